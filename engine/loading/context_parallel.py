"""One clip over several cards: every process holds the whole model and a part of the video's tokens.

In:  a transformer, in processes that torchrun started.
Out: the same transformer, whose forward gives every process the whole velocity.
Knows nothing of jobs. The subject tower, keys of stage 3 and text are the same in every process and are not split; so
stage 3 needs no exchange, and only the video's attention to itself does (Ulysses: heads for tokens, and back).

    torchrun --nproc_per_node 2 -m app.cli generate job.json --out clip.mp4

Source: DeepSpeed-Ulysses, arXiv 2309.14509, by diffusers' hooks. Its own plan for Wan splits what `rope` gives, which
the tower asks too; here each block's positions are split instead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import (
    ContextParallelConfig,
    ContextParallelInput,
    ContextParallelOutput,
    ParallelConfig,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from engine.hardware.options import machine_options
from engine.messages import StudioError


@contextmanager
def join_processes() -> Iterator[int]:
    """Join the processes that torchrun started, each on a card of its own; gives this one's number, 0 when alone.

    Raises:
        StudioError: there are cards, and this torch cannot speak between them (Windows).
    """
    count, card = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if count == 1:
        yield 0
        return
    on_cards = torch.cuda.is_available() and machine_options().device != "cpu"
    if on_cards and not dist.is_nccl_available():
        raise StudioError(
            what="One clip cannot be drawn on several cards here.",
            why="Cards speak to each other through NCCL, which PyTorch has on Linux alone.",
            next_step="Start it on one card, or give each card clips of its own with --devices.",
        )
    if on_cards:
        os.environ["IDCRAFTER_DEVICE"] = f"cuda:{card}"
        torch.cuda.set_device(card)
    dist.init_process_group("nccl" if on_cards else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def split_tokens(transformer: ModelMixin, where: torch.device) -> None:
    """Split the video's tokens over the processes that have joined; does nothing when this one is alone.

    Args:
        where: device it computes on; its weights may wait elsewhere.

    Raises:
        StudioError: heads do not divide among them, or the model has VACE's side branch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    count = dist.get_world_size()
    if not isinstance(transformer, WanTransformer3DModel):
        raise StudioError(
            what="This model cannot draw one clip on several cards.",
            why=f"A {type(transformer).__name__} has a side branch, which is not split.",
            next_step="Start it on one card, or give each card clips of its own with --devices.",
        )
    blocks = cast(list[WanTransformerBlock], list(transformer.blocks))
    if blocks[0].attn1.heads % count:
        raise StudioError(
            what=f"{count} cards cannot share this model.",
            why=f"Its attention has {blocks[0].attn1.heads} heads, and each card takes as many as the others.",
            next_step="Use a number of cards that divides them.",
        )
    mesh = init_device_mesh(where.type, (1, count), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=count)
    # By hand what `enable_parallelism` does: that splits the tower's attention as well, and knows no CPU.
    whole = ParallelConfig(context_parallel_config=config)
    whole.setup(dist.get_rank(), count, where, mesh=mesh)
    for block in blocks:
        processor: Any = block.attn1.processor
        processor._parallel_config = whole
    blocks[0].register_forward_pre_hook(_check_tokens)
    positions = [ContextParallelInput(split_dim=1, expected_dims=4) for _ in range(2)]
    plan: dict[str, Any] = {
        "blocks.*": {"rotary_emb": positions},
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)  # the library's
    apply_context_parallel(cast(nn.Module, transformer), config, plan)


def _check_tokens(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Refuse a clip that does not divide. The library's uneven split is not used: gloo, and so no test here, has it."""
    tokens, count = inputs[0].shape[1], dist.get_world_size()
    if tokens % count:
        raise StudioError(
            what=f"This clip does not divide among {count} cards.",
            why=f"It has {tokens} tokens, of latent frames and of pictures, and each card takes as many as the others.",
            next_step="Use another number of cards, other pictures, or a height or width that is one step larger.",
            field="height",
        )
