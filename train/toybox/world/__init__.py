"""The toybox world: a small, endless, seeded world of drawn subjects that act in front of named backgrounds.

Light: numpy and OpenCV, no torch. Whatever other rooms need is named here; `python -m train.toybox.world` draws sheets.
"""

from train.toybox.world.backgrounds import BACKGROUNDS, background_picture
from train.toybox.world.captions import (
    ATTRIBUTE_WORDS,
    CAMERAS,
    MAX_SUBJECTS,
    PAIR_VERBS,
    SINGLE_VERBS,
    VERBS,
    Action,
    Facts,
    vocabulary,
    words_of,
)
from train.toybox.world.drawing import OUTLINE, PALETTE, PATTERNS, Pose
from train.toybox.world.motion import FPS
from train.toybox.world.scene import (
    IDENTITIES,
    SAMPLES,
    SPLITS,
    VERSION,
    Clip,
    Scene,
    caption,
    cut_from_clip,
    make_scene,
    poses_at,
    reference_picture,
    render,
    sample_pictures,
    split_of,
    subject_seed,
)
from train.toybox.world.subjects import KINDS, draw, extents, make_subject
from train.toybox.world.things import THINGS
from train.toybox.world.traits import CREATURES, PATCHWORK, ToySubject

__all__ = [
    "ATTRIBUTE_WORDS",
    "BACKGROUNDS",
    "CAMERAS",
    "CREATURES",
    "FPS",
    "IDENTITIES",
    "KINDS",
    "MAX_SUBJECTS",
    "OUTLINE",
    "PAIR_VERBS",
    "PALETTE",
    "PATCHWORK",
    "PATTERNS",
    "SAMPLES",
    "SINGLE_VERBS",
    "SPLITS",
    "THINGS",
    "VERBS",
    "VERSION",
    "Action",
    "Clip",
    "Facts",
    "Pose",
    "Scene",
    "ToySubject",
    "background_picture",
    "caption",
    "cut_from_clip",
    "draw",
    "extents",
    "make_scene",
    "make_subject",
    "poses_at",
    "reference_picture",
    "render",
    "sample_pictures",
    "split_of",
    "subject_seed",
    "vocabulary",
    "words_of",
]
