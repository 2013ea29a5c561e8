"""The document of one supervised run: `run.json` in its folder.

In:  JSON.
Out: `SftConfig`, checked.
Knows nothing of tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from engine.document import Document


class SftConfig(Document):
    """What one supervised run does."""

    kind: Literal["base", "identity"]
    """A plain Wan from words alone, or Wan with identity blocks."""
    cache: str
    """Folder of cached latents."""
    start: str = ""
    """Model folder, or run folder whose averaged weights this one starts from; empty: from random weights."""
    architecture: dict[str, Any]
    """Arguments of the transformer's class."""
    steps: int = Field(ge=1)
    """Updates in all."""
    still_batch: int = Field(default=3, ge=1)
    """Samples of a pass on single frames, each with all its noise levels; more do not stay in a core's cache."""
    clip_batch: int = Field(default=1, ge=1)
    """Samples of a pass on clips, each with all its noise levels."""
    sparse_share: float = Field(default=0.0, ge=0, le=1)
    """Share of clip updates that look at a few moments of more clips; a verb shows in three frames of nine as well."""
    sparse_frames: int = Field(default=3, ge=2)
    """Frames that such an update takes of each clip: the first, the last, and others drawn at random."""
    sparse_batch: int = Field(default=4, ge=1)
    """Samples of a pass on such clips, each with as many noise levels as a whole one."""
    sparse_shift: float = Field(default=16.0, gt=0)
    """Shift of their noise levels: near pure noise a verb alone says who is where at which moment."""
    passes: int = Field(default=1, ge=1)
    """Passes whose gradients are added up for one update."""
    clip_share: float = Field(default=1 / 3, ge=0, le=1)
    """Share of updates that take clips; a clip costs two to three stills, and it alone shows what is done."""
    timesteps_per_sample: int = Field(default=4, ge=1)
    """Noise levels drawn for each still of an update; its subjects are read once for all of them."""
    timesteps_per_clip: int = Field(default=2, ge=1)
    """Noise levels drawn for each clip of an update."""
    known_region: float = Field(default=0.2, ge=0, le=1)
    """Share of clip updates in which everything outside a subject's surroundings is given clean, at time 0."""
    learning_rate: float = Field(default=7e-4, gt=0)
    """AdamW's peak rate, after a warm-up of 100 updates."""
    decay_fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of the updates, the last ones, over which the rate falls to zero."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's, as a share of its rate."""
    ema: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones that are exported."""
    in_pair: float = Field(default=0.5, ge=0, le=1)
    """Share of samples whose subjects are cut from the clip itself, at first; it falls to zero by half of the steps."""
    drop_text: float = Field(default=0.1, ge=0, le=1)
    """Share of samples without prompt and VLM."""
    drop_subjects: float = Field(default=0.1, ge=0, le=1)
    """Share of samples without subjects and VLM."""
    drop_both: float = Field(default=0.1, ge=0, le=1)
    """Share of samples with neither."""
    subject_weight: float = Field(default=2.0, ge=0)
    """Extra weight of the loss where a subject is."""
    motion_weight: float = Field(default=0.0, ge=0)
    """Extra weight of what differs between a clip's frames, seen coarsely: a small part, and what is done."""
    subject_alignment: float = Field(default=0.1, ge=0)
    """Weight of the losses that have a subject's place in the frame look at its own pictures, and ask for its slot."""
    caption_alignment: float = Field(default=0.1, ge=0)
    """Weight of the loss that has a subject's place read, in one head, the word that numbers it."""
    shift: float = Field(default=2.5, gt=0)
    """Shift of the noise levels of stills; above 1 more are near noise, where pictures have most to say."""
    clip_shift: float = Field(default=3.0, gt=0)
    """The same for clips: what nine frames share shows through noise that hides it in one."""
    final_sigma: float = Field(default=0.0, ge=0, lt=1)
    """The preset's last noise level: below it a clip is never evaluated, so little is to be learnt there."""
    below_final: float = Field(default=0.1, ge=0, le=1)
    """Share of the noise levels at most that fall below `final_sigma`, where that is not 0."""
    shared_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of a clip's noise that all of its frames have in common; the preset samples with the same."""
    seed: int = 0
    """Of weights, batches, noise and dropout."""


Kind = Literal["still", "clip", "sparse"]
RENAMED = {
    "noises": "timesteps_per_sample",
    "clip_noises": "timesteps_per_clip",
    "fall": "decay_fraction",
    "binding": "subject_alignment",
    "reading": "caption_alignment",
}
"""Names of fields in run folders written before the studio used the field's words, and their names now."""


def read_run(run: Path) -> SftConfig:
    """The document of a run folder; one that an earlier studio wrote goes on with the fields' new names.

    Raises:
        ValidationError: the document does not hold together.
    """
    values = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return SftConfig.model_validate({RENAMED.get(name, name): value for name, value in values.items()})
