"""What a step cache saves and loses: jobs made whole, then under each word of `Sampling.step_cache`.

In:  a preset and jobs for it.
Out: figures by word: steps computed, likeness to the whole clip in dB, change of the weakest likeness; written, where
     asked for, into the preset's own file (`Preset.step_cache`).
Knows nothing of how steps are chosen (engine/diffusion/step_cache.py), or of where the jobs come from.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import presets, run
from engine.diffusion.guidance import branches
from engine.job import GenerateJob
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import Message, duration
from engine.resolve import resolve

WORDS = ("careful", "fast")


class Forwards:
    """Counts how often a transformer is asked while it is open."""

    def __init__(self, transformer: Any) -> None:
        self.count = 0
        self._transformer, self._plain = transformer, transformer.forward

    def __enter__(self) -> Forwards:
        def counted(*inputs: Any, **more: Any) -> Any:
            self.count += 1
            return self._plain(*inputs, **more)

        self._transformer.forward = counted
        return self

    def __exit__(self, *_: object) -> None:
        self._transformer.forward = self._plain


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """How alike two clips are, uint8 of one shape; dB, 99 for equal ones."""
    error = np.square(first.astype(np.float64) - second).mean()
    if error == 0:
        return 99.0
    return float(10 * np.log10(255**2 / error))


def measure(preset: str, jobs: Sequence[GenerateJob]) -> dict[str, dict[str, float]]:
    """Every job made whole and under each word; means over the jobs. Frames are compared as read from the clips.

    Returns:
        By word: `steps` asked for, `computed` of them, `psnr` and `lowest` (of one clip) in dB, `weakest`, the mean of
        the weakest subject's likeness, and `change`, how it differs from the whole clips' (nan without a report).
    """
    pool, found = ModelPool(), {word: [] for word in ("off", *WORDS)}
    transformer, began = pool.part("transformer", presets.load(preset)), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs):
            whole: np.ndarray | None = None
            for word, rows in found.items():
                frames, asked, weakest = _measure_job(job, word, Path(folder), pool, transformer)
                if whole is None:  # the first word is "off"
                    whole = frames
                rows.append((asked, psnr(whole, frames), weakest))
            left = (time.monotonic() - began) / (number + 1) * (len(jobs) - number - 1)
            sys.stderr.write(f"{number + 1} of {len(jobs)} jobs, about {duration(left)} left\n")
    steps = resolve(jobs[0]).sampling.num_inference_steps
    table = {word: np.array(rows, float) for word, rows in found.items()}
    before = table["off"][:, 2].mean()
    return {
        word: {
            "steps": float(steps),
            "computed": float(rows[:, 0].mean()),
            "psnr": float(rows[:, 1].mean()),
            "lowest": float(rows[:, 1].min()),
            "weakest": float(rows[:, 2].mean()),
            "change": float(rows[:, 2].mean() - before),
        }
        for word, rows in table.items()
    }


def _measure_job(
    job: GenerateJob, word: str, folder: Path, pool: ModelPool, transformer: Any
) -> tuple[np.ndarray, float, float]:
    """Native frames, steps in which the model was asked, weakest likeness."""
    resolved = resolve(job.model_copy(update={"sampling": job.sampling.model_copy(update={"step_cache": word})}))
    with Forwards(transformer) as forwards:
        saved = run.run(resolved.document, _quiet, outputs=folder, clip=folder / "clip.mp4", pool=pool)
    frames = video.read_frames(saved.clip, display_scale=resolved.preset.display_scale)
    weakest = saved.weakest
    if weakest is None:
        weakest = float("nan")
    return frames, forwards.count / len(branches(resolved.sampling)), weakest


def _quiet(message: Message) -> None:
    """Jobs have a progress of their own."""


def write(preset: str, found: dict[str, dict[str, float]], jobs: int) -> Path:
    """Put what was measured at the preset's own steps into its file; returns the file."""
    path = presets.PRESETS / f"{preset}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    modes = presets.load(preset).step_cache.model_dump()
    for word in WORDS:
        row = found[word]
        costs = f"{row['psnr']:.0f} dB from the whole clip, likeness {row['change']:+.3f} ({jobs} jobs)"
        modes[word] |= {"share": round(row["computed"] / row["steps"], 3), "costs": costs}
    values["step_cache"] = modes
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
