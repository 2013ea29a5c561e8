"""What a set of judges is worth: shares of right answers on held-out drawings that have been through the VAE.

In:  a set of judges and the VAE.
Out: figures by question, and the scale by which cosines become likenesses.
Knows nothing of how they were taught.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from engine.identity.crops import crop_subjects, to_unit
from engine.identity.toybox import SEEN, Judges, locate
from train.toybox import world
from train.toybox.judges.losses import LEAST
from train.toybox.judges.lost_shapes import NEAR, lose_shape
from train.toybox.judges.pools import CriticFrames, draw_actions, draw_reference, draw_scene
from train.toybox.judges.wear import Wear

FRAMES = 9  # of a clip that likenesses are fitted on
CANDIDATES = 16  # pictures of one kind among which a subject has to find its own


@torch.no_grad()
def measure(judges: Judges, vae: AutoencoderKLWan, *, scenes: int = 160, seed: int = 0) -> dict[str, float]:
    """How often a set is right about held-out drawings that have been through the VAE; shares of 1."""
    wear, rng = Wear(vae), np.random.default_rng((75, seed))
    found = {"place": 0.0}
    ious: list[float] = []
    for _ in range(scenes):
        clip = world.render(draw_scene(rng, "heldout"), num_frames=1)
        frame = wear.round_trip(to_unit(torch.from_numpy(clip.frames)))
        pictures = to_unit(torch.from_numpy(np.stack([draw_reference(s, rng)[None] for s in clip.scene.subjects])))
        instance_ids = judges.locator(judges.locator.look(frame), pictures).argmax(1)[0].numpy()
        ious += measure_ious(instance_ids, clip.instance_ids[0], len(clip.scene.subjects))
        place = int(judges.place(frame)[0].argmax())
        found["place"] += (judges.places[place] == clip.facts.background) / scenes
    found["locator IoU"] = float(np.mean(ious))
    found["kind"] = measure_kinds(judges, wear, rng, scenes)
    found["own of 16"] = measure_own_pictures(judges, wear, rng, rounds=max(1, scenes // 4))
    found |= measure_actions(judges, wear, rng, clips=scenes)
    if judges.critic is not None:
        both = CriticFrames("heldout", max(1, scenes // 8), 99, wear)
        sure = [judges.drawn_probability(to_unit(torch.from_numpy(each))) for each in (both.drawn, both.generated)]
        found["critic"] = float(torch.cat([sure[0] > 0.5, sure[1] < 0.5]).float().mean())
    return found


def measure_ious(found: np.ndarray, truth: np.ndarray, subjects: int) -> list[float]:
    """Intersection over union of every subject that shows enough of itself to be told."""
    shares = []
    for slot in range(1, subjects + 1):
        mine, theirs = found == slot, truth == slot
        if theirs.sum() >= LEAST:
            shares.append(float((mine & theirs).sum() / (mine | theirs).sum()))
    return shares


def measure_own_pictures(judges: Judges, wear: Wear, rng: np.random.Generator, rounds: int) -> float:
    """Share of subjects in a clip's frame whose own picture is the likest of CANDIDATES of their kind."""
    right = []
    for _ in range(rounds):
        kind = str(rng.choice(world.KINDS))
        seeds = [world.subject_seed(int(i), "heldout") for i in rng.integers(0, world.IDENTITIES, CANDIDATES)]
        subjects = [world.make_subject(seed, kind) for seed in seeds]
        pictures = to_unit(torch.from_numpy(np.stack([draw_reference(subject, rng) for subject in subjects])))
        known, _ = judges.embedder.describe(crop_subjects(pictures))
        for number in range(0, CANDIDATES, 4):
            pair = (subjects[number], subjects[number + 1])
            clip = world.render(draw_scene(rng, "heldout", subjects=pair), num_frames=1)
            masks = torch.from_numpy(np.stack([clip.instance_ids[0] == slot for slot in (1, 2)])).float()
            frame = wear.round_trip(to_unit(torch.from_numpy(clip.frames)))
            looks, _ = judges.embedder.describe(crop_subjects(frame.expand(2, -1, -1, -1), masks))
            likest = (looks @ known.T).argmax(1)
            right += [int(likest[slot]) == number + slot for slot in range(2) if float(masks[slot].sum()) >= LEAST]
    return float(np.mean(right))


@torch.no_grad()
def measure_kinds(judges: Judges, wear: Wear, rng: np.random.Generator, scenes: int) -> float:
    """Share of subjects that have a kind and are seen whose kind is told right, masks given by the truth."""
    right = []
    for _ in range(scenes):
        clip = world.render(draw_scene(rng, "heldout"), num_frames=1)
        frame = wear.round_trip(to_unit(torch.from_numpy(clip.frames)))
        for slot, subject in enumerate(clip.scene.subjects, start=1):
            mask = torch.from_numpy(clip.instance_ids[:1] == slot).float()
            if subject.kind != world.PATCHWORK and float(mask.sum()) >= LEAST:
                shown = int(judges.embedder.describe(crop_subjects(frame, mask))[1].argmax())
                right.append(shown == judges.kinds.index(subject.kind))
    return float(np.mean(right))


@torch.no_grad()
def draw_cosines(
    judges: Judges, vae: AutoencoderKLWan, split: str, scenes: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Cosines of subjects with their own picture in each frame of a clip of two: as drawn, and with their shape lost.

    Whoever is not found in any frame is left out, and so is patchwork, which has no shape of a kind to lose.
    """
    wear, rng = Wear(vae), np.random.default_rng((77, seed))
    own, lost = [], []
    for _ in range(scenes):
        scene = draw_scene(rng, split, subjects=[_draw_subject(rng, split) for _ in range(2)])
        clip = world.render(scene, num_frames=FRAMES)
        pictures = [to_unit(torch.from_numpy(draw_reference(s, rng)[None])) for s in scene.subjects]
        known = [judges.embedder(crop_subjects(each)) for each in pictures]
        own += _clip_cosines(judges, wear, clip.frames, pictures, known)
        slot = int(rng.integers(len(pictures))) + 1
        shapes = [name for name, near in NEAR.items() if scene.subjects[slot - 1].kind not in near]
        shape, numbers = str(rng.choice(shapes)), int(rng.integers(2**31))
        bare = world.render(scene, num_frames=FRAMES, hide=(slot,)).frames
        changed = [
            lose_shape(without, clean, ids == slot, shape, numbers)[0]
            for without, clean, ids in zip(bare, clip.frames, clip.instance_ids, strict=True)
        ]
        lost.append(_clip_cosines(judges, wear, np.stack(changed), pictures, known)[slot - 1])
    return [each for each in own if len(each)], [each for each in lost if len(each)]


def _draw_subject(rng: np.random.Generator, split: str) -> world.ToySubject:
    """A random subject of a kind."""
    kind = str(rng.choice([*world.CREATURES, *world.THINGS]))
    return world.make_subject(world.subject_seed(int(rng.integers(world.IDENTITIES)), split), kind)


def _clip_cosines(
    judges: Judges, wear: Wear, frames: np.ndarray, pictures: list[Tensor], known: list[Tensor]
) -> list[Tensor]:
    """Each subject's cosines in five moments of a clip, as the report finds it; fewer where it is not seen."""
    seen = wear.round_trip(to_unit(torch.from_numpy(frames[:: FRAMES // 4])))
    found = locate(judges, seen, pictures).argmax(1)
    cosines = []
    for slot, own in enumerate(known, start=1):
        masks = (found == slot).float()
        there = masks.mean((1, 2)) >= SEEN
        if bool(there.any()):
            cosines.append((judges.embedder(crop_subjects(seen[there], masks[there])) @ own.T).amax(1))
        else:
            cosines.append(seen.new_zeros(0))
    return cosines


def fit_likeness(judges: Judges, vae: AutoencoderKLWan, *, scenes: int = 300) -> list[tuple[float, float]]:
    """Knots of the scale of likenesses: clips of what no judge has learnt from stand near .95 where they are drawn, and
    below .4 where they have lost their shape.

    Between the two the scale is steep: it turns about the mean cosine that as many drawn clips fall short of as lost
    shapes exceed.

    Returns:
        (cosine, likeness) pairs, strictly rising.
    """
    own, lost = (
        torch.stack([each.mean() for each in some]) for some in draw_cosines(judges, vae, "train", scenes, seed=1)
    )
    steps = torch.linspace(0, 1, 1001)
    short = (own.unsqueeze(1) < steps).float().mean(0) - (lost.unsqueeze(1) > steps).float().mean(0)
    turn = float(steps[short.abs().argmin()])
    wanted = [(float(lost.median()), 0.2), (turn - 0.01, 0.39), (turn + 0.01, 0.86), (float(own.median()), 0.95)]
    knots: list[tuple[float, float]] = []
    for cosine, likeness in wanted:
        if knots:
            cosine = max(cosine, knots[-1][0] + 0.01)
        knots.append((min(cosine, 0.999 - 0.01 * (len(wanted) - len(knots))), likeness))
    return knots


def measure_actions(judges: Judges, wear: Wear, rng: np.random.Generator, clips: int) -> dict[str, float]:
    """Shares of right verbs and directions, masks given by the truth."""
    frames, actor, other, verb, way = draw_actions(rng, "heldout", clips)
    seen = torch.stack([wear.round_trip(clip) for clip in frames])
    verbs, ways = judges.action(seen, actor, other)
    verbs, told = judges.verb_shares(verbs), way >= 0
    right = verbs.argmax(1) == verb
    confused = sorted(
        {
            (judges.verbs[int(v)], judges.verbs[int(g)])
            for v, g in zip(verb[~right], verbs.argmax(1)[~right], strict=True)
        }
    )
    for truth, guess in confused:
        print(f"  {truth} taken for {guess}")  # noqa: T201
    return {"verb": float(right.float().mean()), "direction": float((ways.argmax(1)[told] == way[told]).float().mean())}
