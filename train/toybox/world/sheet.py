"""Pictures of the toybox world for people to look at, and its speed: `python -m train.toybox.world`.

In:  a verb of the command line and a path.
Out: PNG files, or a line with clips per second. Knows nothing of training.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from train.toybox import world
from train.toybox.world.drawing import Pixels, cv


def _save(path: Path, picture: Pixels, enlarge: int = 1) -> None:
    c = cv()
    height, width = picture.shape[:2]
    big = c.resize(picture, (width * enlarge, height * enlarge), interpolation=c.INTER_NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not c.imwrite(str(path), np.ascontiguousarray(big[..., ::-1])):
        raise OSError(f"{path} could not be written.")


def draw_subjects_sheet(seed: int = 0, columns: int = 12, size: int = 64) -> Pixels:
    """One row of references per kind; neighbours share an identity, uint8 (rows * size, columns * size, 3)."""
    rows = []
    for kind in world.KINDS:
        views = [world.make_subject(world.subject_seed(seed + k // 2), kind) for k in range(columns)]
        rows.append(np.concatenate([world.reference_picture(s, k, size)[0] for k, s in enumerate(views)], 1))
    return np.concatenate(rows, 0)


def draw_clips_sheet(scenes: list[world.Scene], columns: int = 9, size: int = 64, overlay: bool = False) -> Pixels:
    """One row of frames per scene, spread over 17 frames; with `overlay` the instance map is laid over them."""
    tints = np.array([(0, 0, 0), (255, 60, 60), (60, 200, 60), (60, 90, 255), (250, 210, 40)], np.float64)
    rows = []
    for scene in scenes:
        clip = world.render(scene, size)
        take = np.linspace(0, len(clip.frames) - 1, columns).round().astype(int)
        frames = clip.frames[take].astype(np.float64)
        if overlay:
            instance_ids = clip.instance_ids[take]
            frames = np.where(instance_ids[..., None] > 0, 0.35 * frames + 0.65 * tints[instance_ids], frames)
        rows.append(np.concatenate(list(frames.astype(np.uint8)), 1))
    return np.concatenate(rows, 0)


def clips_per_second(count: int = 60, size: int = 64, num_frames: int = 9) -> float:
    """Two-subject clips drawn per second by one process."""
    world.render(world.make_scene(0, num_subjects=2), size, num_frames)
    start = time.perf_counter()
    for seed in range(count):
        world.render(world.make_scene(seed, num_subjects=2), size, num_frames)
    return count / (time.perf_counter() - start)


def main() -> None:
    """sheet OUT.png | samples DIR | speed"""
    verb, *rest = sys.argv[1:] or ["help"]
    if verb == "sheet" and rest:
        verbs = [world.make_scene(k, verb=v) for k, v in enumerate(world.VERBS)]
        crowds = [world.make_scene(100 + k, num_subjects=1 + k % 4) for k in range(8)]
        left = draw_subjects_sheet()
        right = draw_clips_sheet(verbs[:8] + crowds[:0] + verbs[8:] + crowds[:3])
        height = max(len(left), len(right))
        sides = [np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), constant_values=255) for p in (left, right)]
        _save(Path(rest[0]), np.concatenate(sides, 1), 2)
    elif verb == "samples" and rest:
        for name, picture in world.sample_pictures().items():
            _save(Path(rest[0]) / f"{name}.png", picture)
    elif verb == "speed":
        sys.stdout.write(f"{clips_per_second():.1f} clips per second (2 subjects, 64x64, 9 frames, one process)\n")
    else:
        sys.stdout.write("python -m train.toybox.world sheet OUT.png | samples DIR | speed\n")
