"""A `.pth` that somebody names becomes safetensors, once, in a process of its own; then nobody opens it again.

In:  a file as `torch.save` writes it.
Out: a safetensors file with the same names and tensors, whole or not at all, and what it hashes to.
Knows nothing of torch, which only the child (`engine.hub.pickle_worker`) imports, nor of models or repositories.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from engine.hub.download import exclusive_lock, file_size
from engine.messages import StudioError
from engine.paths import ROOT
from engine.platform_calls import NO_WINDOW

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
DIGITS = 32  # of its own sha256 that the name of such a file shows; all 64 would be too long a path for Windows
LOOK_S = 0.1  # how often the child is looked at


class NotWeights(StudioError):
    """The file itself is the reason: it holds code or no weights, or is damaged. Trying again would not help."""


def is_pickle(path: str) -> bool:
    """Whether a file of that name may hold code, and is to be converted before anything is loaded from it."""
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def convert_once(pickle: Path, folder: Path, digest: str, say: Callable[[int], None], *, name: str) -> Path:
    """The safetensors of a pickle, `<hash of the pickle>.<own hash>.safetensors` in that folder; made where missing.

    One process at a time makes it; what a killed one has left half is written over.

    Args:
        digest: what the pickle hashes to.
        say: hears how many bytes are written; what it raises stops the conversion.
        name: what a person calls the pickle.

    Raises:
        StudioError: see `convert_pth`.
    """
    fresh = folder / f"{digest}.converting"
    with exclusive_lock(folder / f"{digest}.lock", lambda: say(file_size(part_path(fresh)))):
        if (made := find_converted(folder, digest)) is not None:
            return made
        made = folder / f"{digest}.{convert_pth(pickle, fresh, say, name=name)[:DIGITS]}.safetensors"
        fresh.replace(made)
        return made


def find_converted(folder: Path, digest: str) -> Path | None:
    """What was made of the pickle with this hash, when it is in that folder."""
    return next(iter(sorted(folder.glob(f"{digest}.*.safetensors"))), None)


def hash_in_name(made: Path) -> str:
    """The first digits of what such a file has to hash to, as its name shows them."""
    return made.name.split(".")[1]


def convert_pth(path: Path, target: Path, say: Callable[[int], None] = lambda count: None, *, name: str = "") -> str:
    """Write the tensors of a `.pth` as safetensors; only plain ones are let in.

    Args:
        path: written by torch of 2020 or later.
        target: the file to write; it appears whole or not at all, in place of what was there.
        say: hears how many bytes are written; what it raises stops the conversion.
        name: what the person calls the file; left out, its own name.

    Returns:
        The sha256 of what was written.

    Raises:
        NotWeights: the file holds code or no weights, or is damaged.
        StudioError: it cannot be read or written, or the child was ended.
    """
    part = part_path(target)
    command = [sys.executable, "-X", "utf8", "-m", "engine.hub.pickle_worker", "--while-asked"]
    target.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        [*command, str(path.resolve()), str(target.resolve())], cwd=ROOT, encoding="utf-8", errors="replace",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        creationflags=NO_WINDOW,
    )  # fmt: skip
    with child:
        try:
            while child.poll() is None:
                say(file_size(part))
                time.sleep(LOOK_S)
            lines = (child.stdout.read() if child.stdout else "").strip().splitlines()
        finally:
            child.kill()
            child.wait()
            part.unlink(missing_ok=True)
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if child.returncode == 0:
        return said["sha256"]
    kind = NotWeights if said.get("for_good") else StudioError
    raise kind(
        what=f"{name or path.name} cannot be turned into safetensors.",
        why=said.get("reason") or f"The process that read it ended without a reason (code {child.returncode}).",
        next_step="Look for one in safetensors." if kind is NotWeights else "Try again.",
        field="preset",
    )


def part_path(target: Path) -> Path:
    """What the child writes before it is whole."""
    return target.with_name(f"{target.name}.new")
