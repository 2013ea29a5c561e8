"""Counts and sizes in words, as page and command line show them.

In:  numbers.
Out: text.
Knows nothing of HTML.
"""

from __future__ import annotations


def files(count: int) -> str:
    """`1 file`, `2 files`."""
    if count == 1:
        return f"{count} file"
    return f"{count} files"


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            is_whole = unit in ("B", "kB") or count >= 10
            digits = 0 if is_whole else 1
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
