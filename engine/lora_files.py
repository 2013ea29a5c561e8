"""LoRA files on disk: which files there are, which one a document means, and whether it is still the same file.

In:  the `Lora`s of a job, and the folder `loras` in the creator's folder of models.
Out: paths, names, hashes; a `StudioError` for a file that is missing, or another one than the document says.
Knows nothing of torch, of what is in such a file, or of the model it is for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from engine.job import GenerateJob, Lora
from engine.messages import StudioError
from engine.paths import models_dir

SUFFIX = ".safetensors"
SHOWN_HASH = 12  # digits of a hash that a person compares
MOST_NAMES = 2000  # a folder with more is somebody's whole archive, and no list to choose from


def folder() -> Path:
    """Where LoRA files lie, in subfolders as their owner likes."""
    return models_dir() / "loras"


def names() -> list[str]:
    """Every LoRA file of the folder, by its path there with forward slashes, sorted."""
    found: list[str] = []
    for place, inner, files in os.walk(folder()):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [
            (Path(place) / name).relative_to(folder()).as_posix()
            for name in files
            if name.lower().endswith(SUFFIX) and not name.startswith(".")
        ]
    return sorted(found, key=str.lower)[:MOST_NAMES]


def place(lora: Lora) -> Path:
    """The file that a document means: a name inside the folder, or a path of this machine.

    Raises:
        StudioError: field "loras"; it is not there, or of a kind that is not opened.
    """
    name = base_name(lora.path)
    if not name.lower().endswith(SUFFIX):
        raise StudioError(
            f"{name} is not opened as a LoRA.",
            f"Only {SUFFIX} files are: others can carry programs.",
            "Choose the LoRA's safetensors file.",
            field="loras",
        )
    found = _find_path(lora)
    if found is None or not found.is_file():
        made_with = ""
        if lora.sha256:
            made_with = f", {lora.sha256[:SHOWN_HASH]} by its hash,"
        raise StudioError(
            f"The LoRA {name}{made_with} is not here.",
            "The clip would be another one without it.",
            f"Put it into the folder loras of your models, or remove {name} from the job.",
            field="loras",
        )
    return found


def _find_path(lora: Lora) -> Path | None:
    path = Path(lora.path)
    if path.is_absolute():
        return path
    return _find_in_folder(lora.path)


def _find_in_folder(path: str) -> Path | None:
    """A name of the folder; where it is not there, the one file of that name in any of its subfolders."""
    if not _is_inside_folder(path):
        return None
    if (folder() / path).is_file():
        return folder() / path
    same = [name for name in names() if base_name(name) == base_name(path)]
    if len(same) != 1:
        return None
    return folder() / same[0]


def check(job: GenerateJob) -> None:
    """Refuse a job whose LoRA files are not there, without reading them.

    Raises:
        StudioError: field "loras"; see `place`.
    """
    for lora in job.loras:
        if lora.weight:
            place(lora)


def num_bytes(job: GenerateJob) -> int:
    """Bytes of the LoRA files that are used and here; one that is not is refused by whoever opens it."""
    found = [_find_path(lora) for lora in job.loras if lora.weight]
    return sum(path.stat().st_size for path in found if path is not None and path.is_file())


def locate(loras: Sequence[Lora]) -> tuple[Lora, ...]:
    """The same with the absolute path and the hash of every file that is used; one of weight 0 is never opened.

    Raises:
        StudioError: field "loras"; a file is missing, or another one than its hash says.
    """
    return tuple(_locate(lora) for lora in loras)


def _locate(lora: Lora) -> Lora:
    if not lora.weight:
        return lora
    path = place(lora)
    found = sha256(path)
    if lora.sha256 not in ("", found):
        raise StudioError(
            f"{path.name} is another file than the one this clip was made with.",
            f"Its hash begins with {found[:SHOWN_HASH]}, that one's with {lora.sha256[:SHOWN_HASH]}.",
            f"Put the earlier {path.name} back, or remove the LoRA and add it again to use the one that is here.",
            field="loras",
        )
    return lora.model_copy(update={"path": str(path.absolute()), "sha256": found})


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal; read again only when the file has changed.

    Raises:
        StudioError: field "loras"; it cannot be read.
    """
    try:
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise StudioError(
            f"{path.name} cannot be read.",
            f"The system says: {error.strerror or error}.",
            "Allow reading it, or choose another file.",
            field="loras",
        ) from error


@lru_cache(maxsize=64)  # half a second for every 300 MB, and clip after clip uses the same file
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what travels ----------------------------------------------------------------------------------------------------


def shorten_paths(job: GenerateJob) -> GenerateJob:
    """The job as it goes into a clip: a LoRA by its name in the folder, elsewhere by its file's name alone."""
    return _replace_paths(job, _shorten_path)


def drop_foreign_paths(job: GenerateJob) -> GenerateJob:
    """A job from elsewhere, with paths that lead outside this studio's folder of LoRAs replaced by the file's name.

    Nothing outside is ever touched, not even to see whether it exists: on Windows, asking for a network share logs in.
    """

    def path_of(path: str) -> str:
        if _is_inside_folder(path):
            return path
        return base_name(path)

    return _replace_paths(job, path_of)


def base_name(path: str) -> str:
    """The last part of a path as any system writes it."""
    return PurePosixPath(PureWindowsPath(path).as_posix()).name or path


def _shorten_path(path: str) -> str:
    whole = Path(path)
    if not whole.is_absolute():
        return path
    inner = Path(os.path.abspath(folder()))  # noqa: PTH100 - resolve() would follow links to where they really lie
    if whole.is_relative_to(inner):
        return whole.relative_to(inner).as_posix()
    return whole.name


def _is_inside_folder(path: str) -> bool:
    """Whether a name stays inside the folder it is looked up in, on every system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/") and not set(path) & set("\\:")


def _replace_paths(job: GenerateJob, path_of: Callable[[str], str]) -> GenerateJob:
    loras = tuple(lora.model_copy(update={"path": path_of(lora.path)}) for lora in job.loras)
    return job.model_copy(update={"loras": loras})
