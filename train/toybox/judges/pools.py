"""What the judges learn from: stills, clips, and frames that a model made, drawn once and read many times.

In:  a split of the drawn world, how many, and the VAE they have been through.
Out: pools of frames, masks, pictures and answers.
Knows nothing of networks or losses.

Shapes: S scenes, P pictures, B clips, T moments, H x W pixels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import presets
from engine.identity.crops import to_unit
from engine.identity.toybox import MOMENTS
from engine.job import Sampling
from engine.loading.pool import ModelPool
from train.evaluation.clips import make_frames
from train.runs import metrics
from train.toybox import world
from train.toybox.contact_sheet import job_of
from train.toybox.judges.lost_shapes import draw_lost
from train.toybox.judges.wear import Wear, blur_or_light
from train.toybox.recipe import STATE

DIRECTIONS = ["left", "right"]
GENERATED_STEPS = 8  # evaluations of each clip that a critic learns from
LENGTHS = (9, 17, 17)  # frames of the clips that the action judge learns from; it reads MOMENTS of them


def draw_reference(subject: world.ToySubject, rng: np.random.Generator) -> np.ndarray:
    """A picture of a subject, mostly cut out on white."""
    back = "white" if rng.random() < 0.95 else "scene"
    return world.reference_picture(subject, int(rng.integers(2**28)), background=back)[0]


def draw_scene(rng: np.random.Generator, split: str, **wanted: Any) -> world.Scene:
    """A random scene of a split."""
    return world.make_scene(int(rng.integers(2**30)), split=split, **wanted)


class Stills:
    """Scenes drawn once, as they are and worn, with one picture of everyone in them.

    Attributes:
        frames: uint8 (S, 2, H, W, 3), drawn and worn. instance_ids: (S, H, W), slots. places: (S,), backgrounds.
        pictures: uint8 (P, H, W, 3). scene, slot, kind: (P,), where the subject of each picture is, and what it is.
        lost, lost_masks: uint8 (P, H, W, 3) and bool (P, H, W), each subject's scene with its shape lost, worn.
        lost_kind: (P,), which kind it shows then.
    """

    def __init__(self, split: str, count: int, seed: int, wear: Wear) -> None:
        rng = np.random.default_rng((74, seed))
        frames, instance_ids, places, pictures, where, lost = [], [], [], [], [], []
        meter = metrics.MetricsLog(f"stills of {split}", count, STATE / "judges")
        for number in range(count):
            clip = world.render(draw_scene(rng, split), num_frames=1)
            frames.append(clip.frames[0])
            instance_ids.append(clip.instance_ids[0])
            places.append(world.BACKGROUNDS.index(clip.facts.background))
            for slot, subject in enumerate(clip.scene.subjects, start=1):
                pictures.append(draw_reference(subject, rng))
                where.append((number, slot, world.KINDS.index(subject.kind)))
                lost.append(draw_lost(clip.scene, slot, clip, rng))
            meter.tick(number + 1, {})
        drawn = np.stack(frames)
        self.frames = np.stack([drawn, _wear_out(drawn, wear, rng)], 1)
        self.instance_ids, self.places = np.stack(instance_ids), places
        self.pictures = np.stack(pictures)
        self.scene, self.slot, self.kind = np.array(where).T
        self.lost = _wear_out(np.stack([each.frame for each in lost]), wear, rng)
        self.lost_masks = np.stack([each.mask for each in lost])
        self.lost_kind = np.array([world.KINDS.index(each.kind) for each in lost])

    def save(self, path: Path) -> None:
        """Keep the pool in a file; drawing it takes minutes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new.npz")
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(self).items()}
        np.savez(fresh, **arrays)
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Stills:
        """A pool that was kept."""
        pool = cls.__new__(cls)
        with np.load(path) as file:
            for name in file.files:
                setattr(pool, name, file[name])
        return pool

    def frame(self, scenes: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Frames of scenes, (B, 3, H, W), three quarters of them worn; some batches blurred or lit otherwise."""
        chosen = self.frames[scenes, (rng.random(len(scenes)) < 0.75).astype(int)]
        return blur_or_light(to_unit(torch.from_numpy(chosen)), rng)


def _wear_out(frames: np.ndarray, wear: Wear, rng: np.random.Generator) -> np.ndarray:
    """uint8 (P, H, W, 3), worn."""
    parts = []
    for first in range(0, len(frames), 24):
        worn = wear(to_unit(torch.from_numpy(frames[first : first + 24])), rng)
        parts.append(worn.mul(255).round().byte().movedim(1, -1).numpy())
    return np.concatenate(parts)


def draw_actions(rng: np.random.Generator, split: str, count: int) -> tuple[Tensor, ...]:
    """Clips with one of their actions each: frames (B, T, 3, H, W), two masks (B, T, H, W), verb, direction or -1.

    Of longer clips T moments are kept, evenly spread, as an evaluation reads them.
    """
    frames, actors, others, verbs, ways = [], [], [], [], []
    meter = metrics.MetricsLog(f"clips of {split}", count, STATE / "judges")
    while len(frames) < count:
        verb = str(rng.choice(world.VERBS))
        scene = draw_scene(rng, split, verb=verb)
        length = int(rng.choice(LENGTHS))
        clip = world.render(scene, num_frames=length)
        moments = np.linspace(0, length - 1, MOMENTS).round().astype(int)
        for action in scene.actions[:2]:
            if len(frames) == count:
                break
            held = [(clip.instance_ids[moments] == slot).astype(np.float32) for slot in action.slots]
            frames.append(clip.frames[moments])
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
