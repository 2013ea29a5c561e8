"""The worker: a child process that makes the queue's clips. `app.keeper` starts it and replaces it when it dies.

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
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from app.queue import Queue, Row
from engine.job import GenerateJob
from engine.media import video
from engine.messages import Cancelled, Failed, Message, Preview, Progress, Saved, StudioError
from engine.platform_calls import wait_for_end
from engine.threads import limit_spinning

Engine = Callable[[GenerateJob, Callable[[Message], None]], Saved]

LOOK_S = 0.2  # between two looks at an empty queue; a look costs .3 ms and writes nothing
REPORT_S = 0.25  # at most four progress reports a second reach the disk; a new stage always does
GRACE_S = 2.0  # what a run has for cleaning up when the page has gone

log = logging.getLogger(__name__)


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
    limit_spinning(os.environ)  # before torch is imported
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
