"""Look at this machine: what the studio needs, whether it is here, and the cure where it is not.

In:  the outputs folder and the port that a studio would use.
Out: one line a check on stdout, marked ok, warn or FAIL; exit code 1 when something stands in the way.
Knows nothing of torch: what torch finds is asked of `app.verbs.torch_probe`, in a process that may crash.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from app.settings import check_port
from app.verbs.plan import typical_job
from engine import presets
from engine.hardware.options import machine_options
from engine.hardware.plan import make_plan
from engine.hardware.probe import Hardware, probe_hardware
from engine.messages import StudioError
from engine.paths import ROOT
from engine.platform_calls import has_bf16_products

GB = 1e9
NEEDS_MEMORY, NEEDS_DISK = 3 * GB, 1 * GB  # toybox on the processor, and room for clips


@dataclass(frozen=True)
class Finding:
    """What one check saw, and the cure when that is not well."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    says: str
    cure: str = ""

    def __str__(self) -> str:
        line = f"{self.level:4}  {self.name:8}  {self.says}"
        return f"{line}\n                -> {self.cure}" if self.cure else line


def main(*, outputs: Path, port: int) -> int:
    """Print every finding as it comes; 1 when one of them is a FAIL."""
    levels = []
    for finding in examine(outputs=outputs, port=port):
        print(finding, flush=True)
        levels.append(finding.level)
    if "FAIL" in levels:
        print("Something stands in the way; the lines marked FAIL say what to do.")
        return 1
    if "warn" in levels:
        print("This machine can make clips. The warnings are worth reading.")
    else:
        print("This machine can make clips.")
    return 0


def examine(*, outputs: Path, port: int) -> Iterator[Finding]:
    """Every check, the quick ones first."""
    yield system()
    yield memory(psutil.virtual_memory().available, psutil.virtual_memory().total)
    yield disk(outputs)
    yield writable(outputs)
    yield listening(port)
    yield ffmpeg()
    yield from models()
    yield from torch_and_device()


def system() -> Finding:
    """The machine, and whether every pin of the lock is installed as pinned."""
    says = f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    wrong = wrong_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    if not wrong:
        return Finding("ok", "system", f"{says}; the libraries are as the lock names them")
    listed = ", ".join(wrong[:3])
    if len(wrong) > 3:
        listed += f" and {len(wrong) - 3} more"
    return Finding("warn", "system", f"{says}; not as the lock names them: {listed}", FRESH)


FRESH = "Delete the folder .venv and run `python launch.py` again."


def wrong_pins(lock: str) -> list[str]:
    """Names in the lock, without those for other systems, whose installed version is another or none."""
    wrong = []
    for line in lock.splitlines():
        pin, _, elsewhere = line.split("#")[0].partition(";")
        name, _, version = pin.strip().partition("==")
        if not name or elsewhere:
            continue
        try:
            if metadata.version(name) != version:
                wrong.append(name)
        except metadata.PackageNotFoundError:
            wrong.append(name)
    return wrong


def memory(available: float, total: float) -> Finding:
    """Main memory, in bytes."""
    says = f"{available / GB:.1f} GB free of {total / GB:.1f} GB"
    if available >= NEEDS_MEMORY:
        return Finding("ok", "memory", says)
    return Finding("warn", "memory", says, f"Close other programs; toybox alone wants {NEEDS_MEMORY / GB:.0f} GB.")


def disk(outputs: Path) -> Finding:
    """Room for clips."""
    there = next(folder for folder in (outputs, *outputs.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    says = f"{free / GB:.1f} GB free for {outputs}"
    if free >= NEEDS_DISK:
        return Finding("ok", "disk", says)
    return Finding("FAIL", "disk", says, "Free some space, or choose another folder with --outputs.")


def writable(outputs: Path) -> Finding:
    """Whether a clip can be written."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=outputs, prefix=".doctor-") as file:
            file.write(b"clip")
    except OSError as error:
        cure = "Choose a folder you may write to with --outputs."
        return Finding("FAIL", "outputs", f"{outputs} cannot be written: {error.strerror}", cure)
    return Finding("ok", "outputs", f"{outputs} can be written")


def listening(port: int) -> Finding:
    """Whether the page could listen."""
    try:
        check_port("127.0.0.1", port)
    except StudioError as error:
        return Finding("warn", "port", f"{error.what} {error.why}", error.next_step)
    return Finding("ok", "port", f"{port} is free")


def ffmpeg() -> Finding:
    """Whether clips can be encoded."""
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        answer = subprocess.run([program, "-version"], capture_output=True, encoding="utf-8", timeout=30, check=True)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Finding("FAIL", "ffmpeg", str(error).splitlines()[0], FRESH)
    return Finding("ok", "ffmpeg", " ".join(answer.stdout.split()[:3]))


def models() -> Iterator[Finding]:
    """Which presets are here, which could be fetched, and which this machine could run."""
    absent = []
    for name in presets.names():
        preset = presets.load(name)
        try:
            presets.check_files(preset)
        except StudioError as error:
            if preset.downloads():
                absent.append(name)
            else:
                yield Finding("FAIL", "model", error.what, f"{error.why} {error.next_step}")
        else:
            yield Finding("ok", "model", f"{name} is here")
    if absent:
        yield Finding("ok", "model", f"{', '.join(absent)}: `python launch.py models pull NAME` fetches one")
    yield fitting(probe_hardware(machine_options().profile))


def fitting(here: Hardware) -> Finding:
    """Which presets this machine could make a clip with, at their own size and length, with two subjects."""
    known = [preset for name in presets.names() if (preset := presets.load(name)).shape is not None]
    fit = [p.name for p in known if make_plan(typical_job(p), here).fits]
    free = here.ram if here.shared else here.vram
    room = f"{free / GB:.0f} GB free"
    if here.device == "cpu":
        room += ", and a good deal of patience for the large ones"
    if not fit:
        return Finding("warn", "plan", f"{here.name} ({room}) can hold none of the presets", "Close other programs.")
    return Finding("ok", "plan", f"{here.name} ({room}) can hold {', '.join(fit)}")


def torch_and_device() -> Iterator[Finding]:
    """torch's build, the device, and one forward of a tiny model."""
    answer = ask_probe()
    if isinstance(answer, str):
        yield Finding("FAIL", "torch", answer, FRESH)
        return
    yield Finding("ok", "torch", f"{answer['torch']}, one tiny forward in {answer['forward_ms']:.0f} ms")
    gpu = answer["name"]
    if answer["memory_gb"]:
        gpu = f"{gpu}, {answer['memory_gb']:.0f} GB"
    if answer["device"] != "cpu":
        yield Finding("ok", "device", gpu)
    elif shutil.which("nvidia-smi"):
        cure = f"Update the driver. {FRESH} For a card older than the 20 series set TORCH_INDEX_URL to PyTorch's cu126."
        yield Finding("warn", "device", "There is an NVIDIA driver, but torch sees no card", cure)
    else:
        products = "it multiplies in fp32"
        if has_bf16_products():
            products = "it multiplies in bf16, and large models use that"
        about = f"the processor ({products}); enough for toybox, large models want a graphics card"
        yield Finding("ok", "device", about)


def ask_probe() -> dict[str, Any] | str:
    """What `app.verbs.torch_probe` found, or the reason why it could not say."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", "-m", "app.verbs.torch_probe"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=300, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return "a tiny forward did not end within five minutes"
    if answer.returncode == 0:
        return json.loads(answer.stdout.splitlines()[-1])
    complaint = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
    return f"a tiny forward failed: {complaint}"
