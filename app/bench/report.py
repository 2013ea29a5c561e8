"""The report of a bench: figures become rows of docs/measurements.md, each with its command, commit, day and machine.

In:  figures, and the report as it is.
Out: the report with those rows replaced or added.
Knows nothing of how a figure is measured.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import psutil

from engine.paths import ROOT

REPORT = ROOT / "docs" / "measurements.md"


@dataclass(frozen=True)
class Figure:
    """One line of the report. `holds` is None where nothing was promised."""

    key: str
    what: str
    value: str
    limit: str = ""
    holds: bool | None = None


# --- the report -----------------------------------------------------------------------------------------------------

HEAD = """\
# Measurements

Written by `python launch.py bench`; do not edit the table by hand. Each row says how to measure it again.

| key | what | measured | promised | holds | command | commit | day | machine |
|---|---|---|---|---|---|---|---|---|
"""

ROW = re.compile(r"^\| `([^`]+)` \|.*\|$")


def write_report(path: Path, figures: list[tuple[str, Figure]]) -> None:
    """Put figures into the report; rows of other keys stay as they are, in their order."""
    rows: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            match = ROW.match(line)
            if match:
                rows[match[1]] = line
    made, day, machine = commit(), date.today().isoformat(), describe_machine()
    for command, figure in figures:
        holds = {True: "yes", False: "**no**", None: ""}[figure.holds]
        cells = [f"`{figure.key}`", figure.what, figure.value, figure.limit, holds, f"`{command}`", made, day, machine]
        rows[figure.key] = f"| {' | '.join(cells)} |"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "\n".join(rows.values()) + "\n", encoding="utf-8")


@cache
def commit() -> str:
    """The commit that was measured, with + when files differed from it before the first figure was written."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
        name = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no git"  # a copy without history is measured too
    return name.stdout.strip()


def describe_machine() -> str:
    """Processor, cores, memory, card and torch; nothing that names this computer."""
    import torch

    listed = Path("/proc/cpuinfo")
    processor = platform.processor() or platform.machine()
    if listed.is_file():
        found = re.search(r"model name\s*: (.+)", listed.read_text(encoding="utf-8", errors="replace"))
        if found:
            processor = found[1]
    parts = [
        f"{processor.strip()}, {os.cpu_count()} cores",
        f"{psutil.virtual_memory().total / 2**30:.0f} GB",
        platform.system(),
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        parts.insert(1, torch.cuda.get_device_name())
    return "; ".join(parts).replace("|", "/")
