"""The real studio for the journeys: the command a creator types, its worker, its page, and a browser that looks on.

One server for the whole session, on random tiny weights where no trained ones are there; every test gets a fresh page.
"""

from __future__ import annotations

import importlib.resources
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.queue import Queue, Row
from engine.paths import ROOT

T = TypeVar("T")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
SLOW_S = 90.0  # longest wait for one thing on two busy cores; a pass takes a tenth of it


@dataclass
class Server:
    """One studio in a process of its own."""

    home: Path
    models: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def queue(self) -> Queue:
        return Queue(self.home / ".studio" / "queue.db")

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "app.cli",
            "--port",
            str(self.port),
            "--outputs",
            str(self.home),
            "--models-dir",
            str(self.models),
            "--no-inbrowser",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.environment}
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        wait_for(self._answers, "the page to answer")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.home / "server.log").read_text("utf-8")
        with socket.socket() as line:
            line.settimeout(1)
            return line.connect_ex(("127.0.0.1", self.port)) == 0

    def row(self, state: str) -> Row | None:
        """Any row in that state."""
        return next(iter(self.queue.rows(states=[state])), None)  # pyright: ignore[reportArgumentType]

    def clear(self) -> None:
        """Empty the queue, so that the next test meets the studio as new; clips stay."""
        self.queue.pause()  # or the worker would take the next row while this one is let go
        for row in self.queue.rows():
            if row.state == "running":
                self.queue.cancel(row.id)
        wait_for(lambda: self.row("running") is None, "the worker to let go")
        for row in self.queue.rows():
            self.queue.remove(row.id)
        self.queue.resume()


@dataclass
class Watched:
    """A page in the browser, with everything that it asked for and complained about."""

    page: Page
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", lambda request: self.hosts.add(urlparse(request.url).hostname or ""))
        self.page.on("websocket", lambda line: self.hosts.add(urlparse(line.url).hostname or ""))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", lambda got: self.complaints.append(got.url) if got.status >= 400 else None)


def wait_for(look: Callable[[], T], what: str, seconds: float = SLOW_S) -> T:
    """Look until there is something to see."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return line.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Iterator[Server]:
    """The studio that all journeys share. The repository's own checkpoint goes before the tiny one."""
    made = Server(tmp_path_factory.mktemp("studio"), tiny_root, free_port())
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    """One headless Chromium."""
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def watched(server: Server, browser: Browser) -> Iterator[Watched]:
    """A fresh page at 1280 x 720 over an empty queue. Afterwards: no request left the machine, no error was logged."""
    server.clear()
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.set_default_timeout(SLOW_S * 1000)
    expect.set_options(timeout=SLOW_S * 1000)
    found = Watched(context.new_page())
    found.listen()
    open_page(found.page, server)
    yield found
    context.close()
    assert found.hosts <= {"127.0.0.1", "localhost", ""}
    assert found.complaints == []


@pytest.fixture
def page(watched: Watched) -> Page:
    """The page itself."""
    return watched.page


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core."""
    return (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def open_page(page: Page, server: Server) -> None:
    """Go to the studio and wait until its form is filled in."""
    page.goto(server.url)
    expect(page.locator("#prompt textarea")).not_to_have_value("")
    expect(page.locator("#cost")).to_contain_text("memory")


def quick(page: Page, steps: int = 2, frames: int = 5) -> None:
    """A clip of seconds instead of a minute."""
    if not page.get_by_label("Steps", exact=True).is_visible():
        page.locator("#advanced > button").click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Frames", exact=True).fill(str(frames))


def endless(page: Page) -> None:
    """A clip that is still being made when the test has seen enough of it, on a fast machine too."""
    quick(page, steps=100, frames=65)
