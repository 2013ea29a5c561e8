"""ONNX files with weights of our own choice, in the form in which YuNet and SFace are published.

OpenCV reads nothing else for faces, and no library that writes ONNX is needed for two convolutions: the format is
protobuf, field by field (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FLOAT, INT64 = 1, 7
STRIDES = (8, 16, 32)


def write_faces(folder: Path) -> Path:
    """A detector that takes every red cell of 32 pixels for a face, and a recogniser that goes by mean colour."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "face_detection_yunet_2026may.onnx").write_bytes(_yunet())
    (folder / "face_recognition_sface_2021dec.onnx").write_bytes(_sface())
    return folder


def _yunet() -> bytes:
    nodes, tensors, outputs = [], [], []
    eyes_nose_mouth = [0.3, 0.35, 0.7, 0.35, 0.5, 0.55, 0.35, 0.75, 0.65, 0.75]
    for stride in STRIDES:
        red = np.zeros((1, 3, stride, stride), np.float32)  # blue, green, red
        red[0, 2], red[0, 1] = 2 / (255 * stride**2), -2 / (255 * stride**2)  # a third of the cell is enough
        quiet = [0.0] if stride == 32 else [-2.0]
        heads = {"cls": (red, quiet), "obj": (red, quiet), "bbox": (None, [0.5, 0.5, 0.0, 0.0])}
        for name, (weight, bias) in {**heads, "kps": (None, eyes_nose_mouth)}.items():
            key, width = f"{name}_{stride}", len(bias)
            weight = np.zeros((width, 3, stride, stride), np.float32) if weight is None else weight
            tensors += [_tensor(f"{key}_w", weight), _tensor(f"{key}_b", np.array(bias, np.float32))]
            tensors.append(_tensor(f"{key}_s", np.array([1, -1, width], np.int64)))
            nodes.append(_node("Conv", ["input", f"{key}_w", f"{key}_b"], f"{key}_c", strides=[stride, stride]))
            nodes.append(_node("Transpose", [f"{key}_c"], f"{key}_t", perm=[0, 2, 3, 1]))
            nodes.append(_node("Reshape", [f"{key}_t", f"{key}_s"], key))
            outputs.append(_value(key, [1, f"n{stride}", width]))
    return _model(nodes, tensors, [_value("input", [1, 3, "height", "width"])], outputs)


def _sface() -> bytes:
    mean = np.zeros((3, 3, 112, 112), np.float32)
    mean[range(3), range(3)] = 1 / (128 * 112**2)
    tensors = [_tensor("w", mean), _tensor("b", np.array([-1, -1, -1], np.float32))]
    tensors.append(_tensor("s", np.array([1, -1], np.int64)))
    nodes = [_node("Conv", ["data", "w", "b"], "c", strides=[112, 112]), _node("Reshape", ["c", "s"], "fc1")]
    return _model(nodes, tensors, [_value("data", [1, 3, 112, 112])], [_value("fc1", [1, 3])])


# --- protobuf --------------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (1 << 64) - 1)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, array: np.ndarray) -> bytes:
    kind = FLOAT if array.dtype == np.float32 else INT64
    shape = b"".join(_number(1, side) for side in array.shape)
    return shape + _number(2, kind) + _bytes(8, name) + _bytes(9, array.tobytes())


def _node(kind: str, inputs: list[str], output: str, **attributes: list[int]) -> bytes:
    said = b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output) + _bytes(3, output) + _bytes(4, kind)
    for name, values in attributes.items():
        said += _bytes(5, _bytes(1, name) + b"".join(_number(8, value) for value in values) + _number(20, 7))
    return said


def _value(name: str, shape: list[int | str]) -> bytes:
    sides = (_bytes(1, _bytes(2, side) if isinstance(side, str) else _number(1, side)) for side in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, FLOAT) + _bytes(2, b"".join(sides))))


def _model(nodes: list[bytes], tensors: list[bytes], inputs: list[bytes], outputs: list[bytes]) -> bytes:
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, "drawn by hand")
    for field, values in ((5, tensors), (11, inputs), (12, outputs)):
        graph += b"".join(_bytes(field, value) for value in values)
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, "") + _number(2, 13))
