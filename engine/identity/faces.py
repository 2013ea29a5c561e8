"""People known by their faces: YuNet finds them, SFace compares them, both in OpenCV on the processor.

In:  a folder with the two ONNX files, pictures and frames as uint8 RGB.
Out: boxes and unit vectors; `FaceEvaluator` measures people for an identity report (it is an
`engine.identity.reporter.Evaluator`).
Knows nothing of subjects, jobs or models.

Shapes: F frames, N subjects, V pictures of each, R faces, H x W pixels, d numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.identity.reporter import Detections

CERTAIN = 0.7  # YuNet's score of a face
MOST = 12  # faces of a frame


class FaceModels:
    """YuNet and SFace from a folder that holds their ONNX files under the names they are published with.

    Sources: opencv/face_detection_yunet and opencv/face_recognition_sface on the Hub (MIT, Apache-2.0).

    Raises:
        OSError, cv2.error: a file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        # OpenCV's new graph engine warns of a setting that nobody made.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        yunet = _newest(folder, "face_detection_yunet")
        sface = _newest(folder, "face_recognition_sface")
        self._detector = cv2.FaceDetectorYN.create(str(yunet), "", (320, 320), score_threshold=CERTAIN)
        self._recognizer = cv2.FaceRecognizerSF.create(str(sface), "")

    def find(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(H, W, 3) RGB -> boxes (R, 4) of left, top, width, height, and unit vectors (R, d); the surest first."""
        bgr = np.ascontiguousarray(picture[..., ::-1])
        self._detector.setInputSize((bgr.shape[1], bgr.shape[0]))
        rows = self._detector.detect(bgr)[1]
        if rows is None or not len(rows):
            return np.empty((0, 4), np.float32), np.empty((0, 1), np.float32)
        surest = rows[np.argsort(-rows[:, -1])][:MOST]
        units = np.stack([self._embed(bgr, row) for row in surest])
        return np.asarray(surest[:, :4], np.float32), units

    def _embed(self, bgr: NDArray[np.uint8], row: NDArray[np.float32]) -> NDArray[np.float32]:
        """The unit vector (d,) of the face that a row of the detector describes."""
        face = self._recognizer.alignCrop(bgr, row)
        vector = np.asarray(self._recognizer.feature(face), np.float32).flatten()
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def known(self, own: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """The surest face of each picture: (V, d), fewer than the pictures where one shows none."""
        found: list[NDArray[np.float32]] = []
        for picture in own:
            _, vectors = self.find(picture)
            if len(vectors):
                found.append(vectors[:1])
        if not found:
            return np.empty((0, 1), np.float32)
        return np.concatenate(found)


def _newest(folder: Path, name: str) -> Path:
    """The file of that name; of files of several years the latest, which the newest OpenCV reads."""
    found = sorted(folder.glob(f"{name}*.onnx"), key=lambda path: path.stem.removeprefix(name))
    if not found:
        raise FileNotFoundError(f"{name}.onnx is not there.")
    return found[-1]


class FaceEvaluator:
    """The evaluator for people. `known` holds the faces (V, d) of each person."""

    title = "faces, YuNet and SFace"

    def __init__(self, files: FaceModels, known: Sequence[NDArray[np.float32]]) -> None:
        self._files, self._known = files, known

    def look(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """(F, H, W, 3) -> the face boxes of each frame, and whom they look like."""
        found = []
        for frame in frames:
            boxes, vectors = self._files.find(frame)
            regions = np.zeros((len(boxes), *frame.shape[:2]), bool)
            for region, (left, top, wide, high) in zip(regions, boxes.round().astype(int), strict=True):
                region[max(0, top) : max(0, top + high), max(0, left) : max(0, left + wide)] = True
            similarity = np.empty((0, len(self._known)), np.float32)
            if len(boxes) and self._known:
                similarity = np.stack([(vectors @ own.T).max(1) for own in self._known], 1)
            found.append(Detections(regions, similarity))
        return found
