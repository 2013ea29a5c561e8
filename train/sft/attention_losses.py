"""Teach attention where to look: a place in the frame at the word that numbers whoever is there, and at the same part
of that subject's picture; background at the VLM.

In:  a batch's instance maps, numbers, latents and reference latents; what attention read while the model predicted.
Out: three losses. The paper has no such terms: they are FastComposer's localised attention (arXiv 2305.10431), for
words as it is, for pictures taken down to parts, and for what joins the two, the slot. Without them attention stayed
even for as long as we watched (docs/log.md).
Knows nothing of noise levels, optimisers or runs.

Shapes: B samples, N subjects, V pictures of each, C latent channels, F latent frames, h x w latent pixels, Q video
tokens, L text tokens, S keys of stage 3 (N * V * tokens of a picture, then the VLM's).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.models.identity_wan import IdentityAttention
from engine.models.subject_tower import LayerIdentity
from train.sft.conditions import Asked

REACH = 0.7  # tokens; how far from the right part of a picture a look may land


class AttentionAlignment:
    """All three as one auxiliary loss of a run (`train.sft.loss.AuxiliaryLoss`).

    Args:
        patch: latent pixels of a token's side.
        subject: weight of looking at the own pictures ("looks") and of asking for the own slot ("names").
        caption: weight of reading the word that numbers whoever is there ("reads").
    """

    def __init__(self, patch: int, *, subject: float, caption: float) -> None:
        self._patch = patch
        self.weights = {"looks": subject, "names": subject, "reads": caption}

    def record(self, model: Any) -> AbstractContextManager[RecordedAttention]:
        """Inside, what attention reads is noted down."""
        return record_attention(model)

    def __call__(self, seen: RecordedAttention, asked: Asked) -> dict[str, Tensor]:
        """The three, each a scalar; 0 where a batch has nobody to look at."""
        looks, names = self._looks(seen, asked)
        batch, without_text = asked.batch, asked.said.without_text
        instance_ids = torch.where(without_text, 0, token_instance_ids(batch.instance_ids, self._patch))
        instance_ids, numbers = (each.repeat_interleave(asked.repeats, 0) for each in (instance_ids, batch.numbers))
        return {"looks": looks, "names": names, "reads": word_alignment_loss(seen, instance_ids, numbers)}

    def _looks(self, seen: RecordedAttention, asked: Asked) -> tuple[Tensor, Tensor]:
        """Samples without subjects are left out, and so is the background of samples without a VLM."""
        batch, shown = asked.batch, asked.shown
        assert shown.latents is not None and shown.mask is not None and shown.vlm_mask is not None
        there, heard = (mask.flatten(1).any(1, keepdim=True) for mask in (shown.mask, shown.vlm_mask))
        instance_ids = token_instance_ids(batch.instance_ids, self._patch)
        places = torch.where(there & (heard | (instance_ids > 0)), instance_ids, -1)
        near = counterparts(batch.latents, batch.instance_ids, shown.latents, asked.said.drawn, self._patch)
        places, near = (each.repeat_interleave(asked.repeats, 0) for each in (places, near))
        return region_alignment_loss(seen, places, near), slot_alignment_loss(seen, places, shown.latents.shape[1])


@dataclass
class RecordedAttention:
    """What attention read in one forward."""

    pictures: list[tuple[IdentityAttention, Tensor, LayerIdentity]] = field(default_factory=list)
    """Of each stage 3: the module, Z (B, Q, D), and the layer's keys."""
    slots: list[tuple[IdentityAttention, Tensor, Tensor]] = field(default_factory=list)
    """Of each stage 3 whose keys wear slots: the module, Z, and what a key wears of each slot (max_subjects, D)."""
    words: list[tuple[Any, Tensor, Tensor]] = field(default_factory=list)
    """Of each cross-attention to text: the module, its normed Z (B, Q, D), and the text (B, L, D)."""


@contextmanager
def record_attention(model: Any) -> Iterator[RecordedAttention]:
    """Inside, what the last three blocks that have a stage 3 read is noted down."""
    seen = RecordedAttention()
    blocks = [m for m in model.modules() if isinstance(getattr(m, "identity", None), IdentityAttention)][-3:]
    worn = {block.identity: towers.slot_key for block, towers in zip(model.blocks, model.subject_blocks, strict=False)}

    def note_pictures(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, IdentityAttention)
        seen.pictures.append((module, *inputs))
        if worn[module] is not None:
            seen.slots.append((module, inputs[0], worn[module].weight))

    def note_words(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.words.append((module, inputs[0], inputs[1]))

    handles = []
    for block in blocks:
        handles.append(block.identity.register_forward_pre_hook(note_pictures))
        handles.append(block.attn2.register_forward_pre_hook(note_words))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def token_instance_ids(instance_ids: Tensor, patch: int) -> Tensor:
    """(B, F, h, w) slots -> (B, Q): who is in a token, 0 for nobody; the highest slot where several are."""
    return nn.functional.max_pool2d(instance_ids.float(), patch).long().flatten(1)


def counterparts(latents: Tensor, instance_ids: Tensor, references: Tensor, drawn: Tensor, patch: int) -> Tensor:
    """How near each subject token is to the part of its subject that a video token shows.

    Where in its subject a place is, is told by the box around the subject, in the frame and in the picture; of both
    mirror images the one counts whose colours fit better. A picture without a white rim has no box: all of it counts.

    Args:
        latents: (B, C, F, h, w).
        instance_ids: (B, F, h, w), slots.
        references: (B, N, V, C, h, w).
        drawn: (B, N, V, h, w), True where a picture shows its subject.
        patch: latent pixels of a token's side.

    Returns:
        (B, Q, N * V * tokens), 1 at the right part, falling to 0 within about two tokens; 0 where the video token
        shows another subject or none.
    """
    (B, _, F, h, w), (N, V) = latents.shape, references.shape[1:3]
    rim = torch.cat([drawn[..., 0, :], drawn[..., -1, :], drawn[..., :, 0], drawn[..., :, -1]], -1).float().mean(-1)
    slots = torch.arange(1, N + 1, device=instance_ids.device)
    held = instance_ids.unsqueeze(1) == slots.view(1, N, 1, 1, 1)  # (B, N, F, h, w)
    inside, pictured = _box(held), _box(drawn)  # (B, N, F, 4), (B, N, V, 4)

    sides = (torch.arange(side, device=instance_ids.device) + 0.5 for side in (h, w))
    ys, xs = torch.meshgrid(*sides, indexing="ij")
    cells = torch.stack([ys, xs], -1).view(1, 1, 1, 1, h * w, 2)
    straight = _map_to_box(cells, inside.unsqueeze(3), pictured.unsqueeze(2), mirrored=False)  # (B, N, F, V, h * w, 2)
    mirrored = _map_to_box(cells, inside.unsqueeze(3), pictured.unsqueeze(2), mirrored=True)
    costs = [_misfit(latents, held, references, places) for places in (straight, mirrored)]
    flip = (costs[1] < costs[0]).view(B, N, F, V, 1, 1)

    centres = nn.functional.avg_pool2d(torch.stack([ys, xs]), patch).flatten(1).T.view(1, 1, 1, 1, -1, 2)
    places = torch.where(
        flip,
        _map_to_box(centres, inside.unsqueeze(3), pictured.unsqueeze(2), mirrored=True),
        _map_to_box(centres, inside.unsqueeze(3), pictured.unsqueeze(2), mirrored=False),
    )  # (B, N, F, V, q, 2)
    away = (places.unsqueeze(-2) - centres.view(1, 1, 1, 1, 1, -1, 2)).square().sum(-1) / patch**2
    near = torch.where((rim > 0.3).view(B, N, 1, V, 1, 1), 1.0, torch.exp(-away / (2 * REACH**2)))
    mine = token_instance_ids(instance_ids, patch).view(B, 1, F, 1, -1, 1) == slots.view(1, N, 1, 1, 1, 1)
    return (near * mine).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, N * V * near.shape[-1])


def _box(mask: Tensor) -> Tensor:
    """(..., h, w) -> (..., 4): top, left, bottom, right edge of what is True; all when nothing is."""
    sides = []
    for rows in (mask.any(-1), mask.any(-2)):
        some, count = rows.any(-1), rows.shape[-1]
        first = torch.where(some, rows.int().argmax(-1), 0)
        last = torch.where(some, count - rows.flip(-1).int().argmax(-1), count)
        sides.append((first, last))
    (top, bottom), (left, right) = sides
    return torch.stack([top, left, bottom, right], -1).float()


def _map_to_box(points: Tensor, inside: Tensor, pictured: Tensor, *, mirrored: bool) -> Tensor:
    """Points (y, x) from one box into another, clamped to it. Boxes (..., 4) broadcast; returns (..., points, 2)."""
    inside, pictured = inside.unsqueeze(-2), pictured.unsqueeze(-2)
    share = ((points - inside[..., :2]) / (inside[..., 2:] - inside[..., :2])).clamp(0, 1)
    if mirrored:
        share = torch.stack([share[..., 0], 1 - share[..., 1]], -1)
    return pictured[..., :2] + share * (pictured[..., 2:] - pictured[..., :2])


def _misfit(latents: Tensor, held: Tensor, references: Tensor, places: Tensor) -> Tensor:
    """Mean square between what a subject's latent pixels show and what its picture shows there: (B, N, F, V)."""
    (B, C, F, h, w), (N, V) = latents.shape, references.shape[1:3]
    y, x = places.long().unbind(-1)
    index = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).unsqueeze(-2)  # (B, N, F, V, 1, h * w)
    pictures = references.flatten(-2).unsqueeze(2).expand(B, N, F, V, C, h * w)
    shown = pictures.gather(-1, index.expand(B, N, F, V, C, h * w))
    video = latents.transpose(1, 2).flatten(-2).view(B, 1, F, 1, C, h * w)
    error = (shown - video).square().mean(-2) * held.flatten(-2).unsqueeze(3)
    return error.sum(-1) / held.flatten(-2).sum(-1).unsqueeze(3).clamp(min=1)


def region_alignment_loss(seen: RecordedAttention, instance_ids_BQ: Tensor, near_BQS: Tensor) -> Tensor:
    """-log of the share of attention that a place gives to the right part of whoever is there, or to the VLM's tokens.

    Background has to look at the VLM: what stage 3 adds could otherwise not tell a subject's place from any other, and
    adding a subject's colour everywhere only hurts. Heads are averaged before the logarithm, so that some may look
    elsewhere.

    Args:
        seen: what `record_attention` noted down.
        instance_ids_BQ: the slot at each video token, 0 for the background, -1 where nothing is asked.
        near_BQS: what `counterparts` gives, for the subjects' keys, which come first.
    """
    losses = []
    count = near_BQS.shape[-1]
    for module, z, layer in seen.pictures:
        if layer.key.shape[1] < count:  # the batch's subjects were all dropped
            continue
        query = module.norm_q(module.to_q(module.norm(z))).unflatten(-1, (module.heads, -1))
        key = layer.key.unflatten(-1, (module.heads, -1))
        scores = torch.einsum("bqhd,bshd->bhqs", query, key) * query.shape[-1] ** -0.5
        if layer.mask is not None:
            scores = scores.masked_fill(~layer.mask[:, None, None], float("-inf"))
        shares = scores.softmax(-1).mean(1)  # (B, Q, S)
        right = torch.where(instance_ids_BQ > 0, (shares[..., :count] * near_BQS).sum(-1), shares[..., count:].sum(-1))
        surprise = -right.clamp(min=1e-6).log()
        for places in (instance_ids_BQ > 0, instance_ids_BQ == 0):
            losses.append((surprise * places).sum() / places.sum().clamp(min=1))
    return _mean_loss(losses)


def slot_alignment_loss(seen: RecordedAttention, instance_ids_BQ: Tensor, count: int) -> Tensor:
    """Cross entropy of the slot that a place's query asks for, by what keys wear of their slots alone.

    What pictures look like is left out, which near pure noise is louder than who is meant.

    Args:
        seen: what `record_attention` noted down.
        instance_ids_BQ: the slot at each video token; 0 and below: nothing is asked.
        count: how many subjects there are.
    """
    losses = []
    places = instance_ids_BQ > 0
    wanted = (instance_ids_BQ - 1).clamp(min=0)
    for module, z, worn in seen.slots:
        query = module.norm_q(module.to_q(module.norm(z)))
        width = query.shape[-1] // module.heads
        scores = query @ worn[:count].T / (module.heads * width**0.5)  # mean over heads
        surprise = nn.functional.cross_entropy(scores.transpose(1, 2), wanted, reduction="none")
        losses.append((surprise * places).sum() / places.sum().clamp(min=1))
    return _mean_loss(losses)


def word_alignment_loss(seen: RecordedAttention, instance_ids_BQ: Tensor, numbers_BL: Tensor) -> Tensor:
    """-log of the share of attention that a place's first head gives to the words that number whoever is there.

    One head of each watched cross-attention is enough to say who it is; the others stay free for what happens.

    Args:
        seen: what `record_attention` noted down.
        instance_ids_BQ: the slot at each video token; 0 and below: nothing is asked.
        numbers_BL: the slot that each word numbers, 0 for other words.
    """
    losses = []
    right = instance_ids_BQ.unsqueeze(-1) == numbers_BL.unsqueeze(1)  # (B, Q, L)
    places = (instance_ids_BQ > 0) & right.any(-1)
    for module, z, text in seen.words:
        width = module.inner_dim // module.heads
        query, key = module.norm_q(module.to_q(z)), module.norm_k(module.to_k(text))
        shares = (query[..., :width] @ key[..., :width].transpose(1, 2) * width**-0.5).softmax(-1)
        surprise = -(shares * right).sum(-1).clamp(min=1e-6).log()
        losses.append((surprise * places).sum() / places.sum().clamp(min=1))
    return _mean_loss(losses)


def _mean_loss(losses: list[Tensor]) -> Tensor:
    """Mean of the losses of several layers; 0 where no layer was recorded."""
    if not losses:
        return torch.zeros(())
    return torch.stack(losses).mean()
