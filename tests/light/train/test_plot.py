"""The picture of a run: windows are means, and updates that were made twice count once."""

from __future__ import annotations

import json
import re

from train.runs import plot


def test_a_window_is_the_mean_of_its_updates() -> None:
    lines = [json.dumps({"step": step, "time": 0, "error": float(step)}) for step in range(1, 101)]
    assert plot.read_curves(lines, windows=10)["error"][0] == (5.0, 5.5)
    assert len(plot.read_curves(lines, windows=10)["error"]) == 10


def test_what_was_written_before_a_run_was_taken_back_does_not_count() -> None:
    lines = [json.dumps({"step": s, "error": v}) for s, v in ((1, 1.0), (2, 9.0), (3, 9.0), (2, 2.0), (3, 3.0))]
    assert [mean for _, mean in plot.read_curves(lines, windows=3)["error"]] == [1.0, 2.0, 3.0]


def test_the_picture_holds_a_line_for_each_figure_and_no_markup_of_theirs() -> None:
    found = {"<b>": [(1.0, 2.0), (2.0, 1.0)], "even": [(1.0, 5.0), (2.0, 5.0)]}
    picture = plot.draw_svg(found)
    assert picture.count("<polyline") == 2 and "<b>" not in picture
    first = re.findall('points="([^"]*)"', picture)[0].split()
    assert float(first[0].split(",")[1]) < float(first[1].split(",")[1])  # what is larger stands higher
