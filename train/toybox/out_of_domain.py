"""Beyond its own drawings: does a clip keep a subject whose picture somebody else made?

In:  a folder of pictures by others, and a preset.
Out: the share of clips whose subject finds its own picture among sixteen, by colour and by shape; a contact sheet.
Knows nothing of the drawn world but its places and verbs. Pictures of others never enter the repository.

    python -m train.toybox.out_of_domain FOLDER --out SHEET.png

No judge that was taught on our drawings decides here: colours are compared as Lab histograms, shapes by Hu moments,
both inside the subject's mask. The mask alone comes from the locator.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engine import presets
from engine.identity.crops import WHITE, to_unit
from engine.identity.toybox import SEEN, Judges, locate
from engine.job import GenerateJob, Picture, make_job
from engine.loading.pool import ModelPool
from engine.media import pictures
from train.evaluation.clips import as_png, make_frames
from train.evaluation.statistics import interval
from train.toybox.benchmark import CANDIDATES, load_judges
from train.toybox.world import captions

BINS = (4, 8, 8)  # of lightness, a, b
COUNT = 64
SHOWN = 5  # frames of a row
WIDEST = 12.0  # logarithm of the smallest Hu moment that still says something

Pixels = NDArray[np.uint8]


def traits(picture: Pixels, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A subject's Lab histogram, softened over neighbouring bins, and its seven Hu moments as signed logarithms.

    Args:
        picture: (H, W, 3) RGB.
        mask: (H, W), where the subject is.
    """
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    counts = cv2.calcHist([lab], [0, 1, 2], mask.astype(np.uint8), list(BINS), [0, 256, 0, 256, 0, 256])
    soft = cv2.GaussianBlur(counts.reshape(BINS[0], -1), (3, 3), 0.5).ravel().astype(np.float64)
    moments = cv2.HuMoments(cv2.moments(mask.astype(np.uint8), True)).ravel()
    logs = -np.sign(moments) * np.log10(np.maximum(np.abs(moments), 10.0**-WIDEST))
    return soft / max(1e-9, soft.sum()), logs


def distance(
    first: tuple[NDArray[np.float64], NDArray[np.float64]], second: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> float:
    """Hellinger distance of the histograms, 0 to 1, and a quarter of what the first three Hu moments differ by."""
    colour = float(np.sqrt(max(0.0, 1.0 - np.sqrt(first[0] * second[0]).sum())))
    shape = float(np.abs(first[1][:3] - second[1][:3]).mean())
    return colour + 0.25 * shape


def job_of(preset: str, picture: Pixels, number: int) -> GenerateJob:
    """A thing of no known kind does something alone somewhere."""
    rng = np.random.default_rng((91, number))
    verb = str(rng.choice(["stands still", "jumps", "bounces", "wobbles"]))
    place = captions.PLACES[str(rng.choice(list(captions.PLACES)))][0]
    subject = {"name": "s1", "noun": "thing", "pictures": [{"png": as_png(picture)}], "cut_out": False}
    return make_job(preset=preset, prompt=f"@s1 {verb} {place}", seed=number, subjects=[subject])


def mean_traits(
    frames: Pixels, picture: Pixels, judges: Judges
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Mean traits of a clip's subject over the frames that show it; None when none does."""
    shown = to_unit(torch.from_numpy(picture[None]))
    with torch.no_grad():
        instance_ids = locate(judges, to_unit(torch.from_numpy(frames)), [shown]).argmax(1).numpy()
    seen = [traits(f, own == 1) for f, own in zip(frames, instance_ids, strict=True) if (own == 1).mean() >= SEEN]
    return (np.mean([t[0] for t in seen], 0), np.mean([t[1] for t in seen], 0)) if seen else None


def finds_own_picture(
    own: int,
    seen: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    known: list[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> bool:
    """Whether the nearest of CANDIDATES pictures, drawn by the number of the own one among them, is the own one."""
    if seen is None:
        return False
    rest = [number for number in range(len(known)) if number != own]
    others = np.random.default_rng((92, own)).choice(rest, min(CANDIDATES - 1, len(rest)), replace=False)
    return distance(seen, known[own]) < min(distance(seen, known[int(number)]) for number in others)


def main(argv: list[str] | None = None) -> int:
    """Make a clip of every picture, look for its own among sixteen, draw the sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m train.toybox.out_of_domain", description="Subjects that somebody else drew."
    )
    parser.add_argument("folder", type=Path, help="pictures, one subject each, on a plain or clear background")
    parser.add_argument("--out", type=Path, help="contact sheet to write")
    parser.add_argument("--preset", default="toybox")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--judges", default="test", choices=["test", "reward"], help="whose locator draws the masks")
    options = parser.parse_args(argv)
    judges, preset = load_judges(options.judges), presets.load(options.preset)
    paths = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".webp"))
    shown = [
        pictures.prepare(Picture(path=str(path), sha256="", png=""), size=preset.reference_size, cut_out=True)
        for path in paths[: options.count]
    ]
    known = [traits(picture, picture.min(2) < WHITE * 255) for picture in shown]
    right, rows, pool = [], [], ModelPool()
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(shown):
            frames = make_frames(job_of(options.preset, picture, number), Path(folder) / f"{number}.mp4", pool)
            right.append(finds_own_picture(number, mean_traits(frames, picture, judges), known))
            rows.append(np.concatenate([picture, *frames[np.linspace(0, len(frames) - 1, SHOWN).astype(int)]], 1))
            sys.stderr.write(f"{number + 1} of {len(shown)}: {np.mean(right):.2f} found their own picture\n")
    print(json.dumps({"pictures": len(right), "own first of 16": interval([[float(x)] for x in right])}))  # noqa: T201
    if options.out:
        half = (len(rows) + 1) // 2
        blank = [np.full_like(rows[0], 255)] * (2 * half - len(rows))
        columns = [np.concatenate(part) for part in (rows[:half], [*rows[half:], *blank])]
        Image.fromarray(np.concatenate(columns, 1)).save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
