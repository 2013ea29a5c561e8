"""How weights move: Muon for matrices, Adam for everything else, gradients averaged over a team of processes.

In:  a module whose parameters carry gradients.
Out: the same parameters, one update further.
Knows nothing of losses, data or what the module is.

Muon orthogonalises the momentum of a matrix before it is applied, so that every direction in it moves alike; a kernel
of a convolution counts as a matrix of one row per output channel. Embeddings, first and last layers, gains and biases
XX
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.98), 1e-8
# Quintic Newton-Schulz iteration that pushes every singular value into about [.7, 1.2] within five steps.
ITERATION, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
ENDS = ("embed", "proj_out", "lm_head", "shared", "head", "slot", "queries")


class MuonAdam(torch.optim.Optimizer):
    """One optimiser of two kinds of parameter groups, `kind` "muon" and "adam".

    Args:
        module: what is trained; parameters that need no gradient are left alone.
        matrix_rate: Muon's peak rate; an update of a square matrix has this spectral norm.
        rate: Adam's peak rate.
        weight_decay: of Muon's matrices, as a share of their rate.
        by_adam: names of parameters that Adam moves although they are matrices.

    Set `scale` between updates to follow a schedule, 1 is the peak.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        matrix_rate: float = 0.02,
        rate: float = 1e-3,
        weight_decay: float = 0.0,
        by_adam: Callable[[str], bool] = lambda name: False,
    ) -> None:
        groups: dict[str, list[nn.Parameter]] = {"muon": [], "adam": []}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                muon = is_matrix(name, parameter) and not by_adam(name)
                groups["muon" if muon else "adam"].append(parameter)
        rates = {"muon": matrix_rate, "adam": rate}
        super().__init__([{"params": p, "kind": kind, "lr": rates[kind]} for kind, p in groups.items() if p], {})
        self.weight_decay = weight_decay
        self.scale = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Apply the gradients; parameters without one stay as they are."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            move = self._muon if group["kind"] == "muon" else self._adam
            move(moving, group["lr"] * self.scale)

    def _muon(self, parameters: list[nn.Parameter], rate: float) -> None:
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in parameters:
            assert p.grad is not None
            past = self.state[p].setdefault("momentum", torch.zeros_like(p))
            past.lerp_(p.grad, 1 - MOMENTUM)
            ahead = p.grad.lerp(past, MOMENTUM).flatten(1)  # Nesterov
            alike[(ahead.shape[0], ahead.shape[1])].append((p, ahead))
        for (rows, columns), pairs in alike.items():
            updates = orthogonalised(torch.stack([ahead for _, ahead in pairs]))
            size = rate * max(1.0, rows / columns) ** 0.5
            for (p, _), update in zip(pairs, updates, strict=True):
                p.mul_(1 - rate * self.weight_decay).add_(update.view_as(p), alpha=-size)

    def _adam(self, parameters: list[nn.Parameter], rate: float) -> None:
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            mean = state.setdefault("mean", torch.zeros_like(p))
            square = state.setdefault("square", torch.zeros_like(p))
            count = state.setdefault("count", torch.zeros(()))
            count += 1
            mean.lerp_(p.grad, 1 - BETAS[0])
            square.lerp_(p.grad.square(), 1 - BETAS[1])
            size = (square / (1 - BETAS[1] ** count)).sqrt_().add_(EPS)
            p.addcdiv_(mean / (1 - BETAS[0] ** count), size, value=-rate)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves it: a matrix or kernel between two hidden layers."""
    if parameter.ndim < 2 or any(end in part for part in name.split(".") for end in ENDS):
        return False
    return min(parameter.shape[0], parameter[0].numel()) >= 8


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: (K, rows, columns), every singular value brought close to 1.

    Every iterate is a polynomial of the Gram matrix times the first one. For kernels, which are much wider than high,
    the iteration therefore runs on the Gram matrix and touches the kernel itself twice: five times less work.
    """
    a, b, c = ITERATION
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.shape[2] < 3 * x.shape[1]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        gram = x @ x.mT
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        product = eye.expand_as(gram)
        for _ in range(ITERATIONS):
            factor = a * eye + b * gram + c * gram @ gram
            product = factor @ product
            gram = factor @ gram @ factor
        x = product @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Team:
    """The processes of one run: one alone, or as many as torchrun started, talking over gloo or nccl."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def average_gradients(self, model: nn.Module, *, stop: bool) -> bool:
        """Average all gradients over the team; True when anyone of it wants to stop."""
        if self.size == 1:
            return stop
        # A batch of one subject leaves stage 2 without gradients; the others' may have some, so zeros stand in.
        for parameter in model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([float(stop)])])
        dist.all_reduce(flat)
        parts = flat[:-1].div_(self.size).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return bool(flat[-1] > 0)
