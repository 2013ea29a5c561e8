"""A contact sheet of held-out jobs: the references a clip was given, beside frames of that clip.

In:  a preset, a number of jobs, a seed.
Out: one PNG to look at. Whoever looks sees which subject is which and what they do, or that they do not.
Knows nothing of scores.

    python -m train.toybox.contact_sheet OUT.png --jobs 16
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from engine.job import GenerateJob, Sampling, make_job
from engine.loading.pool import ModelPool
from train.evaluation.clips import as_png, make_frames
from train.toybox import world
from train.toybox.world import captions
from train.toybox.world.layout import IN_A_ROW

SCALE = 2
SHOWN = 6  # frames of a clip


def sentence(facts: world.Facts) -> str:
    """What a person would write: every action in its plainest words, slots as @s1, @s2, then the place."""
    clauses = []
    for action in facts.actions:
        actor, *others = (f"@s{slot}" for slot in action.slots)
        words = captions.WORDINGS[action.verb][0]
        way = ""
        if action.direction:
            way = captions.DIRECTIONS[action.direction][0]
        clauses.append(" ".join(f"{actor} {words.format(b=' '.join(others), d=way)}".split()))
    return f"{' and '.join(clauses)} {captions.PLACES[facts.background][0]}"


def verbs_for(subjects: int) -> tuple[str, ...]:
    """What can lead a scene of so many: in a crowd, pairs that leave room for others."""
    if subjects == 1:
        return world.SINGLE_VERBS
    if subjects == 2:
        return world.PAIR_VERBS
    return IN_A_ROW


def held_out_job(number: int, *, preset: str = "toybox", subjects: int = 2, verb: str | None = None) -> GenerateJob:
    """A job on identities no training has seen, worded as a person would: names, no attributes."""
    rng = np.random.default_rng((61, number, subjects))
    verb = verb or str(rng.choice(verbs_for(subjects)))
    scene = world.make_scene(number, num_subjects=subjects, verb=verb, split="heldout")
    pictures = [world.reference_picture(subject, number)[0] for subject in scene.subjects]
    return job_of(preset, scene, pictures, seed=number)


def job_of(preset: str, scene: world.Scene, pictures: Sequence[np.ndarray], *, seed: int) -> GenerateJob:
    """The scene as a job: `@s1 chases @s2 on a beach`, a picture and a noun for each."""
    subjects = [
        {"name": f"s{slot}", "noun": captions.noun(subject.kind), "pictures": [{"png": as_png(picture)}]}
        for slot, (subject, picture) in enumerate(zip(scene.subjects, pictures, strict=True), start=1)
    ]
    return make_job(preset=preset, prompt=sentence(scene.facts), seed=seed, subjects=subjects)


def rows(jobs: list[GenerateJob], steps: int | None) -> Iterator[Image.Image]:
    """One row a job: prompt, references, frames."""
    pool = ModelPool()
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs):
            if steps:
                job = job.model_copy(update={"sampling": Sampling(num_inference_steps=steps)})
            yield _row(job, make_frames(job, Path(folder) / f"{number}.mp4", pool))


def _row(job: GenerateJob, frames: np.ndarray) -> Image.Image:
    side = frames.shape[1] * SCALE
    chosen = frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
    references = [Image.open(io.BytesIO(base64.b64decode(s.pictures[0].png))).convert("RGB") for s in job.subjects]
    row = Image.new("RGB", (side * (4 + SHOWN) + 8, side + 18), "white")
    ImageDraw.Draw(row).text((4, 3), f"{job.prompt}   (seed {job.seed})", fill="black")
    for i, picture in enumerate(references):
        row.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (i * side, 18))
    for i, frame in enumerate(chosen):
        picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
        row.paste(picture, (side * 4 + 8 + i * side, 18))
    return row


def main(argv: list[str] | None = None) -> int:
    """Write the sheet."""
    parser = argparse.ArgumentParser(prog="python -m train.toybox.contact_sheet", description="Draw a contact sheet.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="number of the first job")
    parser.add_argument("--subjects", type=int, default=2, choices=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="denoising steps; left out: the preset's")
    parser.add_argument("--preset", default="toybox")
    options = parser.parse_args(argv)
    numbers = range(options.first, options.first + options.jobs)
    jobs = [held_out_job(n, preset=options.preset, subjects=options.subjects) for n in numbers]
    drawn = list(rows(jobs, options.steps))
    sheet = Image.new("RGB", (drawn[0].width, sum(row.height for row in drawn)), "white")
    top = 0
    for row in drawn:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
