"""Small transformers trained in bfloat16 where the processor has it, with attention as plain matrix products.

In:  a forward and a backward pass, run inside `fast_training()`.
Out: the same result to bfloat16's precision (fp32's without it), about twice as soon.
Knows nothing of models. On a graphics card torch's own attention is the fastest, so only the precision changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def fast_training() -> Iterator[None]:
    """Inside, matrix products are taken in bfloat16 where the processor can, and attention is three plain operations.

    torch's flash attention on the CPU is written for long sequences: at 64 tokens its backward pass in bfloat16 took
    two fifths of an update, four times what it takes here.
    """
    if torch.cuda.is_available():
        with torch.autocast("cuda", torch.bfloat16):
            yield
        return
    if not torch.cpu._is_avx512_bf16_supported():
        yield
        return
    theirs = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = plain_attention
    try:
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            # RMSNorm keeps fp32 weights; that costs it a fused kernel, which the processor does not have.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        nn.functional.scaled_dot_product_attention = theirs


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **unused: Any
) -> Tensor:
    """(B, heads, Q, d), (B, heads, S, d), (B, heads, S, d) -> (B, heads, Q, d). `attn_mask`: True = look.

    Raises:
        ValueError: an argument that this does not serve (dropout, causal masks, a scale of its own, grouped heads).
    """
    if any(unused.values()):
        raise ValueError(f"plain attention serves none of {', '.join(name for name, on in unused.items() if on)}.")
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value
