"""Planted faults: drawings with one thing wrong, to see that the judges notice.

In:  a set of judges and a number of scenes.
Out: for each fault the share of pairs in which the faulty clip scores lower than the clean one.
Knows nothing of models: both clips are drawn.

    python -m train.toybox.judge_sanity test
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from numpy.typing import NDArray
from PIL import Image

from engine.identity.toybox import Judges
from train.toybox import world
from train.toybox.benchmark import Case, draw_case, judge, load_judges, round_trip
from train.toybox.recipe import ASSETS

Frames = NDArray[np.uint8]
FRAMES = 9


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


FAULTS: dict[str, Callable[[Case, world.Clip], Frames]] = {
    "swapped": swap_subjects,
    "missing": hide_second,
    "merged": merge_subjects,
    "recoloured": recolour_second,
    "frozen": freeze,
    "flickering": flicker,
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
    """For each fault the share of `count` scenes in which it lowers the score; every clip has been through the VAE."""
    lower: dict[str, list[bool]] = {name: [] for name in FAULTS}
    for number in range(count):
        of = draw_fault_case(number)
        clean = world.render(of.scene, num_frames=FRAMES)
        best = judge(of, round_trip(clean.frames, vae), judges).score
        for name, plant in FAULTS.items():
            lower[name].append(judge(of, round_trip(plant(of, clean), vae), judges).score < best)
    return {name: float(np.mean(found)) for name, found in lower.items()}


def main(argv: list[str] | None = None) -> int:
    """Print what a set of judges notices."""
    parser = argparse.ArgumentParser(
        prog="python -m train.toybox.judge_sanity", description="Do the judges notice what is wrong?"
    )
    parser.add_argument("name", choices=["test", "reward"])
    parser.add_argument("--count", type=int, default=60, help="scenes, each with every fault")
    options = parser.parse_args(argv)
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "vae").float().eval()
    print(json.dumps(measure_noticed_faults(load_judges(options.name), vae, options.count), indent=1))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
