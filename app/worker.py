"""The worker: a child process that makes the queue's clips, and the keeper that lives in the page and replaces it.

In:  rows of the queue.
Out: clips, and the rows' progress, previews and ends.
Knows nothing of Gradio. The module itself is light: torch is imported by the child, in `_load_engine`, and by nobody
else, so that whatever happens on the card happens to the child alone.

The child learns of the page's death by its standard input: the page holds the other end, and the system closes it when
the page ends in any way. It then has a moment to clean up, and is gone.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from app.queue import Queue, Row
from engine.hardware.options import alone_with
from engine.job import GenerateJob
from engine.media import video
from engine.messages import Cancelled, Failed, Message, Preview, Progress, Saved, StudioError
from engine.paths import ROOT
from engine.platform_calls import NO_WINDOW, try_lock, wait_for_end

Engine = Callable[[GenerateJob, Callable[[Message], None]], Saved]

LOOK_S = 0.2  # between two looks at an empty queue; a look costs .3 ms and writes nothing
REPORT_S = 0.25  # at most four progress reports a second reach the disk; a new stage always does
GRACE_S = 2.0  # what a run has for cleaning up when the page has gone
STEADY_S = 60.0  # a child that lived this long and then died was no fault of its start
LOG_BYTES = 2**20

log = logging.getLogger(__name__)


# --- in the page -----------------------------------------------------------------------------------------------------


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
        self._lock: IO[bytes] | None = None

    def start(self) -> None:
        """Start the workers. Rows that an earlier studio left running become interrupted.

        Raises:
            StudioError: another studio keeps a worker for this queue, or the folder cannot be written.
        """
        if self._threads:
            return
        self._queue = Queue(self._queue_file)
        self._lock = _only_one(self._queue_file)
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
            self._lock.close()
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
            quick_deaths = 0 if lived > STEADY_S else quick_deaths + 1
            self._stopping.wait(min(60.0, 0.25 * 2**quick_deaths))

    def _spawn(self, name: str, device: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-X", "utf8", "-X", "faulthandler", "-m", "app.worker", "--attached"]
        command += ["--queue", str(self._queue_file), "--outputs", str(self._outputs), "--name", name]
        command += ["--run", self._run] if self._run else []
        environment = alone_with(device, os.environ)
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
        why = "The studio was closed." if self._stopping.is_set() else _death(code)
        error = Failed("The worker stopped in the middle of this clip.", why, "Run it again.")
        while True:
            try:
                self._queue.interrupt(name, error=error)
                return
            except StudioError:
                log.exception("the queue could not be written")
                if self._stopping.wait(2.0):
                    return  # the next start marks it


def _death(code: int) -> str:
    """What an exit code says, for a person."""
    if code in (-signal.SIGABRT, -getattr(signal, "SIGSEGV", 11), 3221225477):
        return "A library crashed; logs/worker.log has its last words."
    if code in (-9, 137):
        return "The system or somebody ended it; most often memory had run out."
    return f"It ended with code {code}; logs/worker.log has its last words."


def _only_one(queue_file: Path) -> IO[bytes]:
    path = queue_file.with_suffix(".lock")
    try:
        lock = try_lock(path)
    except OSError as error:
        raise StudioError(
            f"The studio cannot work in {path.parent}.",
            f"It cannot write there ({error.strerror}).",
            "Choose another folder with --outputs.",
        ) from error
    if lock is None:
        raise StudioError(
            f"Another studio is already at work in {path.parent}.",
            "Two workers would make each other slow, and one card may not hold both.",
            "Use the one that is open, close it first, or give this one another folder with --outputs.",
        )
    return lock


def _log_file(data: Path) -> Path:
    """<data>/logs/worker.log, begun anew when it has grown past a megabyte."""
    path = data / "logs" / "worker.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size > LOG_BYTES:
        path.unlink()
    return path


# --- in the child ----------------------------------------------------------------------------------------------------


class Worker:
    """Takes rows and makes them, one after the other.

    Args:
        queue: where they come from.
        name: who it is, written into its rows.
        engine: makes one clip. A future, because importing torch takes its time and a row taken meanwhile can say so.
        logs: folder for the traces of errors that nobody foresaw.
    """

    def __init__(self, queue: Queue, name: str, engine: Future[Engine], logs: Path) -> None:
        self.queue = queue
        self.name = name
        self.engine = engine
        self.logs = logs
        self.leaving = threading.Event()
        """Set from another thread: the run stops at its next word, and no further row is taken."""
        self._reported_at = 0.0
        self._stage = ""

    def work(self) -> None:
        """Until told to leave."""
        while not self.leaving.is_set():
            try:
                row = self.queue.take(self.name)
            except StudioError as error:  # a full disk: rows go on waiting until there is room again
                log.warning("%s", error)
                self.leaving.wait(5.0)
                continue
            if row is None:
                self.leaving.wait(LOOK_S)
            else:
                self.make(row)

    def make(self, row: Row) -> None:
        """One row, from taken to ended, however it ends."""
        assert row.job is not None  # take() passes over rows that cannot be read
        say = partial(self.say, row.id)
        self._stage = ""
        try:
            if not self.engine.done():
                say(Progress("load", 0, 0, note="The engine is starting."))
            if self.engine.exception() is not None:
                raise SystemExit(self._no_engine(row.id))
            saved = self.engine.result()(row.job, say)
        except Cancelled:
            if not self.leaving.is_set():  # otherwise nobody cancelled it: the keeper marks it interrupted
                self._insist(lambda: self.queue.cancelled(row.id))
        except StudioError as error:
            failed = Failed.of(error)
            self._insist(lambda: self.queue.fail(row.id, failed))
        except MemoryError:
            self._insist(lambda: self.queue.fail(row.id, OUT_OF_MEMORY))
        except Exception as error:
            failed = self._unforeseen(row.id, error)
            self._insist(lambda: self.queue.fail(row.id, failed))
        else:
            self._insist(lambda: self.queue.finish(row.id, saved))

    def say(self, id: int, message: Message) -> None:
        """What the engine calls: pass the message on, and stop the run when somebody asked for it.

        Raises:
            Cancelled: the row is to stop, or the page has gone.
        """
        if self.leaving.is_set():
            raise Cancelled
        try:
            if self.queue.cancel_requested(id):
                raise Cancelled
            if isinstance(message, Preview) or (isinstance(message, Progress) and self._is_due(message)):
                self.queue.report(id, message)
        except StudioError as error:
            # An hour of work is not thrown away because a progress bar could not be written.
            log.warning("job %d: %s", id, error)

    def _is_due(self, message: Progress) -> bool:
        """Whether the last report is long enough ago, or was of another stage."""
        now = time.monotonic()
        if message.stage == self._stage and now - self._reported_at < REPORT_S:
            return False
        self._stage, self._reported_at = message.stage, now
        return True

    def _no_engine(self, id: int) -> int:
        """Without an engine every row would fail within a second: one row says why, the others wait until it is mended.

        Returns:
            The exit code: the keeper's next worker tries the import again.
        """
        failed = self._unforeseen(id, self.engine.exception() or RuntimeError("no engine"))
        self._insist(self.queue.pause)
        failed = replace(failed, what="The engine cannot be started.", next_step=MEND_ENGINE)
        self._insist(lambda: self.queue.fail(id, failed))
        return 1

    def _unforeseen(self, id: int, error: BaseException) -> Failed:
        """Keep the trace for whoever mends it; the person gets three sentences."""
        trace = "".join(traceback.format_exception(error))
        log.error("job %d\n%s", id, trace)
        path = self.logs / f"job-{id}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(trace, encoding="utf-8")
        except OSError as trouble:
            log.warning("%s could not be written: %s", path, trouble)
        said = (str(error).splitlines() or [""])[0][:200]
        return Failed(
            "The run stopped with an error that the studio did not foresee.",
            f"{type(error).__name__}: {said.rstrip('.')}." if said else f"{type(error).__name__}.",
            f"Run it again; if it stays, report it with {path}.",
        )

    def _insist(self, write: Callable[[], None]) -> None:
        """How a row ended has to reach the disk: try for a minute, then let the keeper see this process die."""
        for _ in range(30):
            try:
                return write()
            except StudioError as error:
                log.warning("%s", error)
                time.sleep(2.0)
        write()


MEND_ENGINE = "Run python launch.py doctor, then run this again and resume the queue, which is paused until then."
OUT_OF_MEMORY = Failed(
    "The machine ran out of memory.",
    "This clip needs more than is free beside the other programs.",
    "Close other programs, or choose fewer frames or a smaller size.",
    "num_frames",
)


def _load_engine(name: str, outputs: Path) -> Engine:
    """The heavy import. `name` is "module:function", or "" for the studio's own engine."""
    if name:
        module, _, function = name.partition(":")
        return partial(getattr(importlib.import_module(module), function), outputs=outputs)
    from engine.loading.pool import ModelPool
    from engine.run import run

    return partial(run, outputs=outputs, pool=ModelPool())


def _leave_with_the_page(worker: Worker) -> None:
    """Wait for the end of standard input, which is the page's; then stop, in order if that is quick."""
    wait_for_end(sys.stdin.buffer)
    worker.leaving.set()
    time.sleep(GRACE_S)
    # In the middle of a long step there is no other way out: the main thread is inside the card's driver.
    os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """`python -m app.worker`: take rows until the page goes away or, without --attached, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m app.worker", description="Make the clips of a queue.")
    parser.add_argument("--queue", type=Path, required=True, help="the queue's file")
    parser.add_argument("--outputs", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--name", default=f"worker-{os.getpid()}", help="what to write into the rows")
    parser.add_argument("--run", default="", metavar="MODULE:FUNCTION", help="another engine than engine.run:run")
    parser.add_argument("--attached", action="store_true", help="end when standard input is closed")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    loader = ThreadPoolExecutor(1)
    engine = loader.submit(_load_engine, given.run, given.outputs)
    worker = Worker(Queue(given.queue), given.name, engine, given.queue.parent / "logs")
    loader.shutdown(wait=False)
    if given.attached:
        # Ctrl-C in a terminal reaches every process there. The page acts on it and lets this one know in its own way.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_leave_with_the_page, args=(worker,), daemon=True).start()
        video.sweep(given.outputs)
    worker.work()
    # Everything that matters is on disk. Taking torch apart again would cost seconds in which the page cannot close.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
