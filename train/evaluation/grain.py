"""Grain and flicker of clips: how uneven even background is, and how much it changes from frame to frame.

In:  frames of clips, and where their subjects are.
Out: two figures of a clip, in levels of 255, to be compared with those of drawn clips of the same jobs.
Knows nothing of models, or of what the clips show.

What is even is not known of a clip that a model made, so the evenest quarter of its blocks is taken for that; the same
is done with whatever it is compared with.

Shapes: F frames, H x W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 8  # pixels of a block, across and down
EVENEST = 0.25  # share of the blocks that count


class Grain(NamedTuple):
    """Figures of one clip, in levels of 255; NaN where no block shows background alone."""

    within: float
    """Standard deviation of brightness within an even block, mean over the evenest quarter."""
    flicker: float
    """Mean absolute change of a pixel from one frame to the next, in the blocks that are evenest in both."""


def measure_grain(frames: NDArray[np.uint8], subjects: NDArray[np.bool_]) -> Grain:
    """The figures of one clip.

    Args:
        frames: (F, H, W, 3).
        subjects: (F, H, W), where somebody is; blocks with any of it do not count.
    """
    grey = frames.astype(np.float32).mean(-1)
    uneven = _blocks(grey).std(-1)  # (F, blocks)
    uneven[_blocks(subjects).any(-1)] = np.nan
    within = float(np.nanmean([_mean_of_least(row) for row in uneven])) if np.isfinite(uneven).any() else float("nan")
    if len(frames) == 1:
        return Grain(within, float("nan"))
    change = np.abs(np.diff(grey, axis=0))
    pairs = np.maximum(uneven[1:], uneven[:-1])
    flicker = []
    for changed, row in zip(_blocks(change).mean(-1), pairs, strict=True):
        if np.isfinite(row).any():
            flicker.append(changed[row <= np.nanquantile(row, EVENEST)].mean())
    if not flicker:
        return Grain(within, float("nan"))
    return Grain(within, float(np.mean(flicker)))


def _blocks(values: NDArray) -> NDArray:
    """(F, H, W) -> (F, blocks, SIDE * SIDE)."""
    F, H, W = values.shape
    rows, columns = H // SIDE, W // SIDE
    cut = values[:, : rows * SIDE, : columns * SIDE].reshape(F, rows, SIDE, columns, SIDE)
    return cut.transpose(0, 1, 3, 2, 4).reshape(F, rows * columns, SIDE * SIDE)


def _mean_of_least(row: NDArray[np.float32]) -> float:
    """Mean of the evenest quarter of the blocks of a frame; NaN where none counts."""
    if not np.isfinite(row).any():
        return float("nan")
    return float(row[row <= np.nanquantile(row, EVENEST)].mean())
