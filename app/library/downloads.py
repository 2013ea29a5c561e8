"""Pulls of the page: one after the other in a thread beside it, so that closing or reloading the page stops nothing.

In:  the name of a preset, and the wish to fetch, pause, give up or check it.
Out: for each preset what is going on and how far it is, read by whoever paints the page; a count of changes.
Knows nothing of Gradio or of torch. Where this process ends, the parts stay, and the next pull goes on from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from app import wording
from app.library import add_model, models
from engine import presets
from engine.hub.cache import FetchPlan, Hub, Say
from engine.messages import StudioError

Stage = Literal["waiting", "asking", "fetching", "checking", "paused", "done", "failed"]
ADOPT, ADD = "adopt/", "add/"  # what is no preset's own, under names that no preset can have
BUSY = ("waiting", "asking", "fetching", "checking")
TURN_S = 0.2  # how often one that waits for its turn looks whether it is still wanted


@dataclass(frozen=True)
class Pull:
    """How one pull stands."""

    stage: Stage
    here: int = 0  # bytes
    total: int = 0
    file: str = ""  # on its way
    bytes_per_s: float = 0.0
    seconds_left: float | None = None
    said: str = ""  # how it ended
    by_library: tuple[str, ...] = ()  # files that only the library can fetch, and that begin anew after a pause
    error: StudioError | None = None

    @property
    def busy(self) -> bool:
        """Whether it can be paused."""
        return self.stage in BUSY


class _Stop(Exception):
    """Raised out of a pull by whoever wants it to stop."""


class Pulls:
    """All pulls of this process.

    Args:
        hub: makes the Hub that asks and fetches; given the token of the moment.
    """

    def __init__(self, hub: Callable[[str | None], Hub] = lambda token: Hub(token=token)) -> None:
        self._make_hub = hub
        self._token: str | None = None
        self._pulls: dict[str, Pull] = {}
        self._stops: dict[str, threading.Event] = {}
        self._plans: dict[str, FetchPlan] = {}
        self._given_up: set[str] = set()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._changes = 0

    def hub(self) -> Hub:
        """The Hub as this process asks it."""
        return self._make_hub(self._token)

    def hold_token(self, token: str) -> None:
        """Keep a token in memory until the process ends; empty lets it go."""
        self._token = token.strip() or None
        self.touch()

    @property
    def has_token(self) -> bool:
        """Whether one was given; what it is nobody is told."""
        return self._token is not None

    def of(self, name: str) -> Pull | None:
        """How the pull of a preset stands; None where there was none."""
        with self._lock:
            return self._pulls.get(name)

    def changes(self) -> int:
        """Grows with every change that a page could show."""
        return self._changes

    def touch(self) -> None:
        """Something that a page shows has changed."""
        with self._lock:
            self._changes += 1

    # --- wishes ---

    def fetch(self, name: str, *, judges: bool = False, accept_no_licence: bool = False) -> None:
        """Begin to fetch what is missing of a preset, or go on; nothing where it is already on its way."""
        preset = presets.load(name)

        def work(hub: Hub, say: Say) -> str:
            if not accept_no_licence:
                models.check_licences(preset, hub, judges=judges)
            plan = models.plan(preset, hub, judges=judges)
            self._plans[name] = plan
            alone = tuple(found.wanted.path for found in plan.missing if found.xet)
            self._set(name, stage="fetching", by_library=alone)
            count = models.pull(preset, hub, say, judges=judges, accept_no_licence=True)
            return f"{wording.files(count)} {'is' if count == 1 else 'are'} here, each one checked."

        self._begin(name, work)

    def verify(self, name: str) -> None:
        """Begin to hash what is here of a preset."""
        preset = presets.load(name)

        def work(hub: Hub, say: Say) -> str:
            self._set(name, stage="checking")
            broken = models.verify(preset, hub, say)
            if not broken:
                return "Every file that is here is whole."
            what = f"{broken[0].path} was damaged."
            if len(broken) > 1:
                what = f"{broken[0].path} was damaged, and {wording.files(len(broken) - 1)} more."
            raise StudioError(
                what,
                "What was damaged has been taken away.",
                "Fetch it again.",
            )

        self._begin(name, work)

    def adopt(self, folder: Path | None) -> None:
        """Begin to look through a folder of another program; None is refused as any other that is not there."""

        def work(hub: Hub, say: Say) -> str:
            if folder is None:
                raise StudioError("No folder was named.", "It is looked through for files.", "Name one.")
            self._set(ADOPT, stage="checking")
            adopted, unknown = models.adopt([folder], hub, say)
            more = f" Not to be asked about: {len(unknown)} repositories or folders." if unknown else ""
            names = ", ".join(path.name for path in adopted[:4])
            said = "No file there is one that a preset needs."
            if adopted:
                said = f"Adopted: {len(adopted)} ({names})."
            return said + more

        self._begin(ADOPT, work)

    def add(self, repo: str, *, like: str = "", accept_no_licence: bool = False) -> None:
        """Begin to make a preset of a repository."""

        def work(hub: Hub, say: Say) -> str:
            preset = add_model.add(repo.strip(), hub, like=like, accept_no_licence=accept_no_licence)
            return f"{preset.name} is added."

        self._begin(ADD, work)

    def pause(self, name: str) -> None:
        """Stop a pull; it goes on where it stopped."""
        with self._lock:
            stop = self._stops.get(name)
        if stop is not None:
            stop.set()

    def give_up(self, name: str) -> None:
        """Stop a pull and take away what has arrived of files that are not whole."""
        pull = self.of(name)
        with self._lock:
            self._given_up.add(name)
        if pull is not None and pull.busy:
            self.pause(name)  # its own thread tidies up
        else:
            self._tidy(name)

    def clear(self, name: str) -> None:
        """Forget how the last pull of a preset ended."""
        with self._lock:
            known = self._pulls.get(name)
            if known is not None and not known.busy:
                del self._pulls[name]
            self._changes += 1

    # --- the thread ---

    def _begin(self, name: str, work: Callable[[Hub, Say], str]) -> None:
        with self._lock:
            known = self._pulls.get(name)
            if known is not None and known.busy:
                return
            self._pulls[name] = Pull("waiting")
            self._stops[name] = threading.Event()
            self._given_up.discard(name)
            self._changes += 1
        threading.Thread(target=self._run, args=(name, work), name=f"pull {name}", daemon=True).start()

    def _run(self, name: str, work: Callable[[Hub, Say], str]) -> None:
        stop, speed = self._stops[name], models.Speed()

        def say(here: int, total: int, file: str) -> None:
            if stop.is_set():
                raise _Stop
            speed.see(here)
            left = speed.seconds_left(total)
            self._set(name, here=here, total=total, file=file, bytes_per_s=speed.bytes_per_s, seconds_left=left)

        while not self._turn.acquire(timeout=TURN_S):
            if stop.is_set():
                return self._stopped(name)
        try:
            self._set(name, stage="asking")
            said = work(self.hub(), say)
            self._set(name, stage="done", said=said)
        except _Stop:
            self._stopped(name)
        except StudioError as error:
            self._set(name, stage="failed", error=error)
        except Exception as error:  # a thread that dies would leave its bar standing for ever
            words = f"The pull stopped on a fault of its own ({type(error).__name__}: {str(error)[:200]})."
            fault = StudioError(words, "What has arrived is kept.", "Try again: it goes on where it stopped.")
            self._set(name, stage="failed", error=fault)
        finally:
            self._turn.release()

    def _stopped(self, name: str) -> None:
        if name in self._given_up:
            self._tidy(name)
        else:
            self._set(name, stage="paused")

    def _tidy(self, name: str) -> None:
        try:
            hub, preset = self.hub(), presets.load(name)
            hub.discard(self._plans.get(name) or models.plan(preset, hub, judges=True))
        except StudioError as error:
            self._set(name, stage="failed", error=error)
            return
        with self._lock:
            self._pulls.pop(name, None)
            self._given_up.discard(name)
            self._changes += 1

    def _set(self, name: str, **changes: object) -> None:
        with self._lock:
            self._pulls[name] = replace(self._pulls.get(name, Pull("waiting")), **changes)  # pyright: ignore
            self._changes += 1
