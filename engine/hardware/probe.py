"""What this machine has to work with at this moment.

In:  the profile a person chose.
Out: `Hardware`: the device, and how much of its memory, of the machine's memory and of the disk is free.
Knows nothing of models or jobs. Imports no torch: NVIDIA's own tool is asked.

Units: bytes.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, replace

import psutil

from engine.paths import models_dir
from engine.platform_calls import NO_WINDOW, has_bf16_products

GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """What there is to work with, free at this moment."""

    device: str  # "cuda", "mps", "xpu" or "cpu"
    name: str
    vram: int  # of the card; where card and machine share memory, and on a processor, the same as `ram`
    ram: int
    disk: int
    fast_bf16: bool = False  # a processor that has products in bfloat16; every card has

    @property
    def shared(self) -> bool:
        """Whether device and machine have one memory."""
        return self.device in ("cpu", "mps")

    def shrunk(self) -> Hardware:
        """Two thirds of both memories: what to plan with when the first plan did not hold."""
        return replace(self, vram=self.vram * 2 // 3, ram=self.ram * 2 // 3)

    def limited(self, profile: str) -> Hardware:
        """With no more memory on the device than a profile allows: "auto" and "all" leave it, "8" is 8 GB."""
        if profile in ("auto", "all"):
            return self
        vram = min(self.vram, round(float(profile) * GB))
        if self.shared:
            return replace(self, vram=vram, ram=min(self.ram, vram))
        return replace(self, vram=vram)


def probe_hardware(profile: str) -> Hardware:
    """What there is here, as it is now; asks NVIDIA's own tool, and imports nothing heavy."""
    here = psutil.virtual_memory()
    disk = shutil.disk_usage(next(folder for folder in (models_dir(), *models_dir().parents) if folder.exists())).free
    card = _nvidia(whole=profile == "all")
    if card is not None:
        return Hardware("cuda", *card, here.available, disk).limited(profile)
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    device, name = "cpu", "the processor alone"
    if apple:
        device, name = "mps", "Apple silicon"
    fast = device == "cpu" and has_bf16_products()
    return Hardware(device, name, here.available, here.available, disk, fast).limited(profile)


def _nvidia(*, whole: bool) -> tuple[str, int] | None:
    """Name and memory of the first NVIDIA card: what is free, or all of it."""
    tool = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible in ("", "-1"):
        return None
    only: list[str] = []
    if visible:
        only = ["-i", visible.split(",")[0]]
    command = [tool, *only, "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=True,
            creationflags=NO_WINDOW,
        ).stdout  # fmt: skip
        name, free, total = (part.strip() for part in answer.splitlines()[0].split(","))
        counted = free
        if whole:
            counted = total
        return name, round(float(counted) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # a driver that does not answer is a card that cannot be used
