"""The bytes of one file, however often the line drops: a locked part that grows, a hash, one move.

In:  where a file's bytes are, how many, and what they hash to; a place for them.
Out: that file, whole and verified, or an error with the part still there to go on from.
Knows nothing of repositories, presets or layouts. huggingface_hub neither resumes across calls nor checks what it
got, so the bytes are moved here; what lies in the Hub's Xet store alone is moved by the library, in a process of its
own that can be stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from engine.paths import ROOT
from engine.platform_calls import NO_WINDOW

CHUNK = 1 << 20  # most bytes read at once
TRIES = 6  # failures in a row without a new byte, before giving up
SOON_S = 0.2  # after a line that dropped, but had brought something
LOOK_S = 0.3  # how often somebody else's progress is looked at


@dataclass(frozen=True)
class RemoteSource:
    """Where a file's bytes are."""

    location: str
    headers: Mapping[str, str]  # for that server alone
    hash: str  # sha256, or git's sha1
    size: int  # bytes


class ServerRefusal(Exception):
    """The server answered, and not with the file."""

    def __init__(
        self, reason: str, *, wait_s: float | None = None, stale: bool = False, for_good: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait_s, self.stale, self.for_good = wait_s, stale, for_good


class DamagedDownload(Exception):
    """It arrived whole, twice, and its bytes were wrong both times."""


Bring = Callable[[Path, Callable[[int], None]], None]
"""Makes the part as large as the file; tells how many bytes are there."""


def fetch(
    blob: Path, digest: str, bring: Bring, say: Callable[[int], None], *, there: Callable[[], bool] | None = None
) -> None:
    """Have `bring` complete the part, check it, and make it the blob in one move.

    One process at a time does so; the others see it grow and take what it brought.

    Args:
        there: whether it is no longer needed; left out, once the blob is there.

    Raises:
        DamagedDownload: the bytes had another hash twice; nothing of them is kept.
    """
    part = blob.with_suffix(".part")
    with exclusive_lock(blob.with_suffix(".lock"), lambda: say(file_size(part))):
        damaged = False
        while not (there or blob.is_file)():  # another process may have brought it while this one waited
            part.touch()
            bring(part, say)
            part.with_suffix(".etag").unlink(missing_ok=True)
            if hash_file(part, digest) == digest:
                part.replace(blob)
                return
            part.unlink()
            if damaged:
                raise DamagedDownload
            damaged = True


@contextmanager
def exclusive_lock(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Inside, no other process holds this lock. What `waiting`, called now and then before, raises ends the wait."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    while True:
        try:
            held.acquire(timeout=LOOK_S)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        held.release()


def transfer(
    source: RemoteSource,
    part: Path,
    say: Callable[[int], None],
    *,
    again: Callable[[], RemoteSource],
    pause: Callable[[int], float],
) -> None:
    """Append to the part until it is as large as the file.

    Args:
        again: asks anew where the bytes are, since signed addresses run out.
        pause: seconds to wait before the n-th try in a row.

    Raises:
        ServerRefusal, OSError, HTTPException: the line stayed dead, or the disk is full; the part stays.
    """
    failures = 0
    while (have := file_size(part)) < source.size:
        try:
            _stream(source, part, have, say)
            if part.is_file() and part.stat().st_size == have:
                raise ConnectionError("an answer without a byte")
            failures = 0
        except ServerRefusal as refusal:
            failures += 1
            if failures >= TRIES or refusal.for_good:
                raise
            time.sleep(refusal.wait_s or pause(failures))
            if refusal.stale:
                source = again()
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno is not None and not _is_connection_error(error):
                raise  # the disk, not the line
            grown = file_size(part) > have
            failures = 1 if grown else failures + 1
            if failures >= TRIES:
                raise
            time.sleep(min(SOON_S, pause(1)) if grown else pause(failures))
    if part.stat().st_size > source.size:
        part.unlink()
        raise ServerRefusal("it is longer than it should be")


def _stream(source: RemoteSource, part: Path, have: int, say: Callable[[int], None]) -> None:
    """One connection: what is still missing, or all of it where the server does not go on from the middle."""
    headers = {"User-Agent": "id-crafter-studio", "Accept-Encoding": "identity", **source.headers}
    if have:
        mark = part.with_suffix(".etag")
        headers["Range"] = f"bytes={have}-"
        # As the server that has the bytes calls them, which need not be the Hub's hash.
        if mark.is_file() and mark.stat().st_size:
            headers["If-Range"] = mark.read_text(encoding="utf-8")
    request = urllib.request.Request(source.location, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer, part.open("ab", buffering=0) as file:
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
        raise ServerRefusal(
            f"the server answered {error.code}",
            wait_s=min(60.0, float(wait)) if wait.isdigit() else None,
            stale=error.code in (401, 403),
            for_good=error.code in (404, 410),
        ) from None


def _copy(answer: Any, file: IO[bytes], have: int, say: Callable[[int], None]) -> None:
    # Each piece as it comes and straight to the disk: on a slow line a whole CHUNK is seconds that a kill would lose.
    while chunk := answer.read1(CHUNK):
        rest = memoryview(chunk)
        while rest:
            rest = rest[file.write(rest) :]
        have += len(chunk)
        say(have)
    left = getattr(answer, "length", 0)
    if left:
        raise IncompleteRead(b"", left)


def _is_connection_error(error: OSError) -> bool:
    """Whether a fault is the connection's; a full or broken disk is not worth another try."""
    return isinstance(error, (ConnectionError, TimeoutError, urllib.error.URLError))


# --- what only the library can fetch ---------------------------------------------------------------------------------

_BY_LIBRARY = (
    "import sys; from huggingface_hub import hf_hub_download; repo, path, commit, folder, endpoint = sys.argv[1:]; "
    "hf_hub_download(repo, path, revision=commit, local_dir=folder, endpoint=endpoint)"
)


def download_by_library(
    repo: str, path: str, commit: str, part: Path, say: Callable[[int], None], *, endpoint: str, token: str | None
) -> None:
    """One file through huggingface_hub's own download, which speaks to the Xet store; then it is the part.

    It runs in a process of its own: whatever `say` raises ends it, and with it the bytes that were on their way, for
    the library begins anew each time.

    Raises:
        ServerRefusal: the library gave up; with its last words.
    """
    folder = part.with_suffix(".library")
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUTF8": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", _BY_LIBRARY, repo, path, commit, str(folder), endpoint]
    folder.mkdir(parents=True)
    try:
        with (folder / "said").open("w+", encoding="utf-8") as said:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=said,
                creationflags=NO_WINDOW,
            )  # fmt: skip
            try:
                while (code := child.poll()) is None:
                    say(max((file_size(file) for file in folder.rglob("*.incomplete")), default=0))
                    time.sleep(LOOK_S)
            finally:
                child.kill()
                child.wait()
            if code:
                said.seek(0)
                raise ServerRefusal((said.read().strip().splitlines() or [f"exit code {code}"])[-1][:200])
        (folder / path).replace(part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(file_size(part))


# --- files -----------------------------------------------------------------------------------------------------------


def file_size(path: Path) -> int:
    """Size of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def hash_file(path: Path, like: str) -> str:
    """sha256, or git's sha1 where the Hub names that: as many digits as `like` has."""
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """The same bytes at `target`, without taking room twice where the disk allows it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        fresh = target.with_name(f"{target.name}.{os.getpid()}.copy")
        shutil.copyfile(source, fresh)
        fresh.replace(target)
