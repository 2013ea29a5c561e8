"""How far a clip is: seconds left of the stage it is in, and the share of a model that has been read.

In:  steps that end, bytes that arrive.
Out: `Progress` messages.
Knows nothing of what is computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from engine.messages import Message, Progress

LOADING_GAP_S = 0.5


class Pace:
    """How long the rest will take, estimated from the last eight steps; the first steps warm up and are slower."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=8)
        self._since = time.monotonic()

    def seconds_left(self, done: int, total: int) -> float:
        """A step has ended: seconds until the last one does."""
        self._took.append(time.monotonic() - self._since)
        return (total - done) * sum(self._took) / len(self._took)

    def go_on(self) -> None:
        """The next step begins; what came between two steps, such as a preview, is not counted as a step."""
        self._since = time.monotonic()


class LoadingProgress:
    """Reports how far loading a part is, when that takes longer than a moment. An encoder's belongs to "encode"."""

    def __init__(self, say: Callable[[Message], None]) -> None:
        self._say = say
        self._began: dict[str, float] = {}
        self._next = 0.0

    def __call__(self, part: str, share: float) -> None:
        now = time.monotonic()
        began = self._began.setdefault(part, now)
        if share == 1:
            del self._began[part]
        elif now - began > LOADING_GAP_S and now >= self._next:
            self._next = now + LOADING_GAP_S
            stage = "load" if part == "transformer" else "encode"
            seconds_left = (now - began) * (1 - share) / share
            note = f"loading the {part.replace('_', ' ')}"
            self._say(Progress(stage, int(100 * share), 100, eta_s=seconds_left, note=note))
