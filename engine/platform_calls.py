"""The one place for calls that differ between systems.

In:  a pipe.
Out: a wait for the pipe's end; freed memory given back; what the processor can do.
Knows nothing of queues, workers, pages or models.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import IO

# For subprocess's `creationflags`: no console window may pop up beside the page. Elsewhere there is no such flag.
NO_WINDOW = 0x08000000 if sys.platform == "win32" else 0


def give_memory_back() -> None:
    """Give the system what was freed.

    Linux's allocator keeps freed pieces of up to 32 MB for itself: 1.6 GB after a 7B model has left. The others do not.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def has_bf16_products() -> bool:
    """Whether this processor multiplies matrices in bfloat16 by itself (AVX512-BF16, AMX, or Arm's BF16).

    Linux says so. Elsewhere nothing does without a library, and the answer is no; Apple silicon counts as a device.
    """
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
        return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return False


LOOK_S = 0.25  # between two looks at a pipe


def wait_for_end(pipe: IO[bytes]) -> None:
    """Return when whoever holds a pipe's other end has closed it. Nothing is ever written to that pipe.

    On Windows a thread inside a read of standard input holds up every library that looks at standard input while it
    loads, numpy's among them, for as long as the read lasts (numpy/numpy#24290). So the pipe is looked at, not read.
    """
    if sys.platform != "win32":
        pipe.read()
        return
    import _winapi
    import msvcrt

    handle = msvcrt.get_osfhandle(pipe.fileno())
    while True:
        try:
            _winapi.PeekNamedPipe(handle)
        except OSError:
            return
        time.sleep(LOOK_S)
