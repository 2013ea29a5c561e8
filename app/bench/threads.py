"""How long a clip takes beside busy programs, with a short spin of OpenMP's threads and with the default one.

In:  the sanity clip's document.
Out: figures, all of one run: ratios of the median time of a clip in a child process.
Knows nothing of how a clip is made.

    python -m app.bench.threads      # the child: prints the median seconds of three clips
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.bench.report import Figure
from engine.job import read_job
from engine.paths import ROOT
from engine.threads import SPIN_COUNT, WAITING, limit_spinning

CLIPS = 3  # of which the median counts; one more warms up
ROUNDS = 3  # idle runs of each kind, in turn, since machines drift
DEFAULT_SPIN = "300000"  # libgomp's, where no policy is set
MOST_IDLE, MOST_BUSY = 1.05, 3.0


def measure_threads(preset: str) -> Iterator[Figure]:
    """The short spin beside none, one and two busy programs; the default beside none and one; the whole verb."""
    short, default = [], []
    for _ in range(ROUNDS):
        default.append(_seconds_of_a_clip(limited=False))
        short.append(_seconds_of_a_clip(limited=True))
    idle, idle_default = statistics.median(short), statistics.median(default)
    ratio = idle / idle_default
    yield Figure(
        "threads-idle",
        "A clip with a short spin over one with OpenMP's default, nothing else running",
        f"{ratio:.2f}x ({idle:.1f} s of {idle_default:.1f} s)",
        f"≤ {MOST_IDLE}x",
        ratio <= MOST_IDLE,
    )
    yield _whole_verb()
    for neighbours in (1, 2):
        with busy_neighbours(neighbours):
            beside = _seconds_of_a_clip(limited=True)
            told = f"{beside / idle:.2f}x ({beside:.1f} s)"
            if neighbours == 1:  # beside two the default takes minutes
                told += f"; with the default {_seconds_of_a_clip(limited=False) / idle_default:.2f}x"
        what = f"A clip beside {neighbours} busy programs on this machine, over its idle time"
        yield Figure(f"threads-beside-{neighbours}", what, told, f"≤ {MOST_BUSY:g}x", beside / idle <= MOST_BUSY)


def _whole_verb() -> Figure:
    """The whole verb, start and loading among it, in turn with both spins."""
    seconds: dict[str, list[float]] = {SPIN_COUNT: [], DEFAULT_SPIN: []}
    with tempfile.TemporaryDirectory() as folder:
        job, clip = str(ROOT / "assets" / "sanity.json"), str(Path(folder) / "clip.mp4")
        command = [sys.executable, "-X", "utf8", "-m", "app.cli", "generate", job, "--out", clip]
        for _ in range(ROUNDS + 1):  # the first round warms the files up
            for spin, taken in seconds.items():
                environment = {name: value for name, value in os.environ.items() if name not in WAITING}
                environment["GOMP_SPINCOUNT"] = spin
                began = time.monotonic()
                subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
                taken.append(time.monotonic() - began)
    short, default = (statistics.median(taken[1:]) for taken in seconds.values())
    ratio = short / default
    return Figure(
        "threads-verb-idle",
        "The whole verb `generate` with a short spin over one with libgomp's default, nothing else running",
        f"{ratio:.2f}x ({short:.1f} s of {default:.1f} s)",
        f"≤ {MOST_IDLE}x",
        ratio <= MOST_IDLE,
    )


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """So many processes that never rest, for the length of a block."""
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def _seconds_of_a_clip(*, limited: bool) -> float:
    """Median seconds of a clip in a child process whose threads wait in one way or the other."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    if limited:
        limit_spinning(environment)
    command = [sys.executable, "-X", "utf8", "-m", "app.bench.threads"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return float(ran.stdout)


def main() -> None:
    """Make the sanity clip once, then three of other seeds; the median seconds of those on stdout."""
    from engine.loading.pool import ModelPool
    from engine.run import run

    job = read_job((ROOT / "assets" / "sanity.json").read_text(encoding="utf-8"))
    pool, seconds = ModelPool(), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(CLIPS + 1):
            began = time.monotonic()
            seeded = job.model_copy(update={"seed": job.seed + number})
            run(seeded, lambda message: None, outputs=Path(folder), clip=Path(folder) / f"{number}.mp4", pool=pool)
            seconds.append(time.monotonic() - began)
    sys.stdout.write(f"{statistics.median(seconds[1:]):.3f}\n")


if __name__ == "__main__":
    main()
