"""What each judge is asked while it learns.

In:  a set of judges, a pool to draw from, a random generator.
Out: a scalar to differentiate.
Knows nothing of optimizers or files.

Shapes: B samples, N pictures, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.identity.crops import crop_subjects, to_unit
from engine.identity.toybox import STILL, Judges
from train.toybox import world
from train.toybox.judges.pools import Clips, CriticFrames, Stills
from train.toybox.judges.wear import blur, blur_or_light, coarsen, fray_masks

MARGIN, SCALE = 0.2, 16.0  # radians and sharpness of the embedder's angular margin
ALIKE, KINDS_AT_ONCE = 12, 4  # identities of one kind that a batch tells apart, and how many kinds it holds
OWN, STRANGE, APART = 0.9, 0.25, 3.0  # cosines of a subject's own picture and of lost shapes, and their weight
LEAST = 60  # pixels; whoever shows less of itself cannot be told from its kind
GRAINY, GRAIN = 4, (0.03, 0.12)  # drawings with white noise in a critic's batch, and how strong it is, of 1
NAMED = 3  # references that the locator is asked about at once


def choose_references(pool: Stills, scene: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """NAMED pictures to ask of a scene, and each slot's number among them.

    A picture may show somebody who is not there, often of a kind that is; and of those who are there some are not
    asked about: they are strangers, NAMED + 1.
    """
    own = np.nonzero(pool.scene == scene)[0]
    asked = rng.permutation(own)[:NAMED]
    if len(asked) > 1 and rng.random() < 0.35:
        asked = asked[:-1]
    shown = [int(i) for i in asked]
    while len(shown) < NAMED:
        kind = pool.kind[rng.choice(own)] if rng.random() < 0.6 else rng.integers(len(world.KINDS))
        others = np.nonzero((pool.kind == kind) & (pool.scene != scene))[0]
        shown.append(int(rng.choice(others)))
    order = rng.permutation(NAMED)
    numbers = np.full(world.MAX_SUBJECTS + 1, NAMED + 1, np.int64)
    numbers[0] = 0
    for place, which in enumerate(order, start=1):
        if pool.scene[shown[which]] == scene:
            numbers[pool.slot[shown[which]]] = place
    return np.array(shown)[order], numbers


def locator_loss(judges: Judges, pool: Stills, rng: np.random.Generator) -> Tensor:
    """Figure or not at full size, whose figure at half size."""
    scenes = rng.integers(0, len(pool.frames), 12)
    asked = [choose_references(pool, int(scene), rng) for scene in scenes]
    pictures = to_unit(torch.from_numpy(pool.pictures[np.stack([shown for shown, _ in asked])])).unsqueeze(2)
    instance_ids = torch.from_numpy(
        np.stack([n[pool.instance_ids[s]] for s, (_, n) in zip(scenes, asked, strict=True)])
    )
    figure, scores = judges.locator.scores(pool.frame(scenes, rng), pictures)
    drawn = functional.binary_cross_entropy_with_logits(figure.float(), (instance_ids > 0).float())
    small = instance_ids[:, 1::2, 1::2]
    target = torch.where(small == NAMED + 1, 0, small).flatten()
    whose = functional.cross_entropy(scores.float().permute(0, 2, 3, 1).flatten(0, 2), target, reduction="none")
    counts = (small > 0).flatten().float()
    return drawn + (whose * counts).sum() / counts.sum().clamp(min=1)


def embedder_loss(judges: Judges, pool: Stills, rng: np.random.Generator) -> Tensor:
    """Who each cut-out is, of which kind, and that a lost shape is nobody's.

    Each finds its own picture among all of the batch by an angular margin (ArcFace's, arXiv 1801.07698).
    """
    kinds = rng.choice(len(world.KINDS), KINDS_AT_ONCE, replace=False)
    chosen = np.concatenate([rng.choice(np.nonzero(pool.kind == kind)[0], ALIKE, replace=False) for kind in kinds])
    masks = torch.from_numpy(pool.instance_ids[pool.scene[chosen]] == pool.slot[chosen, None, None]).float()
    seen = masks.sum((1, 2)) >= LEAST
    chosen, masks = chosen[seen.numpy()], masks[seen]
    cuts = crop_subjects(pool.frame(pool.scene[chosen], rng), fray_masks(masks, rng))
    pages = coarsen(crop_subjects(to_unit(torch.from_numpy(pool.pictures[chosen]))), rng)
    together = torch.cat([cuts, pages, _lost_cuts(pool, chosen, rng)])
    if rng.random() < 0.5:
        together = together.flip(-1)
    looks, shown = judges.embedder.describe(together)
    asked, known, _ = looks.chunk(3)
    ranked = (_margin_loss(asked, known) + _margin_loss(known, asked)) / 2
    kinds_of = torch.from_numpy(pool.kind[chosen])
    none = torch.full_like(kinds_of, len(judges.kinds))
    lost_kinds = torch.from_numpy(pool.lost_kind[chosen])
    lost_kinds = torch.where(lost_kinds == world.KINDS.index(world.PATCHWORK), none, lost_kinds)
    named = functional.cross_entropy(shown, torch.cat([kinds_of, kinds_of, lost_kinds]))
    asked, known, lost = judges.embedder.join(looks, shown).chunk(3)
    own, strange = (asked * known).sum(1), (lost * known).sum(1)
    apart = (torch.relu(OWN - own).square() + torch.relu(strange - STRANGE).square()).mean()
    return ranked + named + APART * apart


def _lost_cuts(pool: Stills, chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The same subjects with their shape lost, cut out."""
    frames = blur_or_light(to_unit(torch.from_numpy(pool.lost[chosen])), rng)
    masks = torch.from_numpy(pool.lost_masks[chosen]).float()
    return crop_subjects(frames, fray_masks(masks, rng))


def _margin_loss(asked: Tensor, known: Tensor) -> Tensor:
    """Row k of `asked` belongs to row k of `known`; rows of `known` after those belong to nobody."""
    with torch.autocast("cpu", enabled=False):  # in bfloat16 .9999 is 1, where the arc cosine has no slope
        cosine = asked @ known.T
        own = torch.arccos(cosine.diagonal().clamp(-0.9999, 0.9999)) + MARGIN
        narrowed = cosine.diagonal_scatter(torch.cos(own))  # also of a matrix that is wider than high
    return functional.cross_entropy(SCALE * narrowed, torch.arange(len(asked)))


def place_loss(judges: Judges, pool: Stills, rng: np.random.Generator) -> Tensor:
    """Which background a frame shows."""
    scenes = rng.integers(0, len(pool.frames), 32)
    target = torch.tensor([pool.places[scene] for scene in scenes])
    return functional.cross_entropy(judges.place(pool.frame(scenes, rng)).float(), target)


def action_loss(judges: Judges, clips: Clips, rng: np.random.Generator) -> Tensor:
    """Verb and, where there is one, direction."""
    frames, actor, other, verb, way = clips.draw(rng, 24)
    B, T = frames.shape[:2]
    stopped = torch.from_numpy(rng.random(B) < 0.1) & (verb != world.VERBS.index(STILL))
    moment = torch.from_numpy(rng.integers(0, T, B))
    index = torch.where(stopped.unsqueeze(1), moment.unsqueeze(1), torch.arange(T))
    frames, actor, other = (each[torch.arange(B).unsqueeze(1), index] for each in (frames, actor, other))
    verb, way = torch.where(stopped, len(world.VERBS), verb), torch.where(stopped, -1, way)
    if rng.random() < 0.3:
        frames = blur(frames.flatten(0, 1), float(rng.uniform(0.4, 1.1))).unflatten(0, (B, T))
    frames = (frames + 0.04 * torch.randn(frames.shape)).clamp(0, 1)
    masks = [fray_masks(each.flatten(0, 1), rng).unflatten(0, (B, T)) for each in (actor, other)]
    if rng.random() < 0.5:  # the mirrored clip goes the other way
        frames, masks = frames.flip(-1), [each.flip(-1) for each in masks]
        way = torch.where(way < 0, way, 1 - way)
    verbs, ways = judges.action(frames, *masks)
    loss = functional.cross_entropy(verbs.float(), verb)
    if bool((way >= 0).any()):
        loss = loss + functional.cross_entropy(ways.float(), way, ignore_index=-1)
    return loss


def critic_loss(judges: Judges, pool: CriticFrames, rng: np.random.Generator) -> Tensor:
    """As many that are drawn as are not, each blurred or lit as the other; some of the latter are grainy drawings."""
    assert judges.critic is not None
    drawn, made = (
        to_unit(torch.from_numpy(frames[rng.integers(0, len(frames), 16)])) for frames in (pool.drawn, pool.generated)
    )
    grainy = to_unit(torch.from_numpy(pool.drawn[rng.integers(0, len(pool.drawn), GRAINY)]))
    strength = torch.from_numpy(rng.uniform(*GRAIN, (GRAINY, 1, 1, 1)).astype(np.float32))
    made[:GRAINY] = (grainy + strength * torch.from_numpy(rng.standard_normal(grainy.shape, np.float32))).clamp(0, 1)
    scores = [judges.critic(blur_or_light(frames, rng)).float() for frames in (drawn, made)]
    answers = torch.cat([torch.ones(16), torch.zeros(16)])
    return functional.binary_cross_entropy_with_logits(torch.cat(scores).squeeze(1), answers)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "locator": locator_loss,
    "embedder": embedder_loss,
    "action": action_loss,
    "place": place_loss,
    "critic": critic_loss,
}
