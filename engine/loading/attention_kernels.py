"""How the transformer's operations run on this machine: attention kernels and compiled blocks.

In:  a loaded transformer, and a `MachineOptions` that says what is wanted.
Out: the same transformer, set up; what cannot be had here is left out with one line in the log that says why.
Knows nothing of jobs or guidance. Results differ by rounding alone.
"""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor

from engine.hardware.options import MachineOptions

# The library's kernels from the Hub are not among them: they are code that is fetched and run.
BACKENDS = {
    "native": AttentionBackendName.NATIVE,
    "flash": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
    "xformers": AttentionBackendName.XFORMERS,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
}
PREFERRED = ("flash3", "flash")  # what "auto" tries, best first; both compute what torch's own does

log = logging.getLogger(__name__)


def set_up(transformer: ModelMixin, machine: MachineOptions, where: torch.device, *, visiting: bool = False) -> None:
    """Give a freshly loaded transformer the attention kernels and the compilation that this machine asks for.

    Args:
        where: device it computes on.
        visiting: its blocks wait elsewhere and come there one by one; those are not compiled.
    """
    use_attention(transformer, machine.attention, where)
    if machine.compile and visiting:
        log.warning("The blocks are not compiled: they visit the device one after the other.")
    elif machine.compile:
        compile_blocks(transformer)


def use_attention(transformer: ModelMixin, name: str, where: torch.device) -> str:
    """Let the video's attention run on these kernels; returns the name of those it got.

    Only attention without a mask is changed, the video's to itself and to the prompt: most kernels take no mask, and
    the subjects' attention is small beside the video's.

    Args:
        name: one of `BACKENDS`, or "auto".
        where: device it computes on.
    """
    blocks = [module for module in transformer.modules() if isinstance(module, WanTransformerBlock)]
    both = chain.from_iterable((block.attn1, block.attn2) for block in blocks)
    # Not its masked kind, which reads subjects beside the prompt.
    unmasked = [attention for attention in both if type(attention) is WanAttention]
    shape = (1, 64, unmasked[0].heads, unmasked[0].inner_dim // unmasked[0].heads)
    trial = torch.zeros(shape, dtype=transformer.dtype, device=where)
    for candidate in PREFERRED if name == "auto" else (name,):
        reason = _refusal(candidate, trial)
        if not reason:
            for attention in unmasked:
                attention.set_attention_backend(BACKENDS[candidate].value)
            return candidate
        if name != "auto":
            log.warning("Attention by %s cannot be had here, torch's own is used. %s", candidate, reason)
    return "native"


def _refusal(name: str, trial: Tensor) -> str:
    """Why these kernels do not run on tensors like this one (B, L, heads, width); empty when they do."""
    backend: Any = BACKENDS[name]
    try:
        with attention_backend(backend):  # it also asks for the package
            seen = dispatch_attention_fn(trial, trial, trial)
    except Exception as error:  # whatever a stranger's kernel raises: the reason is logged
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "" if seen.shape == trial.shape and bool(torch.isfinite(seen).all()) else "It gives no numbers here."


def compile_blocks(transformer: ModelMixin) -> bool:
    """Compile each kind of repeated block once, at its first use; False, with a line, where nothing can be compiled."""
    try:
        # A compiler that is missing would be noticed in the middle of the first clip.
        torch.compile(_trial, dynamic=False)(torch.zeros(8, device=transformer.device))
    except Exception as error:  # the compiler's own, of many kinds: the reason is logged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        log.warning("The blocks are not compiled: there is no compiler that works here. %s", reason)
        return False
    transformer.compile_repeated_blocks(dynamic=True)
    return True


def _trial(values: Tensor) -> Tensor:
    return torch.sin(values) + 1
