"""Settings of the studio: where it listens, where it keeps things, how it looks.

In:  what the command line says.
Out: a frozen `Settings`, or a `StudioError` for what would end badly: no password, a taken port.
Knows nothing of the page or of torch.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from engine.document import Document
from engine.hardware.options import check_device
from engine.messages import StudioError
from engine.paths import ROOT


class Settings(Document):
    """How one studio runs."""

    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 everyone who can reach it."""
    port: int = Field(default=7860, ge=1, le=65535)
    """Port of the page."""
    share: bool = False
    """Open a public address through Gradio's relay."""
    auth: tuple[str, str] | None = Field(default=None, repr=False)
    """Name and password that the page asks for."""
    inbrowser: bool = False
    """Open the page in a browser at the start."""
    theme: Literal["dark", "light", "system"] = "dark"
    """Colours of the page."""
    outputs: Path = ROOT / "outputs"
    """Finished clips, one folder a day."""
    models_dir: Path = ROOT / "models"
    """Models that are not part of the repository; a preset's folder is looked up there second."""
    data: Path = ROOT / "outputs" / ".studio"
    """The queue, saved subjects, uploads and logs."""
    devices: tuple[str, ...] = ()
    """What the workers run on, one each, such as cuda:0 and cuda:1; empty: one worker on the fastest device."""
    machine: dict[str, str] = Field(default_factory=dict)
    """Attention kernels and compilation, as the variables that a worker reads (`engine.hardware.options`)."""
    offline: bool = False
    """Ask nothing of the network, not even for models."""


def read_auth(text: str) -> tuple[str, str] | None:
    """Name and password from USER:PASS; the password may hold colons. None for an empty text.

    Raises:
        StudioError: either half is missing.
    """
    if not text:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise StudioError(
            what="The password was not understood.",
            why="It is written USER:PASS, and both halves are needed.",
            next_step="Set IDCRAFTER_AUTH=user:password, or give --auth user:password.",
        )
    return user, password


def read_devices(text: str) -> tuple[str, ...]:
    """Devices from cuda:0,cuda:1; none for an empty text.

    Raises:
        StudioError: a word names no device.
    """
    return tuple(check_device(word.strip()) for word in text.split(",") if word.strip())


def check_password(auth: tuple[str, str] | None, *, listen: bool, share: bool) -> None:
    """Refuse to open the page to others without a password.

    Raises:
        StudioError: `listen` or `share` without `auth`.
    """
    if auth is None and (listen or share):
        raise StudioError(
            what=f"{'--share' if share else '--listen'} needs a password.",
            why="Whoever reaches the page can see every clip and use this machine.",
            next_step="Set IDCRAFTER_AUTH=user:password and start again.",
        )


def check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on.

    Raises:
        StudioError: taken, reserved or no port at all; names the next free one.
    """
    if not 1 <= port <= 65535:
        raise StudioError(f"There is no port {port}.", "Ports run from 1 to 65535.", "Use --port 7860.")
    if is_free(host, port):
        return
    near = next((other for other in range(port + 1, min(port + 100, 65536)) if is_free(host, other)), None)
    raise StudioError(
        what=f"Port {port} cannot be used.",
        why="Another program listens there, perhaps a studio that is already open, or the system keeps it to itself.",
        next_step=f"Use --port {near}." if near else "Use --port with another number.",
    )


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        if exclusive is not None:  # Windows: without it two programs may share a port
            probe.setsockopt(socket.SOL_SOCKET, exclusive, 1)
        else:  # a port that was closed a moment ago counts as free, as it does for the server
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def has_screen(environment: Mapping[str, str], platform: str) -> bool:
    """Whether opening a browser makes sense: a desktop, and not at the far end of an ssh."""
    if "SSH_CONNECTION" in environment:
        return False
    return platform in ("win32", "darwin") or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))
