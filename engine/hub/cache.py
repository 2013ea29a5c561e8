"""The files a preset needs, brought from the Hub once, whole and verified, to where every library looks for them.

In:  `FileRequest` files (repository, revision, path), a cache folder, perhaps a token.
Out: a plan (what is here, what is missing, how large), then the files in huggingface_hub's own cache layout.
Knows nothing of models or presets, and of how bytes are moved (`engine.hub.download`). The library tells sizes, hashes,
commits, what a folder holds and under which licence.

Layout: `models--<owner>--<name>/{blobs/<hash>, snapshots/<commit>/<path>, refs/<revision>}`. While a file is on its way
it is `blobs/<hash>.part`, which one process at a time holds by a lock; it becomes a blob in one move, once its hash is
right. A cut pull goes on from the part.

A pickle that was named itself is never loaded: once it is whole (`blobs/<hash>.pickle`), safetensors are made of it,
`blobs/<hash>.<own hash>.safetensors`, whose name in the snapshot is `<path>.safetensors`; then it goes. What another
program has fetched of it stays.
"""

from __future__ import annotations

import errno
import filecmp
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from engine.hub import download, pickles
from engine.hub.download import DamagedDownload, RemoteSource, ServerRefusal, file_size, hash_file, link_or_copy
from engine.hub.pickles import is_pickle
from engine.messages import StudioError

SPARE = 256 * 2**20  # bytes that stay free on the disk
TELLING = (".json", ".model", ".txt")  # configs and tokenizers
WEIGHTS = (".safetensors", ".gguf", ".onnx")  # of a folder, the first of these kinds that it holds


@dataclass(frozen=True)
class FileRequest:
    """One file of a repository."""

    repo: str  # owner/name
    path: str  # inside the repository, with forward slashes
    revision: str = "main"  # branch, tag or commit
    xet: bool = False  # its bytes are in the Hub's Xet store alone, as somebody knows beforehand

    def __post_init__(self) -> None:
        for text in (self.path, self.revision):
            if any(part in ("", ".", "..") or set(part) & set("\\:") for part in text.split("/")):
                raise StudioError(
                    f"{text[:80]!r} is no file or revision of a repository.",
                    "It leads out of the folder that the repository's files lie in.",
                    "Copy the name from the repository's page.",
                    field="repository",
                )


class HubUnreachable(StudioError):
    """The Hub itself does not answer, so that asking it about other files is no use."""


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file."""

    wanted: FileRequest
    commit: str
    hash: str  # sha256 of a large file, git's sha1 of a small one
    size: int  # bytes
    location: str  # where its bytes are
    xet: bool = False  # only the library can fetch them


@dataclass(frozen=True)
class FetchPlan:
    """What pulling would do."""

    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]  # each blob once, however many files share it
    to_convert: tuple[RemoteFile, ...]  # pickles that no safetensors have been made of
    bytes_to_fetch: int
    bytes_free: int

    @property
    def bytes_to_convert(self) -> int:
        """What those safetensors will take beside the pickles, while both are there."""
        return sum(found.size for found in self.to_convert)

    @property
    def fits(self) -> bool:
        """Whether the disk holds it."""
        return self.bytes_to_fetch + self.bytes_to_convert + SPARE <= self.bytes_free


T = TypeVar("T")
Say = Callable[[int, int, str], None]
"""Hears (bytes here, bytes in all, which file). What it raises stops a pull; the next one goes on from there."""


class Hub:
    """A cache folder and who asks.

    Args:
        cache: huggingface_hub's folder; left out, the one that every library on this machine uses.
        endpoint: address of the Hub; left out, HF_ENDPOINT's or the public one.
        token: for private repositories; it goes to the Hub alone, never to where a file's bytes lie, and is never
            written anywhere. Left out: the one that `hf auth login` keeps.
        pause: seconds to wait before the n-th try in a row; tests wait less.
    """

    def __init__(
        self,
        cache: Path | None = None,
        token: str | None = None,
        pause: Callable[[int], float] | None = None,
        endpoint: str | None = None,
    ) -> None:
        self.cache = cache or Path(constants.HF_HUB_CACHE)
        self.endpoint = endpoint or constants.ENDPOINT
        self._token = token
        self._pause = pause or (lambda failures: min(30.0, 2.0**failures) * random.uniform(0.5, 1.0))

    # --- what is here ---

    def find_local(self, wanted: FileRequest) -> Path | None:
        """Where the file lies, when it is here; of a pickle, the safetensors made of it. Asks nobody."""
        path = self.place(wanted.repo, wanted.path, wanted.revision)
        return path if path.is_file() else None

    def place(self, repo: str, path: str, revision: str = "main") -> Path:
        """Where a file or a folder of a repository lies, or would lie once it is fetched; asks nobody."""
        folder = self._repo_folder(repo)
        reference = folder / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        return folder / "snapshots" / commit / _snapshot_name(path)

    def list_local(self, repo: str, path: str = "", revision: str = "main") -> tuple[FileRequest, ...]:
        """Which files of that name are here, a folder's with all below it; asks nobody."""
        place = self.place(repo, path, revision)
        if place.is_file():
            return (FileRequest(repo, path, revision),)
        names = [f"{path}/{each.relative_to(place).as_posix()}".strip("/") for each in _list_files(place)]
        return tuple(FileRequest(repo, name, revision) for name in names)

    def count_arrived_bytes(self, repo: str) -> int:
        """Bytes of a repository's files that are not whole yet, or pickles still; asks nobody."""
        blobs = self._repo_folder(repo) / "blobs"
        parts = chain(blobs.glob("*.part"), blobs.glob("*.pickle"))
        return sum(file_size(part) for part in parts)

    def plan(self, wanted: Iterable[FileRequest]) -> FetchPlan:
        """Ask the Hub about every file, and compare with what is here.

        Raises:
            StudioError: offline, no such repository or file, or no right to read it.
        """
        files = tuple(self._look_up(each) for each in wanted)
        unmade = [found for found in files if self._find_converted(found) is None]
        missing = {found.hash: found for found in unmade if self._find_bytes(found) is None}
        pickled = {found.hash: found for found in unmade if is_pickle(found.wanted.path)}
        here = sum(self._part_bytes(found) for found in missing.values())
        self.cache.mkdir(parents=True, exist_ok=True)
        to_fetch = sum(found.size for found in missing.values()) - here
        free = shutil.disk_usage(self.cache).free
        return FetchPlan(files, tuple(missing.values()), tuple(pickled.values()), to_fetch, free)

    # --- bringing them here ---

    def pull(self, wanted: Iterable[FileRequest], say: Say) -> list[Path]:
        """Fetch what is missing, and make safetensors of pickles; gives every file's path.

        Raises:
            StudioError: the plan does not fit on the disk, the line stays dead, a file arrives damaged twice, or a
                pickle holds more than weights.
        """
        plan = self.plan(wanted)
        if not plan.fits:
            needed, free = (
                _format_gigabytes(plan.bytes_to_fetch + plan.bytes_to_convert),
                _format_gigabytes(plan.bytes_free),
            )
            raise StudioError(
                f"These files need {needed} GB, and {free} GB are free.",
                f"They would lie in {self.cache}.",
                "Free some disk space, or set HF_HUB_CACHE to a folder on a larger disk.",
            )
        distinct = {found.hash: found for found in plan.files}
        total = sum(found.size for found in distinct.values())
        done = total - sum(found.size for found in plan.missing)
        total += plan.bytes_to_convert
        for found in dict.fromkeys((*plan.missing, *plan.to_convert)):
            name = found.wanted.path
            with self._explain_errors(found):
                if found in plan.missing:
                    self._fetch(found, lambda here, name=name, before=done: say(before + here, total, name))
                    done += found.size
                if found in plan.to_convert:
                    name += ", into safetensors"
                    self._convert(found, lambda here, name=name, before=done: say(before + here, total, name))
                    done += found.size
        return [self._link_snapshot(found) for found in plan.files]

    def verify(self, wanted: Iterable[FileRequest], say: Say) -> list[FileRequest]:
        """Hash every file again; gives those that are damaged or not here, and takes the damaged ones away."""
        files, broken, done = [self._look_up(each) for each in wanted], [], 0
        total = sum(found.size for found in files)
        for found in files:
            made = self._find_converted(found)
            blob, digest = (made, pickles.hash_in_name(made)) if made else (self._blob_path(found), found.hash)
            if not blob.is_file() or hash_file(blob, digest)[: len(digest)] != digest:
                blob.unlink(missing_ok=True)
                self._snapshot_path(found).unlink(missing_ok=True)  # a copy, where links are not to be had
                broken.append(found.wanted)
            done += found.size
            say(done, total, found.wanted.path)
        return broken

    def adopt(self, wanted: Iterable[FileRequest], folders: Sequence[Path], say: Say) -> list[Path]:
        """Take files over that another program has already fetched, known by their size and then by their hash.

        They are linked where the disk allows it, else copied; the other program keeps its own.
        """
        plan, adopted = self.plan(wanted), []
        hashes = {found.hash: found for found in plan.missing}
        sizes = {found.size for found in plan.missing}
        listed = chain.from_iterable(_list_files(folder) for folder in folders)
        candidates = [path for path in listed if path.stat().st_size in sizes]
        for number, path in enumerate(candidates, start=1):
            say(number, len(candidates), path.name)
            size = path.stat().st_size
            for digits in {len(found.hash) for found in hashes.values() if found.size == size}:
                found = hashes.pop(hash_file(path, "0" * digits), None)
                if found is not None:
                    self._blob_path(found).parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(path, self._blob_path(found))
                    adopted.append(path)
        for found in plan.files:
            if found in plan.to_convert and self._find_bytes(found) is not None:
                self._convert(found, lambda here, f=found: say(here, f.size, f"{f.wanted.path}, into safetensors"))
            if self._find_converted(found) or self._find_bytes(found):
                self._link_snapshot(found)
        return adopted

    def remove(self, wanted: Iterable[FileRequest], keep: Iterable[FileRequest]) -> int:
        """Take files away that nobody in `keep` needs; gives the bytes that this frees."""
        kept = {(each.repo, path.resolve()) for each in keep if (path := self.find_local(each)) is not None}
        freed = 0
        for each in wanted:
            path = self.find_local(each)
            if path is None or (each.repo, path.resolve()) in kept:
                continue
            size, blobs = path.stat().st_size, self._repo_folder(each.repo) / "blobs"
            # Where links are not to be had, the name is a second name of the blob, or a copy of it.
            same = [blob for blob in blobs.glob("*") if file_size(blob) == size and _is_same_file(blob, path)]
            path.unlink()
            for blob in same:
                blob.unlink()
            freed += size
        return freed

    def discard(self, plan: FetchPlan) -> int:
        """Take away what has arrived of files that are not whole; gives the bytes that this frees."""
        freed = 0
        for found in dict.fromkeys((*plan.missing, *plan.to_convert)):
            blobs = self._repo_folder(found.wanted.repo) / "blobs"
            for suffix in (".part", ".pickle", ".converting", ".converting.new"):
                freed += file_size(blobs / f"{found.hash}{suffix}")
                (blobs / f"{found.hash}{suffix}").unlink(missing_ok=True)
            (blobs / f"{found.hash}.etag").unlink(missing_ok=True)
        return freed

    # --- one file ---

    def _fetch(self, found: RemoteFile, say: Callable[[int], None]) -> None:
        """The blob of one file, by however many connections it takes."""

        def bring(part: Path, say: Callable[[int], None]) -> None:
            if found.xet:
                wanted = found.wanted
                download.download_by_library(
                    wanted.repo, wanted.path, found.commit, part, say, endpoint=self.endpoint, token=self._get_token()
                )
            else:
                again = lambda: self._source(self._look_up(found.wanted))  # noqa: E731
                download.transfer(self._source(found), part, say, again=again, pause=self._pause)

        blob = self._blob_path(found)
        download.fetch(
            blob, found.hash, bring, say, there=lambda: blob.is_file() or self._find_converted(found) is not None
        )

    def _convert(self, found: RemoteFile, say: Callable[[int], None]) -> None:
        """Safetensors of a pickle that is here; then what was fetched of it goes, also where it holds no weights."""
        own, source = self._blob_path(found), self._find_bytes(found)
        if source is None:  # another process has just done it
            return
        try:
            pickles.convert_once(source, own.parent, found.hash, say, name=found.wanted.path)
        except pickles.NotWeights:
            own.unlink(missing_ok=True)
            raise
        own.unlink(missing_ok=True)

    def _source(self, found: RemoteFile) -> RemoteSource:
        """With the token only where the Hub itself has the bytes."""
        own = urlsplit(found.location).netloc == urlsplit(self.endpoint).netloc
        secret = self._get_token() if own else None
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return RemoteSource(found.location, headers, found.hash, found.size)

    # --- the layout ---

    def _link_snapshot(self, found: RemoteFile) -> Path:
        """The snapshot's name for a blob, and the revision's name for the snapshot."""
        folder, twin = self._repo_folder(found.wanted.repo), self._find_converted(found) or self._find_bytes(found)
        blob = folder / "blobs" / (twin.name if twin is not None else found.hash)
        if twin is not None and twin != blob:
            blob.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(twin, blob)
        path = self._snapshot_path(found)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a link that leads nowhere
            try:
                path.symlink_to(os.path.relpath(blob, path.parent))
            except OSError:  # Windows without the right to make links
                link_or_copy(blob, path)
        reference = folder / "refs" / found.wanted.revision
        if found.wanted.revision != found.commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            fresh = reference.with_name(f"{reference.name}.{os.getpid()}.new")
            fresh.write_text(found.commit, encoding="utf-8")
            fresh.replace(reference)
        return path

    def _snapshot_path(self, found: RemoteFile) -> Path:
        return self._repo_folder(found.wanted.repo) / "snapshots" / found.commit / _snapshot_name(found.wanted.path)

    def _repo_folder(self, repo: str) -> Path:
        return self.cache / f"models--{_check_repo_id(repo).replace('/', '--')}"

    def _blob_path(self, found: RemoteFile) -> Path:
        """Where its bytes are fetched to."""
        name = f"{found.hash}.pickle" if is_pickle(found.wanted.path) else found.hash
        return self._repo_folder(found.wanted.repo) / "blobs" / name

    def _find_bytes(self, found: RemoteFile) -> Path | None:
        """The same bytes, in this repository's folder or, where two repositories hold one file, in another's."""
        blob = self._blob_path(found)
        return blob if blob.is_file() else next(iter(self.cache.glob(f"models--*/blobs/{found.hash}")), None)

    def _find_converted(self, found: RemoteFile) -> Path | None:
        """The safetensors that were made of a pickle, in this repository's folder or in another's."""
        if not is_pickle(found.wanted.path):
            return None
        made = pickles.find_converted(self._blob_path(found).parent, found.hash)
        return made or next(iter(self.cache.glob(f"models--*/blobs/{found.hash}.*.safetensors")), None)

    def _part_bytes(self, found: RemoteFile) -> int:
        return file_size(self._blob_path(found).with_suffix(".part"))

    # --- asking ---

    def expand(
        self, repo: str, path: str = "", revision: str = "main", *, xet: bool = False
    ) -> tuple[FileRequest, ...]:
        """The files that a name stands for: itself, or what a folder holds of configs, tokenizers and weights.

        Nothing that could run code is ever among them unless it was named itself. Of several sets of weights there is
        one: safetensors before the others, and a variant (`*.fp16.safetensors`) only where nothing else is.

        Offline, what a folder of the cache holds.

        Raises:
            StudioError: no such repository or folder, no right to read it, or nothing in it that could be used.
        """
        if is_file(path):
            return (FileRequest(repo, path, revision, xet),)
        if constants.HF_HUB_OFFLINE:
            names = [each.path for each in self.list_local(repo, path, revision)]
        else:
            folder = FileRequest(repo, path or ".gitattributes", revision)  # checks the name; a sentence needs it, too
            # Once: for a listing the library itself asks six times, over 23 s.
            listed = self._ask_hub(folder, lambda api: list(self._tree(api, repo, path, revision)), tries=1)
            names = [each.path for each in listed if isinstance(each, RepoFile)]
        chosen = _select_files(sorted(names))
        if not chosen and constants.HF_HUB_OFFLINE:
            raise _explain_refusal(FileRequest(repo, path or "README.md", revision), OfflineModeIsEnabled())
        if not chosen:
            raise StudioError(
                f"{repo}/{path} holds no weights that could be opened here.".replace("/ ", " "),
                "Only safetensors, GGUF and ONNX are; the files of other kinds can carry code.",
                "Choose a repository with safetensors files.",
                field="repository",
            )
        return tuple(FileRequest(repo, name, revision, xet) for name in chosen)

    def licence(self, repo: str, revision: str = "main") -> tuple[str, str]:
        """Licence of a repository as its card names it, empty where it names none; and the commit it is at."""
        told = self._ask_hub(
            FileRequest(repo, "README.md", revision), lambda api: api.model_info(repo, revision=revision, timeout=30)
        )
        named = [tag.removeprefix("license:") for tag in told.tags or [] if tag.startswith("license:")]
        named += [str(told.card_data.get("license"))] if told.card_data and told.card_data.get("license") else []
        return named[-1] if named else "", told.sha or revision

    def read(self, wanted: FileRequest) -> str:
        """A small text file, such as a config, fetched if need be."""
        path = self.find_local(wanted) or self.pull([wanted], lambda *_: None)[0]
        return path.read_text(encoding="utf-8")

    @staticmethod
    def _tree(api: HfApi, repo: str, path: str, revision: str):
        return api.list_repo_tree(repo, path or None, recursive=True, revision=revision)

    def _get_token(self) -> str | None:
        from huggingface_hub import get_token

        return self._token or get_token()

    def _ask_hub(self, wanted: FileRequest, question: Callable[[HfApi], T], *, tries: int = download.TRIES) -> T:
        """The Hub's answer, asked again while it is busy."""
        _check_repo_id(wanted.repo)
        failures = 0
        while True:
            try:
                return question(HfApi(endpoint=self.endpoint, token=self._get_token() or False))
            except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, OfflineModeIsEnabled) as error:
                raise _explain_refusal(wanted, error) from None
            except (HfHubHTTPError, httpx2.TransportError, OSError) as error:
                failures += 1
                if failures >= tries:
                    raise _explain_refusal(wanted, error) from None
                time.sleep(self._pause(failures))

    def _look_up(self, wanted: FileRequest) -> RemoteFile:
        """The Hub's word on a file."""
        url = hf_hub_url(_check_repo_id(wanted.repo), wanted.path, revision=wanted.revision, endpoint=self.endpoint)
        told = self._ask_hub(
            wanted, lambda _: get_hf_file_metadata(url, token=self._get_token() or False, endpoint=self.endpoint)
        )
        names = (told.commit_hash or "", told.etag or "")  # both become names of files
        if told.size is None or not all(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) for name in names):
            raise _explain_refusal(wanted, ValueError("the answer names no commit, hash or size"))
        # A file that has a place to be fetched from is redirected there; what is in Xet alone answers for itself.
        alone = told.xet_file_data is not None and urlsplit(told.location).path == urlsplit(url).path
        return RemoteFile(wanted, *names, told.size, told.location, wanted.xet or alone)

    @contextmanager
    def _explain_errors(self, found: RemoteFile):
        try:
            yield
        except DamagedDownload:
            raise StudioError(
                f"{found.wanted.path} arrived damaged, twice.",
                f"Its bytes do not have the hash that {found.wanted.repo} names.",
                "Try again later; nothing of it was kept.",
            ) from None
        except (ServerRefusal, OSError, HTTPException, HfHubHTTPError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG)
            raise StudioError(
                f"{found.wanted.path} could not be fetched whole.",
                f"{found.wanted.repo}: {error}.",
                f"{'Free some disk space and try' if full else 'Try'} again: it goes on where it stopped.",
            ) from None


def _snapshot_name(path: str) -> Path:
    """A file's name in the snapshot: its own, or that of the safetensors made of a pickle."""
    return Path(*f"{path}.safetensors".split("/")) if is_pickle(path) else Path(*path.split("/"))


def _is_same_file(blob: Path, path: Path) -> bool:
    """Whether a name of a snapshot stands for this blob."""
    return blob.samefile(path) or (not path.is_symlink() and filecmp.cmp(blob, path, shallow=False))


def _list_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []


def is_file(path: str) -> bool:
    """Whether a name in a repository is a file's: it ends as files do. A folder called v1.1 is none."""
    return bool(re.fullmatch(r"\.[A-Za-z][A-Za-z0-9_]*", PurePosixPath(path).suffix))


def _select_files(names: Sequence[str]) -> list[str]:
    """Configs, tokenizers, and weights of one kind; plain names before variants of the same weights."""
    weights = next((found for kind in WEIGHTS if (found := [n for n in names if n.endswith(kind)])), [])
    plain = {(PurePosixPath(n).parent, _weights_stem(n)) for n in weights if not _is_variant(n)}
    weights = [n for n in weights if not _is_variant(n) or (PurePosixPath(n).parent, _weights_stem(n)) not in plain]
    sharded = {(PurePosixPath(n).parent, _weights_stem(n)) for n in names if n.endswith(".safetensors.index.json")}
    weights = [n for n in weights if "-of-" in n or (PurePosixPath(n).parent, _weights_stem(n)) not in sharded]
    telling = [n for n in names if n.endswith(TELLING) and not n.endswith(".index.json")]
    indices = [n for n in names if n.endswith(".safetensors.index.json")]
    indices = [n for n in indices if not _is_variant(n) or (PurePosixPath(n).parent, _weights_stem(n)) not in plain]
    return sorted([*telling, *indices, *weights])


_NAME = re.compile(r"(?P<stem>.+?)(?P<variant>\.(?:fp16|bf16|fp32|fp8|int8|non_ema|ema))?(?P<shard>-\d{5}-of-\d{5})?$")


def _weights_stem(name: str) -> str:
    """The weights that a file belongs to, without shard number and variant."""
    bare = PurePosixPath(name).name.removesuffix(".index.json").rpartition(".")[0]
    match = _NAME.fullmatch(bare)
    return match["stem"] if match else bare


def _is_variant(name: str) -> bool:
    bare = PurePosixPath(name).name.removesuffix(".index.json").rpartition(".")[0]
    match = _NAME.fullmatch(bare)
    return bool(match and match["variant"])


def _check_repo_id(repo: str) -> str:
    """The id, when it is one: owner/name, of letters, digits, dots, dashes and underscores.

    Raises:
        StudioError: anything else, such as a path.
    """
    parts = repo.split("/")
    if len(parts) == 2 and all(p.strip(".") and all(c.isalnum() or c in "._-" for c in p) for p in parts):
        return repo
    raise StudioError(
        f"{repo[:80]!r} is no repository of the Hub.",
        "An id is an owner and a name, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
        "Copy the id from the repository's page.",
        field="repository",
    )


def _explain_refusal(wanted: FileRequest, error: Exception) -> StudioError:
    reasons = {
        GatedRepoError: "Its owner asks everyone to accept terms on its page first.",
        RepositoryNotFoundError: "There is no such repository, or it is private and no token was given.",
        RevisionNotFoundError: f"The repository has no revision {wanted.revision}.",
        LocalEntryNotFoundError: "The Hub cannot be reached.",
        EntryNotFoundError: "The repository has no such file.",
        OfflineModeIsEnabled: "The studio was started with --offline.",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
    page, step = f"https://huggingface.co/{wanted.repo}", "Look at {}, and try again."
    if isinstance(error, GatedRepoError):
        step = "Accept them at {}, then give your token: as HF_TOKEN, or under Models."
    elif isinstance(error, RepositoryNotFoundError):
        step = "Look at {}; for a private one give your token: as HF_TOKEN, or under Models."
    elif isinstance(error, OfflineModeIsEnabled):
        step = "Start without --offline once; what has been fetched then works offline."
    whole = isinstance(error, RepositoryNotFoundError)  # a gated one among them
    kind = StudioError if reason else HubUnreachable
    return kind(
        f"{wanted.repo if whole else f'{wanted.path} of {wanted.repo}'} is not to be had.",
        reason or f"The Hub does not answer ({str(error)[:120] or type(error).__name__}).",
        step.format(page),
        field="preset",
    )


def _format_gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"
