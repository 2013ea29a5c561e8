"""The worker with the studio's own engine, on tiny random weights: killed in mid-step, cancelled within a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from app.keeper import WorkerKeeper
from app.queue import Queue, Row
from engine.job import GenerateJob, make_job, read_job
from engine.media import video

# What the child imports in place of engine.run: the same, with the tiny weights in the preset's place.
ENGINE = """
from functools import partial
from pathlib import Path
from engine import paths
from engine.loading.pool import ModelPool
from engine.run import run as make
paths.ROOT = Path({root!r})
run = partial(make, pool=ModelPool())
"""


@pytest.fixture
def studio(tmp_path: Path, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Queue, WorkerKeeper]]:
    (tmp_path / "tiny_worker_engine.py").write_text(ENGINE.format(root=str(tiny_root)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    queue = Queue(tmp_path / "data" / "queue.db")
    keeper = WorkerKeeper(queue.path, tmp_path / "outputs", run="tiny_worker_engine:run")
    yield queue, keeper
    keeper.stop()


def a_job(folder: Path, steps: int, seed: int = 7) -> GenerateJob:
    picture = Image.new("RGB", (96, 64), "white")
    picture.paste("orange", (30, 20, 66, 44))
    picture.save(folder / "fox.png")
    return make_job(
        prompt="@fox runs on a beach",
        subjects=[{"name": "fox", "pictures": [{"path": str(folder / "fox.png")}]}],
        seed=seed,
        num_frames=5,
        sampling={"num_inference_steps": steps},
    )


def until(queue: Queue, id: int, *states: str) -> Row:
    end = time.monotonic() + 120
    while (row := queue.get(id)).state not in states:
        assert time.monotonic() < end, row
        time.sleep(0.02)
    return row


def sampling(queue: Queue, id: int) -> None:
    """Wait until the row is between its first and its last step."""
    end = time.monotonic() + 120
    while ((row := queue.get(id)).progress or {}).get("stage") != "sample":
        assert row.state in ("waiting", "running") and time.monotonic() < end, row
        time.sleep(0.01)


def test_kill_cancel_and_finish_with_the_real_engine(studio: tuple[Queue, WorkerKeeper], tmp_path: Path) -> None:
    queue, keeper = studio
    killed, cancelled = (queue.add(a_job(tmp_path, steps=100)) for _ in range(2))
    finished = queue.add(a_job(tmp_path, steps=2))
    keeper.start()

    sampling(queue, killed)
    psutil.Process(keeper.pid).kill()
    assert until(queue, killed, "interrupted").job == a_job(tmp_path, steps=100)

    sampling(queue, cancelled)
    asked = time.time()
    queue.cancel(cancelled)
    assert (until(queue, cancelled, "cancelled").finished or 0) - asked < 5  # a step takes a tenth of that

    row = until(queue, finished, "done")
    assert row.saved is not None and row.saved["num_frames"] == 5
    document = read_job(video.read_document(Path(row.saved["clip"])) or "")
    assert document.seed == 7 and document.subjects[0].pictures[0].png
    clips = list((tmp_path / "outputs").rglob("*.mp4"))
    assert clips == [Path(row.saved["clip"])]
