"""Scenes of the toybox world: drawn subjects that act in front of named backgrounds, and the clips they become.

In:  integer seeds (and, where wanted, subjects, a background, a verb).
Out: scenes; clips with frames, instance maps, poses, face boxes, captions and facts; reference pictures.
Knows nothing of torch, models or files on disk.

Shapes: F frames, H x W pixels, N subjects. Slots are 1-based; instance maps hold 0 for the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from train.toybox.world.backgrounds import BACKGROUNDS, draw_board, view
from train.toybox.world.captions import (
    CAMERAS,
    DIRECTED,
    MAX_SUBJECTS,
    PAIR_VERBS,
    VERBS,
    Action,
    Facts,
    write_caption,
)
from train.toybox.world.drawing import SUPERSAMPLE, Pixels, Pose, cv, frame_size, shrink, shrink_instance_ids
from train.toybox.world.layout import arrange_places, pick, plan_actions
from train.toybox.world.motion import FPS, ZOOM, Place, camera_at, pose_pair, pose_single
from train.toybox.world.subjects import KINDS, PATCHWORK_SHARE, draw, extents, make_subject
from train.toybox.world.traits import PATCHWORK, ToySubject

Rng = np.random.Generator

VERSION = 1  # raised whenever a seed's pixels or captions change: checkpoints and figures name the world they saw

# Identities belong to a split by their seed alone. Two splits never meet: each owns [start, start + IDENTITIES).
IDENTITIES = 2**28
SPLITS: dict[str, int] = {
    "train": 0,
    "heldout": 1 * IDENTITIES,
    "judge-reward": 2 * IDENTITIES,
    "judge-test": 3 * IDENTITIES,
}

# Gains for red, green and blue of the light on backgrounds that are not in daylight.
TINTS = {"night city": (0.88, 0.9, 1.0), "underwater": (0.9, 1.0, 1.04), "space": (0.95, 0.95, 1.0)}
# Verbs that need room: the most subjects in their scenes.
MOST_SUBJECTS = {"circles": 2, "jumps over": 2, "flies up": 2, "falls down": 2, "walks": 3}


@dataclass(frozen=True)
class Scene:
    """Everything that decides a clip apart from its size and length; slot k is subjects[k - 1] at places[k - 1]."""

    seed: int
    split: str
    subjects: tuple[ToySubject, ...]
    actions: tuple[Action, ...]
    places: tuple[Place, ...]
    background: str
    background_seed: int
    camera: str
    light: tuple[float, float, float]

    @property
    def facts(self) -> Facts:
        """What can be asked about the scene without knowing who is in it."""
        return Facts(tuple(s.kind for s in self.subjects), self.actions, self.background, self.camera)


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    frames: uint8 (F, H, W, 3), RGB. instance_ids: uint8 (F, H, W), 0 for background, k for slot k.
    poses: F tuples of N poses, as seen by the camera. face_boxes: float32 (F, N, 4), x0 y0 x1 y1 in pixels, NaN for
    whatever has no face (boxes may reach past the frame, and tell nothing about occlusion: ask `instance_ids`).
    """

    frames: Pixels
    instance_ids: Pixels
    poses: tuple[tuple[Pose, ...], ...]
    face_boxes: NDArray[np.float32]
    caption: str
    facts: Facts
    scene: Scene


def subject_seed(index: int, split: str = "train") -> int:
    """The seed of identity `index` (0 <= index < IDENTITIES) of a split; splits never share a seed.

    Raises:
        ValueError: an unknown split, or an index outside its range.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split. Use one of {', '.join(SPLITS)}.")
    if not 0 <= index < IDENTITIES:
        raise ValueError(f"Identity {index} is outside of 0 to {IDENTITIES - 1}.")
    return SPLITS[split] + index


def split_of(seed: int) -> str:
    """The split an identity's seed belongs to.

    Raises:
        ValueError: a seed outside every split.
    """
    for name, start in SPLITS.items():
        if start <= seed < start + IDENTITIES:
            return name
    raise ValueError(f"Seed {seed} belongs to no split. Use 0 to {len(SPLITS) * IDENTITIES - 1}.")


def _draw_cast(rng: Rng, count: int, split: str) -> tuple[ToySubject, ...]:
    """Who plays: a quarter patchwork; in 30 % of larger casts at least two are of one kind."""
    kinds = []
    for _ in range(count):
        if rng.random() < PATCHWORK_SHARE:
            kinds.append(PATCHWORK)
        else:
            kinds.append(pick(rng, KINDS[:-1]))
    if count > 1 and rng.random() < 0.3:
        a, b = rng.choice(count, 2, replace=False)
        kinds[a] = kinds[b]
    return tuple(make_subject(subject_seed(int(rng.integers(IDENTITIES)), split), kind) for kind in kinds)


def make_scene(
    seed: int,
    *,
    num_subjects: int | None = None,
    subjects: Sequence[ToySubject] | None = None,
    background: str | None = None,
    verb: str | None = None,
    camera: str | None = None,
    split: str = "train",
) -> Scene:
    """The scene a seed stands for; whatever is given is kept, the rest is drawn from the seed.

    Args:
        num_subjects: 1 to MAX_SUBJECTS; None draws 1 / 2 / 3 / 4 with 35 / 40 / 15 / 10 %.
        subjects: the cast in slot order; num_subjects then follows from it.
        background, camera: one of BACKGROUNDS, one of CAMERAS.
        verb: of the first action: one of VERBS, optionally with a direction ('walks right', 'chases left').
        split: of the identities and the scene; the same seed in another split is another scene.

    Raises:
        ValueError: an unknown name, a number outside 1 to 4, or a verb that this many subjects cannot do.
    """
    subject_seed(0, split)
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 101])
    drawn_count = int(rng.choice(4, p=[0.35, 0.4, 0.15, 0.1])) + 1
    verb, direction, least, most = _parse_verb(verb)
    if subjects is not None:
        num_subjects = len(subjects)
    count = num_subjects
    if count is None:
        count = min(max(drawn_count, least), most)
    if not 1 <= count <= MAX_SUBJECTS:
        raise ValueError(f"A scene holds 1 to {MAX_SUBJECTS} subjects, not {count}.")
    if not least <= count <= most:
        raise ValueError(f"{verb!r} needs {least} to {most} subjects in a scene, not {count}.")
    if subjects is None:
        subjects = _draw_cast(rng, count, split)
    cast = tuple(subjects)
    actions = plan_actions(rng, count, verb, direction)
    where = background or pick(rng, BACKGROUNDS)
    if where not in BACKGROUNDS:
        raise ValueError(f"{where!r} is no background. Use one of {', '.join(BACKGROUNDS)}.")
    how = camera or str(rng.choice(CAMERAS, p=[0.52, 0.15, 0.15, 0.18]))
    if how not in CAMERAS:
        raise ValueError(f"{how!r} is no camera. Use one of {', '.join(CAMERAS)}.")
    width = 1.0
    if how == "zoom in":
        width = 1 / ZOOM
    places = arrange_places(rng, cast, actions, width)
    gain, warmth = float(rng.uniform(0.95, 1.04)), float(rng.uniform(-0.03, 0.03))
    tint = TINTS.get(where, (1.0, 1.0, 1.0))
    light = (tint[0] * gain * (1 + warmth), tint[1] * gain, tint[2] * gain * (1 - warmth))
    return Scene(int(seed), split, cast, actions, places, where, int(rng.integers(2**31)), how, light)


def _parse_verb(verb: str | None) -> tuple[str | None, str | None, int, int]:
    """'chases left' -> ('chases', 'left', fewest subjects, most subjects)."""
    if verb is None:
        return None, None, 1, MAX_SUBJECTS
    name, direction = verb, None
    if verb not in VERBS and " " in verb:
        name, direction = verb.rsplit(" ", 1)
    known = name in VERBS and direction in (None, "left", "right")
    if not known or (direction and name not in DIRECTED):
        raise ValueError(
            f"{verb!r} is no verb. Use one of {', '.join(VERBS)}; {', '.join(DIRECTED)} may add left or right."
        )
    least = 1
    if name in PAIR_VERBS:
        least = 2
    return name, direction, least, MOST_SUBJECTS.get(name, MAX_SUBJECTS)


def poses_at(scene: Scene, u: float, duration: float, size: tuple[int, int] = (64, 64)) -> tuple[Pose, ...]:
    """Every slot's pose as the camera sees it.

    Args:
        u: the part of the action that has passed, 0 to 1.
        duration: of the whole clip, seconds.
        size: (width, height); only its shape matters.
    """
    poses: dict[int, Pose] = {}
    movers: set[int] = set()
    for action in scene.actions:
        p = [scene.places[k - 1] for k in action.slots]
        if len(p) == 1:
            poses[action.slots[0]] = pose_single(action.verb, p[0], u, duration)
        else:
            direction = action.direction
            if not direction and p[0].flip:
                direction = "left"
            poses[action.slots[0]], poses[action.slots[1]] = pose_pair(action.verb, p[0], p[1], direction, u, duration)
        if action.verb in ("walks", "chases", "pushes", "meets"):
            movers.update(action.slots)
    offset, zoom = camera_at(scene.camera, _camera_reach(scene), u)
    in_view = []
    for k, subject in enumerate(scene.subjects, start=1):
        pose = poses[k]
        # A standing subject is tied to the ground and slides with it; the camera follows a travelling one.
        x = pose.x
        if k not in movers:
            x -= offset
        pose = replace(pose, x=0.5 + (x - 0.5) * zoom, y=0.5 + (pose.y - 0.5) * zoom, scale=pose.scale * zoom)
        in_view.append(_keep_inside(subject, pose, size))
    return tuple(in_view)


def _camera_reach(scene: Scene) -> float:
    """Half the way of a pan, in frame widths."""
    if len(scene.subjects) == 1:
        return 0.1
    return 0.07


def _keep_inside(subject: ToySubject, pose: Pose, size: tuple[int, int], overhang: float = 0.04) -> Pose:
    """The pose moved so that no more than `overhang` of the subject's extent leaves the frame on any side."""
    left, top, right, bottom = extents(subject, pose)
    short = min(size)
    fx, fy = short / size[0], short / size[1]
    spare_x, spare_y = overhang * (right - left) * fx, overhang * (bottom - top) * fy
    x = float(np.clip(pose.x, -left * fx - spare_x, max(1 - right * fx + spare_x, -left * fx - spare_x)))
    y = float(np.clip(pose.y, -top * fy - spare_y, max(1 - bottom * fy + spare_y, -top * fy - spare_y)))
    return replace(pose, x=x, y=y)


def _draw_order(scene: Scene, poses: tuple[Pose, ...]) -> list[int]:
    """Slots from far to near: lower feet are nearer, whoever jumps over somebody is nearest."""
    over = {a.slots[0] for a in scene.actions if a.verb == "jumps over"}
    return sorted(range(1, len(poses) + 1), key=lambda k: (k in over, poses[k - 1].y + scene.places[k - 1].feet))


def render(
    scene: Scene,
    size: int | tuple[int, int] = 64,
    num_frames: int = 17,
    *,
    moment: float | None = None,
    attributes: bool | None = None,
    hide: Sequence[int] = (),
) -> Clip:
    """Draw a scene.

    Args:
        size: of the square frame, or (width, height), pixels.
        num_frames: 1, or any 4k + 1; one frame is a still at `moment`.
        moment: 0 to 1, the part of the action that has passed in a still; None takes one from the scene's seed.
        attributes: whether the caption names attributes; None lets one caption in four do so.
        hide: slots that are not drawn; the caption and the facts still name them.

    Raises:
        ValueError: a number of frames that is not 4k + 1.
    """
    if num_frames < 1 or num_frames % 4 != 1:
        low = max(1, (num_frames - 1) // 4 * 4 + 1)
        raise ValueError(f"{num_frames} frames do not fit the video VAE, which takes 4k + 1. Use {low} or {low + 4}.")
    frame = frame_size(size)
    if num_frames == 1:
        if moment is None:
            rng = np.random.default_rng([scene.seed, list(SPLITS).index(scene.split), 202])
            moment = float(rng.random())
        times, duration = [moment], 16 / FPS
    else:
        times, duration = [i / (num_frames - 1) for i in range(num_frames)], (num_frames - 1) / FPS
    whole = draw_board(scene.background, scene.background_seed, frame)
    frames = np.empty((num_frames, frame[1], frame[0], 3), np.uint8)
    instance_ids = np.empty((num_frames, frame[1], frame[0]), np.uint8)
    boxes = np.full((num_frames, len(scene.subjects), 4), np.nan, np.float32)
    reach = _camera_reach(scene)
    all_poses = []
    for i, u in enumerate(times):
        poses = poses_at(scene, u, duration, frame)
        canvas = view(whole, frame, *camera_at(scene.camera, reach, u))
        canvas_ids = np.zeros(canvas.shape[:2], np.uint8)
        for k in _draw_order(scene, poses):
            if k in hide:
                continue
            box = draw(canvas, scene.subjects[k - 1], poses[k - 1], scene.light, instance_ids=canvas_ids, label=k)
            if box is not None:
                boxes[i, k - 1] = box / SUPERSAMPLE
        frames[i], instance_ids[i] = shrink(canvas, frame), shrink_instance_ids(canvas_ids, frame)
        all_poses.append(poses)
    return Clip(frames, instance_ids, tuple(all_poses), boxes, caption(scene, attributes), scene.facts, scene)


def caption(scene: Scene, attributes: bool | None = None, rng: Rng | None = None) -> str:
    """One caption of a scene.

    Args:
        attributes: True names colours, patterns and accessories; False never does; None does in one of four.
        rng: decides the wording; None takes the wording that belongs to the scene's seed.
    """
    rng = rng or np.random.default_rng([scene.seed, list(SPLITS).index(scene.split), 303])
    if attributes is None:
        attributes = bool(rng.random() < 0.25)
    if attributes:
        return write_caption(scene.facts, scene.subjects, rng)
    return write_caption(scene.facts, None, rng)


def reference_picture(
    subject: ToySubject, seed: int, size: int = 64, background: str = "white"
) -> tuple[Pixels, NDArray[np.bool_]]:
    """A picture of a subject in another pose, size and light than any clip: (rgb uint8 (S, S, 3), mask bool (S, S)).

    Args:
        seed: of the picture; the subject's own seed is mixed in.
        background: 'white', 'scene' for a random background, or one of BACKGROUNDS.

    Raises:
        ValueError: an unknown background.
    """
    rng = np.random.default_rng([seed, subject.seed, 404])
    name = pick(rng, BACKGROUNDS)
    if background not in ("white", "scene"):
        name = background
    pose = Pose(
        0.5,
        0.5,
        1.0,
        angle=float(rng.uniform(-0.3, 0.3)),
        squash=float(rng.uniform(0.93, 1.08)),
        flip=bool(rng.random() < 0.5),
        gait=float(rng.random()),
        wave=float(rng.random() * (rng.random() < 0.5)),
    )
    gain, warmth = float(rng.uniform(0.91, 1.09)), float(rng.uniform(-0.03, 0.03))
    light = (gain * (1 + warmth), gain, gain * (1 - warmth))
    left, top, right, bottom = extents(subject, pose)
    fill = float(rng.uniform(0.56, 0.86))
    scale = fill / max(right - left, bottom - top)
    spare_x, spare_y = 0.93 - scale * (right - left), 0.93 - scale * (bottom - top)
    x = 0.5 - scale * (left + right) / 2 + 0.5 * float(rng.uniform(-1, 1)) * min(0.3, spare_x)
    y = 0.5 - scale * (top + bottom) / 2 + 0.5 * float(rng.uniform(-1, 1)) * min(0.3, spare_y)
    background_seed = int(rng.integers(2**31))
    if background == "white":
        canvas = np.full((size * SUPERSAMPLE, size * SUPERSAMPLE, 3), 255, np.uint8)
    else:
        canvas = view(draw_board(name, background_seed, (size, size)), (size, size), float(rng.uniform(-0.1, 0.1)), 1.0)
    instance_ids = np.zeros(canvas.shape[:2], np.uint8)
    draw(canvas, subject, replace(pose, x=x, y=y, scale=scale), light, instance_ids=instance_ids)
    return shrink(canvas, (size, size)), shrink_instance_ids(instance_ids, (size, size)) > 0


def cut_from_clip(clip: Clip, slot: int, frame: int, size: int = 64) -> tuple[Pixels, NDArray[np.bool_]]:
    """A reference picture taken from the clip itself: a slot cut out by its mask, on white, filling 80 % of (S, S).

    Raises:
        ValueError: the slot cannot be seen in that frame.
    """
    mask = clip.instance_ids[frame] == slot
    if not mask.any():
        raise ValueError(f"Slot {slot} cannot be seen in frame {frame}.")
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = max(4, math.ceil(side / 0.8))
    picture, cut = np.full((side, side, 3), 255, np.uint8), np.zeros((side, side), np.uint8)
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    y, x = (side - height) // 2, (side - width) // 2
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    spot = np.s_[y : y + height, x : x + width]
    cut[spot] = mask[part]
    picture[spot] = np.where(mask[part][..., None], clip.frames[frame][part], 255)
    c = cv()
    how = c.INTER_LINEAR
    if side > size:
        how = c.INTER_AREA
    resized = c.resize(picture, (size, size), interpolation=how)
    return resized, c.resize(cut, (size, size), interpolation=c.INTER_NEAREST) > 0


# Chosen by eye from the held-out identities: name -> (kind, index, seed of the picture).
SAMPLES: dict[str, tuple[str, int, int]] = {
    "fox": ("fox", 13, 1),
    "kite": ("kite", 7, 1),
    "robot": ("robot", 5, 6),
    "cat": ("cat", 2, 9),
    "rocket": ("rocket", 11, 1),
    "rabbit": ("rabbit", 7, 1),
    "car": ("car", 6, 6),
    "bird": ("bird", 8, 10),
}


def sample_pictures(size: int = 256) -> dict[str, Pixels]:
    """The sample subjects shipped with the studio, on white: name -> uint8 (size, size, 3)."""
    pictures = {}
    for name, (kind, index, seed) in SAMPLES.items():
        pictures[name] = reference_picture(make_subject(subject_seed(index, "heldout"), kind), seed, size)[0]
    return pictures
