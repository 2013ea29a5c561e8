"""Planted faults: drawings with one thing wrong, to see that the judges notice.

In:  a set of judges and a number of scenes.
Out: for each fault the share of pairs in which the faulty clip is found worse than the clean one.
Knows nothing of models: both clips are drawn.

    python -m train.toybox.judge_sanity test
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from numpy.typing import NDArray
from PIL import Image

from engine.identity.toybox import Judges
from train.toybox import world
from train.toybox.benchmark import Case, Verdict, draw_case, judge, load_judges, round_trip
from train.toybox.judges import lost_shapes
from train.toybox.recipe import ASSETS

Frames = NDArray[np.uint8]
FRAMES = 9
GRAIN = 25.0  # standard deviation of planted noise, in levels of 255
UNLIKE, ALIKE = 0.4, 0.85  # likenesses below which a lost shape stays, and above which a drawn clip lies


def swap_subjects(of: Case, clean: world.Clip) -> Frames:
    """Whoever acts is acted upon."""
    return _render_cast(of, of.scene.subjects[::-1])


def hide_second(of: Case, clean: world.Clip) -> Frames:
    """The second subject is not there."""
    return world.render(of.scene, num_frames=FRAMES, hide=(2,)).frames


def merge_subjects(of: Case, clean: world.Clip) -> Frames:
    """Both look like the first."""
    return _render_cast(of, (of.scene.subjects[0],) * 2)


def recolour_second(of: Case, clean: world.Clip) -> Frames:
    """The second subject's colours have turned by a third of the circle."""
    turned = np.stack([_turn_hue(frame) for frame in clean.frames])
    return np.where((clean.instance_ids == 2)[..., None], turned, clean.frames)


def freeze(of: Case, clean: world.Clip) -> Frames:
    """Nothing moves."""
    return np.repeat(clean.frames[FRAMES // 2 :][:1], FRAMES, 0)


def flicker(of: Case, clean: world.Clip) -> Frames:
    """In every second frame somebody else of its kind stands in for the second subject."""
    first, second = of.scene.subjects
    stranger = world.make_subject(world.subject_seed((second.seed + 1) % world.IDENTITIES, "heldout"), second.kind)
    other = _render_cast(of, (first, stranger))
    return np.where((np.arange(FRAMES) % 2 == 1).reshape(-1, 1, 1, 1), other, clean.frames)


def lose_shape(of: Case, clean: world.Clip) -> Frames:
    """The second subject has the right colours and no shape: a blob, a scribble or a box on legs."""
    return lose_shape_as(of, clean, None)


def lose_shape_as(of: Case, clean: world.Clip, shape: str | None) -> Frames:
    """The clip with the second subject drawn as a shape of `lost_shapes.SHAPES`; None: one of those that suit it."""
    seed = of.scene.seed
    if shape is None:
        suited = [name for name, near in lost_shapes.NEAR.items() if of.scene.subjects[1].kind not in near]
        shape = suited[seed % len(suited)]
    without = world.render(of.scene, num_frames=FRAMES, hide=(2,)).frames
    frames = []
    for bare, whole, ids in zip(without, clean.frames, clean.instance_ids, strict=True):
        frames.append(lost_shapes.lose_shape(bare, whole, ids == 2, shape, seed)[0])
    return np.stack(frames)


def add_grain(of: Case, clean: world.Clip) -> Frames:
    """Noise on every pixel of every frame, as a decoder shows that draws each error of its latents."""
    noise = np.random.default_rng(of.scene.seed).normal(0, GRAIN, clean.frames.shape)
    return (clean.frames + noise).clip(0, 255).round().astype(np.uint8)


class Fault(NamedTuple):
    """One thing that is wrong, and the figure that has to fall for it to be noticed."""

    plant: Callable[[Case, world.Clip], Frames]
    figure: Callable[[Verdict], float]


def _score(verdict: Verdict) -> float:
    return verdict.score


def _drawn(verdict: Verdict) -> float:
    """How sure the critic is that the clip was drawn: what grain changes, which leaves subjects as they are."""
    assert verdict.drawn is not None
    return verdict.drawn


FAULTS: dict[str, Fault] = {
    "swapped": Fault(swap_subjects, _score),
    "missing": Fault(hide_second, _score),
    "merged": Fault(merge_subjects, _score),
    "recoloured": Fault(recolour_second, _score),
    "frozen": Fault(freeze, _score),
    "flickering": Fault(flicker, _score),
    "shape lost": Fault(lose_shape, _score),
    "grain": Fault(add_grain, _drawn),
}


def _render_cast(of: Case, cast: tuple[world.ToySubject, ...]) -> Frames:
    """The scene with others in the same places."""
    return world.render(replace(of.scene, subjects=cast), num_frames=FRAMES).frames


def _turn_hue(frame: Frames) -> Frames:
    hue, saturation, value = Image.fromarray(frame).convert("HSV").split()
    moved = hue.point([(level + 85) % 256 for level in range(256)])
    # What is grey has no hue to turn: it is tinted instead.
    tinted = saturation.point([max(level, 110) for level in range(256)])
    return np.asarray(Image.merge("HSV", (moved, tinted, value)).convert("RGB"))


def draw_fault_case(number: int) -> Case:
    """A case in which one subject jumps over or chases the other, so that exchanging the two changes what is shown."""
    category = ("twocreatures", "creaturething")[number % 2]
    drawn = draw_case("toybox", category, 1000 + number, 2)
    verb = ("jumps over", "chases")[number // 2 % 2]
    scene = world.make_scene(number, subjects=drawn.scene.subjects, verb=verb, split="heldout")
    return replace(drawn, scene=scene)


def measure_noticed_faults(judges: Judges, vae: AutoencoderKLWan, count: int) -> dict[str, float]:
    """For each fault the share of `count` scenes in which it lowers its figure; every clip has been through the VAE."""
    lower: dict[str, list[bool]] = {name: [] for name in FAULTS}
    for number in range(count):
        of = draw_fault_case(number)
        clean = world.render(of.scene, num_frames=FRAMES)
        best = judge(of, round_trip(clean.frames, vae), judges)
        for name, (plant, figure) in FAULTS.items():
            frames = plant(of, clean)
            if plant is not add_grain:  # the VAE takes grain away
                frames = round_trip(frames, vae)
            lower[name].append(figure(judge(of, frames, judges)) < figure(best))
    return {name: float(np.mean(found)) for name, found in lower.items()}


def measure_likenesses(judges: Judges, vae: AutoencoderKLWan, count: int) -> dict[str, float]:
    """Whether likeness is on its scale: shares of drawn subjects above ALIKE, and of lost shapes below UNLIKE."""
    drawn: list[bool] = []
    lost: dict[str, list[bool]] = {name: [] for name in lost_shapes.SHAPES}
    for number in range(count):
        of = draw_fault_case(number)
        clean = world.render(of.scene, num_frames=FRAMES)
        drawn += [likeness > ALIKE for likeness in judge(of, round_trip(clean.frames, vae), judges).likeness]
        for name, near in lost_shapes.NEAR.items():
            if of.scene.subjects[1].kind not in near:
                frames = round_trip(lose_shape_as(of, clean, name), vae)
                lost[name].append(judge(of, frames, judges).likeness[1] < UNLIKE)
    shares = {f"{name} below {UNLIKE}": float(np.mean(found)) for name, found in lost.items()}
    everyone = [each for found in lost.values() for each in found]
    return {f"drawn above {ALIKE}": float(np.mean(drawn)), f"lost below {UNLIKE}": float(np.mean(everyone)), **shares}


def main(argv: list[str] | None = None) -> int:
    """Print what a set of judges notices."""
    parser = argparse.ArgumentParser(
        prog="python -m train.toybox.judge_sanity", description="Do the judges notice what is wrong?"
    )
    parser.add_argument("name", choices=["test", "reward"])
    parser.add_argument("--count", type=int, default=60, help="scenes, each with every fault")
    options = parser.parse_args(argv)
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "vae").float().eval()
    judges = load_judges(options.name)
    found = {
        "noticed": measure_noticed_faults(judges, vae, options.count),
        "likeness": measure_likenesses(judges, vae, options.count),
    }
    print(json.dumps(found, indent=1))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
