"""Figures with their uncertainty: bootstrap intervals, rank correlation, a Markdown table.

In:  numbers, grouped by the job they come from.
Out: means with 95 % intervals, and text.
Knows nothing of clips or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float, float]  # mean, low, high


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks; equal values share the mean of their ranks. 0 when all of one side are equal."""
    ranks = []
    for values in (np.asarray(first, float), np.asarray(second, float)):
        below, same = values[:, None] > values, values[:, None] == values
        ranks.append(below.sum(1) + (same.sum(1) - 1) / 2)
    spread = float(ranks[0].std() * ranks[1].std())
    if spread == 0:
        return 0.0
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / spread)


def interval(values: Sequence[Sequence[float]], *, seed: int = 0) -> Interval | None:
    """Mean of all values and its 95 % interval, bootstrapped over jobs (each an inner sequence); None for none."""
    jobs = [list(inner) for inner in values if len(inner)]
    if not jobs:
        return None
    sums, counts = np.array([sum(inner) for inner in jobs]), np.array([len(inner) for inner in jobs])
    index = np.random.default_rng(seed).integers(0, len(jobs), (2000, len(jobs)))
    means = sums[index].sum(1) / counts[index].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def as_text(rows: dict[str, dict[str, Interval | None]]) -> str:
    """The table as Markdown: mean and 95 % interval."""
    questions = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(questions)} |", f"|---|{'---|' * len(questions)}"]
    for name, figures in rows.items():
        cells = [_cell(each) for each in figures.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: Interval | None) -> str:
    """One cell of the table: "0.50 (0.40 to 0.60)", or a dash where there is no figure."""
    if figure is None:
        return "-"
    mean, low, high = figure
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"
