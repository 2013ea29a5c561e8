"""Several processes, one model: gradients averaged over whoever torchrun started.

In:  a module whose parameters carry gradients.
Out: the same gradients in every process.
Knows nothing of losses, optimisers or what the module is.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


class ProcessGroup:
    """The processes of one run: one alone, or as many as torchrun started, talking over gloo or nccl."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "nccl"
            dist.init_process_group(backend)

    def average_gradients(self, model: nn.Module, *, stop: bool) -> bool:
        """Average all gradients over all processes; True when any of them wants to stop."""
        if self.size == 1:
            return stop
        # A batch of one subject leaves stage 2 without gradients; the others' may have some, so zeros stand in.
        for parameter in model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([float(stop)])])
        dist.all_reduce(flat)
        parts = flat[:-1].div_(self.size).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return bool(flat[-1] > 0)
