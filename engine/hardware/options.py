"""What this machine is to do with its cards: which one, which attention kernels, compiled or not.

In:  environment variables, so that a worker inherits them from whoever started it.
Out: a `MachineOptions`, or a `StudioError` for a word that is none.
Knows nothing of torch, of jobs or of presets: frames do not depend on any of this beyond rounding, and no document
carries it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from engine.messages import StudioError

Attention = Literal["auto", "native", "flash", "flash3", "sage", "xformers", "cudnn"]
Profile = Literal["auto", "6", "8", "12", "16", "24", "all"]
DEVICE = re.compile(r"(cpu|mps|cuda(:\d{1,2})?|xpu(:\d{1,2})?)")


@dataclass(frozen=True)
class MachineOptions:
    """How models run here."""

    device: str = ""
    """cpu, cuda, mps, xpu; empty: the fastest there is."""
    attention: Attention = "auto"
    """Kernels of the video's attention. auto: FlashAttention where it is installed and serves the card, else torch's
    own (native). Those of `sage` round more than the others."""
    compile: bool = False
    """Compile the transformer's blocks at the first clip: a minute or more then, faster steps after."""
    profile: Profile = "auto"
    """GB of the card that clips may use; auto is what is free, all the whole card."""

    def variables(self) -> dict[str, str]:
        """The environment that gives this machine back."""
        return {
            "IDCRAFTER_DEVICE": self.device,
            "IDCRAFTER_ATTENTION": self.attention,
            "IDCRAFTER_COMPILE": "1" if self.compile else "",
            "IDCRAFTER_PROFILE": self.profile,
        }


def machine_options(environment: Mapping[str, str] = os.environ) -> MachineOptions:
    """The machine that these variables describe.

    Raises:
        StudioError: a word that names no device, no attention or no profile.
    """
    profile = environment.get("IDCRAFTER_PROFILE") or "auto"
    if profile not in get_args(Profile):
        raise StudioError(
            what=f"There is no profile called {profile[:40]!r}.",
            why=f"There are {', '.join(get_args(Profile))}.",
            next_step="Choose one of those with --profile, or leave it out.",
        )
    device, attention = environment.get("IDCRAFTER_DEVICE", ""), environment.get("IDCRAFTER_ATTENTION") or "auto"
    if device:
        check_device(device)
    if attention not in get_args(Attention):
        raise StudioError(
            what=f"There is no attention called {attention[:40]!r}.",
            why=f"There are {', '.join(get_args(Attention))}.",
            next_step="Set IDCRAFTER_ATTENTION to one of those, or leave it out.",
        )
    compiled = environment.get("IDCRAFTER_COMPILE", "") not in ("", "0")
    return MachineOptions(device, cast(Attention, attention), compiled, cast(Profile, profile))


def check_device(word: str) -> str:
    """The word back, when it names a device.

    Raises:
        StudioError: it does not.
    """
    if not DEVICE.fullmatch(word):
        raise StudioError(
            what=f"There is no device {word[:40]!r}.",
            why="A device is cpu, mps, cuda or xpu, the last two with a card's number where there are several.",
            next_step="Write --devices cuda:0,cuda:1, or leave it out.",
        )
    return word


def restrict_to_device(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to see one device and no other.

    A process that sees one card cannot take memory on another by mistake, and whatever asks for "the card" (free
    memory, kernels) means the right one.

    Args:
        device: as `check_device` takes it; empty changes nothing.
        environment: of the process that starts it. Cards are counted among those it sees itself.
    """
    kind, _, number = device.partition(":")
    changed = dict(environment)
    if not device:
        return changed
    changed["IDCRAFTER_DEVICE"] = kind
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get(kind)
    if number and variable is not None:
        changed[variable] = _pick_card(environment.get(variable, ""), number)
    return changed


def _pick_card(visible: str, number: str) -> str:
    """The card of that number among the visible ones (empty: all); "-1", which is no card, where there are fewer."""
    cards = [card.strip() for card in visible.split(",") if card.strip()]
    if not cards:
        return number
    if int(number) < len(cards):
        return cards[int(number)]
    return "-1"
