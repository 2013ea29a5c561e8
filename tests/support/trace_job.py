"""How far a job is handed around while one clip is made: every function that receives it or a part of it.

In:  a clip of the toybox with two subjects, made here under a trace.
Out: how many functions of `engine` received the job or a part of it, and how many of them return into another room than
     their own (a folder of `engine`, or one of its modules), with a line for each.
Knows nothing of what the functions do.

    python -m tests.support.trace_job
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from engine.job import GenerateJob, Lora, Picture, Sampling, Subject, read_job
from engine.loading.pool import ModelPool
from engine.paths import ROOT
from engine.run import run

ENGINE = str(ROOT / "engine")
PARTS = (GenerateJob, Lora, Picture, Sampling, Subject)  # and whatever holds one of them as a field
HOLDERS = ("ResolvedJob", "ResolvedSampling", "PreparedSubject")  # by name: a checkout of before has none


def is_part(value: Any) -> bool:
    """Whether a value is the job, a part of it, or a list of such parts."""
    if isinstance(value, PARTS) or type(value).__name__ in HOLDERS:
        return True
    return isinstance(value, list | tuple) and bool(value) and is_part(value[0])


def room_of(frame: FrameType) -> str:
    """The folder of `engine` that a function lies in, or its module's name where it lies in none."""
    return Path(frame.f_code.co_filename).relative_to(ENGINE).parts[0]


def name_of(frame: FrameType) -> str:
    """module.function."""
    return f"{Path(frame.f_code.co_filename).relative_to(ENGINE).with_suffix('').as_posix()}.{frame.f_code.co_qualname}"


class Trace:
    """Counts what receives the job, while it is the profile function of this thread."""

    def __init__(self) -> None:
        self.received: set[str] = set()
        self.returns: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls; a comprehension and a lambda belong to the function they stand in."""
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(ENGINE) or "<" in code.co_name:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not any(is_part(frame.f_locals.get(name)) for name in names):
            return
        self.received.add(name_of(frame))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(ENGINE):
            caller = caller.f_back
        if event == "return" and caller is not None and room_of(caller) != room_of(frame):
            self.returns.add((name_of(frame), room_of(caller)))


def sample_job() -> GenerateJob:
    """Two shipped subjects, a step, one LoRA that is left out."""
    samples = ROOT / "assets" / "samples"
    subjects = [{"name": name, "pictures": [{"path": str(samples / f"{name}.png")}]} for name in ("fox", "kite")]
    values: dict[str, Any] = {"version": 4, "prompt": "@fox chases @kite", "subjects": subjects, "num_frames": 5}
    return read_job({**values, "sampling": {"num_inference_steps": 3}})


def main() -> int:
    """Make a clip under a trace and print what was counted."""
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        job, pool = sample_job(), ModelPool()
        sys.setprofile(trace)
        try:
            run(job, lambda message: None, outputs=Path(folder), pool=pool)
        finally:
            sys.setprofile(None)
    for name in sorted(trace.received):
        sys.stdout.write(f"{name}\n")
    for name, room in sorted(trace.returns):
        sys.stdout.write(f"{name} -> {room}\n")
    sys.stdout.write(f"{len(trace.received)} functions, {len(trace.returns)} returns into another room\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
