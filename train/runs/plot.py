"""How a run went, as a picture: every figure it wrote down, smoothed, over its updates.

In:  `metrics.jsonl` of a run folder.
Out: one SVG. Knows nothing of what the figures mean.

    python -m train.runs.plot ~/.cache/idcrafter-studio/toybox/identity docs/curve.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path

WINDOWS = 60  # points of a curve: each is the mean of a window of updates
WIDTH, HEIGHT, EDGE = 720, 220, 48
COLOURS = ("#135f9e", "#b0441c", "#0b6e5f", "#5a3fc0", "#566a0c", "#a52a68")
Point = tuple[float, float]


def read_curves(lines: Iterable[str], windows: int = WINDOWS) -> dict[str, list[Point]]:
    """Name -> (update, mean of a window), for every figure of a `metrics.jsonl`.

    A run that was taken back to an earlier save has written some updates twice; the later writing counts.
    """
    found: dict[int, Mapping[str, float]] = {}
    for line in lines:
        record = json.loads(line)
        found = {step: kept for step, kept in found.items() if step < record["step"]}
        found[record["step"]] = record
    last = max(found, default=0)
    width = max(1.0, last / windows)
    sums: dict[str, dict[int, list[float]]] = {}
    for step, record in found.items():
        for name in record.keys() - {"step", "time"}:
            sums.setdefault(name, {}).setdefault(int((step - 1) / width), []).append(record[name])
    means: dict[str, list[Point]] = {}
    for name, own in sorted(sums.items()):
        means[name] = [((window + 0.5) * width, sum(seen) / len(seen)) for window, seen in sorted(own.items())]
    return means


def draw_svg(found: Mapping[str, Sequence[Point]]) -> str:
    """One panel for each figure, below each other, all over the same updates."""
    steps = [x for x, _ in chain.from_iterable(found.values())]
    last = max(steps, default=1.0)
    panels = [_draw_panel(name, points, last, number) for number, (name, points) in enumerate(found.items())]
    high = HEIGHT * max(1, len(panels))
    style = "text{font:12px system-ui,sans-serif;fill:#1c1f26}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" height="{high}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def _draw_panel(name: str, points: Sequence[Point], last: float, number: int) -> str:
    low, high = min(y for _, y in points), max(y for _, y in points)
    top, span = number * HEIGHT, (high - low) or 1.0

    def place(point: Point) -> str:
        x = EDGE + (WIDTH - 2 * EDGE) * point[0] / last
        y = top + HEIGHT - 36 - (HEIGHT - 72) * (point[1] - low) / span
        return f"{x:.1f},{y:.1f}"

    colour = COLOURS[number % len(COLOURS)]
    heights = ((value, float(place((0, value)).split(",")[1]) + 4) for value in (low, high))
    marks = "".join(f'<text x="{EDGE - 6}" y="{y:.1f}" text-anchor="end">{value:.3g}</text>' for value, y in heights)
    return (
        f'<text x="{EDGE}" y="{top + 20}" font-weight="600">{escape(name)}</text>{marks}'
        f'<text x="{WIDTH - EDGE}" y="{top + HEIGHT - 12}" text-anchor="end">update {last:.0f}</text>'
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(map(place, points))}"/>'
    )


def main(argv: list[str] | None = None) -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python -m train.runs.plot", description="Draw how a run went.")
    parser.add_argument("run", type=Path, help="run folder with metrics.jsonl")
    parser.add_argument("out", type=Path, help="SVG to write")
    options = parser.parse_args(argv)
    with (options.run / "metrics.jsonl").open(encoding="utf-8") as lines:
        options.out.write_text(draw_svg(read_curves(lines)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
