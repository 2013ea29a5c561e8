"""The subjects' side of the model: a tower that reads pictures and VLM states once per clip (S.9, S.10 of the paper).

In:  patch tokens of the subjects' pictures and projected VLM states, with masks of what is there.
Out: per layer the keys and values that the video reads in stage 3, kept as an `IdentityCache`.
Knows nothing of the video, of time, of Wan's blocks or of how the cache is used (that is `identity_wan`).

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
        total = 0
        for layer in self.layers:
            total += layer.key.numel() * layer.key.element_size()
            if layer.value is not None:
                total += layer.value.numel() * layer.value.element_size()
        return total

    def without_vlm(self) -> IdentityCache | None:
        """The same subjects without the VLM's tokens, sharing memory; None when there is no subject."""
        if self.num_subject_tokens == 0:
            return None
        layers = tuple(_keep_first_keys(layer, self.num_subject_tokens) for layer in self.layers)
        return replace(self, layers=layers)

    def repeat_interleave(self, times: int) -> IdentityCache:
        """Each clip's subjects `times` in a row, for a batch that holds every clip that often."""
        return replace(self, layers=tuple(_repeat_clips(layer, times) for layer in self.layers))


def _repeat_clips(layer: LayerIdentity, times: int) -> LayerIdentity:
    key = layer.key.repeat_interleave(times, 0)
    value, mask, present = layer.value, layer.mask, layer.present
    if value is not None:
        value = value.repeat_interleave(times, 0)
    if mask is not None:
        mask = mask.repeat_interleave(times, 0)
    if present is not None:
        present = present.repeat_interleave(times, 0)
    return LayerIdentity(key, value, mask, present)


def _keep_first_keys(layer: LayerIdentity, count: int) -> LayerIdentity:
    value, mask = layer.value, true_mask(layer)
    if value is not None:
        value = value[:, :count]
    if mask is not None:
        mask = mask[:, :count]
    return LayerIdentity(layer.key[:, :count], value, *_make_usable(mask))


def true_mask(layer: LayerIdentity) -> Tensor | None:
    """The layer's mask as it was before `_make_usable` unmasked the rows that have no key."""
    if layer.mask is None or layer.present is None:
        return layer.mask
    return layer.mask & layer.present.unsqueeze(-1)


def _make_usable(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A key mask that attention can take, and which rows had a key at all (None: all rows).

    In a row whose keys are all masked softmax would be 0 / 0. Such a row is unmasked here, and the caller multiplies
    its result by zero. A mask that masks nothing becomes None: attention without a mask is faster.
    """
    if mask is None or bool(mask.all()):
        return None, None
    present = mask.any(dim=-1)
    if bool(present.all()):
        return mask, None
    return mask | ~present.unsqueeze(-1), present


def add_head_axes(key_mask: Tensor | None) -> Tensor | None:
    """(B, S) -> (B, 1, 1, S): the shape of a mask that attention applies to every head and every query."""
    if key_mask is None:
        return None
    return key_mask[:, None, None, :]


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
        others = _other_subjects(N, hidden_states.device)
        key, value = (t[:, others].reshape(B * N, (N - 1) * L, attn.heads, -1) for t in (key, value))
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        out = out.flatten(2, 3).type_as(query).unflatten(0, (B, N))
        return attn.to_out[1](attn.to_out[0](out))


def _other_subjects(N: int, device: torch.device) -> Tensor:
    """(N, N - 1): for each subject the numbers of all the others."""
    rows = []
    for subject in range(N):
        rows.append([other for other in range(N) if other != subject])
    return torch.tensor(rows, device=device)


class TowerMasks(NamedTuple):
    """Masks of one batch, the same in every layer of the tower; None: nothing is masked."""

    within: Tensor | None = None  # (B * N, 1, 1, L)
    others: Tensor | None = None  # (B * N, 1, 1, (N - 1) * L)
    has_others: Tensor | None = None  # (B, N, 1, 1), 0 where a subject is alone


class SubjectBlock(nn.Module):
    """Stages 1 and 2 of one layer, and the keys and values that stage 3 of that layer reads.

    A stage that is switched off has no parameters and passes its input through.

    Args:
        intra, inter, cross: stages 1, 2 and 3 on or off.
        slot_keys: how many slots the keys of stage 3 can carry the embedding of; 0: none.
    """

    def __init__(
        self, dim: int, num_heads: int, eps: float, *, intra: bool, inter: bool, cross: bool, slot_keys: int = 0
    ) -> None:
        super().__init__()
        head = {"dim": dim, "heads": num_heads, "dim_head": dim // num_heads, "eps": eps}
        # The order of the modules is that of the random numbers they start from.
        self.norm1: FP32LayerNorm | None = None
        self.attn1: WanAttention | None = None
        if intra:
            self.norm1 = FP32LayerNorm(dim, eps)
            self.attn1 = WanAttention(**head, processor=WanAttnProcessor())

        self.norm2: FP32LayerNorm | None = None
        self.attn2: WanAttention | None = None
        self.gate: nn.Linear | None = None
        if inter:
            self.norm2 = FP32LayerNorm(dim, eps)
            self.attn2 = WanAttention(**head, processor=OthersAttnProcessor(), is_cross_attention=True)
            self.gate = nn.Linear(dim, dim)

        self.norm3: FP32LayerNorm | None = None
        self.to_k: nn.Linear | None = None
        self.to_v: nn.Linear | None = None
        self.norm_k: nn.RMSNorm | None = None
        self.slot_key: nn.Embedding | None = None
        if cross:
            self.norm3 = FP32LayerNorm(dim, eps)
            self.to_k = nn.Linear(dim, dim)
            self.to_v = nn.Linear(dim, dim)
            self.norm_k = nn.RMSNorm(dim, eps=eps)
        if cross and slot_keys:
            self.slot_key = nn.Embedding(slot_keys, dim)

    def forward(
        self,
        tokens_BNLD: Tensor | None,
        vlm_BTD: Tensor | None,
        weights_BN: Tensor | None,
        slots_BN: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor] | None,
        masks: TowerMasks,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """One layer of the tower.

        Returns:
            The subjects' tokens after stages 1 and 2, and the key and value (B, S, D) that stage 3 reads. Without
            stage 3 the key is the bare tokens and the value is None.
        """
        if tokens_BNLD is not None:
            tokens_BNLD = self._attend_within(tokens_BNLD, rotary_emb, masks)
            tokens_BNLD = self._attend_between(tokens_BNLD, masks)
        if self.norm3 is None or self.to_k is None or self.to_v is None or self.norm_k is None:
            return tokens_BNLD, _join_tokens(tokens_BNLD, vlm_BTD), None
        if tokens_BNLD is None:
            context = _join_tokens(None, vlm_BTD)
            value = self.to_v(context)  # before the key, as below: gradients are summed in this order
            return None, self.norm_k(self.to_k(context)), value
        context = _join_tokens(self.norm3(tokens_BNLD), vlm_BTD)
        tokens_per_subject = tokens_BNLD.shape[2]
        value = self.to_v(context)
        if weights_BN is not None:
            weights_BS = _spread_over_keys(weights_BN.to(value.dtype), tokens_per_subject, value.shape[1])
            value = value * weights_BS.unsqueeze(-1)
        key = self.norm_k(self.to_k(context))
        if self.slot_key is not None and slots_BN is not None:
            slot_keys = self.slot_key(slots_BN).to(key.dtype)  # (B or 1, N, D)
            slot_keys = slot_keys.repeat_interleave(tokens_per_subject, dim=1)
            key = key + nn.functional.pad(slot_keys, (0, 0, 0, key.shape[1] - slot_keys.shape[1]))
        return tokens_BNLD, key, value

    def _attend_within(self, f: Tensor, rotary_emb: tuple[Tensor, Tensor] | None, masks: TowerMasks) -> Tensor:
        """Stage 1, with the residual that S.9 leaves out (a zero start would erase the subject otherwise)."""
        if self.attn1 is None or self.norm1 is None:
            return f
        flat = self.norm1(f).flatten(0, 1)
        return f + self.attn1(flat, None, masks.within, rotary_emb).view_as(f)

    def _attend_between(self, f: Tensor, masks: TowerMasks) -> Tensor:
        """Stage 2; a single subject has no others to attend to and stays as it is."""
        if self.attn2 is None or self.norm2 is None or self.gate is None or f.shape[1] < 2:
            return f
        normed = self.norm2(f)
        gated = torch.sigmoid(self.gate(normed)) * self.attn2(normed, None, masks.others)
        if masks.has_others is not None:
            gated = gated * masks.has_others.to(gated.dtype)
        return f + gated


def _join_tokens(tokens_BNLD: Tensor | None, vlm_BTD: Tensor | None) -> Tensor:
    """All subjects' tokens, then the VLM's: (B, S, D)."""
    parts: list[Tensor] = []
    if tokens_BNLD is not None:
        parts.append(tokens_BNLD.flatten(1, 2))
    if vlm_BTD is not None:
        parts.append(vlm_BTD)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1)


def _spread_over_keys(values_BN: Tensor, tokens_per_subject: int, num_keys: int) -> Tensor:
    """One value per subject -> one per key, 1 for the VLM's: (B, S)."""
    subjects = values_BN.repeat_interleave(tokens_per_subject, dim=1)
    return nn.functional.pad(subjects, (0, num_keys - subjects.shape[1]), value=1)


def picture_positions(height: int, width: int, dim: int) -> Tensor:
    """Where in a picture each token lies, (h * w, D): sines of its share of height and width, half a wave to eight."""
    waves = torch.pi * 16 ** torch.linspace(0, 1, dim // 4)
    down = _sines_along_side(height, waves).repeat_interleave(width, 0)
    across = _sines_along_side(width, waves).repeat(height, 1)
    both = torch.cat([down, across], 1)
    return 0.7 * nn.functional.pad(both, (0, dim - both.shape[1]))


def _sines_along_side(count: int, waves: Tensor) -> Tensor:
    """Sines, then cosines, of `count` tokens along one side, (count, 2 * waves)."""
    share = (torch.arange(count) + 0.5) / count
    angles = share.unsqueeze(1) * waves
    return torch.cat([angles.sin(), angles.cos()], 1)


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


# --- before the first layer: which subjects are there, and which keys are kept ----------------------------------------


class Tower(NamedTuple):
    """The subjects before the first layer, and what stays the same from layer to layer."""

    tokens: Tensor | None  # (B, N, L, D)
    vlm: Tensor | None  # (B, T, D)
    weights: Tensor | None  # (B, N)
    slots: Tensor | None  # (B, N) or (1, N)
    rotary_emb: tuple[Tensor, Tensor] | None
    masks: TowerMasks
    kept_keys: Tensor | None  # indices of the keys of stage 3 to keep; None: all, or they differ between clips
    mask: Tensor | None  # (B, S), see LayerIdentity
    present: Tensor | None  # (B,), see LayerIdentity
    num_subject_keys: int


def build_tower(
    references: References,
    tokens_BNLD: Tensor | None,
    rotary_emb: tuple[Tensor, Tensor] | None,
    vlm_BTD: Tensor | None,
) -> Tower | None:
    """The tower with the masks of what is there; None when there is neither a subject nor a VLM token.

    Args:
        references: masks and weights of the batch.
        tokens_BNLD: patch tokens with their slot embeddings; None without subjects.
        rotary_emb: RoPE of stage 1.
        vlm_BTD: projected VLM states; None without a VLM.
    """
    if tokens_BNLD is None and vlm_BTD is None:
        return None
    picture_mask = _mask_pictures(references)
    masks = TowerMasks()
    slots = None
    num_subject_keys = 0
    if tokens_BNLD is not None:
        _, N, L, _ = tokens_BNLD.shape
        if picture_mask is not None:
            masks = _mask_tower(picture_mask, tokens_BNLD)
        slots = slots_of(references, N, tokens_BNLD.device)
        num_subject_keys = N * L
    key_mask = _mask_keys(picture_mask, tokens_BNLD, references.vlm_mask, vlm_BTD)
    kept_keys = None
    if key_mask is not None and bool((key_mask == key_mask[:1]).all()):
        # Where all clips lack the same keys (always so with one clip), these are dropped once, here, instead of being
        # masked at every step.
        kept_keys = key_mask[0].nonzero().flatten()
        num_subject_keys = int(key_mask[0, :num_subject_keys].sum())
        key_mask = None
        if len(kept_keys) == 0:
            return None
    mask, present = _make_usable(key_mask)
    weights = references.weights
    return Tower(tokens_BNLD, vlm_BTD, weights, slots, rotary_emb, masks, kept_keys, mask, present, num_subject_keys)


def slots_of(references: References, N: int, device: torch.device) -> Tensor:
    """Which slot embedding each of N subjects has: (B, N) or (1, N)."""
    if references.slots is not None:
        return references.slots
    return torch.arange(N, device=device).unsqueeze(0)


def _mask_pictures(references: References) -> Tensor | None:
    """(B, N, V): True where a picture is there and its subject's weight is above 0; None: everywhere."""
    mask, weights, latents = references.mask, references.weights, references.latents
    if latents is None or (mask is None and weights is None):
        return None
    if mask is None:
        there = torch.ones(latents.shape[:3], dtype=torch.bool, device=latents.device)
    else:
        there = mask.bool()
    if weights is not None:
        there = there & (weights > 0).unsqueeze(-1)
    if bool(there.all()):
        return None
    return there


def _mask_tower(picture_mask_BNV: Tensor, tokens_BNLD: Tensor) -> TowerMasks:
    """Masks of stages 1 and 2: neither missing pictures nor missing subjects are attended to."""
    B, N, _, _ = tokens_BNLD.shape
    token_mask = _spread_over_tokens(picture_mask_BNV, tokens_BNLD)
    within, _ = _make_usable(token_mask.flatten(0, 1))
    others, has_others = None, None
    if N > 1:
        numbers = _other_subjects(N, token_mask.device)
        others, has_others = _make_usable(token_mask[:, numbers].reshape(B * N, -1))
    if has_others is not None:
        has_others = has_others.view(B, N, 1, 1)
    return TowerMasks(add_head_axes(within), add_head_axes(others), has_others)


def _mask_keys(
    picture_mask_BNV: Tensor | None, tokens_BNLD: Tensor | None, vlm_mask_BT: Tensor | None, vlm_BTD: Tensor | None
) -> Tensor | None:
    """(B, S): which keys of stage 3 count; None: all of them."""
    if picture_mask_BNV is None and (vlm_mask_BT is None or vlm_BTD is None):
        return None
    parts: list[Tensor] = []
    if tokens_BNLD is not None:
        B, N, L, _ = tokens_BNLD.shape
        if picture_mask_BNV is None:
            parts.append(torch.ones(B, N * L, dtype=torch.bool, device=tokens_BNLD.device))
        else:
            parts.append(_spread_over_tokens(picture_mask_BNV, tokens_BNLD).flatten(1, 2))
    if vlm_BTD is not None:
        if vlm_mask_BT is None:
            parts.append(torch.ones(vlm_BTD.shape[:2], dtype=torch.bool, device=vlm_BTD.device))
        else:
            parts.append(vlm_mask_BT.bool())
    return torch.cat(parts, dim=1)


def _spread_over_tokens(picture_mask_BNV: Tensor, tokens_BNLD: Tensor) -> Tensor:
    """The mask of pictures as a mask of their tokens, (B, N, L)."""
    tokens_per_picture = tokens_BNLD.shape[2] // picture_mask_BNV.shape[2]
    return picture_mask_BNV.repeat_interleave(tokens_per_picture, dim=2)
