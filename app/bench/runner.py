"""Measure what docs/measurements.md claims, and write it there.

In:  names of measurements, or none for all of them.
Out: docs/measurements.md, one row per figure with the command, the commit, the day and the machine; a row that is
     measured again replaces the old one.
Knows nothing of how a model is trained. Whatever has to be cold or counted apart runs in a process of its own.

    python launch.py bench [NAME ...]    # the names are in MEASUREMENTS; none means all of them
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator

from app.bench.counts import count_flops, count_sizes
from app.bench.quality import measure_identity, measure_judges, measure_step_cache
from app.bench.report import REPORT, Figure, write_report
from app.bench.speed import decode_alone, measure_loop, measure_memory, measure_page, measure_report
from engine.messages import StudioError
from engine.paths import ROOT


def main(arguments: list[str]) -> int:
    """Run the measurements asked for and write them down; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(prog="python launch.py bench", description="Measure what the documents claim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MEASUREMENTS)}; none means all")
    parser.add_argument("--preset", default="toybox", help="the preset whose speed is measured (toybox)")
    parser.add_argument("--decode", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.decode:
        return decode_alone(given.decode, given.preset)
    unknown = [name for name in given.names if name not in MEASUREMENTS]
    if unknown:
        raise StudioError(
            f"There is no measurement called {unknown[0]!r}.",
            f"There are {', '.join(MEASUREMENTS)}.",
            "Name some of those.",
        )
    broken = False
    for name in given.names or MEASUREMENTS:
        _say(f"{name} ...")
        for figure in MEASUREMENTS[name](given.preset):
            line = f"  {figure.what}: {figure.value}"
            if figure.limit:
                line += f" (promised: {figure.limit})"
            _say(line + {True: "  holds", False: "  BROKEN", None: ""}[figure.holds])
            write_report(REPORT, [(f"python launch.py bench {name}", figure)])  # at once: some take an hour
            broken = broken or figure.holds is False
    _say(f"Written to {REPORT.relative_to(ROOT)}.")
    return int(broken)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _measurement(module: str, name: str) -> Callable[[str], Iterator[Figure]]:
    """A measurement that lies in a module of its own, imported when it is asked for."""
    return lambda preset: getattr(importlib.import_module(f"app.bench.{module}"), name)(preset)


MEASUREMENTS: dict[str, Callable[[str], Iterator[Figure]]] = {
    "sizes": count_sizes,
    "flops": count_flops,
    "memory": measure_memory,
    "loop": measure_loop,
    "report": measure_report,
    "caches": measure_step_cache,
    "judges": measure_judges,
    "identity": measure_identity,
    "loading": _measurement("weights", "measure_loading"),
    "rounding": _measurement("weights", "measure_rounding"),
    "full": _measurement("full_clips", "measure_full_clips"),
    "cards": _measurement("cards", "measure_cards"),
    "page": measure_page,
    "threads": _measurement("threads", "measure_threads"),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
