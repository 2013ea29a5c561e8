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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from train.cpu_attention import fast_training
from train.data.batch import NullConditioning
from train.data.cache import Cache
from train.distributed import ProcessGroup
from train.runs import checkpoint, metrics
from train.sft.config import Kind, SftConfig, read_run
from train.sft.loss import kind_at, loss_at
from train.sft.models import new_model, new_optimizer, schedule

CPU = torch.device("cpu")


def train(run: Path, *, seconds: float, updates: int | None = None) -> bool:
    """Go on with a run for at most `seconds` (and `updates`, when given); True once all its updates are done.

    Under torchrun every process draws batches of its own and the gradients are averaged.
    """
    config, team = read_run(run), ProcessGroup()
    where = _device_of(team.rank)
    model: Any = new_model(config)
    model.to(where).train()
    optimizer = new_optimizer(model, config)
    ema = checkpoint.Ema(model, config.ema)
    step = resume(run, model, ema, optimizer)
    cache = Cache(Path(config.cache))
    cache.refresh()
    blank = NullConditioning.load(Path(config.cache), where)
    last = config.steps
    if updates is not None:
        last = min(last, step + updates)
    meter, began, kept = metrics.MetricsLog(run.name, config.steps, run, start=step), time.monotonic(), time.monotonic()

    def keep() -> None:
        groups = {"model": dict(model.named_parameters()), "ema": ema.tensors}
        checkpoint.save(run, step, {**groups, "optimizer": checkpoint.optimizer_tensors(optimizer)})

    stop = False
    while step < last and not stop:
        kind = kind_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, config)
        parts = [_one_pass(model, cache, config, blank, kind, (step, team.rank, i)) for i in range(config.passes)]
        stop = team.average_gradients(model, stop=time.monotonic() - began > seconds)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        step += 1
        if team.rank == 0:
            meter.tick(step, {**_mean_parts(kind, parts), "norm": float(norm)})
        if time.monotonic() - kept > 180:
            if team.rank == 0:
                keep()
            cache.refresh()
            kept = time.monotonic()
    if team.rank == 0:
        keep()
    return step == config.steps


def _device_of(rank: int) -> torch.device:
    """The graphics card of a process, the cards dealt out in turn; the processor where there is no card."""
    if not torch.cuda.is_available():
        return CPU
    return torch.device("cuda", rank % torch.cuda.device_count())


def _mean_parts(kind: Kind, parts: list[dict[str, float]]) -> dict[str, float]:
    """Means of the loss's parts over the passes of one update, each named with the kind of update."""
    means = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        means[f"{kind} {name}"] = sum(values) / len(values)
    return means


def _one_pass(
    model: nn.Module, cache: Cache, config: SftConfig, blank: NullConditioning, kind: Kind, place: tuple[int, int, int]
) -> dict[str, float]:
    """Add the gradients of one batch; `place` is (step, process, pass). Returns the parts of its loss."""
    step, _, number = place
    size = {"still": config.still_batch, "clip": config.clip_batch, "sparse": config.sparse_batch}[kind]
    bucket = "clip"
    if kind == "still":
        bucket = "still"
    # All processes draw the same shape: a process with fewer subjects would wait for one with four.
    shape = np.random.default_rng((config.seed, step, number, 2))
    batch = cache.draw(bucket, size, np.random.default_rng((config.seed, *place, 3)), shape)
    batch = batch.to(blank.text.device)
    with fast_training():
        loss, parts = loss_at(model, batch, config, blank, place, sparse=kind == "sparse")
        (loss / config.passes).backward()
    return parts


def resume(run: Path, model: nn.Module, ema: checkpoint.Ema, optimizer: torch.optim.Optimizer) -> int:
    """Put back the run's last save, wherever the model is; the step it belongs to, 0 when there is none."""
    saved = checkpoint.load(run)
    if saved is None:
        return 0
    step, groups, _ = saved
    model.load_state_dict(groups["model"], strict=False)
    ema.restore(groups["ema"], step)
    checkpoint.restore_optimizer(optimizer, groups["optimizer"])
    return step


def main(argv: list[str] | None = None) -> int:
    """0 when the run is complete, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.sft", description="Train by rectified flow.")
    parser.add_argument("run", type=Path, help="folder with run.json")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    options = parser.parse_args(argv)
    return 0 if train(options.run, seconds=options.minutes * 60) else 3
