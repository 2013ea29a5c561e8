"""Whole clips at full size, from random weights: the peak of memory in every stage beside what the plan had said.

In:  room for a preset's files in a temporary folder.
Out: figures for the report. A child of this module makes the clip while its parent watches its memory.
Knows nothing of how figures are written down. The clip is noise: its memory does not depend on the weights' values.

    python -m app.bench.full_clips phantom-1.3b 256 256 17 FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from app.bench.random_files import write_files
from app.bench.report import Figure
from app.bench.speed import SAMPLES
from engine import presets
from engine.hardware.plan import CONTEXT, plan_or_raise
from engine.hardware.probe import GB
from engine.job import Sampling, make_job
from engine.loading.pool import ModelPool
from engine.messages import Message, Progress
from engine.paths import ROOT
from engine.resolve import resolve

Said = list[tuple[dict[str, Any], int]]  # a line, and the peak of memory before it, in bytes
STAGES = {  # of a run, and the phases of a plan that lie in each
    "encode": ("the prompt is read", "the VLM reads", "pictures are encoded"),
    "sample": ("sampling",),
    "decode": ("decoding",),
}
CLIPS = (  # preset, width, height, frames, profile: on a processor a step at the preset's own size would take hours
    ("id-crafter-1.3b", 192, 192, 5, "auto"),
    ("id-crafter-1.3b", 224, 160, 9, "12"),
    ("phantom-1.3b", 256, 256, 17, "auto"),
    ("phantom-1.3b", 320, 192, 9, "8"),
    ("wan-1.3b", 256, 256, 5, "8"),
    ("vace-1.3b", 256, 256, 5, "auto"),
)


def measure_full_clips(_: str) -> Iterator[Figure]:
    """Peaks of whole clips at full size beside what the plan said of them; on a card, of the card's memory."""
    import torch

    card = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cache, models = Path(folder) / "cache", Path(folder) / "models"
        for preset, width, height, frames, profile in CLIPS:
            write_files(presets.load(preset), cache, models)
            environment = {
                **os.environ,
                "HF_HUB_CACHE": str(cache),
                "HF_HUB_OFFLINE": "1",
                "IDCRAFTER_MODELS": str(models),
                "IDCRAFTER_PROFILE": profile,
            }
            size = map(str, (width, height, frames))
            command = [sys.executable, "-X", "utf8", "-m", "app.bench.full_clips", preset, *size, folder]
            code, said = run_watched(command, environment)
            key = f"full-{preset}-{width}x{height}x{frames}-{profile}"
            most = f"at most {profile} GB"
            if profile == "auto":
                most = "all memory"
            what = f"{preset}, random weights of full size, {width}x{height}x{frames}, {most}: peak as planned"
            yield _compare(key, what, code, said, card)


def _compare(key: str, what: str, code: int, said: Said, card: bool) -> Figure:
    """The plan's highest phase beside the highest stage, and every stage in brackets."""
    if code:
        return Figure(key, what, f"failed with code {code}", "within 10 %", False)
    plan = said[0][0]
    found: dict[str, int] = {}
    for told, private in said[1:]:
        peak = private
        if card:
            peak = told["card"]
        found[told["ended"]] = peak
    found["sample"] = max(found["load"], found["sample"])  # the plan has one phase for both
    planned = {}
    for stage, names in STAGES.items():
        planned[stage] = max(plan["phases"].get(name, 0) for name in names)
    off = max(planned.values()) / max(found[stage] for stage in STAGES) - 1
    apart = ", ".join(f"{stage} {planned[stage] / GB:.1f} / {found[stage] / GB:.1f}" for stage in STAGES)
    ways = ", ".join(f"{part.replace('_', ' ')} {way}" for part, way in plan["ways"].items())
    return Figure(key, what, f"{off:+.1%} (GB, planned / found: {apart}; {ways})", "within 10 %", abs(off) <= 0.1)


def run_watched(command: list[str], environment: Mapping[str, str] = os.environ) -> tuple[int, Said]:
    """Run a process that speaks in lines of JSON; gives its exit code, and with each line the peak of its private
    memory since the line before, in bytes.

    Private is what is neither shared nor a file's pages, which the system may drop; where it does not tell, all of it.
    """
    peak, over, said = 0, threading.Event(), []

    def watch(child: psutil.Process) -> None:
        nonlocal peak
        while not over.wait(0.01):
            try:
                used = child.memory_info()
            except psutil.NoSuchProcess:
                return
            peak = max(peak, used.rss - getattr(used, "shared", 0))

    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8") as child:
        watcher = threading.Thread(target=watch, args=(psutil.Process(child.pid),))
        watcher.start()
        for line in child.stdout or ():
            said.append((json.loads(line), peak))
            peak = 0
        over.set()
        watcher.join()
    return child.returncode, said


def main(preset: str, size: tuple[int, int], frames: int, folder: Path) -> None:
    """The watched process's part: a clip of two subjects in one step, as lines of JSON.

    First what the plan says, asked here so that it knows the memory and the files that the run will know; then each
    stage as it ends.
    """
    from engine import run

    subjects = [{"name": name, "pictures": [{"path": str(SAMPLES / f"{name}.png")}]} for name in ("fox", "kite")]
    job = make_job(
        preset=preset,
        prompt="@fox chases @kite on a beach",
        subjects=subjects,
        width=size[0],
        height=size[1],
        num_frames=frames,
        sampling=Sampling(num_inference_steps=1),
    )
    pool = ModelPool()
    plan = plan_or_raise(resolve(job), pool.hardware())
    ways = {part: f"{fit.precision} {fit.where}" for part, fit in plan.parts.items() if fit.device + fit.memory}
    shared = plan.machine.shared
    write_line({"ways": ways, "phases": {each.name: each.vram + shared * each.ram for each in plan.phases}})
    stage = "start"

    def say(message: Message) -> None:
        nonlocal stage
        if isinstance(message, Progress) and message.stage != stage:
            write_line({"ended": stage, "card": _card_peak()})
            stage = message.stage

    run.run(job, say, outputs=folder, pool=pool)
    write_line({"ended": stage, "card": _card_peak()})


def _card_peak() -> int:
    """The most that a graphics card held since the last call, in bytes; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peak + CONTEXT


def write_line(what: dict[str, Any]) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m app.bench.full_clips", description="A clip from files of full size."
    )
    parser.add_argument("preset")
    parser.add_argument("width", type=int)
    parser.add_argument("height", type=int)
    parser.add_argument("frames", type=int)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    main(given.preset, (given.width, given.height), given.frames, given.folder)
