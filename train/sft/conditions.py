"""What a model is told of its samples in one pass: texts and subjects, some of them left out.

In:  a batch, the run's config, a random generator.
Out: `Conditions`; and `Asked`, all that an auxiliary loss may look at.
Knows nothing of noise levels, losses or models.

Shapes: B samples, N subjects, V pictures of each, L text tokens, h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.subject_tower import References
from train.data.batch import Batch, NullConditioning
from train.sft.config import SftConfig


@dataclass(frozen=True)
class Conditions:
    """What a pass is told of its samples."""

    text: Tensor  # (B, L, text_dim)
    without_text: Tensor  # (B, 1), True where the prompt was left out
    shown: References | None  # None for a model without identity blocks
    drawn: Tensor  # (B, N, V, h, w), where the pictures show their subjects


def draw_conditions(
    batch: Batch, config: SftConfig, blank: NullConditioning, generator: torch.Generator, in_pair: float = 0.0
) -> Conditions:
    """Texts and subjects of a batch, some of them left out (R20: text .1, subjects .1, both .1), some subjects shown as
    they are in the clip itself."""
    shares = config.dropout
    roll = torch.rand(len(batch), generator=generator, device=generator.device)
    no_text = roll < shares.text + shares.both
    no_subjects = (roll >= shares.text) & (roll < shares.text + shares.both + shares.subjects)
    text = torch.where(no_text.view(-1, 1, 1), blank.text, batch.text)
    without_text = no_text.unsqueeze(1)
    if config.model.kind == "base":
        return Conditions(text, without_text, None, batch.reference_masks)
    there = (~no_subjects).view(-1, 1, 1).expand(batch.references.shape[:3])
    heard = batch.vlm_mask & ~(no_text | no_subjects).unsqueeze(1)
    pictures, drawn = batch.references, batch.reference_masks
    if in_pair > 0:
        same = torch.rand(len(batch), generator=generator, device=generator.device) < in_pair
        pictures = torch.where(same.view(-1, 1, 1, 1, 1, 1), batch.in_pair, pictures)
        drawn = torch.where(same.view(-1, 1, 1, 1, 1), batch.in_pair_masks, drawn)
    shown = References(pictures, there, vlm_states=batch.vlm, vlm_mask=heard)
    return Conditions(text, without_text, shown, drawn)


@dataclass(frozen=True)
class Asked:
    """What the model was asked in one pass, before its samples were repeated for each noise level."""

    batch: Batch
    said: Conditions
    shown: References
    """The subjects; a pass that shows none asks nothing of attention."""
    repeats: int
    """Noise levels of each sample."""
