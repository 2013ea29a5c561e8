"""The processes of one run: one alone, or as many as torchrun started, by accelerate.

In:  what torchrun says in the environment, and a module that computes a loss.
Out: the device of this process, and the module as DDP wraps it.
Knows nothing of losses, optimisers or what the module is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn


def count_processes() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says; for work that needs no word from the others."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """The processes that train one model; a process alone is a team of one."""

    def __init__(self) -> None:
        # A batch of one subject leaves stage 2 without gradients, which DDP has to be told.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])
        self.rank = self._accelerator.process_index
        self.device = self._accelerator.device
        if self.device.type == "cpu":
            self.device = torch.device("cpu")  # accelerate numbers processors, which safetensors does not know

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over the team; itself where there is one process."""
        if self._accelerator.num_processes == 1:
            return module
        return self._accelerator.prepare_model(module)

    def any(self, answer: bool) -> bool:
        """Whether any process of the team says so; all get the same answer."""
        if self._accelerator.num_processes == 1:
            return answer
        flag = torch.tensor([float(answer)], device=self.device)
        total: Any = self._accelerator.reduce(flag, "sum")
        return bool(total > 0)
