"""What a clip will cost, said before anybody waits for it: time, memory, disk.

In:  a checked job, its preset's measured cost, and this machine's own finished rows.
Out: an `Estimate`.
Knows nothing of torch or of the page.

Memory is what `engine.hardware.plan` plans. Time grows with the number of latent tokens (frames are grouped by four in
every Wan VAE) and with the forwards that one step of the chosen guidance takes. Attention's quadratic part is left out:
what it adds, the history corrects.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

from app.queue import Row
from engine.hardware.costs import FORWARDS
from engine.hardware.options import machine_options
from engine.hardware.plan import make_plan
from engine.hardware.probe import Hardware, probe_hardware
from engine.job import GenerateJob
from engine.messages import StudioError
from engine.presets import Preset
from engine.resolve import ResolvedJob, resolve

HISTORY = 12  # latest finished clips of the preset that correct the prediction
BYTES_PER_PIXEL = 0.12  # H.264 at our quality, written pixels, generous: flat art takes a third of it
LITTLE_DISK = 300 * 2**20
MACHINE_S = 20  # how long free memory is taken to stay what it is


@dataclass(frozen=True)
class Estimate:
    """Costs of one clip. `learnt`: corrected by this machine's own clips rather than the preset's figures alone."""

    seconds: float
    memory_mb: int
    memory: str  # which limit comes first, in a sentence
    fits: bool
    clip_bytes: int
    free_bytes: int
    learnt: bool

    @property
    def disk_is_low(self) -> bool:
        """Whether the clip might not fit."""
        return self.free_bytes < LITTLE_DISK + self.clip_bytes


def estimate(resolved: ResolvedJob, history: Iterable[Row], folder: Path) -> Estimate:
    """Costs of a clip.

    Args:
        history: rows of any state; the finished ones of this preset correct the time.
        folder: where the clip will be written, for the free disk.
    """
    preset = resolved.preset
    ratios = _compare_with_history(history, preset)
    correction = 1.0
    if ratios:
        correction = median(ratios[:HISTORY])
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    memory_mb, memory, fits = 0, "Nothing is known of what this preset needs.", True
    if preset.shape:
        plan = make_plan(resolved, _machine(time.monotonic() // MACHINE_S))
        memory_mb, memory, fits = round(plan.peak / 1e6), plan.words(), plan.fits
    written = resolved.width * resolved.height * resolved.num_frames * preset.display_scale**2
    return Estimate(
        seconds=_predict_seconds(resolved) * correction,
        memory_mb=memory_mb,
        memory=memory,
        fits=fits,
        clip_bytes=round(written * BYTES_PER_PIXEL),
        free_bytes=shutil.disk_usage(nearest).free,
        learnt=bool(ratios),
    )


def _compare_with_history(history: Iterable[Row], preset: Preset) -> list[float]:
    """Measured over predicted seconds of each finished clip of this preset."""
    ratios = []
    for row in history:
        measured = _measure_seconds(row, preset)
        if not measured or row.job is None:
            continue
        try:
            resolved = resolve(row.job, preset)
        except StudioError:  # the preset has changed since, and takes no such clip any more
            continue
        ratios.append(measured / _predict_seconds(resolved))
    return ratios


@lru_cache(maxsize=1)
def _machine(now: float) -> Hardware:
    """This machine as it was a moment ago: asking the card's tool at every keystroke would be felt."""
    return probe_hardware(machine_options().profile)


def _measure_seconds(row: Row, preset: Preset) -> float | None:
    """Seconds that a finished row of this preset took; None for every other row."""
    if row.state != "done" or row.job is None or row.job.preset != preset.name:
        return None
    if not row.finished or not row.started:
        return None
    return row.finished - row.started


def _predict_seconds(resolved: ResolvedJob) -> float:
    """Seconds by the preset's own figures."""
    cost, preset = resolved.preset.cost, resolved.preset
    share = _tokens(resolved)
    forwards = FORWARDS[resolved.sampling.guidance] / FORWARDS[preset.sampling.guidance or "none"]
    return cost.start_s + _count_computed_steps(resolved) * cost.step_s * share * forwards + cost.decode_s * share


def _count_computed_steps(resolved: ResolvedJob) -> float:
    """Steps that run the model; the others are extrapolated by the step cache and cost next to nothing."""
    preset, steps, word = resolved.preset, resolved.sampling.num_inference_steps, resolved.sampling.step_cache
    if word == "off":
        return steps
    own = preset.sampling.num_inference_steps or steps
    # The error of a row of r left-out steps grows with r³ / steps², so rows grow with the 2/3rd power of the steps.
    return min(steps, getattr(preset.step_cache, word).share * own * (steps / own) ** (1 / 3))


def _tokens(resolved: ResolvedJob) -> float:
    """Latent tokens of the job as a share of the preset's own clip."""
    preset = resolved.preset
    own = preset.sizes[0].width * preset.sizes[0].height * _groups(preset.num_frames, preset)
    return resolved.width * resolved.height * _groups(resolved.num_frames, preset) / own


def _groups(frames: int, preset: Preset) -> int:
    """Latent frames: the first, then groups of as many as the preset's VAE takes together."""
    return 1 + (frames - 1) // preset.frames_per_latent


def clip_costs(job: GenerateJob, history: Iterable[Row], folder: Path) -> Estimate:
    """`estimate` for a job as it was asked for, its values not yet filled in.

    Raises:
        StudioError: the job does not fit its preset.
    """
    return estimate(resolve(job), history, folder)
