"""The files a preset needs, brought from the Hub once, whole and verified, to where every library looks for them.

In:  `Wanted` files (repository, revision, path), a cache folder, perhaps a token.
Out: a plan (what is here, what is missing, how large), then the files in huggingface_hub's own cache layout.
Knows nothing of models or presets. The library tells sizes, hashes and commits; the bytes are moved here, because it
neither resumes across calls nor checks what it got.

Layout: `models--<owner>--<name>/{blobs/<hash>, snapshots/<commit>/<path>, refs/<revision>}`. While a file is on its way
it is `blobs/<hash>.part`, which one process at a time holds by a lock; it becomes a blob in one move, once its hash is
right. A cut pull goes on from the part.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.messages import StudioError

CHUNK = 1 << 20  # bytes read at once
TRIES = 6  # failures in a row without a new byte, before giving up
SPARE = 256 * 2**20  # bytes that stay free on the disk


@dataclass(frozen=True)
class Wanted:
    """One file of a repository."""

    repo: str  # owner/name
    path: str  # inside the repository, with forward slashes
    revision: str = "main"  # branch, tag or commit

    def __post_init__(self) -> None:
        for text in (self.path, self.revision):
            if any(part in ("", ".", "..") or set(part) & set("\\:") for part in text.split("/")):
                raise StudioError(
                    f"{text[:80]!r} is no file or revision of a repository.",
                    "It leads out of the folder that the repository's files lie in.",
                    "Copy the name from the repository's page.",
                    field="repository",
                )


@dataclass(frozen=True)
class Found:
    """What the Hub says of a file."""

    wanted: Wanted
    commit: str
    hash: str  # sha256 of a large file, git's sha1 of a small one
    size: int  # bytes
    location: str  # where its bytes are


@dataclass(frozen=True)
class Plan:
    """What pulling would do."""

    files: tuple[Found, ...]
    missing: tuple[Found, ...]  # each blob once, however many files share it
    bytes_to_fetch: int
    bytes_free: int

    @property
    def fits(self) -> bool:
        """Whether the disk holds it."""
        return self.bytes_to_fetch + SPARE <= self.bytes_free


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

    def local(self, wanted: Wanted) -> Path | None:
        """Where the file lies, when it is here; asks nobody."""
        path = self.place(wanted.repo, wanted.path, wanted.revision)
        return path if path.is_file() else None

    def place(self, repo: str, path: str, revision: str = "main") -> Path:
        """Where a file or a folder of a repository lies, or would lie once it is fetched; asks nobody."""
        folder = self._repo(repo)
        reference = folder / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        return folder / "snapshots" / commit / Path(*path.split("/"))

    def plan(self, wanted: Iterable[Wanted]) -> Plan:
        """Ask the Hub about every file, and compare with what is here.

        Raises:
            StudioError: offline, no such repository or file, or no right to read it.
        """
        files = tuple(self._ask(each) for each in wanted)
        missing = {found.hash: found for found in files if self._twin(found) is None}
        here = sum(self._part_bytes(found) for found in missing.values())
        self.cache.mkdir(parents=True, exist_ok=True)
        to_fetch = sum(found.size for found in missing.values()) - here
        return Plan(files, tuple(missing.values()), to_fetch, shutil.disk_usage(self.cache).free)

    # --- bringing them here ---

    def pull(self, wanted: Iterable[Wanted], say: Say) -> list[Path]:
        """Fetch what is missing; gives every file's path.

        Raises:
            StudioError: the plan does not fit on the disk, the line stays dead, or a file arrives damaged twice.
        """
        plan = self.plan(wanted)
        if not plan.fits:
            needed, free = _gigabytes(plan.bytes_to_fetch), _gigabytes(plan.bytes_free)
            raise StudioError(
                f"These files need {needed} GB, and {free} GB are free.",
                f"They would lie in {self.cache}.",
                "Free some disk space, or set HF_HUB_CACHE to a folder on a larger disk.",
            )
        total = sum(found.size for found in {found.hash: found for found in plan.files}.values())
        done = total - sum(found.size for found in plan.missing)
        for found in plan.missing:
            with self._explained(found):
                self._fetch(found, lambda here, f=found, before=done: say(before + here, total, f.wanted.path))
            done += found.size
        return [self._point(found) for found in plan.files]

    def verify(self, wanted: Iterable[Wanted], say: Say) -> list[Wanted]:
        """Hash every file again; gives those that are damaged or not here, and takes the damaged ones away."""
        files, broken, done = [self._ask(each) for each in wanted], [], 0
        total = sum(found.size for found in files)
        for found in files:
            blob = self._blob(found)
            if not blob.is_file() or _hash_of(blob, found.hash) != found.hash:
                blob.unlink(missing_ok=True)
                broken.append(found.wanted)
            done += found.size
            say(done, total, found.wanted.path)
        return broken

    def adopt(self, wanted: Iterable[Wanted], folders: Sequence[Path], say: Say) -> list[Path]:
        """Take files over that another program has already fetched, known by their size and then by their hash.

        They are linked where the disk allows it, else copied; the other program keeps its own.
        """
        plan, adopted = self.plan(wanted), []
        hashes = {found.hash: found for found in plan.missing}
        sizes = {(found.size, len(found.hash)) for found in plan.missing}
        candidates = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*"))]
        candidates = [
            path for path in candidates if path.is_file() and path.stat().st_size in {size for size, _ in sizes}
        ]
        for number, path in enumerate(candidates, start=1):
            say(number, len(candidates), path.name)
            for digits in {digits for size, digits in sizes if size == path.stat().st_size}:
                found = hashes.pop(_hash_of(path, "0" * digits), None)
                if found is not None:
                    self._blob(found).parent.mkdir(parents=True, exist_ok=True)
                    _linked_or_copied(path, self._blob(found))
                    adopted.append(path)
        for found in plan.files:
            if self._twin(found) is not None:
                self._point(found)
        return adopted

    def remove(self, wanted: Iterable[Wanted], keep: Iterable[Wanted]) -> int:
        """Take files away that nobody in `keep` needs; gives the bytes that this frees."""
        kept = {(each.repo, path.resolve()) for each in keep if (path := self.local(each)) is not None}
        freed = 0
        for each in wanted:
            path = self.local(each)
            if path is None or (each.repo, path.resolve()) in kept:
                continue
            blob = path.resolve()
            freed += blob.stat().st_size
            path.unlink()
            blob.unlink(missing_ok=True)
        return freed

    # --- one file ---

    def _fetch(self, found: Found, say: Callable[[int], None]) -> None:
        """The blob of one file, by however many connections it takes."""
        blob = self._blob(found)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(blob.with_suffix(".lock")):
            damaged = False
            blob.with_suffix(".part").touch()
            while not blob.is_file():  # another process may have brought it while this one waited
                part = blob.with_suffix(".part")
                self._transfer(found, part, say)
                part.with_suffix(".etag").unlink(missing_ok=True)
                if _hash_of(part, found.hash) == found.hash:
                    part.replace(blob)
                    return
                part.unlink()
                if damaged:
                    raise StudioError(
                        f"{found.wanted.path} arrived damaged, twice.",
                        f"Its bytes do not have the hash that {found.wanted.repo} names.",
                        "Try again later; nothing of it was kept.",
                    )
                damaged = True

    def _transfer(self, found: Found, part: Path, say: Callable[[int], None]) -> None:
        """Append to the part until it is as large as the file."""
        failures = 0
        while (have := part.stat().st_size if part.is_file() else 0) < found.size:
            try:
                self._stream(found, part, have, say)
                if part.is_file() and part.stat().st_size == have:
                    raise ConnectionError("an answer without a byte")
                failures = 0
            except _Refused as refusal:
                failures += 1
                if failures >= TRIES or refusal.for_good:
                    raise
                time.sleep(refusal.wait_s or self._pause(failures))
                if refusal.stale:
                    found = self._ask(found.wanted)
            except (OSError, HTTPException) as error:
                if isinstance(error, OSError) and error.errno is not None and not _of_the_line(error):
                    raise  # the disk, not the line
                grown = part.is_file() and part.stat().st_size > have
                failures = 1 if grown else failures + 1
                if failures >= TRIES:
                    raise
                time.sleep(self._pause(failures))
        if part.stat().st_size > found.size:
            part.unlink()
            raise _Refused("it is longer than it should be")

    def _stream(self, found: Found, part: Path, have: int, say: Callable[[int], None]) -> None:
        """One connection: what is still missing, or all of it where the server does not go on from the middle."""
        headers = {"User-Agent": "id-crafter-studio", "Accept-Encoding": "identity"}
        if have:
            mark = part.with_suffix(".etag")
            headers["Range"] = f"bytes={have}-"
            # As the server that has the bytes calls them, which need not be the Hub's hash.
            if mark.is_file() and mark.stat().st_size:
                headers["If-Range"] = mark.read_text(encoding="utf-8")
        if urlsplit(found.location).netloc == urlsplit(self.endpoint).netloc and (token := self._secret()):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(found.location, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer, part.open("ab") as file:
                if answer.status != 206:
                    file.truncate(0)
                    have = 0
                    part.with_suffix(".etag").write_text(answer.headers.get("ETag") or "", encoding="utf-8")
                _copy(answer, file, have, say)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is from another version of the file
                part.unlink(missing_ok=True)
                return
            wait = error.headers.get("Retry-After", "") if error.headers else ""
            raise _Refused(
                f"the server answered {error.code}",
                wait_s=min(60.0, float(wait)) if wait.isdigit() else None,
                stale=error.code in (401, 403),
                for_good=error.code in (404, 410),
            ) from None

    # --- the layout ---

    def _point(self, found: Found) -> Path:
        """The snapshot's name for a blob, and the revision's name for the snapshot."""
        folder, blob = self._repo(found.wanted.repo), self._blob(found)
        twin = self._twin(found)
        if twin is not None and twin != blob:
            blob.parent.mkdir(parents=True, exist_ok=True)
            _linked_or_copied(twin, blob)
        path = folder / "snapshots" / found.commit / Path(*found.wanted.path.split("/"))
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a link that leads nowhere
            try:
                path.symlink_to(os.path.relpath(blob, path.parent))
            except OSError:  # Windows without the right to make links
                _linked_or_copied(blob, path)
        reference = folder / "refs" / found.wanted.revision
        if found.wanted.revision != found.commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            fresh = reference.with_name(f"{reference.name}.{os.getpid()}.new")
            fresh.write_text(found.commit, encoding="utf-8")
            fresh.replace(reference)
        return path

    def _repo(self, repo: str) -> Path:
        return self.cache / f"models--{_checked(repo).replace('/', '--')}"

    def _blob(self, found: Found) -> Path:
        return self._repo(found.wanted.repo) / "blobs" / found.hash

    def _twin(self, found: Found) -> Path | None:
        """The same bytes, in this repository's folder or, where two repositories hold one file, in another's."""
        blob = self._blob(found)
        return blob if blob.is_file() else next(iter(self.cache.glob(f"models--*/blobs/{found.hash}")), None)

    def _part_bytes(self, found: Found) -> int:
        part = self._blob(found).with_suffix(".part")
        return part.stat().st_size if part.is_file() else 0

    # --- asking ---

    def _secret(self) -> str | None:
        from huggingface_hub import get_token

        return self._token or get_token()

    def _ask(self, wanted: Wanted) -> Found:
        """The Hub's word on a file, tried again while the server is busy."""
        url = hf_hub_url(_checked(wanted.repo), wanted.path, revision=wanted.revision, endpoint=self.endpoint)
        failures = 0
        while True:
            try:
                told = get_hf_file_metadata(url, token=self._secret() or False, endpoint=self.endpoint)
                break
            except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, OfflineModeIsEnabled) as error:
                raise _unknown(wanted, error) from None
            except (HfHubHTTPError, OSError) as error:
                failures += 1
                if failures >= TRIES:
                    raise _unknown(wanted, error) from None
                time.sleep(self._pause(failures))
        names = (told.commit_hash or "", told.etag or "")  # both become names of files
        if told.size is None or not all(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) for name in names):
            raise _unknown(wanted, ValueError("the answer names no commit, hash or size"))
        return Found(wanted, *names, told.size, told.location)

    @contextmanager
    def _explained(self, found: Found):
        try:
            yield
        except (_Refused, OSError, HTTPException, HfHubHTTPError) as error:
            raise StudioError(
                f"{found.wanted.path} could not be fetched whole.",
                f"{found.wanted.repo}: {error}.",
                "Try again: it goes on where it stopped.",
            ) from None


class _Refused(Exception):
    """The server answered, and not with the file."""

    def __init__(
        self, reason: str, *, wait_s: float | None = None, stale: bool = False, for_good: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait_s, self.stale, self.for_good = wait_s, stale, for_good


def _copy(answer: Any, file: BinaryIO, have: int, say: Callable[[int], None]) -> None:
    while chunk := answer.read(CHUNK):
        file.write(chunk)
        have += len(chunk)
        say(have)
    left = getattr(answer, "length", 0)
    if left:
        raise IncompleteRead(b"", left)


def _of_the_line(error: OSError) -> bool:
    """Whether a fault is the connection's; a full or broken disk is not worth another try."""
    return isinstance(error, (ConnectionError, TimeoutError, urllib.error.URLError))


def _hash_of(path: Path, like: str) -> str:
    """sha256, or git's sha1 where the Hub names that: as many digits as `like` has."""
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _linked_or_copied(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        fresh = target.with_name(f"{target.name}.{os.getpid()}.copy")
        shutil.copyfile(source, fresh)
        fresh.replace(target)


def _checked(repo: str) -> str:
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


def _unknown(wanted: Wanted, error: Exception) -> StudioError:
    reasons = {
        GatedRepoError: "Its owner asks everyone to accept terms on its page first.",
        RepositoryNotFoundError: "There is no such repository, or it is private and no token was given.",
        RevisionNotFoundError: f"The repository has no revision {wanted.revision}.",
        LocalEntryNotFoundError: "The Hub cannot be reached.",
        EntryNotFoundError: "The repository has no such file.",
        OfflineModeIsEnabled: "The studio was started with --offline.",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
    return StudioError(
        f"{wanted.path} of {wanted.repo} is not to be had.",
        reason or f"The Hub does not answer ({type(error).__name__}).",
        "Look at https://huggingface.co/" + wanted.repo + ", and try again.",
        field="preset",
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"
