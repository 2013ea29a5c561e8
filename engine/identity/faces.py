"""People known by their faces: YuNet finds them, SFace compares them, both in OpenCV on the processor.

In:  a folder with the two ONNX files, pictures and frames as uint8 RGB.
Out: boxes and unit vectors; `Faces` answers for people in an identity report (`engine.identity.reporter.Evaluator`).
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


class FaceFiles:
    """YuNet and SFace from a folder that holds their ONNX files under the names they are published with.

    Sources: opencv/face_detection_yunet and opencv/face_recognition_sface on the Hub (MIT, Apache-2.0).

    Raises:
        OSError, cv2.error: a file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        # OpenCV's new graph engine warns of a setting that nobody made.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        yunet, sface = (_newest(folder, name) for name in ("face_detection_yunet", "face_recognition_sface"))
        self._detector = cv2.FaceDetectorYN.create(str(yunet), "", (320, 320), score_threshold=CERTAIN)
        self._recognizer = cv2.FaceRecognizerSF.create(str(sface), "")

    def find(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(H, W, 3) RGB -> boxes (R, 4) of left, top, width, height, and unit vectors (R, d); the surest first."""
        bgr = np.ascontiguousarray(picture[..., ::-1])
        self._detector.setInputSize((bgr.shape[1], bgr.shape[0]))
        rows = self._detector.detect(bgr)[1]
        rows = np.empty((0, 15), np.float32) if rows is None else rows[np.argsort(-rows[:, -1])][:MOST]
        aligned = (self._recognizer.alignCrop(bgr, row) for row in rows)
        vectors = [np.asarray(self._recognizer.feature(face), np.float32).flatten() for face in aligned]
        units = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in vectors]
        return np.asarray(rows[:, :4], np.float32), np.stack(units) if units else np.empty((0, 1), np.float32)

    def known(self, own: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """The surest face of each picture: (V, d), fewer than the pictures where one shows none."""
        found = [vectors[:1] for _, vectors in (self.find(picture) for picture in own) if len(vectors)]
        return np.concatenate(found) if found else np.empty((0, 1), np.float32)


def _newest(folder: Path, name: str) -> Path:
    """The file of that name; of several years the last, which is the one that the newest OpenCV reads."""
    found = sorted(folder.glob(f"{name}*.onnx"), key=lambda path: path.stem.removeprefix(name))
    if not found:
        raise FileNotFoundError(f"{name}.onnx is not there.")
    return found[-1]


class Faces:
    """The witness for people. `known` holds the faces (V, d) of each."""

    title = "faces, YuNet and SFace"

    def __init__(self, files: FaceFiles, known: Sequence[NDArray[np.float32]]) -> None:
        self._files, self._known = files, known

    def look(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """(F, H, W, 3) -> the face boxes of each frame, and whom they look like."""
        sights = []
        for frame in frames:
            boxes, vectors = self._files.find(frame)
            regions = np.zeros((len(boxes), *frame.shape[:2]), bool)
            for region, (left, top, wide, high) in zip(regions, boxes.round().astype(int), strict=True):
                region[max(0, top) : max(0, top + high), max(0, left) : max(0, left + wide)] = True
            alike = [(vectors @ own.T).max(1) for own in self._known] if len(boxes) else []
            shape = (0, len(self._known))
            sights.append(Detections(regions, np.stack(alike, 1) if alike else np.empty(shape, np.float32)))
        return sights
