"""The identity report as a person reads it: a score for everyone, frames with outlines, and a plot over time.

In:  a clip and its `IdentityReport`.
Out: HTML text.
Knows nothing of Gradio, of judges, or of how the figures were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from app.page import markup
from engine.identity.report import STRIP, IdentityReport, SubjectReport, read_report

WIDTH, HEIGHT = 560, 150  # of the plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 22


def panel(clip: Path, names: Sequence[str]) -> str:
    """Everything a clip's report says, folded under one line; nothing when it has none.

    Args:
        names: of the clip's subjects in slot order, which decides their colours.
    """
    report = read_report(clip)
    if report is None or not report.subjects:
        return ""
    strip = clip.with_suffix(STRIP)
    outlines = "Frames of the clip; each subject is outlined in its colour"
    picture = f'<img class="strip" alt="{outlines}" src="{markup.file_url(strip)}">' if strip.is_file() else ""
    parts = "".join(_judged(report, judge, names) for judge in report.judges)
    return f'<details class="who"><summary>{_line(report, names)}</summary>{picture}{parts}</details>'


def _judged(report: IdentityReport, judge: str, names: Sequence[str]) -> str:
    """Plot and table of one judge; figures of two judges never share one."""
    by = f'<p class="about">Judged by {escape(judge)}; figures of other judges do not compare with these.</p>'
    subjects = report.by(judge)
    return f"{plot(subjects, names, report.every)}{_table(subjects, names, report.every)}{by}"


def line(clip: Path, names: Sequence[str]) -> str:
    """The scores alone, for clips side by side."""
    report = read_report(clip)
    return f'<p class="who">{_line(report, names)}</p>' if report is not None and report.subjects else ""


def _line(report: IdentityReport, names: Sequence[str]) -> str:
    weakest = min(report.by(report.judges[0]), key=lambda subject: subject.score)
    scores = " ".join(
        f'<span class="mention"{_colour(subject, names)}>@{escape(subject.name)} <b>{subject.score:.2f}</b></span>'
        for subject in report.subjects
    )
    swapped = [subject.name for subject in report.subjects if (subject.margin or 0.0) < 0]
    doubt = f" · @{escape(swapped[0])} looks more like another" if swapped else ""
    lowest = f" · weakest @{escape(weakest.name)}" if len(report.subjects) > 1 else ""
    return f"Likeness {scores}{doubt or lowest}"


def _colour(subject: SubjectReport, names: Sequence[str]) -> str:
    return markup.colour(list(names).index(subject.name) if subject.name in names else -1)


def _table(subjects: Sequence[SubjectReport], names: Sequence[str], every: int) -> str:
    rows = ""
    for each in subjects:
        margin = "-"
        if each.margin is not None:
            margin = f"{each.margin:+.2f}"
        worst = ", ".join(str(frame * every + 1) for frame in each.worst_frames)
        rows += (
            f'<tr><th scope="row"><span class="mention"{_colour(each, names)}>@{escape(each.name)}</span></th>'
            f"<td>{each.score:.2f}</td><td>{margin}</td><td>{each.presence:.0%}</td><td>{worst}</td></tr>"
        )
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("Subject", "Likeness", "Above others", "Seen", "Worst frames")
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def plot(subjects: Sequence[SubjectReport], names: Sequence[str], every: int = 1) -> str:
    """Likeness over the frames: a line for each subject, and a dashed one for the other that it resembles most.

    Args:
        every: how many of the clip's frames lie between two figures.
    """
    frames = max(len(subject.own) for subject in subjects)
    lines = "".join(
        f"<g{_colour(subject, names)}>{_curve(subject.other, frames, 'other')}{_curve(subject.own, frames, 'own')}</g>"
        for subject in subjects
    )
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(level):.1f}" y2="{_y(level):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{_y(level) + 4:.1f}" text-anchor="end">{level:g}</text>'
        for level in (0.0, 0.5, 1.0)
    )
    ends = "".join(
        f'<text x="{_x(frame, frames):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{word}</text>'
        for frame, anchor, word in ((0, "start", "frame 1"), (frames - 1, "end", str((frames - 1) * every + 1)))
    )
    said = "; ".join(f"@{escape(each.name)} {each.score:.2f} on average" for each in subjects)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Likeness over the frames: {said}">'
        f'<g class="grid">{grid}{ends}</g>{lines}</svg>'
    )


def _curve(values: Sequence[float | None], frames: int, kind: str) -> str:
    """One line, with a gap wherever the subject cannot be seen; a lone point is a dot."""
    drawn, run = "", list[str]()
    for frame, value in enumerate([*values, None]):
        if value is not None:
            run.append(f"{_x(frame, frames):.1f},{_y(max(0.0, value)):.1f}")
            continue
        if len(run) > 1:
            drawn += f'<polyline class="{kind}" points="{" ".join(run)}"/>'
        elif run:
            x, y = run[0].split(",")
            drawn += f'<circle class="{kind}" cx="{x}" cy="{y}" r="2.5"/>'
        run = []
    return drawn


def _x(frame: int, frames: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * frame / max(1, frames - 1)


def _y(value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)
