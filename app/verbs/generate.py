"""One clip from the command line: options and a document -> a job -> the engine, in this very process, or in several
that torchrun started, one for each card (`engine.loading.context_parallel`).

In:  parsed options, and perhaps a job document or a clip that carries one.
Out: the clip's path on stdout, progress on stderr, an exit code.
Knows nothing of the page and of the queue. torch is imported once the job has passed every check that needs none.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from engine import lora_files, presets, wan2gp
from engine.job import GenerateJob, make_job, read_job
from engine.media import pictures
from engine.messages import Cancelled, Message, Progress, StudioError
from engine.resolve import resolve
from engine.wan2gp import ForeignJob

STAGES = {
    "load": "Loading the model",
    "encode": "Reading prompt and pictures",
    "sample": "Drawing",
    "decode": "Decoding",
    "save": "Saving",
}


def main(given: argparse.Namespace) -> int:
    """Make the clip; 0 when it is saved, 130 when Ctrl+C stopped it.

    Raises:
        StudioError: something about the job, the machine or the files.
    """
    job = read_given(given)
    clip = check_out(given.out) if given.out else None
    resolved = pictures.prepare_subjects(resolve(job))
    presets.check_files(resolved.preset)
    job = resolved.document
    lora_files.check(job)
    meter = ProgressLine()
    meter.show("Starting the engine")
    # On some processors it recommends a package for 4-bit weights, in the middle of everybody's progress.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from engine.loading import context_parallel
    from engine.run import run  # torch and the model classes: seconds, and only now

    with (
        Interrupt() as interrupt,
        context_parallel.join_processes() as number,
        tempfile.TemporaryDirectory() as elsewhere,
    ):

        def say(message: Message) -> None:
            if interrupt.asked:
                raise Cancelled
            if not isinstance(message, Progress):
                return
            if number and message.stage == "decode":
                raise Cancelled  # it has helped to draw the clip; the first process alone decodes and keeps it
            if not number:
                meter.progress(message)

        outputs = Path(elsewhere) if number else given.outputs.expanduser().resolve()
        try:
            saved = run(job, say, outputs=outputs, clip=None if number else clip)
        except Cancelled:
            if number:
                return 0
            meter.end("Cancelled. Nothing was saved.")
            return 130
    meter.end(f"{saved.num_frames} frames in {saved.seconds:.0f} s.")
    sys.stderr.writelines(f"{note}\n" for note in saved.notes)
    sys.stdout.write(f"{saved.clip}\n")
    return 0


# --- the job ---------------------------------------------------------------------------------------------------------


def read_given(given: argparse.Namespace) -> GenerateJob:
    """The job that the document and the options ask for; options win.

    Raises:
        StudioError: no prompt, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    if given.document:
        found = read_document(given.document, given.outputs)
        values = found.job.model_dump(exclude_none=True)
        sys.stderr.write(f"{found.said}\n" if found.said else "")
    elif given.prompt is None:
        raise StudioError(
            what="There is nothing to make.",
            why="A clip needs a prompt, or a document that holds one.",
            next_step='Write --prompt "what happens", or name a .json or .mp4 that this studio made.',
            field="prompt",
        )
    options = {"preset": given.preset, "prompt": given.prompt, "seed": given.seed, "num_frames": given.frames}
    options["precision"] = given.precision
    values |= {field: value for field, value in options.items() if value is not None}
    if given.size is not None:
        values["width"], values["height"] = read_size(given.size)
    drawn = {"num_inference_steps": given.steps, "step_cache": given.cache}
    if drawn := {field: value for field, value in drawn.items() if value is not None}:
        values["sampling"] = {**values.get("sampling", {}), **drawn}
    subjects = {subject["name"]: subject for subject in values.get("subjects", ())}
    for text in given.subject:
        name, pictures = read_subject(text)
        subjects[name] = {**subjects.get(name, {}), "name": name, "pictures": pictures}
    loras = {lora_files.base_name(lora["path"]): lora for lora in values.get("loras", ())}
    for text in given.lora:
        path, weight = read_lora(text)
        loras[lora_files.base_name(path)] = {"path": path, "weight": weight}
    return make_job(**{**values, "subjects": tuple(subjects.values()), "loras": tuple(loras.values())})


def read_document(path: Path, outputs: Path) -> ForeignJob:
    """The job inside a .json, or inside a clip or a picture of Wan2GP, which may open no file of this machine outside
    `outputs`.

    Raises:
        StudioError: no such file, or no job in it.
    """
    if not path.is_file():
        raise StudioError(
            f"There is no file {path}.", "A job document or a clip was expected there.", "Check the name."
        )
    if path.suffix.lower() == ".json":
        return ForeignJob(read_job(path.read_bytes()), "")
    found = wan2gp.read_file(path)
    if found is None:
        raise StudioError(
            what=f"{path.name} carries no job.",
            why="Only clips of this studio and of Wan2GP hold their document, and sites that re-encode clips drop it.",
            next_step="Use the original file, or the .json beside it.",
        )
    return replace(found, job=lora_files.drop_foreign_paths(pictures.drop_foreign_paths(found.job, [outputs])))


def read_subject(text: str) -> tuple[str, list[dict[str, str]]]:
    """Name and pictures from NAME=PICTURE[,PICTURE]; a comma may also belong to the name of one file.

    Raises:
        StudioError: not of that form, or a picture is not there.
    """
    name, equals, listed = text.partition("=")
    if not equals or not name.strip() or not listed.strip():
        raise StudioError(
            what=f"The subject {text!r} was not understood.",
            why="A subject has a name and at least one picture.",
            next_step="Write --subject fox=fox.png, or --subject fox=front.png,side.png.",
            field="subjects",
        )
    paths = [Path(listed)] if Path(listed).is_file() else [Path(part.strip()) for part in listed.split(",")]
    for path in paths:
        if not path.is_file():
            raise StudioError(
                what=f"There is no picture {path}.",
                why=f"@{name.strip()} needs it to be recognisable.",
                next_step="Check the name, and the folder you are in.",
                field="subjects",
            )
    return name.strip().lower().removeprefix("@"), [{"path": str(path.resolve())} for path in paths]


def read_lora(text: str) -> tuple[str, float]:
    """Path and weight from FILE[=WEIGHT]; what is no file here is a name in the folder of LoRAs.

    Raises:
        StudioError: the weight is no number.
    """
    path, weight = text, 1.0
    if not Path(text).is_file() and not text.lower().endswith(lora_files.SUFFIX):
        path, equals, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not path or not math.isfinite(weight):
            raise StudioError(
                what=f"The LoRA {text!r} was not understood.",
                why="It is a safetensors file, with a weight behind an = where that is not 1.",
                next_step="Write --lora style.safetensors, or --lora style.safetensors=0.8.",
                field="loras",
            )
    return (str(Path(path).resolve()) if Path(path).is_file() else path), weight


def read_size(text: str) -> tuple[int, int]:
    """Width and height in pixels from WxH.

    Raises:
        StudioError: not of that form.
    """
    found = re.fullmatch(r"\s*(\d{1,5})\s*[xX*]\s*(\d{1,5})\s*", text)
    if not found:
        raise StudioError(
            what=f"The size {text!r} was not understood.",
            why="A size is a width and a height in pixels.",
            next_step="Write --size 64x64.",
            field="width",
        )
    return int(found[1]), int(found[2])


def check_out(path: Path) -> Path:
    """The absolute path of the clip to write.

    Raises:
        StudioError: not an .mp4, or no folder to write it into.
    """
    path = path.expanduser().resolve()
    if path.suffix.lower() != ".mp4" or path.is_dir():
        raise StudioError(f"{path.name} cannot be the clip.", "Clips are .mp4 files.", "Write --out clip.mp4.")
    if not path.parent.is_dir():
        raise StudioError(
            f"There is no folder {path.parent}.", "The clip would go there.", "Make it, or choose another."
        )
    return path


# --- while it runs ---------------------------------------------------------------------------------------------------


class Interrupt:
    """Ctrl+C asks the run to stop at its next message; a second Ctrl+C stops the process where it is."""

    asked = False

    def __enter__(self) -> Interrupt:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class ProgressLine:
    """Progress on stderr: one line repainted on a terminal; elsewhere a line at each stage and every ten seconds."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.stage = ""
        self.shown = 0.0

    def progress(self, message: Progress) -> None:
        """Show one step."""
        due = message.stage != self.stage or time.monotonic() - self.shown > 10.0
        if not (self.terminal or due):
            return
        parts = [STAGES.get(message.stage, message.stage)]
        if message.total > 1:
            percent = message.stage in ("encode", "load")
            parts.append(f"{message.step} %" if percent else f"{message.step} of {message.total}")
        if message.eta_s is not None:
            parts.append(f"about {clock(message.eta_s)} left")
        if message.note:
            parts.append(message.note)
        self.stage, self.shown = message.stage, time.monotonic()
        self.show(", ".join(parts))

    def show(self, text: str) -> None:
        """Replace the line on a terminal; write one elsewhere."""
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{text[:width].ljust(width)}" if self.terminal else f"{text}\n")
        sys.stderr.flush()

    def end(self, text: str) -> None:
        """The last line."""
        self.show(text)
        if self.terminal:
            sys.stderr.write("\n")


def clock(seconds: float) -> str:
    """Minutes and seconds, as 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
