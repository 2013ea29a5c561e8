"""Which memory ran out, read from whatever error an allocator raised.

In:  an exception.
Out: `OutOfMemory` with the name of the memory: "VRAM", "RAM", "pinned RAM" or "disk".
Knows nothing of plans or jobs. Imports no torch: its errors are told by name and text.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfMemory(Exception):
    """Memory ran out; `what` says which: "VRAM", "RAM", "pinned RAM" or "disk"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@contextmanager
def classify_oom() -> Iterator[None]:
    """Turn a lack of memory inside the block into an `OutOfMemory`; everything else passes through unchanged.

    Raises:
        OutOfMemory: naming the memory.
    """
    try:
        yield
    except Exception as error:
        what = which_memory(error)
        if what is None:
            raise
        raise OutOfMemory(what) from error


def which_memory(error: Exception) -> str | None:
    """Which memory an error says has run out, as an `OutOfMemory` names it; None where it is about something else."""
    said = str(error).lower()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk"
    # safetensors' own errors bear no number; Windows' sentence is in the person's language, the code is not.
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or "error 1455" in said:
        return "RAM"
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, of every card
        return "VRAM"
    if isinstance(error, RuntimeError):
        return next((kind for saying, kind in _SAYINGS.items() if saying in said), None)
    return None


_SAYINGS = {
    "pin memory": "pinned RAM",
    "cudahostalloc": "pinned RAM",
    "mps backend out of memory": "VRAM",
    "invalid buffer size": "VRAM",  # MPS, where one tensor is larger than Metal's largest buffer
    "cuda error: out of memory": "VRAM",
    "cuda driver error: out of memory": "VRAM",
    "cublas_status_alloc_failed": "VRAM",
    "cudnn_status_alloc_failed": "VRAM",
    "xpu out of memory": "VRAM",
    "cuda failure 2 'out of memory'": "VRAM",  # NCCL
    "not enough memory": "RAM",
    "can't allocate memory": "RAM",
    "cannot allocate memory": "RAM",
    "out of memory": "RAM",
}
"""What allocators say that raise a plain RuntimeError; the more specific texts come first."""
