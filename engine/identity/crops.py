"""Cut-outs of subjects as the toybox's judges read them: squares on white, values in [0, 1].

In:  frames and masks.
Out: float crops of one size.
Knows nothing of networks or reports.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CROP = 40  # pixels; side of a cut-out subject

WHITE = 0.985  # darker than this in any colour is drawn upon


# --- cut-outs ---------------------------------------------------------------------------------------------------------


def to_unit(frames: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in [0, 1]."""
    return frames.movedim(-1, -3).float() / 255


def crop_subjects(pictures: Tensor, masks: Tensor | None = None, *, side: int = CROP) -> Tensor:
    """Each picture's subject alone on white, in the middle of a square.

    Args:
        pictures: (P, 3, H, W).
        masks: (P, H, W), above .5 where the subject is. None: it is whatever is not white, as in a reference picture.
        side: of the square, in pixels.

    Returns:
        (P, 3, side, side); all white where there is no subject.
    """
    if masks is None:
        held = pictures.amin(1) < WHITE
    else:
        held = masks > 0.5
        pictures = torch.where(held.unsqueeze(1), pictures, 1.0)
    return torch.stack([_cut_one(picture, own, side) for picture, own in zip(pictures, held, strict=True)])


def _cut_one(picture: Tensor, held: Tensor, side: int) -> Tensor:
    rows, columns = held.any(1).nonzero().flatten(), held.any(0).nonzero().flatten()
    if len(rows) == 0:
        return picture.new_ones(3, side, side)
    part = picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    high, wide = part.shape[1:]
    room = round(max(high, wide) * 1.1) + 1
    top, left = (room - high) // 2, (room - wide) // 2
    edges = (left, room - wide - left, top, room - high - top)
    square = functional.pad(part, edges, value=1.0).unsqueeze(0)
    small = functional.interpolate(square, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return small[0].clamp(0, 1)
