"""How a run goes: one line on the terminal every few seconds, one JSON record per line in `metrics.jsonl`.

In:  step numbers and the values measured in them.
Out: text with rate and ETA; the file `train.runs.plot` draws.
Knows nothing of what is trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from engine.messages import duration


class MetricsLog:
    """Says how a stage goes: a line every few seconds with rate and ETA, and a record per line in metrics.jsonl."""

    def __init__(self, name: str, total: int, folder: Path, *, start: int = 0, every_s: float = 10.0) -> None:
        self.name, self.total, self.every_s = name, total, every_s
        self.first_step, self.began, self.spoke = start, time.monotonic(), 0.0
        self.sums: dict[str, list[float]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "metrics.jsonl"

    def tick(self, step: int, values: Mapping[str, float]) -> None:
        """Count one finished step (1-based) and the values measured in it."""
        for key, value in values.items():
            self.sums.setdefault(key, []).append(value)
        now = time.monotonic()
        if now - self.spoke < self.every_s and step != self.total:
            return
        rate = (step - self.first_step) / max(1e-9, now - self.began)
        means = {key: sum(seen) / len(seen) for key, seen in self.sums.items()}
        eta = (self.total - step) / max(1e-9, rate)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
        print(f"{self.name}  step {step}/{self.total}  {shown}  {rate:.2f} steps/s  ETA {duration(eta)}", flush=True)  # noqa: T201
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 1), **means}) + "\n")
        self.spoke, self.sums = now, {}
