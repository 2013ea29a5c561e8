"""The Hub's protocol on loopback: what a repository holds, a file's facts, a redirect to where its bytes lie, ranges,
and faults on demand.

In:  repositories as dictionaries of bytes; faults to be had, one for each answer with bytes.
Out: an endpoint that huggingface_hub's own client talks to.
Knows nothing of the studio.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Fault:
    """What goes wrong with the next answer that carries bytes."""

    drop_after: int | None = None
    """Close the line after so many bytes."""
    status: int | None = None
    """Answer this instead."""
    flip: bool = False
    """One byte is another."""
    no_range: bool = False
    """Send everything although a range was asked for."""
    stall: threading.Event | None = None
    """Send half, then wait for this before the rest."""
    bytes_per_s: float = 0.0
    """Send no faster than this."""


@dataclass
class HubServer:
    """Serve `repos` (id -> path -> bytes) until the block ends. Private ones want `token`."""

    repos: dict[str, dict[str, bytes]]
    private: frozenset[str] = frozenset()
    token: str = ""
    cards: dict[str, dict[str, object]] = field(default_factory=dict)  # id -> what its README's head says
    gated: frozenset[str] = frozenset()
    xet: frozenset[str] = frozenset()  # files with no place of their own: in the Xet store alone
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    bytes_sent: int = 0

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def bytes_host(self) -> str:
        """Address of the bytes: another host, as far as a client can tell."""
        return f"http://localhost:{self._server.server_port}"

    def hash_of(self, content: bytes) -> str:
        """The sha256 of a large file (kept as LFS, from 1 kB here), git's sha1 of a small one."""
        if len(content) >= 1024:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        if path.startswith("/bytes/"):
            content = next(
                (c for files in self.hub.repos.values() for c in files.values() if self.hub.hash_of(c) == path[7:]),
                None,
            )
            return self._bytes(content) if content is not None else self._refuse(404)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._about("/".join(parts[2:4]), parts[4:])
        if len(parts) < 5 or parts[2] != "resolve":
            return self._refuse(404)
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if self._refused(repo, revision):
            return None
        content = self.hub.repos[repo].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        return self._facts(content, body, alone=f"{repo}/{name}" in self.hub.xet)

    def _refused(self, repo: str, revision: str) -> bool:
        """Whether whoever asks may not see it; then they have been told."""
        allowed = repo not in self.hub.private or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.repos or not allowed:
            self._refuse(401, "RepoNotFound")
        elif repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return False
        return True

    def _about(self, repo: str, asked: list[str]) -> None:
        """`/api/models/<id>`, `.../revision/<revision>`, `.../tree/<revision>/<folder>`; the tree as deep as it is."""
        kind, revision, folder = (*asked, "", "", "")[0], (*asked, "main", "main")[1], "/".join(asked[2:])
        if self._refused(repo, revision):
            return None
        files = self.hub.repos[repo]
        if kind != "tree":
            card = self.hub.cards.get(repo, {"license": "apache-2.0"})
            tags = [f"license:{card['license']}"] if "license" in card else []
            return self._json({"id": repo, "sha": COMMIT, "cardData": card, "tags": tags, "siblings": []})
        inside = {name: content for name, content in files.items() if not folder or name.startswith(folder + "/")}
        if not inside:
            return self._refuse(404, "EntryNotFound")
        folders = sorted({name.rpartition("/")[0] for name in inside} - {"", folder})
        return self._json(
            [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
            + [self._entry(name, content) for name, content in sorted(inside.items())]
        )

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        if len(content) >= 1024:
            entry["lfs"] = {"oid": self.hub.hash_of(content), "size": len(content), "pointerSize": 134}
        return entry

    def _json(self, said: object) -> None:
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _facts(self, content: bytes, body: bool, *, alone: bool) -> None:
        digest, large = self.hub.hash_of(content), len(content) >= 1024
        if body and (alone or not large):
            return self._bytes(content)
        if alone:
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Xet-Hash", "f" * 64)
            self.send_header("X-Xet-Refresh-Route", f"{self.hub.endpoint}/api/xet")
            self.send_header("Content-Length", str(len(content)))
            return self.end_headers()
        self.send_response(302 if large else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Location", f"{self.hub.bytes_host}/bytes/{digest}")
        self.send_header("Content-Length", "0" if large else str(len(content)))
        self.end_headers()

    def _bytes(self, content: bytes) -> None:
        fault = self.hub.faults.pop(0) if self.hub.faults else Fault()
        if fault.status:
            return self._refuse(fault.status)
        mark, start = f'"bytes-{hashlib.md5(content, usedforsecurity=False).hexdigest()}"', 0
        asked = self.headers.get("Range", "")
        if asked and not fault.no_range and self.headers.get("If-Range", mark) == mark:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return self._refuse(416)
        sent = bytearray(content[start:])
        if fault.flip:
            sent[len(sent) // 2] ^= 255
        self.send_response(206 if start else 200)
        self.send_header("ETag", mark)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
            self._write(bytes(sent), fault)

    def _write(self, sent: bytes, fault: Fault) -> None:
        whole = sent if fault.drop_after is None else sent[: fault.drop_after]
        if fault.stall is not None:
            self.hub.bytes_sent += len(whole) // 2
            self.wfile.write(whole[: len(whole) // 2])
            self.wfile.flush()
            fault.stall.wait(30)
            whole = whole[len(whole) // 2 :]
        step = len(whole) if not fault.bytes_per_s else max(1, int(fault.bytes_per_s / 10))
        for start in range(0, len(whole), step or 1):
            some = whole[start : start + step]
            self.hub.bytes_sent += len(some)  # before a client can have them, and ask
            self.wfile.write(some)
            time.sleep(0.1 if fault.bytes_per_s else 0)
        if fault.drop_after is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()
