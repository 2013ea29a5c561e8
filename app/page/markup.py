"""Small pieces of HTML that several tabs share. Every value that a person wrote is escaped here, once.

In:  plain values.
Out: HTML text.
Knows nothing of Gradio, of the queue, or of what the pieces mean.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from engine.job import MENTION
from engine.messages import StudioError

COLOURS = 8  # --slot-0 ... --slot-7 in studio.css


def button(label: str, act: str, *, kind: str = "", title: str = "", **data: object) -> str:
    """A button whose click reaches Python as `evt.act` and `evt.<data>`.

    Args:
        kind: classes, such as "primary" or "danger".
        title: what a screen reader says when the label alone is not enough.
    """
    extras = "".join(f' data-{key}="{escape(str(value))}"' for key, value in data.items())
    said = f' aria-label="{escape(title)}" title="{escape(title)}"' if title else ""
    return f'<button type="button" class="btn {kind}" data-act="{act}"{extras}{said}>{label}</button>'


def refusal(error: StudioError | None) -> str:
    """An error beside its field, announced to screen readers; nothing when there is none."""
    if error is None:
        return ""
    return (
        f'<p class="refusal" role="alert">{escape(error.what)} {escape(error.why)} <b>{escape(error.next_step)}</b></p>'
    )


def empty(title: str, words: str, *, kind: str = "") -> str:
    """A dashed frame that says why there is nothing to see; both texts are our own HTML."""
    alert = ' role="alert"' if kind == "bad" else ""
    return f'<div class="frame empty {kind}"{alert}><div><h2>{title}</h2><p>{words}</p></div></div>'


def note(text: str) -> str:
    """A quiet confirmation."""
    return f'<p class="note" role="status">{escape(text)}</p>' if text else ""


def prompt_text(prompt: str, names: Sequence[str]) -> str:
    """The prompt with every @name in its subject's colour."""
    pieces: list[str] = []
    end = 0
    for match in MENTION.finditer(prompt):
        name = match.group(1).lower()
        place = names.index(name) if name in names else -1
        pieces.append(escape(prompt[end : match.start()]))
        pieces.append(f'<span class="mention"{colour(place)}>@{escape(match.group(1))}</span>')
        end = match.end()
    return "".join(pieces) + escape(prompt[end:])


def colour(place: int) -> str:
    """The style attribute that gives an element its subject's colour; none for -1."""
    return f' style="--slot: var(--slot-{place % COLOURS})"' if place >= 0 else ""


def file_url(path: Path) -> str:
    """Where the page fetches a file it may see; changes with the file, so that a browser never shows an old one."""
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return f"/gradio_api/file={quote(path.resolve().as_posix())}?v={stamp}"


def data_url(pixels: np.ndarray, *, side: int = 0) -> str:
    """Pixels, uint8 (H, W, 3), as a picture inside the page; `side` enlarges or shrinks to that many pixels across."""
    image = Image.fromarray(pixels)
    if side and image.width != side:
        smooth = Image.Resampling.LANCZOS if image.width > side else Image.Resampling.NEAREST
        image = image.resize((side, round(image.height * side / image.width)), smooth)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
