"""Who is where in every frame of a clip, and how much everyone looks like their own pictures.

In:  frames as they are decoded, the subjects' prepared pictures, and the judges that the preset names.
Out: an `IdentityReport`, and frames with coloured outlines to look at.
Knows nothing of how the clip was made, or of what becomes of the report.

Shapes: F frames, N subjects, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

from engine.judges import SIZE, Judges, cut_out, to_unit
from engine.report import COLOURS, IdentityReport, SubjectReport

SEEN = 0.004  # a subject counts as there when it fills this share of a frame
AT_ONCE = 8  # frames judged together; no more are held than these and the few that are shown
SHOWN = 9  # frames of the strip


class Reporter:
    """Listens to a clip as it is decoded and ends with a report.

    Args:
        judges: who judges.
        subjects: name, and place among all subjects of the job (0 the first), of each who is to be recognised.
        pictures: the prepared pictures of each, uint8 (H, W, 3).
        fps: of the clip.
        num_frames: how many frames will come.
        at_once: frames judged together.
    """

    def __init__(
        self,
        judges: Judges,
        subjects: Sequence[tuple[str, int]],
        pictures: Sequence[Sequence[NDArray[np.uint8]]],
        *,
        fps: float,
        num_frames: int,
        at_once: int = AT_ONCE,
    ) -> None:
        self._judges, self._fps, self._at_once = judges, fps, at_once
        self._names, places = [name for name, _ in subjects], [place for _, place in subjects]
        self._colours = [ImageColor.getrgb(COLOURS[place % len(COLOURS)]) for place in places]
        self._pictures = [_prepared(own) for own in pictures]
        self._known = [judges.embedder(cut_out(own)) for own in self._pictures]
        self._waiting: list[NDArray[np.uint8]] = []
        self._own: list[list[float | None]] = [[] for _ in subjects]
        self._other: list[list[float | None]] = [[] for _ in subjects]
        self._show = set(np.linspace(0, num_frames - 1, min(SHOWN, num_frames)).round().astype(int).tolist())
        self._strip: list[NDArray[np.uint8]] = []
        self._seen = 0

    def see(self, frame: NDArray[np.uint8]) -> None:
        """The next frame, (H, W, 3)."""
        self._waiting.append(frame)
        if len(self._waiting) == self._at_once:
            self._judge()

    def finish(self) -> IdentityReport:
        """Judge what is left and sum up."""
        self._judge()
        subjects = zip(self._names, self._own, self._other, strict=True)
        return IdentityReport(
            judge=f"toybox {self._judges.name}",
            fps=self._fps,
            subjects=tuple(SubjectReport(name, tuple(own), tuple(other)) for name, own, other in subjects),
        )

    def write_strip(self, path: Path) -> None:
        """Some frames side by side, every subject outlined in its colour, as WebP."""
        if self._strip:
            Image.fromarray(np.concatenate(self._strip, axis=1)).save(path, quality=85)

    @torch.no_grad()
    def _judge(self) -> None:
        if not self._waiting:
            return
        frames, self._waiting = np.stack(self._waiting), []
        shares = locate(self._judges, to_unit(torch.from_numpy(frames)), self._pictures)
        owner = shares.argmax(1)
        for frame, own in zip(frames, owner, strict=True):
            own = self._judge_frame(to_unit(torch.from_numpy(frame)), own)
            if self._seen in self._show:
                self._strip.append(outlined(frame, own.numpy().astype(np.uint8), self._colours))
            self._seen += 1

    def _judge_frame(self, frame: Tensor, owner: Tensor) -> Tensor:
        """Likenesses of one frame; the owner map with every region given to whom it resembles."""
        N = len(self._names)
        masks = torch.stack([owner == slot for slot in range(1, N + 1)]).float()
        there = masks.mean((1, 2)) >= SEEN
        alike = likenesses(self._judges, frame.expand(N, -1, -1, -1), masks, self._known)
        mine = matched(alike, there)
        for slot in range(N):
            region = mine[slot]
            if region is None:
                self._own[slot].append(None)
                self._other[slot].append(None)
                continue
            rest = [float(alike[region, k]) for k in range(N) if k != slot]
            self._own[slot].append(round(float(alike[region, slot]), 4))
            self._other[slot].append(round(max(rest), 4) if rest else None)
        renamed = torch.zeros_like(owner)
        for slot, region in enumerate(mine, start=1):
            if region is not None:
                renamed[owner == region + 1] = slot
        return renamed


def _prepared(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """One subject's pictures at the judges' size, (V, 3, SIZE, SIZE) in [0, 1]."""
    whole = to_unit(torch.from_numpy(np.stack(pictures)))
    return torch.nn.functional.interpolate(whole, (SIZE, SIZE), mode="bilinear", antialias=True).clamp(0, 1)


def locate(judges: Judges, frames: Tensor, pictures: Sequence[Tensor]) -> Tensor:
    """Who is where: (F, 3, H, W) in [0, 1] and each subject's (V, 3, SIZE, SIZE) -> shares (F, N + 1, H, W).

    Frames of another size are judged at the height the judges know, and the shares carried back.
    """
    H, W = frames.shape[-2:]
    wide = max(8, round(W * SIZE / H / 8) * 8)
    known = torch.nn.functional.interpolate(frames, (SIZE, wide), mode="bilinear", antialias=True)
    most = max(len(own) for own in pictures)
    # A picture shown twice counts as often as another subject's two.
    even = torch.stack([own[torch.arange(most) % len(own)] for own in pictures])
    shares = judges.locator(known, even)
    return torch.nn.functional.interpolate(shares, (H, W), mode="bilinear", align_corners=False)


def likenesses(judges: Judges, frames: Tensor, masks: Tensor, known: Sequence[Tensor]) -> Tensor:
    """Cosine of every cut-out with the likest picture of each subject: (P, 3, H, W), (P, H, W) -> (P, N)."""
    seen = judges.embedder(cut_out(frames, masks))
    return torch.stack([(seen @ own.T).amax(1) for own in known], 1)


def matched(alike: Tensor, there: Tensor) -> list[int | None]:
    """For each subject the region that shows it, one to one, so that the sum of likenesses is the largest.

    Exact, over sets of subjects that have their region already: eight subjects are 256 sets.

    Args:
        alike: (R, N), regions by subjects.
        there: (R,), which regions exist.
    """
    value, N = (alike + 1).tolist(), alike.shape[1]  # above 0, so that leaving a pair out never pays
    best: dict[int, tuple[float, tuple[int | None, ...]]] = {0: (0.0, (None,) * N)}
    for region in there.nonzero().flatten().tolist():
        longer = dict(best)
        for taken, (total, pairs) in best.items():
            for subject in (k for k in range(N) if not taken & 1 << k):
                found = total + value[region][subject]
                if found > longer.get(taken | 1 << subject, (-1.0, ()))[0]:
                    longer[taken | 1 << subject] = (found, (*pairs[:subject], region, *pairs[subject + 1 :]))
        best = longer
    return list(max(best.values(), key=lambda found: found[0])[1])


def outlined(
    frame: NDArray[np.uint8], owner: NDArray[np.uint8], colours: Sequence[tuple[int, ...]], scale: int = 4
) -> NDArray[np.uint8]:
    """A frame enlarged, (H, W, 3) -> `scale` times that; whoever owns pixels k is outlined in colours[k - 1]."""
    large = frame.repeat(scale, 0).repeat(scale, 1)
    for slot, colour in enumerate(colours, start=1):
        held = (owner == slot).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
        edges, _ = cv2.findContours(held, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(large, edges, -1, colour, max(1, scale // 2))
    return large
