"""Weights in files: looked at without reading them, then read one tensor after the other.

In:  a safetensors or GGUF file, or a folder with safetensors.
Out: names, shapes and number formats of all tensors; then each tensor as asked for, scaled fp8 and GGUF unpacked.
Knows nothing of models, nor of what a name means. What a file is, its bytes tell, not its ending.

Scaled fp8 comes in two kinds: `x.weight` times `x.scale_weight`, with a tensor `scaled_fp8` as the mark (Kijai, older
ComfyUI), and `x.weight` times `x.weight_scale`, with `x.comfy_quant` naming the format (newer ComfyUI).
"""

from __future__ import annotations

import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.hardware.oom import which_memory
from engine.messages import StudioError

WHOLE = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # beside it only variants of the same weights
WHOLE_PREFIX = "model.diffusion_model."  # a ComfyUI checkpoint; what else it holds is another part
PREFIXES = (WHOLE_PREFIX, "diffusion_model.", "model.")
SCALES = (".scale_weight", ".weight_scale")
# Of no use here: marks and scales of activations, and the tokenizer that ComfyUI keeps in a text encoder's file.
ASIDE = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant", "spiece_model")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
UNPACKED_AT_ONCE = 2**18  # weights of a GGUF tensor: 1 MB in fp32, and a few copies of that
STARTS = {
    b"PK\x03\x04": "It is a pickle, not a safetensors file.",
    b"\x80\x02": "It is a pickle, not a safetensors file.",
    b"version https://git-lfs": "It is a pointer of Git LFS, not the weights that it points at.",
    b"<": "It is a web page, not weights.",
}


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    stored: str
    """The format's own word: F32, BF16, F8_E4M3, Q4_K, ..."""


class TensorSource(ABC):
    """An opened file. `place` is what a person chose; `entries` are its tensors."""

    def __init__(self, place: Path, entries: Mapping[str, Entry]) -> None:
        self.place = place
        self.entries = entries

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """One tensor on the processor, in its own precision; packed and scaled ones in fp32.

        It may still lie in the file: copy what is to be kept.

        Raises:
            StudioError: the file is cut short.
        """


def load_error(place: Path, reason: str) -> StudioError:
    """The error for a file that cannot be loaded, by its name."""
    return StudioError(
        what=f"{place.name} cannot be loaded.",
        why=reason,
        next_step="Fetch the file again, or choose another one.",
        field="preset",
    )


@contextmanager
def open_tensors(place: Path) -> Iterator[TensorSource]:
    """Look at a file, or at the safetensors of a folder.

    Args:
        place: a file; or a folder, whose index says which of its files belong together where there is one.

    Raises:
        StudioError: it is neither, damaged, cut short, or packed in a way that nothing here unpacks.
    """
    files = _files(place)
    with ExitStack() as stack:
        try:
            made = _Gguf(place, files[0], stack) if _kind(files[0]) == "gguf" else _Safetensors(place, files, stack)
        except (SafetensorError, OSError, ValueError) as error:
            if which_memory(error):
                raise
            raise load_error(place, f"It is damaged or cut short ({str(error)[:120]}).") from None
        yield made


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    listed = _listed(place)
    whole = [place / name for name in WHOLE if (place / name).is_file()]
    files = [place / name for name in sorted(set(listed.values()))] or whole[:1] or sorted(place.glob("*.safetensors"))
    missing = [key for key, name in listed.items() if not (place / name).is_file()]
    if missing:
        raise load_error(place, f"{len(missing)} weights of its index are in no file that is here.")
    if not files:
        raise load_error(place, "An empty folder is not a safetensors file.")
    wrong = next((file for file in files if _kind(file) != "safetensors"), None)
    if wrong is not None:
        raise load_error(place, f"{wrong.name} is not a safetensors file.")
    return files


def _listed(folder: Path) -> dict[str, str]:
    """Which file holds which weight, as the index of shards says, where there is one."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        return {}
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(name).name != name for name in listed.values()):
            raise ValueError("a file outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise load_error(folder, f"{index.name} is no index of shards ({str(error)[:80]}).") from None
    return listed


def _kind(file: Path) -> str:
    """ "safetensors" or "gguf", by the first bytes."""
    with file.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{":  # before anything else: the eight bytes of its length may look like any other start
        return "safetensors"
    reason = next((what for start, what in STARTS.items() if head.lstrip().startswith(start)), None)
    raise load_error(file, reason or "It begins neither like a safetensors nor like a GGUF file.")


def _without_prefix(keys: list[str]) -> dict[str, str]:
    """Name -> key in the file, without the prefix that a checkpoint's transformer wears."""
    if any(key.startswith(WHOLE_PREFIX) for key in keys):
        keys = [key for key in keys if key.startswith(WHOLE_PREFIX)]
    weights = [key for key in keys if not key.endswith(ASIDE)]
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), "")
    return {key.removeprefix(prefix): key for key in keys}


# --- safetensors ----------------------------------------------------------------------------------------------------


class _Safetensors(TensorSource):
    def __init__(self, place: Path, files: list[Path], stack: ExitStack) -> None:
        self._in: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            _check_format(place, (handle.metadata() or {}).get("_quantization_metadata", ""))
            for key in handle.keys():  # noqa: SIM118 - a safetensors file is not a dict
                if key in self._in:
                    raise load_error(place, f"{key} is in {file.name} and in another file beside it.")
                self._in[key] = handle
        self._keys = _without_prefix(list(self._in))
        self._scales: dict[str, str] = {}
        for name in list(self._keys):
            suffix = next((end for end in SCALES if name.endswith(end)), None)
            if suffix is not None:
                self._scales[f"{name.removesuffix(suffix)}.weight"] = self._keys.pop(name)
            elif name.endswith(ASIDE):
                key = self._keys.pop(name)
                if name.endswith(".comfy_quant"):
                    _check_format(place, bytes(self._in[key].get_tensor(key).tolist()).decode("utf-8"))
        entries = {}
        for name, key in self._keys.items():
            part = self._in[key].get_slice(key)
            entries[name] = Entry(tuple(part.get_shape()), part.get_dtype())
        super().__init__(place, entries)
        self._check_stored()

    def _check_stored(self) -> None:
        for name, entry in self.entries.items():
            if entry.stored not in FLOATS:
                raise load_error(self.place, f"{name} is stored as {entry.stored}, which nothing here unpacks.")
        astray = [name for name in self._scales if name not in self.entries]
        if astray:
            raise load_error(self.place, f"It holds a scale for {astray[0]}, which is not in it.")

    def read(self, key: str) -> Tensor:
        name = self._keys[key]
        try:
            tensor = self._in[name].get_tensor(name)
            if key not in self._scales:
                return tensor
            scale = self._in[self._scales[key]].get_tensor(self._scales[key]).float().flatten()
        except (SafetensorError, OSError, ValueError) as error:
            if which_memory(error):
                raise
            raise load_error(self.place, f"{key} cannot be read ({str(error)[:120]}).") from None
        if scale.numel() not in (1, tensor.shape[0]):
            raise load_error(self.place, f"{key} has {scale.numel()} scales for {tensor.shape[0]} rows.")
        return tensor.float().mul_(scale.view(-1, *[1] * (tensor.ndim - 1)) if tensor.ndim else scale[0])


def _check_format(place: Path, told: str) -> None:
    """Refuse what ComfyUI packs in another way than as scaled fp8."""
    if not told:
        return
    document = json.loads(told)
    if not isinstance(document, dict):
        raise ValueError("its formats are no table")
    layers = document.get("layers", {"": document})
    for layer in layers.values() if isinstance(layers, dict) else layers:
        name = str(layer.get("format") if isinstance(layer, dict) else layer)
        if not name.startswith("float8_"):
            raise load_error(place, f"Its layers are stored as {name[:40]}, which nothing here unpacks.")


# --- GGUF -----------------------------------------------------------------------------------------------------------
# The header is read here and not by the library's reader: that one counts to whatever number a file claims.

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
TRUE_SHAPE = "comfy.gguf.orig_shape."  # rows that are no multiple of a block were folded before packing


class _Packed(NamedTuple):
    start: int
    type: Any
    packed: tuple[int, int]
    """How many weights are a block, and the bytes it takes; `type` is the library's own name for it."""


class _Gguf(TensorSource):
    def __init__(self, place: Path, file: Path, stack: ExitStack) -> None:
        self._handle: BufferedReader = stack.enter_context(file.open("rb"))
        self._size = file.stat().st_size
        self._parts: dict[str, _Packed] = {}
        entries = self._header(place)
        self._keys = _without_prefix(list(entries))
        super().__init__(place, {name: entries[key] for name, key in self._keys.items()})

    def read(self, key: str) -> Tensor:
        from diffusers.quantizers.gguf.utils import dequantize_functions

        start, kind, (block, size) = self._parts[self._keys[key]]
        count = math.prod(self.entries[key].shape)
        stored = {"F32": torch.float32, "F16": torch.float16}.get(self.entries[key].stored)
        unpacked = torch.empty(count, dtype=stored or torch.float32)
        self._handle.seek(start)
        if stored is not None:
            self._fill(key, unpacked.view(torch.uint8))
            return unpacked.view(self.entries[key].shape)
        step = max(1, UNPACKED_AT_ONCE // block)
        for first in range(0, count // block, step):
            blocks = torch.empty(min(step, count // block - first), size, dtype=torch.uint8)
            self._fill(key, blocks)
            values = dequantize_functions[kind](blocks, block, size, dtype=torch.float32)
            unpacked[first * block : (first + len(blocks)) * block] = values.flatten()
        return unpacked.view(self.entries[key].shape)

    def _fill(self, key: str, room: Tensor) -> None:
        if self._handle.readinto(memoryview(cast(Any, room.numpy())).cast("B")) != room.numel():
            raise load_error(self.place, f"It is cut short in the middle of {key}.")

    def _header(self, place: Path) -> dict[str, Entry]:
        from diffusers.quantizers.gguf.utils import dequantize_functions
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *dequantize_functions}
        _, version, tensors, fields = self._next("4sIQQ")
        if version not in (2, 3):
            raise load_error(place, f"It is GGUF of version {version}; 2 and 3 can be read.")
        told = dict(self._field() for _ in range(fields))
        found: dict[str, tuple[Entry, int, int]] = {}
        for _ in range(tensors):
            key = self._text()
            (dims,) = self._next("I")
            shape = self._next(f"{dims}Q")[::-1] if 0 < dims <= 8 else ()
            kind, offset = self._next("IQ")
            if kind not in known:
                names = {each.value: each.name for each in GGMLQuantizationType}
                raise load_error(place, f"{key} is stored as {names.get(kind, kind)}, which nothing here unpacks.")
            if not shape or key in found:
                raise ValueError(f"{key} has {dims} dimensions, or is there twice")
            true = told.get(TRUE_SHAPE + key, shape)
            if math.prod(true) != math.prod(shape):
                raise ValueError(f"{key} has two shapes")
            found[key] = Entry(tuple(true), GGMLQuantizationType(kind).name), kind, offset
        align = told.get("general.alignment", 32)
        start = -(-self._handle.tell() // max(1, align)) * align
        for key, (entry, kind, offset) in found.items():
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            count = math.prod(entry.shape)
            if count % block or start + offset + count // block * size > self._size:
                raise ValueError(f"{key} does not end inside the file")
            self._parts[key] = _Packed(start + offset, GGMLQuantizationType(kind), (block, size))
        return {key: entry for key, (entry, _, _) in found.items()}

    def _field(self) -> tuple[str, Any]:
        """One entry of the metadata; of lists only those of numbers are kept."""
        key = self._text()
        (kind,) = self._next("I")
        if kind == TEXT:
            return key, self._text()
        if kind != ARRAY:
            return key, self._next(_scalar(kind))[0]
        kind, count = self._next("IQ")
        if kind == TEXT:
            for _ in range(count):
                self._text()
            return key, None
        return key, self._next(f"{count}{_scalar(kind)}")

    def _text(self) -> str:
        (length,) = self._next("Q")
        return self._take(length).decode("utf-8")

    def _next(self, form: str) -> tuple[Any, ...]:
        try:
            return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))
        except struct.error as error:
            raise ValueError(str(error)) from None

    def _take(self, count: int) -> bytes:
        """The next bytes of the header; nothing is made room for that the file does not hold."""
        if count > self._size - self._handle.tell():
            raise ValueError("its header says more than the file holds")
        return self._handle.read(count)


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return SCALARS[kind]
