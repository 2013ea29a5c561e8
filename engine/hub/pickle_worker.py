"""The child that reads a pickle and writes safetensors; `engine.hub.pickles` starts it.

In:  a file as `torch.save` writes it.
Out: a safetensors file with the same names and tensors; as JSON in the last line its sha256, or why there is none.
Knows nothing of models. Only plain tensors are let in (`weights_only`); a pickle that asks for code is refused.

    python -m engine.hub.pickle_worker SOURCE TARGET
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from engine.hub.pickles import part_path

NESTS = ("state_dict", "model_state", "model", "module", "ema")  # where a training run keeps its weights
STORED = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
AT_ONCE = 2**24  # bytes


def main(arguments: list[str]) -> int:
    """0, or 1 with the reason."""
    parser = argparse.ArgumentParser(prog="python -m engine.hub.pickle_worker", description="A .pth into safetensors.")
    parser.add_argument("--while-asked", action="store_true", help="end when stdin does: whoever asked is gone")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    part = part_path(given.target)
    if given.while_asked:
        threading.Thread(target=_exit_with_stdin, args=(part,), daemon=True).start()
    try:
        with given.source.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise ValueError("not a file that torch has written since 2020, or cut short")
        tensors = _extract_tensors(torch.load(given.source, map_location="cpu", weights_only=True, mmap=True))
        given.target.parent.mkdir(parents=True, exist_ok=True)
        digest = _write(tensors, part)
        part.replace(given.target)
    except Exception as error:
        sys.stdout.write(json.dumps({"reason": _explain_error(error), "for_good": not _is_system_error(error)}) + "\n")
        return 1
    finally:
        part.unlink(missing_ok=True)
    sys.stdout.write(json.dumps({"sha256": digest}) + "\n")
    return 0


def _exit_with_stdin(part: Path) -> None:
    """Whoever waits for this process holds its stdin; when they are killed, nothing half stays behind."""
    while os.read(0, 1):  # not through sys.stdin, whose lock this thread would hold when the process ends by itself
        pass
    with contextlib.suppress(OSError):  # Windows keeps an open file; whoever converts next writes over it
        part.unlink(missing_ok=True)
    os._exit(1)


def _is_system_error(error: Exception) -> bool:
    """Whether another try might go well; torch says a lack of memory in words alone."""
    return isinstance(error, (OSError, MemoryError)) or "memory" in str(error)


def _explain_error(error: Exception) -> str:
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    if type(error).__name__ == "UnpicklingError":
        return "It holds code or objects, not only weights, and was not opened."
    if _is_system_error(error):
        return f"The system says: {getattr(error, 'strerror', None) or first}."
    return f"It is damaged, or no file of weights ({first})."


def _extract_tensors(held: Any) -> dict[str, Tensor]:
    """Names and tensors."""
    while isinstance(held, dict) and not all(isinstance(value, Tensor) for value in held.values()):
        nest = next((name for name in NESTS if isinstance(held.get(name), dict)), None)
        if nest is None:
            break
        held = held[nest]
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError("no table of names and tensors")
    strange = next((tensor.dtype for tensor in held.values() if tensor.dtype not in STORED), None)
    if strange is not None:
        raise ValueError(f"numbers of the kind {strange}")
    return {str(name): tensor.detach() for name, tensor in held.items()}


def _write(tensors: dict[str, Tensor], file: Path) -> str:
    """Write a safetensors file tensor by tensor; gives its sha256.

    By hand: the library writes under a name of its own, as large as it will be from the start, so that nobody sees how
    far it is, and a killed process leaves it lying there.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    # Wide numbers first, as the library has them, so that each tensor begins at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": STORED[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as handle:
        for piece in (len(told).to_bytes(8, "little"), told):
            handle.write(piece)
            digest.update(piece)
        for name in order:
            # One that is a part or a turn of another is laid out for itself.
            flat = memoryview(cast(Any, tensors[name].contiguous().flatten().view(torch.uint8).numpy()))
            for start in range(0, len(flat), AT_ONCE):
                handle.write(flat[start : start + AT_ONCE])
                digest.update(flat[start : start + AT_ONCE])
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
