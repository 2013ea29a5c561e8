"""The loop of a small stage on one processor: updates until all are made or time is up, kept as they go.

In:  how one update is made, how the state is kept, and how long this call may take.
Out: whether all updates are made; progress by `train.runs.metrics`.
Knows nothing of models, data or losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from train.runs.metrics import MetricsLog

KEEP_S = 120.0  # between two saves


def run_updates(
    name: str,
    folder: Path,
    update: Callable[[int], Mapping[str, float]],
    keep: Callable[[int], None],
    *,
    start: int,
    total: int,
    seconds: float,
) -> bool:
    """Go on from `start` for at most `seconds`; True once all `total` updates are made.

    Args:
        name, folder: of the progress lines and of the metrics file.
        update: makes the update with this number (0 the first) and gives the values to be logged.
        keep: saves the state after so many updates; called every two minutes and at the end.
    """
    if start >= total:
        return True
    meter, step = MetricsLog(name, total, folder, start=start), start
    began = kept = time.monotonic()
    while step < total and time.monotonic() - began < seconds:
        values = update(step)
        step += 1
        meter.tick(step, values)
        if time.monotonic() - kept > KEEP_S:
            keep(step)
            kept = time.monotonic()
    keep(step)
    return step >= total


def descend(loss: Tensor, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer down the loss, the gradients clipped to a norm of 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
