"""Teach the judges of the drawn world, and ask what they are worth.

In:  the drawn world, and the toybox's VAE, which three quarters of the stills have been through.
Out: assets/judges/<set>; `measure` says how often they are right on identities they have never seen.
The critic alone knows the model that is judged: it is taught last, on clips that the shipped checkpoint makes.

    python -m train.toybox.judges reward --minutes 20     # goes on from its last save
    python -m train.toybox.judges reward --parts critic
    python -m train.toybox.judges measure reward

Each set learns from identities of its own (`judge-reward`, `judge-test`), and differs in seed and width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.identity.toybox import FROZEN, Judges
from train.cpu_attention import fast_training
from train.runs import checkpoint
from train.runs.updates import descend, run_updates
from train.toybox import world
from train.toybox.judges.losses import LOSSES
from train.toybox.judges.measure import fit_likeness, measure
from train.toybox.judges.pools import DIRECTIONS, Clips, CriticFrames, Stills
from train.toybox.judges.wear import Wear, load_vae
from train.toybox.recipe import ASSETS, STATE

JUDGES = ASSETS.parent / "judges"
WIDTHS = {"reward": 16, "test": 20}
STILLS, CLIPS = 6000, 5000  # drawn for each set
STEPS = {"embedder": 10_000, "place": 3000, "action": 3000, "locator": 2000, "critic": 4000}
GENERATED = 120  # clips the critic of each set learns from


def new_judges(name: str) -> Judges:
    """A set that has learnt nothing yet."""
    torch.manual_seed(100 + list(WIDTHS).index(name))
    verbs = [*world.VERBS, FROZEN]
    return Judges(name, WIDTHS[name], verbs, DIRECTIONS, list(world.BACKGROUNDS), kinds=list(world.KINDS), critic=True)


@cache
def stills_of(name: str) -> Stills:
    """The pool of a set: drawn when it is first asked for and kept beside the training state, for this VAE."""
    vae = ASSETS / "vae" / "diffusion_pytorch_model.safetensors"
    place = STATE / "judges" / name / f"stills-{hashlib.sha256(vae.read_bytes()).hexdigest()[:12]}.npz"
    if not place.is_file():
        Stills(f"judge-{name}", STILLS, list(WIDTHS).index(name), Wear(load_vae())).save(place)
    return Stills.load(place)


def pool_of(part: str, name: str) -> Any:
    """What a judge of a set learns from."""
    if part == "action":
        return Clips(f"judge-{name}", CLIPS, list(WIDTHS).index(name))
    if part == "critic":
        return CriticFrames(f"judge-{name}", GENERATED, list(WIDTHS).index(name), Wear(load_vae()))
    return stills_of(name)


def teach(name: str, part: str, state: Path, seconds: float) -> bool:
    """Go on teaching one judge of a set; True when all its updates are done."""
    folder, total = state / name / part, STEPS[part]
    judges = new_judges(name)
    module = judges.get_submodule(part).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.02)
    averaged = checkpoint.average_of(module, 0.998)
    step = 0
    if (saved := checkpoint.load(folder)) is not None:
        step, groups, _ = saved
        checkpoint.load_weights(module, {**groups["ema"], **groups["model"]})  # buffers are kept with the averages
        checkpoint.restore_average(averaged, groups["ema"], step)
        checkpoint.restore_optimizer(optimizer, groups["optimizer"])
    if step >= total:
        return True
    pool = pool_of(part, name)
    loss_of: Callable[..., Tensor] = LOSSES[part]

    def update(step: int) -> dict[str, float]:
        rng = np.random.default_rng((73, list(WIDTHS).index(name), list(STEPS).index(part), step))
        rate = 2e-3 * min(1.0, (step + 1) / 50, max(0.01, (total - step) / (0.4 * total)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with fast_training():
            loss = loss_of(judges, pool, rng)
        descend(loss, module.parameters(), optimizer)
        averaged.update_parameters(module)
        return {"loss": loss.item()}

    def keep(step: int) -> None:
        groups = {"model": dict(module.named_parameters()), "ema": averaged.module.state_dict()}
        checkpoint.save(folder, step, {**groups, "optimizer": checkpoint.optimizer_tensors(optimizer)})

    return run_updates(f"{name} {part}", folder, update, keep, start=step, total=total, seconds=seconds)


def export(name: str, state: Path) -> Judges:
    """Write the set as far as it has been taught; a part that has no state here stays as it is shipped."""
    judges = new_judges(name)
    shipped = Judges.load(JUDGES / name) if (JUDGES / name / "config.json").is_file() else None
    if shipped is not None:
        checkpoint.load_weights(judges, shipped.state_dict(), may_lack=lambda name: name.startswith("critic."))
    taught = {part: saved for part in STEPS if (saved := checkpoint.load(state / name / part)) is not None}
    for part, (_, groups, _) in taught.items():
        checkpoint.load_weights(judges.get_submodule(part), groups["ema"])
    if "critic" not in taught and (shipped is None or shipped.critic is None):
        judges.critic = None
    if shipped is not None:
        judges.knots = shipped.knots
    if "embedder" in taught:
        judges.knots = fit_likeness(judges.eval(), load_vae())
    judges.save(JUDGES / name)
    return Judges.load(JUDGES / name)


def main(argv: list[str] | None = None) -> int:
    """Teach or measure one set; 0 when it is taught to the end, 3 when time ran out first."""
    parser = argparse.ArgumentParser(
        prog="python -m train.toybox.judges", description="Teach the judges of the drawn world."
    )
    parser.add_argument("what", choices=[*WIDTHS, "measure"])
    parser.add_argument("name", nargs="?", choices=[*WIDTHS], help="the set to measure")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    parser.add_argument("--parts", nargs="*", choices=[*STEPS], default=[*STEPS], help="which judges of the set")
    parser.add_argument(
        "--state", type=Path, default=STATE / "judges", help="folder that holds the state between calls"
    )
    options = parser.parse_args(argv)
    if options.what == "measure":
        figures = measure(Judges.load(JUDGES / options.name), load_vae())
        print(json.dumps(figures, indent=1))  # noqa: T201
        return 0
    until = time.monotonic() + options.minutes * 60
    done = [teach(options.what, part, options.state, until - time.monotonic()) for part in options.parts]
    export(options.what, options.state)
    return 0 if all(done) else 3
