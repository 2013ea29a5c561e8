"""The keeper: a thread in the page for each device, which keeps a worker process alive and replaces it when it dies.

In:  the queue's file, the devices.
Out: worker processes; rows whose worker died are marked "interrupted", with a reason for people.
Knows nothing of what a worker does, of torch or of Gradio. Workers hang on the page by their standard input.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from app.queue import Queue
from app.worker import GRACE_S
from engine.hardware.options import restrict_to_device
from engine.messages import Failed, StudioError
from engine.paths import ROOT
from engine.platform_calls import NO_WINDOW

STEADY_S = 60.0  # a child that lived this long and then died was no fault of its start
LOG_BYTES = 2**20

log = logging.getLogger(__name__)


class WorkerKeeper:
    """Keeps a worker alive beside the page for each device: starts it, notices its death, marks its row, starts anew.

    One keeper per data folder: a lock file beside the queue refuses a second one. Its workers share the line, each row
    going to whoever is free first.

    Args:
        queue: the queue's file.
        outputs: where the clips go.
        run: another engine than `engine.run:run`, as "module:function". The seam for tests that need no model.
        devices: what each worker runs on, such as "cuda:1"; "" is the fastest device that a worker finds.
    """

    def __init__(self, queue: Path, outputs: Path, *, run: str = "", devices: Sequence[str] = ("",)) -> None:
        self._queue_file = Path(queue).resolve()
        self._outputs = Path(outputs).resolve()
        self._run = run
        self._devices = tuple(devices) or ("",)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock: FileLock | None = None

    def start(self) -> None:
        """Start the workers. Rows that an earlier studio left running become interrupted.

        Raises:
            StudioError: another studio keeps a worker for this queue, or the folder cannot be written.
        """
        if self._threads:
            return
        self._queue = Queue(self._queue_file)
        self._lock = lock_queue(self._queue_file)
        self._queue.interrupt(
            error=Failed(
                "The studio was closed in the middle of this clip.", "A clip is made in one go.", "Run it again."
            )
        )
        self._stopping.clear()
        for place in range(len(self._devices)):
            thread = threading.Thread(target=self._keep, args=(place,), name=f"worker-keeper-{place}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End the workers and wait until they are gone. What they were making becomes interrupted; the line stays."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def alive(self) -> bool:
        """Whether there is a worker at this moment."""
        return bool(self.pids)

    @property
    def pids(self) -> list[int]:
        """The workers' process numbers, in the order of their devices; those that are gone are left out."""
        return [child.pid for _, child in sorted(self._children.items()) if child.poll() is None]

    @property
    def pid(self) -> int | None:
        """The first worker's process number, None while there is none."""
        return next(iter(self.pids), None)

    def _keep(self, place: int) -> None:
        """Start, wait for the end, mark, start again; slower each time if it does not live for a minute."""
        quick_deaths = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            name = f"worker-{secrets.token_hex(4)}"
            try:
                child = self._children[place] = self._spawn(name, self._devices[place])
            except OSError:
                log.exception("the worker could not be started")
            else:
                self._wait_for_end(child)
                self._mark(name, child.returncode)
            lived = time.monotonic() - began
            if lived > STEADY_S:
                quick_deaths = 0
            else:
                quick_deaths += 1
            self._stopping.wait(min(60.0, 0.25 * 2**quick_deaths))

    def _spawn(self, name: str, device: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-X", "utf8", "-X", "faulthandler", "-m", "app.worker", "--attached"]
        command += ["--queue", str(self._queue_file), "--outputs", str(self._outputs), "--name", name]
        if self._run:
            command += ["--run", self._run]
        environment = restrict_to_device(device, os.environ)
        if len(self._devices) > 1:
            # Busy OpenMP pools fight over the cores: each worker gets its share of them.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self._devices))))
        with _log_file(self._queue_file.parent).open("ab") as said:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                creationflags=NO_WINDOW,
            )

    def _wait_for_end(self, child: subprocess.Popen[bytes]) -> None:
        while child.poll() is None and not self._stopping.wait(0.1):
            pass
        assert child.stdin is not None
        child.stdin.close()  # nothing was ever written to it: it is the thread by which the worker hangs on the page
        try:
            child.wait(GRACE_S + 2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _mark(self, name: str, code: int) -> None:
        """Until it is written down: a full disk must not leave a dead row looking alive."""
        why = "The studio was closed." if self._stopping.is_set() else _explain_exit_code(code)
        error = Failed("The worker stopped in the middle of this clip.", why, "Run it again.")
        while True:
            try:
                self._queue.interrupt(name, error=error)
                return
            except StudioError:
                log.exception("the queue could not be written")
                if self._stopping.wait(2.0):
                    return  # the next start marks it


def _explain_exit_code(code: int) -> str:
    """What an exit code says, for a person."""
    if code in (-signal.SIGABRT, -getattr(signal, "SIGSEGV", 11), 3221225477):
        return "A library crashed; logs/worker.log has its last words."
    if code in (-9, 137):
        return "The system or somebody ended it; most often memory had run out."
    return f"It ended with code {code}; logs/worker.log has its last words."


def lock_queue(queue_file: Path) -> FileLock:
    """What keeps a second studio away from this queue; it ends with this process, however that ends."""
    path = queue_file.with_suffix(".lock")
    lock = FileLock(path, thread_local=False)  # the thread that stops a keeper need not be the one that started it
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudioError(
            f"Another studio is already at work in {path.parent}.",
            "Two workers would make each other slow, and one card may not hold both.",
            "Use the one that is open, close it first, or give this one another folder with --outputs.",
        ) from None
    except OSError as error:
        raise StudioError(
            f"The studio cannot work in {path.parent}.",
            f"It cannot write there ({error.strerror}).",
            "Choose another folder with --outputs.",
        ) from error
    return lock


def _log_file(data: Path) -> Path:
    """<data>/logs/worker.log, begun anew when it has grown past a megabyte."""
    path = data / "logs" / "worker.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size > LOG_BYTES:
        path.unlink()
    return path
