"""Training state on disk: weights, averages and the optimiser's moments in safetensors, written whole or not at all.

In:  tensors and a step number.
Out: `<folder>/state.safetensors`; `load` gives them back, so that a run cut anywhere goes on from its last save.
Knows nothing of what is trained. Randomness is not stored: every stage draws its data from (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], notes: Mapping[str, Any] | None = None
) -> None:
    """Write groups of named tensors and the step they belong to; the one before stays until this is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for group, named in groups.items():
        for name, tensor in named.items():
            flat[f"{group}/{name}"] = tensor.detach().contiguous().clone()
    metadata = {"step": str(step), "notes": json.dumps(dict(notes or {}))}
    fresh = folder / "state.new.safetensors"
    save_file(flat, fresh, metadata=metadata)
    final = folder / "state.safetensors"
    fresh.replace(final)


def load(folder: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The step, the groups and the notes of the last save, or None when there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        for key in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    return int(metadata["step"]), groups, json.loads(metadata["notes"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts, one entry per parameter index."""
    state = optimizer.state_dict()["state"]
    tensors = {}
    for index, values in state.items():
        for name, value in values.items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out; the parameter groups keep their present settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Ema:
    """Exponential moving average of a module's parameters; warms up so that early steps do not linger.

    Args:
        decay: weight of the past once warm, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.steps = 0
        self.tensors = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in module.named_parameters():
            if name in self.tensors:
                self.tensors[name].lerp_(parameter, 1 - decay)

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self.steps = steps
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def apply_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with their averages."""
        module.load_state_dict(self.tensors, strict=False)


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of all modules together."""
    count = 0
    for module in modules:
        count += sum(parameter.numel() for parameter in module.parameters())
    return count
