"""The worker and its keeper, with real processes and real kills: the page lives, the queue stays whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import psutil
import pytest

from app.keeper import WorkerKeeper, lock_queue
from app.queue import Queue, Row
from app.worker import LOOK_S
from engine import platform_calls
from engine.job import GenerateJob, make_job, read_job
from engine.media import video
from engine.messages import StudioError
from engine.paths import ROOT

T = TypeVar("T")
SMALL = "tests.support.small_engine:run"


class House:
    """A data folder with its queue, the outputs folder, and a keeper that is stopped at the end."""

    def __init__(self, folder: Path, run: str = SMALL) -> None:
        self.data, self.outputs = folder / "data", folder / "outputs"
        self.queue = Queue(self.data / "queue.db")
        self.keeper = WorkerKeeper(self.queue.path, self.outputs, run=run)

    def until(self, id: int, *states: str, patience_s: float = 60.0) -> Row:
        """The row, once it is in one of these states."""
        return self.once(lambda: row if (row := self.queue.get(id)).state in states else None, patience_s)

    def once(self, look: Callable[[], T | None], patience_s: float = 60.0) -> T:
        """What `look` gives as soon as it gives something."""
        end = time.monotonic() + patience_s
        while not (found := look()):
            assert time.monotonic() < end, f"waited {patience_s} s in vain; {self.queue.rows()}\n{self.last_words()}"
            time.sleep(0.02)
        return found

    def last_words(self) -> str:
        path = self.data / "logs" / "worker.log"
        return path.read_text(encoding="utf-8") if path.is_file() else "the worker never spoke"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A house of its own, its keeper not started."""
    house = House(tmp_path)
    yield house
    house.keeper.stop()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A house whose worker goes on from test to test: starting one takes half a second."""
    house = House(tmp_path_factory.mktemp("busy"))
    house.keeper.start()
    yield house
    house.keeper.stop()


def a_job(prompt: str = "a square walks", steps: int = 2, seed: int = 0) -> GenerateJob:
    return make_job(prompt=prompt, seed=seed, sampling={"num_inference_steps": steps})


def test_the_line_is_made_in_order_and_every_clip_carries_its_document(busy: House) -> None:
    ids = [busy.queue.add(a_job(seed=seed)) for seed in (3, 4)]
    rows = [busy.until(id, "done") for id in ids]
    assert (rows[0].finished or 0) <= (rows[1].started or 0)
    for row in rows:
        assert row.saved is not None
        document = video.read_document(Path(row.saved["clip"]))
        assert document is not None and read_job(document) == row.job


def test_however_a_run_ends_its_row_says_so_and_the_line_goes_on(busy: House) -> None:
    prompts = ["refused by the guard", "unforeseen weather", "memory is short", "a square walks"]
    refused, unforeseen, memory, good = (busy.queue.add(a_job(prompt)) for prompt in prompts)
    busy.until(good, "done")
    errors = [busy.queue.get(id).error or {} for id in (refused, unforeseen, memory)]
    assert [busy.queue.get(id).state for id in (refused, unforeseen, memory)] == ["failed"] * 3
    assert (errors[0]["what"], errors[0]["next_step"]) == ("The clip came out black.", "Use fewer steps.")
    trace = busy.data / "logs" / f"job-{unforeseen}.log"
    assert errors[1]["why"] == "ZeroDivisionError: no such luck." and str(trace) in errors[1]["next_step"]
    assert "small_engine.py" in trace.read_text(encoding="utf-8")
    assert "out of memory" in errors[2]["what"] and "fewer frames" in errors[2]["next_step"]


def test_a_worker_that_crashes_or_is_killed_in_mid_step_takes_only_its_row_along(busy: House) -> None:
    jobs = [a_job("crash and burn"), a_job(steps=100), a_job(seed=1)]
    crashed, killed, after = (busy.queue.add(job) for job in jobs)
    busy.until(crashed, "interrupted")
    busy.once(lambda: busy.queue.get(killed).progress)
    pid = busy.keeper.pid
    psutil.Process(pid).kill()
    row = busy.until(killed, "interrupted")
    busy.until(after, "done")
    assert busy.keeper.alive and busy.keeper.pid != pid
    assert row.job == jobs[1] and row.error is not None and "stopped in the middle" in row.error["what"]
    busy.queue.pause()  # or the worker would have it before it is edited
    busy.queue.edit(busy.queue.run_again(killed), a_job(steps=1))
    busy.queue.resume()
    busy.until(killed, "done")


def test_a_cancelled_run_stops_within_a_step_and_leaves_no_file(busy: House) -> None:
    id, after = busy.queue.add(a_job(steps=100, seed=555)), busy.queue.add(a_job(seed=1))
    busy.once(lambda: busy.queue.get(id).progress)
    asked = time.time()
    busy.queue.cancel(id)
    row = busy.until(id, "cancelled")
    assert (row.finished or 0) - asked < 2.0  # all hundred steps take five seconds
    busy.until(after, "done")
    assert not list(busy.outputs.rglob("*s555*"))


def test_a_paused_line_starts_nothing(busy: House) -> None:
    busy.queue.pause()
    id = busy.queue.add(a_job())
    time.sleep(3 * LOOK_S)
    assert busy.queue.get(id).state == "waiting"
    busy.queue.resume()
    busy.until(id, "done")


def test_one_studio_per_folder_and_stopping_it_keeps_the_line(house: House) -> None:
    running, waiting = house.queue.add(a_job(steps=100)), house.queue.add(a_job())
    house.keeper.start()
    second = WorkerKeeper(house.queue.path, house.outputs, run=SMALL)
    with pytest.raises(StudioError, match="Another studio"):
        second.start()
    house.once(lambda: house.queue.get(running).progress)
    pid = house.keeper.pid
    house.keeper.stop()
    assert not psutil.pid_exists(pid or -1) and not house.keeper.alive
    assert (house.queue.get(running).state, house.queue.get(waiting).state) == ("interrupted", "waiting")
    second.start()
    second.stop()


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    script = (
        "import sys, time; from pathlib import Path; from app.keeper import lock_queue; "
        "kept = lock_queue(Path(sys.argv[1])); print('mine', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StudioError, match="Another studio"):
            lock_queue(path)
        holder.kill()
    lock_queue(path).release()


STUDIO = """
import sys, time
from pathlib import Path
from app.keeper import WorkerKeeper
from app.worker import LOOK_S
keeper = WorkerKeeper(Path(sys.argv[1]), Path(sys.argv[2]), run="tests.support.small_engine:run")
keeper.start()
while True:
    print(keeper.pid or 0, flush=True)
    time.sleep(0.02)
"""


@pytest.mark.parametrize("kill_worker", [True, False], ids=["everything", "the page alone"])
def test_killing_the_studio_loses_nothing_that_was_queued(house: House, kill_worker: bool) -> None:
    # Without its page the worker has to go by itself, even in the middle of a step that never ends.
    first = a_job("a square walks" if kill_worker else "stuck in a long step", steps=100)
    ids = [house.queue.add(job) for job in (first, a_job(seed=1), a_job(seed=2))]
    command = [sys.executable, "-c", STUDIO, str(house.queue.path), str(house.outputs)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as studio:
        house.once(lambda: house.queue.get(ids[0]).progress)
        worker = psutil.Process(studio.pid).children()[0]
        studio.kill()
        if kill_worker:
            worker.kill()
    worker.wait(10)
    # What a power cut leaves in the file: one row still says running.
    assert [house.queue.get(id).state for id in ids] == ["running", "waiting", "waiting"]
    house.keeper.start()
    row = house.until(ids[0], "interrupted")
    assert row.job == first and row.error is not None and "closed in the middle" in row.error["what"]
    for id in ids[1:]:
        house.until(id, "done")
    assert not [path for path in house.outputs.rglob("*") if video.PART in path.name]


def test_an_engine_that_cannot_start_fails_one_row_and_pauses_the_rest(tmp_path: Path) -> None:
    house = House(tmp_path, run="tests.light.no_such_engine:run")
    first, second = house.queue.add(a_job()), house.queue.add(a_job())
    house.keeper.start()
    try:
        error = house.until(first, "failed").error
        assert error is not None and "engine cannot be started" in error["what"]
        assert "no_such_engine" in error["why"] and "doctor" in error["next_step"]
        assert house.queue.paused and house.queue.get(second).state == "waiting"
    finally:
        house.keeper.stop()


def test_a_full_disk_while_saving_fails_the_row_and_leaves_no_part(house: House) -> None:
    house.outputs.write_text("a file where the folder should be", encoding="utf-8")
    id = house.queue.add(a_job())
    house.keeper.start()
    error = house.until(id, "failed").error
    assert error is not None and "could not be written" in error["what"] and "file stands where" in error["why"]
    house.outputs.unlink()
    house.until(house.queue.run_again(id), "done")


def test_a_worker_by_hand_needs_no_page(house: House) -> None:
    id = house.queue.add(a_job())
    command = [sys.executable, "-m", "app.worker", "--queue", str(house.queue.path), "--outputs", str(house.outputs)]
    with subprocess.Popen([*command, "--run", SMALL], cwd=ROOT, stdin=subprocess.DEVNULL, env=os.environ) as worker:
        house.until(id, "done")
        worker.kill()


def test_the_worker_module_is_light() -> None:
    check = (
        "import sys, app.worker, app.library.clips; sys.exit(any(m in sys.modules for m in ('torch', 'gradio', 'cv2')))"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[House]:
    """A house with two workers."""
    house = House(tmp_path)
    house.keeper = WorkerKeeper(house.queue.path, house.outputs, run=SMALL, devices=("cpu", "cpu"))
    house.keeper.start()
    yield house
    house.keeper.stop()


def test_two_workers_share_the_line_and_no_row_is_made_twice(pair: House) -> None:
    pair.once(lambda: len(pair.keeper.pids) == 2)
    long = [pair.queue.add(a_job(steps=60, seed=seed)) for seed in (100, 101)]
    running = pair.once(
        lambda: (
            [row for id in long if (row := pair.queue.get(id)).state == "running"]
            if all(pair.queue.get(id).progress for id in long)
            else None
        )
    )
    assert len({row.worker for row in running}) == 2
    ids = [pair.queue.add(a_job(seed=seed)) for seed in range(8)]
    rows = [pair.until(id, "done") for id in (*long, *ids)]
    clips = [row.saved["clip"] for row in rows if row.saved]
    assert len(set(clips)) == 10 == len(list(pair.outputs.rglob("*.mp4")))


def test_a_killed_worker_leaves_the_other_going(pair: House) -> None:
    ids = [pair.queue.add(a_job(steps=100, seed=seed)) for seed in (100, 101)]
    pair.once(lambda: all(pair.queue.get(id).progress for id in ids))
    pids = pair.keeper.pids
    psutil.Process(pids[0]).kill()
    lost = pair.once(lambda: next((id for id in ids if pair.queue.get(id).state == "interrupted"), None))
    kept = next(id for id in ids if id != lost)
    assert pair.queue.get(kept).state == "running" and pids[1] in pair.keeper.pids
    pair.until(kept, "done")
    pair.until(pair.queue.run_again(lost), "running")  # by whoever is free: the other, or the dead one's successor


def test_a_worker_sees_its_own_device_and_its_share_of_the_cores(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = []

    def listen(command: list[str], env: dict[str, str], **rest: object) -> None:
        told.append({name: env.get(name) for name in ("IDCRAFTER_DEVICE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")})
        raise OSError("no process is wanted here")

    monkeypatch.setattr("app.keeper.subprocess.Popen", listen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("app.keeper.os.cpu_count", lambda: 16)
    keeper = WorkerKeeper(tmp_path / "queue.db", tmp_path, devices=("cuda:0", "cuda:1"))
    keeper.start()
    keeper.stop()
    told.sort(key=str)
    assert told == [
        {"IDCRAFTER_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "4", "OMP_NUM_THREADS": "8"},
        {"IDCRAFTER_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "6", "OMP_NUM_THREADS": "8"},
    ]


def test_on_windows_the_pages_pipe_is_looked_at_and_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads standard input there stops numpy from loading, so no clip would ever be made."""
    looked = []

    def peek(handle: int) -> tuple[int, int]:
        looked.append(handle)
        if len(looked) == 3:
            raise BrokenPipeError
        return 0, 0

    class Unreadable:
        def fileno(self) -> int:
            return 7

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(platform_calls, "LOOK_S", 0.0)
    monkeypatch.setitem(sys.modules, "_winapi", SimpleNamespace(PeekNamedPipe=peek))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda number: number + 100))
    platform_calls.wait_for_end(Unreadable())
    assert looked == [107, 107, 107]
