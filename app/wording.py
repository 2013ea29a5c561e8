"""Durations, counts and sizes in words, as page and command line show them.

In:  numbers.
Out: text.
Knows nothing of HTML.
"""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as a person says them: `8 s`, `2 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


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
