"""Things known by their nouns and pictures: Grounding DINO finds, SAM 2.1 cuts out, DINOv2 compares.

In:  the three loaded networks, each subject's noun and pictures, and frames as uint8 RGB.
Out: `ThingEvaluator`, which measures everything but faces for an identity report (it is an
`engine.identity.reporter.Evaluator`).
Knows nothing of jobs, presets or the report.

All of it runs on the processor, in fp32, while the card holds the model.

Shapes: F frames, N subjects, R regions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.identity.crops import crop_subjects, to_unit
from engine.identity.reporter import Detections

Pictures = Sequence[NDArray[np.uint8]]  # of one subject, each (H, W, 3), RGB

FOUND = 0.25  # Grounding DINO's score of a thing, as OpenS2V has it
TWICE = 0.7  # two boxes that share this much are one
MOST = 12  # regions of a frame
LONGEST, SHORTEST = 1333, 800  # pixels of the sides of a picture that Grounding DINO reads
EMBEDDED = 224  # pixels of a cut-out that DINOv2 reads
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all three networks were trained with
THINGS = ("detector", "detector_tokenizer", "segmenter", "embedder")


class ThingEvaluator:
    """The evaluator for whatever has a noun.

    Args:
        detector: GroundingDinoForObjectDetection. tokenizer: its own.
        segmenter: Sam2Model.
        embedder: Dinov2Model.
        nouns, pictures: of each subject.
    """

    title = "things, Grounding DINO, SAM 2.1 and DINOv2"

    def __init__(
        self,
        detector: Any,
        tokenizer: Any,
        segmenter: Any,
        embedder: Any,
        *,
        nouns: Sequence[str],
        pictures: Sequence[Pictures],
    ) -> None:
        self._detector, self._segmenter, self._embedder = detector, segmenter, embedder
        unique = dict.fromkeys(noun.lower().replace(".", " ").strip() for noun in nouns)
        self._words = tokenizer(". ".join(unique) + ".", return_tensors="pt", truncation=True)
        self._known = [self._embed_pictures(own) for own in pictures]

    def _embed_pictures(self, pictures: Pictures) -> Tensor:
        """One subject's pictures -> (V, d), unit vectors."""
        cuts = [crop_subjects(_to_unit_batch(picture), side=EMBEDDED)[0] for picture in pictures]
        return self._embed(cuts)

    @torch.no_grad()
    def look(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """(F, H, W, 3) -> what was found in each frame, and whom it looks like."""
        return [self._look(_to_unit_batch(frame)) for frame in frames]

    def _look(self, frame: Tensor) -> Detections:
        """(1, 3, H, W) in [0, 1]."""
        boxes = self._boxes(frame)
        regions = self._regions(frame, boxes)
        regions = regions[regions.flatten(1).any(1)]
        if len(regions) == 0:
            return Detections(np.zeros((0, *frame.shape[2:]), bool), np.empty((0, len(self._known)), np.float32))
        cuts = crop_subjects(frame.expand(len(regions), -1, -1, -1), regions.float(), side=EMBEDDED)
        vectors = self._embed(list(cuts))
        similarity = torch.stack([(vectors @ own.T).amax(1) for own in self._known], 1)
        return Detections(regions.numpy(), similarity.numpy())

    def _boxes(self, frame: Tensor) -> Tensor:
        """(1, 3, H, W) -> (R, 4): left, top, right, bottom as shares of the frame, surest first."""
        H, W = frame.shape[2:]
        scale = min(SHORTEST / min(H, W), LONGEST / max(H, W))
        seen = _normalize(frame, (round(H * scale), round(W * scale)))
        found = self._detector(pixel_values=seen, **self._words)
        scores = found.logits[0].sigmoid().amax(-1)
        centre, size = found.pred_boxes[0].split(2, -1)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)
        pixels = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], -1) * torch.tensor([W, H, W, H])
        kept = cv2.dnn.NMSBoxes(pixels.tolist(), scores.tolist(), FOUND, TWICE)
        return corners[[int(k) for k in kept][:MOST]]

    def _regions(self, frame: Tensor, boxes: Tensor) -> Tensor:
        """(1, 3, H, W), (R, 4) -> (R, H, W), True where the thing in a box is."""
        if len(boxes) == 0:
            return torch.zeros(0, *frame.shape[2:], dtype=torch.bool)
        side = self._segmenter.config.prompt_encoder_config.image_size
        seen = _normalize(frame, (side, side))
        masks = self._segmenter(pixel_values=seen, input_boxes=boxes[None] * side, multimask_output=False).pred_masks
        return functional.interpolate(masks[0], frame.shape[2:], mode="bilinear")[:, 0] > 0

    @torch.no_grad()
    def _embed(self, cuts: Sequence[Tensor]) -> Tensor:
        """(3, s, s) each, in [0, 1] -> (P, d), unit vectors."""
        seen = _normalize(torch.stack(list(cuts)), (EMBEDDED, EMBEDDED))
        return functional.normalize(self._embedder(pixel_values=seen).pooler_output.float(), dim=-1)


def _to_unit_batch(picture: NDArray[np.uint8]) -> Tensor:
    return to_unit(torch.from_numpy(np.array(picture)[None]))


def _normalize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """(P, 3, H, W) in [0, 1] -> the size a network reads, by its mean and spread."""
    sized = functional.interpolate(pictures, size, mode="bilinear", antialias=True)
    return (sized - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(SPREAD).view(3, 1, 1)
