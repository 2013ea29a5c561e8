"""The document of one supervised run: `run.json` in its folder, its values grouped by what they concern.

In:  JSON.
Out: `SftConfig`, checked.
Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from engine.document import Document


class ModelConfig(Document):
    """Which transformer is trained, and from where it starts."""

    kind: Literal["base", "identity"]
    """A plain Wan from words alone, or Wan with identity blocks."""
    start: str = ""
    """Model folder, or run folder whose averaged weights this one starts from; empty: from random weights."""
    architecture: dict[str, Any]
    """Arguments of the transformer's class."""


class DataConfig(Document):
    """What one update reads."""

    cache: str
    """Folder of cached latents."""
    still_batch: int = Field(default=3, ge=1)
    """Samples of a pass on single frames, each with all its noise levels; more do not stay in a core's cache."""
    clip_batch: int = Field(default=1, ge=1)
    """Samples of a pass on clips, each with all its noise levels."""
    clip_share: float = Field(default=1 / 3, ge=0, le=1)
    """Share of updates that take clips; a clip costs two to three stills, and it alone shows what is done."""
    sparse_share: float = Field(default=0.0, ge=0, le=1)
    """Share of clip updates that look at a few moments of more clips; a verb shows in three frames of nine as well."""
    sparse_frames: int = Field(default=3, ge=2)
    """Frames that such an update takes of each clip: the first, the last, and others drawn at random."""
    sparse_batch: int = Field(default=4, ge=1)
    """Samples of a pass on such clips, each with as many noise levels as a whole one."""
    passes: int = Field(default=1, ge=1)
    """Passes whose gradients are added up for one update."""
    in_pair: float = Field(default=0.5, ge=0, le=1)
    """Share of samples whose subjects are cut from the clip itself, at first; it falls to zero by half of the steps."""
    known_region: float = Field(default=0.2, ge=0, le=1)
    """Share of clip updates in which everything outside a subject's surroundings is given clean, at time 0."""


class DropoutConfig(Document):
    """Shares of samples whose conditions are left out, so that guidance has something to guide away from."""

    text: float = Field(default=0.1, ge=0, le=1)
    """Without prompt and VLM."""
    subjects: float = Field(default=0.1, ge=0, le=1)
    """Without subjects and VLM."""
    both: float = Field(default=0.1, ge=0, le=1)
    """With neither."""


class NoiseConfig(Document):
    """Noise levels, and the noise itself."""

    timesteps_per_sample: int = Field(default=4, ge=1)
    """Noise levels drawn for each still of an update; its subjects are read once for all of them."""
    timesteps_per_clip: int = Field(default=2, ge=1)
    """Noise levels drawn for each clip of an update."""
    shift: float = Field(default=2.5, gt=0)
    """Shift of the noise levels of stills; above 1 more are near noise, where pictures have most to say."""
    clip_shift: float = Field(default=3.0, gt=0)
    """The same for clips: what their frames share shows through noise that hides it in one."""
    sparse_shift: float = Field(default=16.0, gt=0)
    """The same for a few moments of a clip: near pure noise a verb alone says who is where at which moment."""
    final_sigma: float = Field(default=0.0, ge=0, lt=1)
    """The preset's last noise level: below it a clip is never evaluated, so little is to be learnt there."""
    below_final: float = Field(default=0.1, ge=0, le=1)
    """Share of the noise levels at most that fall below `final_sigma`, where that is not 0."""
    shared_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of a clip's noise that all of its frames have in common; the preset samples with the same."""


class LossConfig(Document):
    """What counts how much."""

    subject_weight: float = Field(default=2.0, ge=0)
    """Extra weight of the error where a subject is."""
    motion_weight: float = Field(default=0.0, ge=0)
    """Extra weight of what differs between a clip's frames, seen coarsely: a small part, and what is done."""
    subject_alignment: float = Field(default=0.1, ge=0)
    """Of the losses that have a subject's place in the frame look at its own pictures, and ask for its slot."""
    caption_alignment: float = Field(default=0.1, ge=0)
    """Of the loss that has a subject's place read, in one head, the word that numbers it."""


class OptimizerConfig(Document):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=7e-4, gt=0)
    """Peak rate, after a warm-up of 100 updates."""
    decay_fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of the updates, the last ones, over which the rate falls to zero."""
    weight_decay: float = Field(default=0.01, ge=0)
    """As a share of the rate."""


class CheckpointConfig(Document):
    """What is kept."""

    ema: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones that are exported."""


class SftConfig(Document):
    """What one supervised run does."""

    model: ModelConfig
    data: DataConfig
    dropout: DropoutConfig = DropoutConfig()
    noise: NoiseConfig = NoiseConfig()
    losses: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = Field(ge=1)
    """Updates in all."""
    seed: int = 0
    """Of weights, batches, noise and dropout."""

    @model_validator(mode="after")
    def _knows_moments(self) -> SftConfig:
        if self.data.sparse_share > 0 and self.model.kind == "base":
            raise ValueError("plain Wan cannot be told which moments of a clip it sees: sparse_share has to be 0")
        return self


Kind = Literal["still", "clip", "sparse"]
RENAMED = {
    "noises": "timesteps_per_sample",
    "clip_noises": "timesteps_per_clip",
    "fall": "decay_fraction",
    "binding": "subject_alignment",
    "reading": "caption_alignment",
}
"""Names of fields in run folders written before the studio used the field's words, and their names now."""
DROPOUT_BEFORE = {"drop_text": "text", "drop_subjects": "subjects", "drop_both": "both"}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A run's values as they were written before they were grouped, in their groups.

    Raises:
        KeyError: a value that no group has.
    """
    place_of: dict[str, str] = {}
    for group, field in SftConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Document):
            place_of |= dict.fromkeys(field.annotation.model_fields, group)
    nested: dict[str, Any] = {}
    for old, value in flat.items():
        name = RENAMED.get(old, old)
        if name in SftConfig.model_fields:
            nested[name] = value
        elif name in DROPOUT_BEFORE:
            nested.setdefault("dropout", {})[DROPOUT_BEFORE[name]] = value
        else:
            nested.setdefault(place_of[name], {})[name] = value
    return nested


def read_run(run: Path) -> SftConfig:
    """The document of a run folder; one that an earlier studio wrote goes on under today's names.

    Raises:
        ValidationError: the document does not hold together.
    """
    values = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if "model" not in values:
        values = nest(values)
    return SftConfig.model_validate(values)
