"""Who is where in every frame of a clip, and how much everyone looks like their own pictures.

In:  frames as they are decoded, and the evaluators that the preset names, each with the subjects it measures.
Out: an `IdentityReport`, and frames with coloured outlines to look at.
Knows nothing of how the clip was made, or of what becomes of the report.

Shapes: F frames, N subjects of an evaluator, R regions it finds in a frame, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from engine.identity.report import COLOURS, IdentityReport, SubjectReport

AT_ONCE = 8  # frames judged together; no more are held than these and the few that are shown
SHOWN = 9  # frames of the strip


class Detections(NamedTuple):
    """What an evaluator finds in one frame."""

    regions: NDArray[np.bool_]
    """(R, H, W), where somebody is."""
    similarity: NDArray[np.float32]
    """(R, N), cosine of each region with each subject's most similar picture."""


class Evaluator(Protocol):
    """Knows some subjects by their pictures and finds where in a frame they are."""

    title: str
    """What the report calls it; figures of two titles are never compared."""

    def look(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """(F, H, W, 3) -> one `Detections` for each frame."""
        ...


class Assignment(NamedTuple):
    """An evaluator and the subjects it measures."""

    evaluator: Evaluator
    subjects: tuple[tuple[str, int], ...]
    """Name of each of its N subjects, and their place among all subjects of the job (0 the first)."""


class Reporter:
    """Listens to a clip as it is decoded and ends with a report.

    Args:
        answers: the evaluators with their subjects.
        fps: of the clip.
        num_frames: how many frames will come.
        every: each n-th frame is judged, the first one always.
        at_once: frames judged together.
    """

    def __init__(
        self, answers: Sequence[Assignment], *, fps: float, num_frames: int, every: int = 1, at_once: int = AT_ONCE
    ) -> None:
        self._answers, self._fps, self._every, self._at_once = answers, fps, every, at_once
        self._waiting: list[NDArray[np.uint8]] = []
        self._own = [_empty_series(answer) for answer in answers]
        self._other = [_empty_series(answer) for answer in answers]
        judged = (num_frames - 1) // every + 1
        self._show = set(np.linspace(0, judged - 1, min(SHOWN, judged)).round().astype(int).tolist())
        self._strip: list[NDArray[np.uint8]] = []
        self._came = self._judged = 0
        self.seconds = 0.0
        """Time that judging has taken so far."""

    def see(self, frame: NDArray[np.uint8]) -> None:
        """The next frame, (H, W, 3)."""
        if self._came % self._every == 0:
            self._waiting.append(frame)
        self._came += 1
        if len(self._waiting) == self._at_once:
            self._judge()

    def finish(self) -> IdentityReport:
        """Judge what is left and sum up."""
        self._judge()
        subjects: list[tuple[int, SubjectReport]] = []
        for answer, all_own, all_other in zip(self._answers, self._own, self._other, strict=True):
            for (name, place), own, other in zip(answer.subjects, all_own, all_other, strict=True):
                subjects.append((place, SubjectReport(name, answer.evaluator.title, tuple(own), tuple(other))))
        subjects.sort(key=lambda each: each[0])
        ordered = tuple(subject for _, subject in subjects)
        return IdentityReport(fps=self._fps, every=self._every, subjects=ordered)

    def write_strip(self, path: Path) -> None:
        """Some frames side by side, every subject outlined in its colour, as WebP."""
        if self._strip:
            Image.fromarray(np.concatenate(self._strip, axis=1)).save(path, quality=85)

    def _judge(self) -> None:
        if not self._waiting:
            return
        began = time.perf_counter()
        frames, self._waiting = np.stack(self._waiting), []
        found = [answer.evaluator.look(frames) for answer in self._answers]
        for number, frame in enumerate(frames):
            self._judge_frame(frame, [detections[number] for detections in found])
            self._judged += 1
        self.seconds += time.perf_counter() - began

    def _judge_frame(self, frame: NDArray[np.uint8], found: Sequence[Detections]) -> None:
        """Note the likenesses of one frame, and keep it with outlines when the strip shows it.

        Args:
            found: each evaluator's detections in this frame.
        """
        shown = self._judged in self._show
        picture = frame
        if shown:
            picture = enlarge(frame)
        for answer, detections, own, other in zip(self._answers, found, self._own, self._other, strict=True):
            matches = match_regions(detections.similarity)
            _append_likenesses(detections.similarity, matches, own, other)
            for (_, place), region in zip(answer.subjects, matches, strict=True):
                if shown and region is not None:
                    colour = ImageColor.getrgb(COLOURS[place % len(COLOURS)])
                    draw_outline(picture, detections.regions[region], colour)
        if shown:
            self._strip.append(picture)


def _empty_series(answer: Assignment) -> list[list[float | None]]:
    """For each subject of an evaluator, room for one likeness a judged frame."""
    return [[] for _ in answer.subjects]


def _append_likenesses(
    similarity: NDArray[np.float32],
    matches: Sequence[int | None],
    own: Sequence[list[float | None]],
    other: Sequence[list[float | None]],
) -> None:
    """Append one frame's likenesses: to the own pictures, and to whichever other subject's it resembles most."""
    for slot, region in enumerate(matches):
        likeness: float | None = None
        likeness_to_other: float | None = None
        if region is not None:
            likeness = round(float(similarity[region, slot]), 4)
            rest = [float(value) for k, value in enumerate(similarity[region]) if k != slot]
            if rest:
                likeness_to_other = round(max(rest), 4)
        own[slot].append(likeness)
        other[slot].append(likeness_to_other)


def match_regions(similarity: NDArray[np.float32]) -> list[int | None]:
    """For each subject the region that shows it, one to one, so that the sum of likenesses is the largest.

    Exact, over sets of subjects that have their region already: eight subjects are 256 sets.

    Args:
        alike: (R, N), regions by subjects, cosines.
    """
    value, N = (similarity + 1).tolist(), similarity.shape[1]  # above 0, so that leaving a pair out never pays
    best: dict[int, tuple[float, tuple[int | None, ...]]] = {0: (0.0, (None,) * N)}
    for region in range(len(value)):
        longer = dict(best)
        for taken, (total, pairs) in best.items():
            for subject in range(N):
                if taken & 1 << subject:
                    continue
                with_subject = taken | 1 << subject
                sum_with_subject = total + value[region][subject]
                if sum_with_subject > longer.get(with_subject, (-1.0, ()))[0]:
                    longer[with_subject] = (sum_with_subject, (*pairs[:subject], region, *pairs[subject + 1 :]))
        best = longer
    return list(max(best.values(), key=lambda found: found[0])[1])


def enlarge(frame: NDArray[np.uint8], least: int = 256) -> NDArray[np.uint8]:
    """A frame as large as a person needs it: whole multiples, the shorter side at least `least` pixels."""
    scale = max(1, -(-least // min(frame.shape[:2])))
    return frame.repeat(scale, 0).repeat(scale, 1)


def draw_outline(picture: NDArray[np.uint8], region: NDArray[np.bool_], colour: tuple[int, ...]) -> None:
    """Draw the edges of a region, (H, W), upon a picture of some multiple of its size."""
    scale = picture.shape[0] // region.shape[0]
    held = region.astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    edges, _ = cv2.findContours(held, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, edges, -1, colour, max(2, picture.shape[0] // 128))
