"""Training state on disk: weights, averages and the optimiser's moments in safetensors, written whole or not at all.

In:  tensors and a step number.
Out: `<folder>/state.safetensors`; `load` gives them back, so that a run cut anywhere goes on from its last save.
Knows nothing of what is trained. Randomness is not stored: every stage draws its data from (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


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


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], *, may_lack: Callable[[str], bool] = lambda name: False
) -> None:
    """Put named tensors into a module. Buffers may be left out, parameters may not.

    Args:
        may_lack: asked for a parameter's name, whether it may be left out all the same.

    Raises:
        ValueError: a parameter is missing, or a tensor belongs to nothing.
    """
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    parameters = dict(module.named_parameters())
    lacking = [name for name in missing if name in parameters and not may_lack(name)]
    for what, names in (("has no", lacking), ("also has", unexpected)):
        if names:
            raise ValueError(
                f"the saved model has another architecture: it {what} {names[0]} ({len(names)} such names)"
            )


def average_of(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a module's parameters; its buffers are the module's latest.

    It warms up, so that early steps do not linger: the weight of the past is (1 + n) / (10 + n) after n updates, and at
    most `decay`, in [0, 1).
    """

    def average(averaged: Any, latest: Any, updates: Tensor | int) -> None:
        count = int(updates)
        torch._foreach_lerp_(averaged, latest, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(module, multi_avg_fn=average)


def restore_average(averaged: AveragedModel, tensors: Mapping[str, Tensor], updates: int) -> None:
    """Put back averages that were saved after so many updates.

    Raises:
        ValueError: see `load_weights`.
    """
    load_weights(averaged.module, tensors)
    averaged.n_averaged.fill_(updates)


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of all modules together."""
    count = 0
    for module in modules:
        count += sum(parameter.numel() for parameter in module.parameters())
    return count
