"""Jobs as the engine's stages receive them.

In:  a document, and perhaps a preset that no file describes.
Out: a resolved job, its subjects prepared.
"""

from __future__ import annotations

from engine.job import GenerateJob
from engine.media.pictures import prepare_subjects
from engine.presets import Preset
from engine.resolve import ResolvedJob, resolve


def prepared(job: GenerateJob, preset: Preset | None = None) -> ResolvedJob:
    """What `engine.run` hands to a pipeline."""
    return prepare_subjects(resolve(job, preset))
