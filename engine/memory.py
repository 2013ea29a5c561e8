"""Telling a lack of memory from any other fault, in words.

In:  a job, and whatever the machine raised while it was made.
Out: a StudioError with what to change. Imports torch only where it runs; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.job import GenerateJob
from engine.messages import StudioError
from engine.presets import Preset

# What allocators say who raise a plain RuntimeError: torch's on the CPU, and MPS.
_SAYINGS = ("not enough memory", "can't allocate memory", "out of memory")


@contextmanager
def explained(job: GenerateJob, preset: Preset) -> Iterator[None]:
    """Turn a lack of memory inside the block into a sentence; everything else passes through unchanged.

    Raises:
        StudioError: field "num_frames"; the card or the machine had no memory left.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _too_much(job, preset) from error
    except RuntimeError as error:
        if not any(saying in str(error).lower() for saying in _SAYINGS):
            raise
        raise _too_much(job, preset) from error


def _too_much(job: GenerateJob, preset: Preset) -> StudioError:
    smallest = min(preset.sizes, key=lambda size: size.width * size.height)
    shorter = max(1, ((job.num_frames or preset.num_frames) // 2) // 4 * 4 + 1)
    return StudioError(
        what="The machine ran out of memory while it made the clip.",
        why=f"{job.width} x {job.height} with {job.num_frames} frames and {len(job.subjects)} subjects needs more "
        "than is free.",
        next_step=f"Close other programs, or choose {shorter} frames or {smallest.width} x {smallest.height}.",
        field="num_frames",
    )
