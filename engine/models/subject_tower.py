"""The subjects' side of the model: a tower that reads pictures and VLM states once per clip (S.9, S.10 of the paper).

In:  patch tokens of the subjects' pictures and projected VLM states, with masks of what is there.
Out: per layer the keys and values that the video reads in stage 3, kept as an `IdentityCache`.
Knows nothing of the video, of time, of Wan's blocks or of how the cache is used (engine/models/identity_wan.py does).

Shapes: B clips, N subjects, V pictures of a subject, L tokens of a subject (all its pictures), T VLM tokens, S keys of
stage 3 (N * L + T), D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

# --- what goes in, what is kept ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """The subjects of a batch, before the model has read them.

    Args:
        latents: (B, N, V, C, H, W), normalised VAE latents of the pictures; None without subjects.
        mask: (B, N, V), True where a picture is there. None: all are. A subject without a picture is absent.
        weights: (B, N), how strongly the clip follows a subject, >= 0. 1 is as trained; 0 is the same as absent.
            None: all 1. It scales the values that stage 3 reads: where a pixel looks at one subject only, a bias on
            the scores would change nothing.
        slots: (B, N) or (1, N), which slot embedding each subject wears. None: 0, 1, 2, ... Shuffled in training, so
            that no slot becomes the main one.
        vlm_states: (B, T, vlm_dim), last hidden states of the VLM; None without a VLM.
        vlm_mask: (B, T), True where a VLM token counts. None: all do.
    """

    latents: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    slots: Tensor | None = None
    vlm_states: Tensor | None = None
    vlm_mask: Tensor | None = None


class LayerIdentity(NamedTuple):
    """What one block reads about the subjects: keys and values of stage 3, or bare tokens where stage 3 is off."""

    key: Tensor  # (B, S, D); the tokens themselves where stage 3 is off
    value: Tensor | None  # (B, S, D)
    mask: Tensor | None  # (B, S), True where a key counts; None: all do
    present: Tensor | None  # (B,), 1 where a clip has any key at all, else 0; None: all have


@dataclass(frozen=True)
class IdentityCache:
    """Everything the video reads about the subjects, computed once per clip and kept over all steps.

    The keys of the subjects come first, then those of the VLM, so a guidance branch without the VLM is a view.
    """

    layers: tuple[LayerIdentity, ...]
    num_subject_tokens: int

    def num_bytes(self) -> int:
        """Memory of the keys and values of all layers, in bytes."""
        tensors = [t for layer in self.layers for t in (layer.key, layer.value) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def without_vlm(self) -> IdentityCache | None:
        """The same subjects without the VLM's tokens, sharing memory; None when there is no subject."""
        if self.num_subject_tokens == 0:
            return None
        return replace(self, layers=tuple(_first_keys(layer, self.num_subject_tokens) for layer in self.layers))

    def repeat_interleave(self, times: int) -> IdentityCache:
        """Each clip's subjects `times` in a row, for a batch that holds every clip that often."""

        def repeated(layer: LayerIdentity) -> LayerIdentity:
            rest = (None if t is None else t.repeat_interleave(times, 0) for t in layer[1:])
            return LayerIdentity(layer.key.repeat_interleave(times, 0), *rest)

        return replace(self, layers=tuple(repeated(layer) for layer in self.layers))


def _first_keys(layer: LayerIdentity, count: int) -> LayerIdentity:
    value = None if layer.value is None else layer.value[:, :count]
    mask = true_mask(layer)
    return LayerIdentity(layer.key[:, :count], value, *_usable(None if mask is None else mask[:, :count]))


def true_mask(layer: LayerIdentity) -> Tensor | None:
    """The layer's mask without the stand-in that `_usable` puts into rows that have no key."""
    if layer.mask is None or layer.present is None:
        return layer.mask
    return layer.mask & layer.present.unsqueeze(-1)


def _usable(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A key mask that attention can take, and which rows had a key at all.

    A row of nothing but masked keys makes softmax 0 / 0, so such a row looks at everything and its result is
    multiplied by zero. A mask that masks nothing is dropped: attention without one is faster.
    """
    if mask is None or bool(mask.all()):
        return None, None
    present = mask.any(dim=-1)
    if bool(present.all()):
        return mask, None
    return mask | ~present.unsqueeze(-1), present


# --- the subject tower: stages 1 and 2, and what stage 3 reads ------------------------------------------------------


class OthersAttnProcessor:
    """Attention of each subject to all the others; keys are projected once and gathered, not projected N - 1 times."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, L, D) -> (B, N, L, D), N >= 2. `attention_mask`: (B * N, 1, 1, (N - 1) * L), True = look."""
        B, N, L, _ = hidden_states.shape
        query = attn.norm_q(attn.to_q(hidden_states)).flatten(0, 1).unflatten(-1, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        others = _others(N, hidden_states.device)
        key, value = (t[:, others].reshape(B * N, (N - 1) * L, attn.heads, -1) for t in (key, value))
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        out = out.flatten(2, 3).type_as(query).unflatten(0, (B, N))
        return attn.to_out[1](attn.to_out[0](out))


def _others(N: int, device: torch.device) -> Tensor:
    """(N, N - 1): for each subject the numbers of all the others."""
    return torch.tensor([[j for j in range(N) if j != i] for i in range(N)], device=device)


class TowerMasks(NamedTuple):
    """Masks of one batch, the same in every layer of the tower; None: nothing is masked."""

    within: Tensor | None = None  # (B * N, 1, 1, L)
    others: Tensor | None = None  # (B * N, 1, 1, (N - 1) * L)
    has_others: Tensor | None = None  # (B, N, 1, 1), 0 where a subject is alone


class SubjectBlock(nn.Module):
    """Stages 1 and 2 of one layer, and the keys and values that stage 3 of that layer reads.

    A stage that is switched off has no parameters and passes its input through.
    """

    def __init__(
        self, dim: int, num_heads: int, eps: float, *, intra: bool, inter: bool, cross: bool, slot_keys: int = 0
    ) -> None:
        super().__init__()
        head = {"dim": dim, "heads": num_heads, "dim_head": dim // num_heads, "eps": eps}
        self.norm1 = FP32LayerNorm(dim, eps) if intra else None
        self.attn1 = WanAttention(**head, processor=WanAttnProcessor()) if intra else None
        self.norm2 = FP32LayerNorm(dim, eps) if inter else None
        self.attn2 = WanAttention(**head, processor=OthersAttnProcessor(), is_cross_attention=True) if inter else None
        self.gate = nn.Linear(dim, dim) if inter else None
        self.norm3 = FP32LayerNorm(dim, eps) if cross else None
        self.to_k = nn.Linear(dim, dim) if cross else None
        self.to_v = nn.Linear(dim, dim) if cross else None
        self.norm_k = nn.RMSNorm(dim, eps=eps) if cross else None
        self.slot_key = nn.Embedding(slot_keys, dim) if cross and slot_keys else None

    def forward(
        self,
        tokens_BNLD: Tensor | None,
        vlm_BTD: Tensor | None,
        weights_BN: Tensor | None,
        slots_BN: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor] | None,
        masks: TowerMasks,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Subjects, one layer further, with the key and value (B, S, D) of stage 3 (bare tokens, None without it)."""
        if tokens_BNLD is not None:
            tokens_BNLD = self._within(tokens_BNLD, rotary_emb, masks)
            tokens_BNLD = self._between(tokens_BNLD, masks)
        if self.norm3 is None or self.to_k is None or self.to_v is None or self.norm_k is None:
            return tokens_BNLD, _joined(tokens_BNLD, vlm_BTD), None
        normed = None if tokens_BNLD is None else self.norm3(tokens_BNLD)
        context = _joined(normed, vlm_BTD)
        value = self.to_v(context)
        if weights_BN is not None and tokens_BNLD is not None:
            value = value * _per_key(weights_BN.to(value.dtype), tokens_BNLD.shape[2], value.shape[1]).unsqueeze(-1)
        key = self.norm_k(self.to_k(context))
        if self.slot_key is not None and tokens_BNLD is not None and slots_BN is not None:
            worn = self.slot_key(slots_BN).to(key.dtype)  # (B or 1, N, D)
            worn = worn.repeat_interleave(tokens_BNLD.shape[2], dim=1)
            key = key + nn.functional.pad(worn, (0, 0, 0, key.shape[1] - worn.shape[1]))
        return tokens_BNLD, key, value

    def _within(self, f: Tensor, rotary_emb: tuple[Tensor, Tensor] | None, masks: TowerMasks) -> Tensor:
        """Stage 1, with the residual that S.9 leaves out (a zero start would erase the subject otherwise)."""
        if self.attn1 is None or self.norm1 is None:
            return f
        flat = self.norm1(f).flatten(0, 1)
        return f + self.attn1(flat, None, masks.within, rotary_emb).view_as(f)

    def _between(self, f: Tensor, masks: TowerMasks) -> Tensor:
        """Stage 2; a single subject has nobody to look at and stays as it is."""
        if self.attn2 is None or self.norm2 is None or self.gate is None or f.shape[1] < 2:
            return f
        normed = self.norm2(f)
        seen = torch.sigmoid(self.gate(normed)) * self.attn2(normed, None, masks.others)
        return f + (seen if masks.has_others is None else seen * masks.has_others.to(seen.dtype))


def _joined(tokens_BNLD: Tensor | None, vlm_BTD: Tensor | None) -> Tensor:
    """All subjects' tokens, then the VLM's: (B, S, D)."""
    parts = [] if tokens_BNLD is None else [tokens_BNLD.flatten(1, 2)]
    parts += [] if vlm_BTD is None else [vlm_BTD]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _per_key(values_BN: Tensor, tokens_per_subject: int, num_keys: int) -> Tensor:
    """One value per subject -> one per key, 1 for the VLM's: (B, S)."""
    subjects = values_BN.repeat_interleave(tokens_per_subject, dim=1)
    return nn.functional.pad(subjects, (0, num_keys - subjects.shape[1]), value=1)


def picture_positions(height: int, width: int, dim: int) -> Tensor:
    """Where in a picture a token lies: sines of its share of height and width, half a wave to eight, (h * w, D)."""
    waves = torch.pi * 16 ** torch.linspace(0, 1, dim // 4)
    sides = [(torch.arange(count) + 0.5) / count for count in (height, width)]
    down, across = (
        torch.cat([(side.unsqueeze(1) * waves).sin(), (side.unsqueeze(1) * waves).cos()], 1) for side in sides
    )
    both = torch.cat([down.repeat_interleave(width, 0), across.repeat(height, 1)], 1)
    return 0.7 * nn.functional.pad(both, (0, dim - both.shape[1]))


class VLMProjector(nn.Module):
    """Last hidden states of the VLM -> the transformer's width, once per clip (D1: norm, then an MLP)."""

    def __init__(self, vlm_dim: int, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = FP32LayerNorm(vlm_dim, eps)
        self.linear_1 = nn.Linear(vlm_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, states_BTX: Tensor) -> Tensor:
        """(B, T, vlm_dim) -> (B, T, D)."""
        states = self.norm(states_BTX.to(self.linear_1.weight.dtype))
        return self.linear_2(nn.functional.gelu(self.linear_1(states), approximate="tanh"))


# --- the ground floor: who is there, and which keys survive -----------------------------------------------------------


class Tower(NamedTuple):
    """The subjects before the first layer, and what stays the same from layer to layer."""

    tokens: Tensor | None  # (B, N, L, D)
    vlm: Tensor | None  # (B, T, D)
    weights: Tensor | None  # (B, N)
    slots: Tensor | None  # (B, N) or (1, N)
    rotary_emb: tuple[Tensor, Tensor] | None
    masks: TowerMasks
    chosen: Tensor | None  # numbers of the keys of stage 3 that exist; None: all do, or they differ between clips
    mask: Tensor | None  # (B, S), see LayerIdentity
    present: Tensor | None  # (B,), see LayerIdentity
    num_subject_keys: int


def start(
    references: References,
    tokens_BNLD: Tensor | None,
    rotary_emb: tuple[Tensor, Tensor] | None,
    vlm_BTD: Tensor | None,
) -> Tower | None:
    """Sort out who is there; None when there is neither a subject nor a VLM token.

    Args:
        references: masks and weights of the batch.
        tokens_BNLD: patch tokens with their slot embeddings; None without subjects.
        rotary_emb: RoPE of stage 1.
        vlm_BTD: projected VLM states; None without a VLM.
    """
    if tokens_BNLD is None and vlm_BTD is None:
        return None
    there = _presence(references)
    masks = TowerMasks() if tokens_BNLD is None or there is None else _tower_masks(there, tokens_BNLD)
    keys = _key_mask(there, tokens_BNLD, references.vlm_mask, vlm_BTD)
    num_subject_keys = 0 if tokens_BNLD is None else tokens_BNLD.shape[1] * tokens_BNLD.shape[2]
    chosen = None
    if keys is not None and bool((keys == keys[:1]).all()):
        # Clips that lack the same keys (one clip above all) lose them for good, not by a mask at every step.
        chosen = keys[0].nonzero().flatten()
        num_subject_keys = int(keys[0, :num_subject_keys].sum())
        keys = None
        if len(chosen) == 0:
            return None
    mask, present = _usable(keys)
    weights, slots = references.weights, None
    if tokens_BNLD is not None:
        slots = slots_of(references, tokens_BNLD.shape[1], tokens_BNLD.device)
    return Tower(tokens_BNLD, vlm_BTD, weights, slots, rotary_emb, masks, chosen, mask, present, num_subject_keys)


def slots_of(references: References, N: int, device: torch.device) -> Tensor:
    """Which slot each of N subjects wears: (B, N) or (1, N)."""
    return torch.arange(N, device=device).unsqueeze(0) if references.slots is None else references.slots


def _presence(references: References) -> Tensor | None:
    """(B, N, V): True where a picture is there and its subject's weight is above 0; None: everywhere."""
    mask, weights, latents = references.mask, references.weights, references.latents
    if latents is None or (mask is None and weights is None):
        return None
    there = torch.ones(latents.shape[:3], dtype=torch.bool, device=latents.device) if mask is None else mask.bool()
    there = there if weights is None else there & (weights > 0).unsqueeze(-1)
    return None if bool(there.all()) else there


def _tower_masks(there_BNV: Tensor, tokens_BNLD: Tensor) -> TowerMasks:
    """Masks of stages 1 and 2: missing pictures are not looked at, missing subjects neither."""
    B, N, L, _ = tokens_BNLD.shape
    tokens = there_BNV.repeat_interleave(L // there_BNV.shape[2], dim=2)  # (B, N, L)
    within, _ = _usable(tokens.flatten(0, 1))
    others, has_others = None, None
    if N > 1:
        others, has_others = _usable(tokens[:, _others(N, tokens.device)].reshape(B * N, -1))
    return TowerMasks(
        within=None if within is None else within[:, None, None, :],
        others=None if others is None else others[:, None, None, :],
        has_others=None if has_others is None else has_others.view(B, N, 1, 1),
    )


def _key_mask(
    there_BNV: Tensor | None, tokens_BNLD: Tensor | None, vlm_mask_BT: Tensor | None, vlm_BTD: Tensor | None
) -> Tensor | None:
    """(B, S): which keys of stage 3 count; None: all of them."""
    if there_BNV is None and (vlm_mask_BT is None or vlm_BTD is None):
        return None
    parts: list[Tensor] = []
    if tokens_BNLD is not None:
        B, N, L, _ = tokens_BNLD.shape
        if there_BNV is None:
            parts.append(torch.ones(B, N * L, dtype=torch.bool, device=tokens_BNLD.device))
        else:
            parts.append(there_BNV.repeat_interleave(L // there_BNV.shape[2], dim=2).flatten(1, 2))
    if vlm_BTD is not None:
        everything = torch.ones(vlm_BTD.shape[:2], dtype=torch.bool, device=vlm_BTD.device)
        parts.append(everything if vlm_mask_BT is None else vlm_mask_BT.bool())
    return torch.cat(parts, dim=1)
