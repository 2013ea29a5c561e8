"""Teach the judges of the drawn world, and ask what they are worth.

In:  the drawn world, and the toybox's VAE, which three quarters of the stills have been through.
Out: assets/judges/<set>; `measure` says how often they are right on identities they have never seen.
The critic alone knows the model that is judged: it is taught last, on clips that the shipped checkpoint makes.

    python -m train.toybox.judges reward --minutes 20     # goes on from its last save
    python -m train.toybox.judges reward --parts critic
    python -m train.toybox.judges measure reward

Each set learns from identities of its own (`judge-reward`, `judge-test`), and differs in seed and width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional

from engine import presets
from engine.identity.crops import CROP, crop_subjects, to_unit
from engine.identity.toybox import FROZEN, MOMENTS, STILL, Judges
from engine.job import Sampling
from engine.loading.pool import ModelPool
from train.cpu_attention import fast_training
from train.evaluation.clips import make_frames
from train.runs import checkpoint, metrics
from train.toybox import world
from train.toybox.contact_sheet import job_of
from train.toybox.recipe import ASSETS, STATE
from train.toybox.vae import stills

JUDGES = ASSETS.parent / "judges"
WIDTHS = {"reward": 16, "test": 20}
DIRECTIONS = ["left", "right"]
MARGIN, SCALE = 0.2, 16.0  # radians and sharpness of the embedder's angular margin
ALIKE, KINDS_AT_ONCE = 12, 4  # identities of one kind that a batch tells apart, and how many kinds it holds
LEAST = 60  # pixels; whoever shows less of itself cannot be told from its kind
STILLS, CLIPS = 6000, 5000  # drawn for each set
STEPS = {"embedder": 3000, "place": 3000, "action": 3000, "locator": 2000, "critic": 4000}
GENERATED, GENERATED_STEPS = 120, 12  # clips the critic of each set learns from, and denoising steps of each


def new_judges(name: str) -> Judges:
    """A set that has learnt nothing yet."""
    torch.manual_seed(100 + list(WIDTHS).index(name))
    return Judges(name, WIDTHS[name], [*world.VERBS, FROZEN], DIRECTIONS, list(world.BACKGROUNDS), critic=True)


# --- what they see ---------------------------------------------------------------------------------------------------


class Wear:
    """Makes drawings look as a generator's do: through the VAE, with noise on the latents."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    @torch.no_grad()
    def round_trip(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """(P, 3, H, W) in [0, 1] -> the same after encoding and decoding, with noise (P, C, h, w) on the latents."""
        with stills(self.vae), torch.autocast("cpu", enabled=False):  # the codec needs all of its bits
            posterior: Any = self.vae.encode(frames.unsqueeze(2) * 2 - 1, return_dict=False)[0]
            latents = posterior.mode()
            if noise is not None:
                latents = latents + noise.unsqueeze(2) * float(self.vae.config["latents_std"][0])
            decoded: Any = self.vae.decode(latents, return_dict=False)[0]
        return decoded.squeeze(2).add(1).div(2).clamp(0, 1)

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """(P, 3, H, W) -> worn copies, each with a strength of noise of its own, up to a third of the latents' size."""
        strength = rng.choice([0, 0, 0.1, 0.2, 0.33], (len(frames), 1, 1, 1))
        side = frames.shape[-1] // 4
        noise = rng.standard_normal((len(frames), self.vae.config["z_dim"], side, side)) * strength
        return self.round_trip(frames, torch.from_numpy(noise.astype(np.float32)))


def blur(frames: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `sigma` pixels over (P, C, H, W)."""
    reach = max(1, round(2.5 * sigma))
    taps = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).view(1, 1, -1)
    C = frames.shape[1]
    across = functional.pad(frames, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(across, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)
    return functional.conv2d(across, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)


def draw_reference(subject: world.ToySubject, rng: np.random.Generator) -> np.ndarray:
    """A picture of a subject, mostly cut out on white."""
    back = "white" if rng.random() < 0.95 else "scene"
    return world.reference_picture(subject, int(rng.integers(2**28)), background=back)[0]


def draw_scene(rng: np.random.Generator, split: str, **wanted: Any) -> world.Scene:
    """A random scene of a split."""
    return world.make_scene(int(rng.integers(2**30)), split=split, **wanted)


# --- stills: one pool for locator, embedder and place ----------------------------------------------------------------

NAMED = 3  # references that the locator is asked about at once


class Stills:
    """Scenes drawn once, as they are and worn, with one picture of everyone in them.

    Attributes:
        frames: uint8 (S, 2, H, W, 3), drawn and worn. instance_ids: (S, H, W), slots. places: (S,), backgrounds.
        pictures: uint8 (P, H, W, 3). scene, slot, kind: (P,), where the subject of each picture is, and what it is.
    """

    def __init__(self, split: str, count: int, seed: int, wear: Wear) -> None:
        rng = np.random.default_rng((74, seed))
        frames, instance_ids, places, pictures, where = [], [], [], [], []
        meter = metrics.MetricsLog(f"stills of {split}", count, STATE / "judges")
        for number in range(count):
            clip = world.render(draw_scene(rng, split), num_frames=1)
            frames.append(clip.frames[0])
            instance_ids.append(clip.instance_ids[0])
            places.append(world.BACKGROUNDS.index(clip.facts.background))
            for slot, subject in enumerate(clip.scene.subjects, start=1):
                pictures.append(draw_reference(subject, rng))
                where.append((number, slot, world.KINDS.index(subject.kind)))
            meter.tick(number + 1, {})
        drawn = np.stack(frames)
        worn = [
            wear(to_unit(torch.from_numpy(drawn[i : i + 24])), rng).mul(255).round().byte().movedim(1, -1).numpy()
            for i in range(0, count, 24)
        ]
        self.frames, self.instance_ids, self.places = (
            np.stack([drawn, np.concatenate(worn)], 1),
            np.stack(instance_ids),
            places,
        )
        self.pictures = np.stack(pictures)
        self.scene, self.slot, self.kind = np.array(where).T

    def frame(self, scenes: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Frames of scenes, (B, 3, H, W), three quarters of them worn; some batches blurred or lit otherwise."""
        chosen = self.frames[scenes, (rng.random(len(scenes)) < 0.75).astype(int)]
        return blur_or_light(to_unit(torch.from_numpy(chosen)), rng)


def blur_or_light(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """What needs no VAE: blur in two of five batches, a light of its own for each frame."""
    if rng.random() < 0.4:
        frames = blur(frames, float(rng.uniform(0.4, 1.1)))
    light = torch.from_numpy(rng.uniform(0.92, 1.08, (len(frames), 3, 1, 1)).astype(np.float32))
    return (frames * light).clamp(0, 1)


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
    """Each cut-out finds its own picture among all of the batch, by an angular margin (ArcFace's, arXiv 1801.07698)."""
    kinds = rng.choice(len(world.KINDS), KINDS_AT_ONCE, replace=False)
    chosen = np.concatenate([rng.choice(np.nonzero(pool.kind == kind)[0], ALIKE, replace=False) for kind in kinds])
    masks = torch.from_numpy(pool.instance_ids[pool.scene[chosen]] == pool.slot[chosen, None, None]).float()
    seen = masks.sum((1, 2)) >= LEAST
    chosen, masks = chosen[seen.numpy()], masks[seen]
    cuts = crop_subjects(pool.frame(pool.scene[chosen], rng), fray_masks(masks, rng))
    pages = coarsen(crop_subjects(to_unit(torch.from_numpy(pool.pictures[chosen]))), rng)
    both = torch.cat([cuts, pages])
    if rng.random() < 0.5:
        both = both.flip(-1)
    asked, known = judges.embedder(both).float().chunk(2)
    return (_margin_loss(asked, known) + _margin_loss(known, asked)) / 2


def fray_masks(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Masks as a locator gives them: some a pixel wider or narrower, some with a hole."""
    out = masks.clone()
    for i, roll in enumerate(rng.random(len(masks))):
        if roll < 0.2:
            out[i] = functional.max_pool2d(masks[i][None], 3, 1, 1)[0]
        elif roll < 0.4:
            out[i] = -functional.max_pool2d(-masks[i][None], 3, 1, 1)[0]
        if rng.random() < 0.15:
            y, x = rng.integers(0, masks.shape[-1] - 8, 2)
            out[i, y : y + 8, x : x + 8] = 0
    return torch.where(out.flatten(1).any(1)[:, None, None], out, masks)


def coarsen(cuts: Tensor, rng: np.random.Generator) -> Tensor:
    """Cut-outs as if they had been small in their frame: a batch made smaller, then as large as before."""
    side = int(rng.integers(16, CROP + 1))
    small = functional.interpolate(cuts, (side, side), mode="bilinear", antialias=True)
    return functional.interpolate(small, (CROP, CROP), mode="bilinear", align_corners=False)


def _margin_loss(asked: Tensor, known: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # in bfloat16 .9999 is 1, where the arc cosine has no slope
        cosine = asked @ known.T
        own = torch.arccos(cosine.diagonal().clamp(-0.9999, 0.9999)) + MARGIN
        narrowed = cosine.diagonal_scatter(torch.cos(own))
    return functional.cross_entropy(SCALE * narrowed, torch.arange(len(asked)))


def place_loss(judges: Judges, pool: Stills, rng: np.random.Generator) -> Tensor:
    """Which background a frame shows."""
    scenes = rng.integers(0, len(pool.frames), 32)
    target = torch.tensor([pool.places[scene] for scene in scenes])
    return functional.cross_entropy(judges.place(pool.frame(scenes, rng)).float(), target)


# --- actions ---------------------------------------------------------------------------------------------------------


def draw_actions(rng: np.random.Generator, split: str, count: int) -> tuple[Tensor, ...]:
    """Clips with one of their actions each: frames (B, T, 3, H, W), two masks (B, T, H, W), verb, direction or -1."""
    frames, actors, others, verbs, ways = [], [], [], [], []
    meter = metrics.MetricsLog(f"clips of {split}", count, STATE / "judges")
    while len(frames) < count:
        verb = str(rng.choice(world.VERBS))
        scene = draw_scene(rng, split, verb=verb)
        clip = world.render(scene, num_frames=MOMENTS)
        for action in scene.actions[:2]:
            if len(frames) == count:
                break
            held = [(clip.instance_ids == slot).astype(np.float32) for slot in action.slots]
            frames.append(clip.frames)
            actors.append(held[0])
            others.append(held[1] if len(held) > 1 else np.zeros_like(held[0]))
            verbs.append(world.VERBS.index(action.verb))
            ways.append(DIRECTIONS.index(action.direction) if action.direction else -1)
            meter.tick(len(frames), {})
    stacked = [torch.from_numpy(np.stack(each)) for each in (frames, actors, others)]
    return to_unit(stacked[0]), *stacked[1:], torch.tensor(verbs), torch.tensor(ways)


class Clips:
    """Clips for the action judge, drawn once and read again: a clip costs ten stills."""

    def __init__(self, split: str, count: int, seed: int) -> None:
        rng = np.random.default_rng((71, seed))
        frames, *rest = draw_actions(rng, split, count)
        self.frames, self.rest = frames.mul(255).byte(), rest

    def draw(self, rng: np.random.Generator, size: int) -> tuple[Tensor, ...]:
        """A random batch."""
        index = torch.from_numpy(rng.integers(0, len(self.frames), size))
        return self.frames[index].float() / 255, *(each[index] for each in self.rest)


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


# --- the critic ------------------------------------------------------------------------------------------------------


class CriticFrames:
    """Frames of the same scenes, drawn and generated; the drawn ones have been through the VAE, as all generated have.

    Attributes:
        drawn, generated: uint8 (P, H, W, 3).
    """

    def __init__(self, split: str, count: int, seed: int, wear: Wear) -> None:
        rng, pool = np.random.default_rng((76, seed)), ModelPool(torch.device("cpu"))
        meter = metrics.MetricsLog(f"clips made of {split}", count, STATE / "judges")
        drawn, generated = [], []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(count):
                clip = world.render(draw_scene(rng, split), num_frames=presets.load("toybox").num_frames)
                pictures = [draw_reference(subject, rng) for subject in clip.scene.subjects]
                job = job_of("toybox", clip.scene, pictures, seed=number)
                job = job.model_copy(update={"sampling": Sampling(num_inference_steps=GENERATED_STEPS)})
                generated.append(make_frames(job, Path(folder) / f"{number}.mp4", pool))
                worn = wear.round_trip(to_unit(torch.from_numpy(clip.frames)))
                drawn.append(worn.mul(255).round().byte().movedim(1, -1).numpy())
                meter.tick(number + 1, {})
        self.drawn, self.generated = np.concatenate(drawn), np.concatenate(generated)


def critic_loss(judges: Judges, pool: CriticFrames, rng: np.random.Generator) -> Tensor:
    """As many of both, each blurred or lit as the other."""
    assert judges.critic is not None
    scores = []
    for frames in (pool.drawn, pool.generated):
        chosen = to_unit(torch.from_numpy(frames[rng.integers(0, len(frames), 16)]))
        scores.append(judges.critic(blur_or_light(chosen, rng)).float())
    answers = torch.cat([torch.ones(16), torch.zeros(16)])
    return functional.binary_cross_entropy_with_logits(torch.cat(scores).squeeze(1), answers)


@cache
def stills_of(name: str) -> Stills:
    """The pool of a set, drawn when it is first asked for."""
    return Stills(f"judge-{name}", STILLS, list(WIDTHS).index(name), Wear(_vae()))


def pool_of(part: str, name: str) -> Any:
    """What a judge of a set learns from."""
    if part == "action":
        return Clips(f"judge-{name}", CLIPS, list(WIDTHS).index(name))
    if part == "critic":
        return CriticFrames(f"judge-{name}", GENERATED, list(WIDTHS).index(name), Wear(_vae()))
    return stills_of(name)


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(ASSETS / "vae", torch_dtype=torch.float32).eval()


# --- the loop --------------------------------------------------------------------------------------------------------


def teach(name: str, part: str, state: Path, seconds: float) -> bool:
    """Go on teaching one judge of a set; True when all its updates are done."""
    folder, total = state / name / part, STEPS[part]
    judges = new_judges(name)
    module = judges.get_submodule(part).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.02)
    ema = checkpoint.Ema(module, 0.998)
    step = 0
    if (saved := checkpoint.load(folder)) is not None:
        step, groups, _ = saved
        module.load_state_dict(groups["model"], strict=False)
        for held, kept_before in module.named_buffers():
            kept_before.copy_(groups["ema"].pop(held))
        ema.restore(groups["ema"], step)
        checkpoint.restore_optimizer(optimizer, groups["optimizer"])
    if step >= total:
        return True
    pool = pool_of(part, name)
    loss_of: Callable[..., Tensor] = LOSSES[part]
    meter = metrics.MetricsLog(f"{name} {part}", total, folder, start=step)
    began = kept = time.monotonic()

    def keep() -> None:
        groups = {"model": dict(module.named_parameters()), "ema": {**dict(module.named_buffers()), **ema.tensors}}
        checkpoint.save(folder, step, {**groups, "optimizer": checkpoint.optimizer_tensors(optimizer)})

    while step < total and time.monotonic() - began < seconds:
        rng = np.random.default_rng((73, list(WIDTHS).index(name), list(STEPS).index(part), step))
        rate = 2e-3 * min(1.0, (step + 1) / 50, max(0.01, (total - step) / (0.4 * total)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with fast_training():
            loss = loss_of(judges, pool, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(module)
        step += 1
        meter.tick(step, {"loss": loss.item()})
        if time.monotonic() - kept > 120:
            keep()
            kept = time.monotonic()
    keep()
    return step >= total


LOSSES: dict[str, Callable[..., Tensor]] = {
    "locator": locator_loss,
    "embedder": embedder_loss,
    "action": action_loss,
    "place": place_loss,
    "critic": critic_loss,
}


def export(name: str, state: Path) -> Judges:
    """Write the set as far as it has been taught; a part that has no state here stays as it is shipped."""
    judges = new_judges(name)
    shipped = Judges.load(JUDGES / name) if (JUDGES / name / "config.json").is_file() else None
    if shipped is not None:
        judges.load_state_dict(shipped.state_dict(), strict=False)
    taught = {part: saved for part in STEPS if (saved := checkpoint.load(state / name / part)) is not None}
    for part, (_, groups, _) in taught.items():
        judges.get_submodule(part).load_state_dict(groups["ema"], strict=False)
    if "critic" not in taught and (shipped is None or shipped.critic is None):
        judges.critic = None
    judges.save(JUDGES / name)
    return Judges.load(JUDGES / name)


# --- what they are worth ---------------------------------------------------------------------------------------------

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
        known = judges.embedder(crop_subjects(pictures))
        for number in range(0, CANDIDATES, 4):
            pair = (subjects[number], subjects[number + 1])
            clip = world.render(draw_scene(rng, "heldout", subjects=pair), num_frames=1)
            masks = torch.from_numpy(np.stack([clip.instance_ids[0] == slot for slot in (1, 2)])).float()
            frame = wear.round_trip(to_unit(torch.from_numpy(clip.frames)))
            likest = (judges.embedder(crop_subjects(frame.expand(2, -1, -1, -1), masks)) @ known.T).argmax(1)
            right += [int(likest[slot]) == number + slot for slot in range(2) if float(masks[slot].sum()) >= LEAST]
    return float(np.mean(right))


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


def main(argv: list[str] | None = None) -> int:
    """Teach or measure one set; 0 when it is taught to the end, 3 when time ran out first."""
    parser = argparse.ArgumentParser(
        prog="python -m train.toybox.judges", description="Teach the judges of the drawn world."
    )
    parser.add_argument("what", choices=[*WIDTHS, "measure"])
    parser.add_argument("name", nargs="?", choices=[*WIDTHS], help="the set to measure")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    parser.add_argument("--parts", nargs="*", choices=[*STEPS], default=[*STEPS], help="which judges of the set")
    parser.add_argument(
        "--state", type=Path, default=STATE / "judges", help="folder that holds the state between calls"
    )
    options = parser.parse_args(argv)
    if options.what == "measure":
        figures = measure(Judges.load(JUDGES / options.name), _vae())
        print(json.dumps(figures, indent=1))  # noqa: T201
        return 0
    until = time.monotonic() + options.minutes * 60
    done = [teach(options.what, part, options.state, until - time.monotonic()) for part in options.parts]
    export(options.what, options.state)
    return 0 if all(done) else 3


if __name__ == "__main__":
    sys.exit(main())
