"""Supervised fine-tuning by rectified flow: a plain text-to-video base, or identity blocks upon it.

In:  a run folder with `run.json` (an `SftConfig`) and a cache of latents (`train.data.cache`).
Out: `state.safetensors` (weights, averages, moments) and `metrics.jsonl` in the run folder; `export` writes a model.
Knows nothing of pictures, prompts or the page.

    python -m train.sft runs/identity --minutes 30

Shapes: B samples, C latent channels, F latent frames, h x w latent pixels, N subjects.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from train.cpu_attention import fast_training
from train.data.batch import NullConditioning
from train.data.cache import Cache
from train.distributed import Team
from train.runs import checkpoint, metrics
from train.sft.config import Kind, SftConfig, read_run
from train.sft.loss import AuxiliaryLoss, TrainingStep, kind_at
from train.sft.models import new_model, new_optimizer, schedule

KEEP_S = 180.0  # between two saves


def train(run: Path, *, seconds: float, updates: int | None = None, auxiliary: Sequence[AuxiliaryLoss] = ()) -> bool:
    """Go on with a run for at most `seconds` (and `updates`, when given); True once all its updates are done.

    Under torchrun every process draws batches of its own, and DDP averages the gradients.

    Args:
        auxiliary: further losses, which know what the samples mean.
    """
    config, team = read_run(run), Team()
    model: Any = new_model(config)
    model.to(team.device).train()
    optimizer = new_optimizer(model, config)
    averaged = checkpoint.average_of(model, config.checkpoint.ema)
    step = resume(run, model, averaged, optimizer)
    cache = Cache(Path(config.data.cache))
    cache.refresh()
    blank = NullConditioning.load(Path(config.data.cache), team.device)
    learn = team.wrap(TrainingStep(model, config, blank, auxiliary))
    last = config.steps
    if updates is not None:
        last = min(last, step + updates)
    meter, began, kept = metrics.MetricsLog(run.name, config.steps, run, start=step), time.monotonic(), time.monotonic()

    def keep() -> None:
        groups = {"model": dict(model.named_parameters()), "ema": dict(averaged.module.named_parameters())}
        checkpoint.save(run, step, {**groups, "optimizer": checkpoint.optimizer_tensors(optimizer)})

    stop = False
    while step < last and not stop:
        kind = kind_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, config)
        parts = [_one_pass(learn, cache, config, kind, (step, team.rank, i)) for i in range(config.data.passes)]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(model)
        step += 1
        stop = team.any(time.monotonic() - began > seconds)
        if team.rank == 0:
            meter.tick(step, {**_mean_parts(kind, parts), "norm": float(norm)})
        if time.monotonic() - kept > KEEP_S:
            if team.rank == 0:
                keep()
            cache.refresh()
            kept = time.monotonic()
    if team.rank == 0:
        keep()
    return step == config.steps


def _mean_parts(kind: Kind, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means of the loss's parts over the passes of one update, each named with the kind of update."""
    means = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [float(part[name]) for part in parts if name in part]
        means[f"{kind} {name}"] = sum(values) / len(values)
    return means


def _one_pass(
    learn: nn.Module, cache: Cache, config: SftConfig, kind: Kind, place: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Add the gradients of one batch; `place` is (step, process, pass). Returns the parts of its loss."""
    step, _, number = place
    data = config.data
    size = {"still": data.still_batch, "clip": data.clip_batch, "sparse": data.sparse_batch}[kind]
    bucket = "clip"
    if kind == "still":
        bucket = "still"
    # All processes draw the same shape: a process with fewer subjects would wait for one with four.
    shape = np.random.default_rng((config.seed, step, number, 2))
    batch = cache.draw(bucket, size, np.random.default_rng((config.seed, *place, 3)), shape)
    batch = batch.to(next(learn.parameters()).device)
    with fast_training():
        loss, parts = learn(batch, place, sparse=kind == "sparse")
        (loss / data.passes).backward()
    return parts


def resume(run: Path, model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer) -> int:
    """Put back the run's last save, wherever the model is; the step it belongs to, 0 when there is none.

    Raises:
        ValueError: it was saved of another architecture.
    """
    saved = checkpoint.load(run)
    if saved is None:
        return 0
    step, groups, _ = saved
    checkpoint.load_weights(model, groups["model"])
    checkpoint.restore_average(averaged, groups["ema"], step)
    checkpoint.restore_optimizer(optimizer, groups["optimizer"])
    return step


def main(argv: list[str] | None = None) -> int:
    """0 when the run is complete, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.sft", description="Train by rectified flow.")
    parser.add_argument("run", type=Path, help="folder with run.json")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    options = parser.parse_args(argv)
    if train(options.run, seconds=options.minutes * 60):
        return 0
    return 3
