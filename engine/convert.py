"""A `.pth` into safetensors, once, in a process of its own; afterwards nobody opens the `.pth` again.

In:  a file as `torch.save` writes it.
Out: a safetensors file with the same names and tensors.
Knows nothing of models. Only plain tensors are let in (`weights_only`); a pickle that asks for code is refused.

    python -m engine.convert SOURCE TARGET
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.messages import StudioError

ROOT = Path(__file__).resolve().parent.parent
NESTS = ("state_dict", "model_state", "model", "module", "ema")  # where a training run keeps its weights


def convert_pth(path: Path, target: Path) -> Path:
    """Write the tensors of a `.pth` as safetensors, unless that was done before.

    Args:
        path: written by torch of 2020 or later.
        target: the file to write; it appears whole or not at all.

    Returns:
        `target`.

    Raises:
        StudioError: the file holds code or no weights, is damaged, or cannot be written.
    """
    if target.is_file():
        return target
    command = [sys.executable, "-X", "utf8", "-m", "engine.convert", str(path.resolve()), str(target.resolve())]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if ran.returncode == 0:
        return target
    lines = ran.stdout.strip().splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    raise StudioError(
        what=f"{path.name} cannot be turned into safetensors.",
        why=said.get("reason") or f"The process that read it ended without a reason (code {ran.returncode}).",
        next_step="Fetch the file again, or look for one in safetensors.",
        field="preset",
    )


def main(arguments: list[str]) -> int:
    """The child's part: 0, or 1 with the reason as JSON in the last line."""
    parser = argparse.ArgumentParser(prog="python -m engine.convert", description="A .pth into safetensors.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    part = given.target.with_name(f"{given.target.name}.{os.getpid()}.part")
    try:
        with given.source.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise ValueError("not a file that torch has written since 2020, or cut short")
        tensors = _tensors(torch.load(given.source, map_location="cpu", weights_only=True, mmap=True))
        given.target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part)
        part.replace(given.target)
    except Exception as error:
        sys.stdout.write(json.dumps({"reason": _reason(error)}) + "\n")
        return 1
    finally:
        part.unlink(missing_ok=True)
    return 0


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    if type(error).__name__ == "UnpicklingError":
        return "It holds code or objects, not only weights, and was not opened."
    if isinstance(error, OSError):
        return f"The system says: {error.strerror or first}."
    return f"It is damaged, or no file of weights ({first})."


def _tensors(held: Any) -> dict[str, Tensor]:
    """Names and tensors, each with memory of its own, as safetensors wants them."""
    while isinstance(held, dict) and not all(isinstance(value, Tensor) for value in held.values()):
        nest = next((name for name in NESTS if isinstance(held.get(name), dict)), None)
        if nest is None:
            break
        held = held[nest]
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError("no table of names and tensors")
    taken: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, tensor in held.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in taken
        taken.add(storage.data_ptr())
        made[str(name)] = tensor.detach().contiguous() if alone else tensor.detach().clone().contiguous()
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
