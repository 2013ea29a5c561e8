"""The queue: order, states, and that nothing queued is ever lost or made twice."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from app.queue import MIGRATIONS, Queue, Row
from engine.job import GenerateJob, make_job, write_job
from engine.messages import Failed, Preview, Progress, Saved, StudioError
from engine.paths import ROOT


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "data" / "queue.db")


def a_job(prompt: str = "a kite in the wind", **values: object) -> GenerateJob:
    return make_job(prompt=prompt, **values)


def prompts(rows: list[Row]) -> list[str]:
    return [row.job.prompt if row.job else "?" for row in rows]


def a_clip(folder: Path) -> Saved:
    return Saved(folder / "a.mp4", folder / "a.json", folder / "a.webp", 2.125, 17)


def test_a_row_gives_back_the_very_document_that_was_added(queue: Queue) -> None:
    subjects = [{"name": "fox", "pictures": [{"path": "füchsin.png", "sha256": "ab" * 32}]}]
    job = a_job("@fox liest ein Buch, 狐", seed=2**63 - 1, subjects=subjects)
    row = queue.get(queue.add(job, group="three seeds"))
    assert (row.job, row.state, row.position, row.group) == (job, "waiting", 0, "three seeds")


def test_rows_are_taken_in_the_order_of_the_line(queue: Queue) -> None:
    ids = [queue.add(a_job(f"clip {n}")) for n in range(3)]
    taken = [queue.take("w") for _ in range(4)]
    assert [row and row.id for row in taken] == [*ids, None]


@pytest.mark.parametrize(("place", "expected"), [(0, "dabc"), (1, "adbc"), (3, "abcd"), (99, "abcd"), (-5, "dabc")])
def test_a_moved_row_stands_where_it_was_put(queue: Queue, place: int, expected: str) -> None:
    ids = [queue.add(a_job(name)) for name in "abcd"]
    queue.move(ids[3], place)
    rows = queue.rows()
    assert "".join(prompts(rows)) == expected
    assert [row.position for row in rows] == [0, 1, 2, 3]


def test_what_runs_comes_first_then_the_line_then_the_latest_that_ended(queue: Queue) -> None:
    ids = [queue.add(a_job(name)) for name in "abcde"]
    queue.cancel(ids[0])
    queue.cancel(ids[3])
    queue.take("w")
    assert "".join(prompts(queue.rows())) == "bceda"
    assert "".join(prompts(queue.rows(limit=3))) == "bce"
    assert "".join(prompts(queue.rows(states=["cancelled"]))) == "da"


def test_a_waiting_row_can_be_edited_and_keeps_its_place(queue: Queue) -> None:
    first, second = queue.add(a_job("a")), queue.add(a_job("b"))
    queue.edit(first, a_job("changed"))
    assert [row.id for row in queue.rows()] == [first, second]
    assert queue.get(first).job == a_job("changed")


def test_a_running_row_refuses_edit_move_remove_and_run_again(queue: Queue) -> None:
    id = queue.add(a_job())
    queue.take("w")
    for wish in (
        lambda: queue.edit(id, a_job("late")),
        lambda: queue.move(id, 0),
        lambda: queue.remove(id),
        lambda: queue.run_again(id),
    ):
        with pytest.raises(StudioError, match=r"running|being made"):
            wish()
    assert queue.get(id).job == a_job()


def test_a_job_that_is_not_there_is_named(queue: Queue) -> None:
    with pytest.raises(StudioError, match="no job 7"):
        queue.get(7)


def test_cancelling_a_waiting_row_ends_it_and_a_running_one_is_asked(queue: Queue) -> None:
    running, waiting = queue.add(a_job("a")), queue.add(a_job("b"))
    queue.take("w")
    queue.cancel(running)
    queue.cancel(waiting)
    assert (queue.get(running).state, queue.get(waiting).state) == ("running", "cancelled")
    assert queue.cancel_requested(running) and queue.get(running).cancel
    queue.cancelled(running)
    assert queue.get(running).state == "cancelled"


def test_progress_and_preview_are_readable_while_the_row_runs(queue: Queue, tmp_path: Path) -> None:
    id = queue.add(a_job())
    queue.take("w")
    queue.report(id, Progress("sample", 3, 30, eta_s=5.5))
    queue.report(id, Preview(3, 30, tmp_path / "p.png"))
    row = queue.get(id)
    assert row.progress == {"kind": "progress", "stage": "sample", "step": 3, "total": 30, "eta_s": 5.5, "note": ""}
    assert row.preview == tmp_path / "p.png"


def test_a_finished_row_knows_its_clip_and_takes_no_more_reports(queue: Queue, tmp_path: Path) -> None:
    id = queue.add(a_job())
    queue.take("w")
    queue.finish(id, a_clip(tmp_path))
    queue.report(id, Progress("sample", 1, 2))
    queue.fail(id, Failed("late", "late", "late"))
    row = queue.get(id)
    assert (row.state, row.progress, row.error) == ("done", None, None)
    assert row.saved is not None and row.saved["clip"] == str(tmp_path / "a.mp4")
    assert row.created <= (row.started or 0) <= (row.finished or 0)


def test_a_failed_row_says_what_why_and_what_next(queue: Queue) -> None:
    id = queue.add(a_job())
    queue.take("w")
    queue.fail(id, Failed("Dark.", "A NaN.", "Fewer steps.", "sampling"))
    assert queue.get(id).error == {
        "kind": "failed",
        "what": "Dark.",
        "why": "A NaN.",
        "next_step": "Fewer steps.",
        "field": "sampling",
    }


def test_run_again_brings_an_ended_row_back_and_copies_a_finished_one(queue: Queue, tmp_path: Path) -> None:
    broken, done = queue.add(a_job("a")), queue.add(a_job("b"))
    queue.take("w")
    queue.fail(broken, Failed("x", "y", "z"))
    queue.take("w")
    queue.finish(done, a_clip(tmp_path))
    assert queue.run_again(broken) == broken
    row = queue.get(broken)
    assert (row.state, row.error, row.started, row.finished, row.worker) == ("waiting", None, None, None, "")
    copy = queue.run_again(done)
    assert copy != done and queue.get(done).saved and queue.get(copy).job == a_job("b")


def test_a_clip_that_falls_short_is_followed_by_the_next_seed_until_one_is_good_enough(
    queue: Queue, tmp_path: Path
) -> None:
    queue.add(a_job(seed=40), group="g", until=0.6, tries=5)
    for weakest in (0.2, 0.59, 0.6):
        row = queue.take("w")
        assert row is not None and row.until == 0.6 and row.group == "g"
        queue.finish(row.id, replace(a_clip(tmp_path), weakest=weakest))
    assert queue.take("w") is None
    assert sorted(row.job.seed for row in queue.rows() if row.job) == [40, 41, 42]


@pytest.mark.parametrize(("until", "tries", "weakest"), [(0.6, 0, 0.1), (None, 9, 0.1), (0.6, 9, None)])
def test_nothing_is_drawn_again_without_a_wish_a_try_left_or_a_judge(
    queue: Queue, tmp_path: Path, until: float | None, tries: int, weakest: float | None
) -> None:
    queue.add(a_job(), until=until, tries=tries)
    row = queue.take("w")
    assert row is not None
    queue.finish(row.id, replace(a_clip(tmp_path), weakest=weakest))
    assert queue.take("w") is None


def test_a_clip_that_is_cancelled_is_not_drawn_again(queue: Queue, tmp_path: Path) -> None:
    queue.add(a_job(), until=0.9, tries=3)
    row = queue.take("w")
    assert row is not None
    queue.cancel(row.id)  # too late for this clip, in time for the next
    queue.finish(row.id, replace(a_clip(tmp_path), weakest=0.1))
    assert queue.take("w") is None


def test_a_queue_of_the_first_format_is_brought_up_to_date(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "queue.db")) as db:
        db.executescript(MIGRATIONS[0])
        db.execute("PRAGMA user_version = 1")
        values = ("waiting", write_job(a_job("from before")), "", 1.0)
        db.execute("INSERT INTO rows (rank, state, job, grouped, created) VALUES (1, ?, ?, ?, ?)", values)
        db.commit()
    row = Queue(tmp_path / "queue.db").take("w")
    assert row is not None and row.job == a_job("from before") and (row.until, row.tries) == (None, 0)


def test_a_duplicate_stands_at_the_end_with_the_same_document(queue: Queue) -> None:
    first = queue.add(a_job("a"), group="g")
    queue.add(a_job("b"))
    copy = queue.get(queue.duplicate(first))
    assert (copy.position, copy.job, copy.group) == (2, a_job("a"), "g")


def test_a_dead_workers_rows_are_interrupted_and_nobody_elses(queue: Queue) -> None:
    ids = [queue.add(a_job(name)) for name in "abc"]
    queue.take("one")
    queue.take("two")
    assert queue.interrupt("one", error=Failed("Gone.", "Killed.", "Again.")) == 1
    assert (queue.get(ids[0]).error or {})["what"] == "Gone."
    assert [queue.get(id).state for id in ids] == ["interrupted", "running", "waiting"]
    queue.cancel(ids[1])
    assert queue.interrupt(error=Failed("Gone.", "Killed.", "Again.")) == 1
    assert (queue.get(ids[1]).state, queue.get(ids[1]).error) == ("cancelled", None)


def test_a_paused_queue_starts_nothing_and_stays_paused_for_the_next_studio(queue: Queue) -> None:
    queue.add(a_job())
    queue.pause()
    assert queue.take("w") is None
    again = Queue(queue.path)
    assert again.paused
    again.resume()
    assert queue.take("w") is not None


def test_the_counter_grows_with_every_change_and_only_then(queue: Queue) -> None:
    before = queue.changes()
    id = queue.add(a_job())
    after_add = queue.changes()
    queue.rows()
    queue.get(id)
    assert before < after_add == queue.changes()
    queue.take("w")
    after_take = queue.changes()
    queue.take("w")  # nothing left: an idle worker must not make pages repaint
    assert after_add < after_take == queue.changes()


def test_a_refused_wish_changes_nothing(queue: Queue) -> None:
    before = queue.changes()
    with pytest.raises(StudioError):
        queue.cancel(99)
    assert queue.changes() == before


def overwrite_document(queue: Queue, id: int, document: str) -> None:
    db = sqlite3.connect(queue.path)
    with db:
        db.execute("UPDATE rows SET job = ? WHERE id = ?", (document, id))
    db.close()


def test_a_document_of_a_newer_studio_shows_as_failed_and_lets_the_others_pass(queue: Queue) -> None:
    strange, fine = queue.add(a_job("a")), queue.add(a_job("b"))
    overwrite_document(queue, strange, json.dumps({"version": 99, "prompt": "a"}))
    row = queue.rows()[0]
    assert (row.id, row.state, row.job) == (strange, "failed", None)
    assert row.error is not None and "version 99" in row.error["what"]
    taken = queue.take("w")
    assert taken is not None and taken.id == fine
    assert queue.get(strange).state == "failed"


def test_a_queue_file_of_a_newer_studio_is_refused_and_left_alone(queue: Queue) -> None:
    db = sqlite3.connect(queue.path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = queue.path.read_bytes()
    with pytest.raises(StudioError, match="newer studio"):
        Queue(queue.path)
    assert queue.path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"this is no database, but a letter to my aunt. " * 40, b"SQLite format 3\x00" + b"!" * 4096]
)
def test_a_file_that_is_no_queue_is_refused_by_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "queue.db"
    path.write_bytes(content)
    with pytest.raises(StudioError, match=r"not a queue|damaged"):
        Queue(path)
    assert path.read_bytes() == content


def test_a_file_in_the_folders_place_is_refused_by_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way", encoding="utf-8")
    with pytest.raises(StudioError, match="cannot be kept"):
        Queue(tmp_path / "data" / "queue.db")


def test_threads_adding_at_once_lose_nothing(queue: Queue) -> None:
    def add(thread: int) -> None:
        for n in range(10):
            queue.add(a_job(f"{thread}-{n}"))

    threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = queue.rows()
    assert sorted(prompts(rows)) == sorted(f"{t}-{n}" for t in range(6) for n in range(10))
    assert [row.position for row in rows] == list(range(60))


def take_all(path: Path, worker: str, gate: Barrier) -> None:
    queue = Queue(path)
    gate.wait(60)
    first = queue.take(worker)
    gate.wait(60)  # neither empties the line before the other has begun
    row = first
    while row is not None:
        queue.finish(row.id, a_clip(path.parent))
        row = queue.take(worker)


def test_two_processes_taking_at_once_share_the_rows_without_a_double(queue: Queue) -> None:
    ids = {queue.add(a_job(f"clip {n}")) for n in range(40)}
    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Barrier(2)
    workers = [spawn.Process(target=take_all, args=(queue.path, name, gate)) for name in ("one", "two")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    rows = queue.rows()
    assert {row.id for row in rows} == ids
    assert all(row.state == "done" for row in rows)
    # Every row was taken by one worker; the number of changes says that none was taken or finished twice.
    assert queue.changes() == 3 * len(ids)
    assert {row.worker for row in rows} == {"one", "two"}


def test_many_threads_opening_a_new_queue_at_once_all_get_one(tmp_path: Path) -> None:
    gate = threading.Barrier(8)
    added: list[int] = []

    def open_and_add() -> None:
        gate.wait(10)
        added.append(Queue(tmp_path / "queue.db").add(a_job()))

    threads = [threading.Thread(target=open_and_add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == list(range(1, 9))


ADD_FOR_EVER = """
import sys
from pathlib import Path
from app.queue import Queue
from engine.job import make_job
queue = Queue(Path(sys.argv[1]))
while True:
    print(queue.add(make_job(prompt="x" * 2000)), flush=True)
"""


def test_a_process_killed_while_adding_leaves_the_queue_whole(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    last = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", ADD_FOR_EVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        last = int(child.stdout.readline())  # it is at work now
        time.sleep(0.05)
        child.kill()
        said = child.communicate()[0].split()
        last = int(said[-1]) if said else last
        queue = Queue(path)
        rows = queue.rows(limit=100_000)
        # Everything it reported is there; at most one more was committed and not yet reported.
        assert len(rows) in (last, last + 1)
        assert {row.id for row in rows} == set(range(1, len(rows) + 1))
        assert all(row.job and row.state == "waiting" for row in rows)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
from app.queue import Queue
from engine.job import make_job
from engine.messages import StudioError
queue = Queue(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
while True:
    try:
        print(queue.add(make_job(prompt="x" * 3900)))
    except StudioError as error:
        print(error)
        break
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files, which Windows does not have")
def test_a_disk_that_is_full_refuses_by_a_sentence_and_keeps_every_row_before(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    ran = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *added, said = ran.stdout.splitlines()
    assert "The disk" in said and "Free some space" in said
    assert [row.id for row in Queue(path).rows(limit=1000)] == [int(id) for id in added]
    assert Queue(path).add(a_job()) == len(added) + 1  # there is room again
