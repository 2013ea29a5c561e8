"""Wan's transformer block with stage 3 inside: the video reads the subjects (S.11 of the paper).

In:  video tokens, text states, and what one layer of the tower hands over (`LayerIdentity`).
Out: video tokens of the same shape.
Knows nothing of pictures, of the VLM or of the whole model (that is `identity_wan`).

Shapes: B clips, C latent channels, Q video tokens, D model width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from engine.models.subject_tower import LayerIdentity, add_head_axes, true_mask


class VideoPositions(nn.Module):
    """Where in the frame and when in the clip each token is, as something to add to it; starts at nothing.

    Shares of height, width and length, told by half waves: a longer clip, too, runs from its beginning to its end.
    """

    WAVES = 6

    def __init__(self, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * 2 * self.WAVES, dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        """(1, Q, D), in the order of the video's tokens; of the latents only the shape is read."""
        weight, grid = self.proj.weight, latents_BCFHW.shape[2:]
        sides = [size // patch for size, patch in zip(grid, self.patch_size, strict=True)]
        waves = torch.pi * torch.arange(1, self.WAVES + 1, device=weight.device)
        positions = []
        for axis, count in enumerate(sides):
            share = (torch.arange(count, device=weight.device) + 0.5) / count
            angles = share.unsqueeze(1) * waves
            waves_of_axis = torch.cat([angles.sin(), angles.cos()], 1)
            shape = [1, 1, 1, waves_of_axis.shape[1]]
            shape[axis] = count
            positions.append(waves_of_axis.view(shape).expand(*sides, -1))
        return self.proj(torch.cat(positions, -1).flatten(0, 2).unsqueeze(0).to(weight.dtype))


class IdentityAttention(nn.Module):
    """Stage 3 as the video sees it: what is added to Z. Its output projection is the only one that starts at zero."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.heads = num_heads
        self.norm = FP32LayerNorm(dim, eps)
        self.to_q = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, hidden_states_BQD: Tensor, identity: LayerIdentity) -> Tensor:
        """(B, Q, D) and the keys of this layer -> what the subjects add, (B, Q, D). No RoPE: a subject has no place."""
        assert identity.value is not None, "this layer's identity was made by a model without stage 3"
        query = self.norm_q(self.to_q(self.norm(hidden_states_BQD)))
        heads = (t.unflatten(-1, (self.heads, -1)) for t in (query, identity.key, identity.value))
        out = dispatch_attention_fn(*heads, attn_mask=add_head_axes(identity.mask))
        out = self.to_out(out.flatten(2, 3).type_as(query))
        if identity.present is None:
            return out
        return out * identity.present[:, None, None].to(out.dtype)


class JoinedCrossAttention(WanAttention):
    """Wan's cross-attention over text and subject tokens side by side, for the ablations without stage 3."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Tensor | None] | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Like Wan's, but the context may be a pair of tokens and their mask, since a Wan block passes no mask on."""
        if isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states, attention_mask = encoder_hidden_states
        return super().forward(hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)


class IdentityWanTransformerBlock(WanTransformerBlock):
    """A Wan block, then stage 3. It sits inside the block so that a step cache which skips the block skips both."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        qk_norm: str = "rms_norm_across_heads",
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
        added_kv_proj_dim: int | None = None,
        *,
        cross: bool = True,
    ) -> None:
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
        self.identity: IdentityAttention | None = None
        if cross:
            self.identity = IdentityAttention(dim, num_heads, eps)
        else:
            self.attn2 = JoinedCrossAttention(
                dim=dim,
                heads=num_heads,
                dim_head=dim // num_heads,
                eps=eps,
                added_kv_proj_dim=added_kv_proj_dim,
                cross_attention_dim_head=dim // num_heads,
                processor=WanAttnProcessor(),
            )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
        identity: LayerIdentity | None = None,
    ) -> Tensor:
        """(B, Q, D) -> (B, Q, D); without `identity` exactly Wan's block."""
        if identity is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        if self.identity is None:
            context = cast(Tensor, _context_with_subjects(encoder_hidden_states, identity))
            return super().forward(hidden_states, context, temb, rotary_emb)
        hidden_states = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return hidden_states + self.identity(hidden_states, identity)


def _context_with_subjects(text: Tensor, identity: LayerIdentity) -> tuple[Tensor, Tensor | None]:
    """Text tokens, then the subjects' and the VLM's, with the mask that leaves absent ones out."""
    tokens = torch.cat([text, identity.key.to(text.dtype)], dim=1)
    mask = true_mask(identity)  # text is always there, so here an empty row needs no stand-in
    if mask is None:
        return tokens, None
    return tokens, nn.functional.pad(mask, (text.shape[1], 0), value=True)[:, None, None, :]


TransformerBlockRegistry.register(
    IdentityWanTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0),
)
