"""The identity report without a judge: what follows from its figures, how it is read back, how it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from app.page import identity_panel
from engine.identity.report import REPORT, IdentityReport, SubjectReport, read_report

FOX = SubjectReport("fox", "toybox reward", own=(0.8, 0.9, None, 0.7), other=(0.2, 0.1, None, 0.3))
KITE = SubjectReport("kite", "toybox reward", own=(0.4, 0.5, 0.6, 0.5), other=(0.6, 0.7, 0.2, 0.9))
REPORTED = IdentityReport(8, 1, (FOX, KITE))


def test_a_frame_without_the_subject_counts_as_nothing() -> None:
    assert FOX.score == pytest.approx((0.8 + 0.9 + 0.7) / 4)
    assert FOX.presence == 0.75
    assert FOX.margin == pytest.approx((0.6 + 0.8 + 0.4) / 3)
    seen_everywhere = SubjectReport("fox", "x", (0.8, 0.9, 0.8, 0.7), (0.2, 0.1, 0.2, 0.3))
    assert seen_everywhere.score > FOX.score


def test_the_worst_frames_name_the_missing_ones_first() -> None:
    assert FOX.worst_frames == (0, 2, 3)
    assert 2 in SubjectReport("a", "x", (-0.5, 0.9, None, 0.9, 0.8), (None,) * 5).worst_frames


def test_a_clip_is_as_good_as_its_weakest_subject() -> None:
    assert REPORTED.weakest == KITE.score < FOX.score
    assert IdentityReport(8, 1, ()).weakest == 0.0


def test_somebody_alone_is_compared_with_nobody() -> None:
    assert SubjectReport("a", "x", (0.5, 0.5), (None, None)).margin is None


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / f"clip{REPORT}").write_text(REPORTED.as_json(), encoding="utf-8")
    assert read_report(tmp_path / "clip.mp4") == REPORTED


def test_a_report_of_the_first_version_had_one_judge_for_all(tmp_path: Path) -> None:
    old = json.loads(REPORTED.as_json())
    del old["every"]
    old |= {"version": 1, "judge": "toybox reward"}
    for subject in old["subjects"]:
        del subject["judge"]
    (tmp_path / f"clip{REPORT}").write_text(json.dumps(old), encoding="utf-8")
    assert read_report(tmp_path / "clip.mp4") == REPORTED


def test_figures_of_two_judges_share_neither_plot_nor_table_nor_the_weakest(tmp_path: Path) -> None:
    anna = SubjectReport("anna", "faces", own=(0.6, 0.7), other=(None, None))
    dog = SubjectReport("dog", "things", own=(0.2, 0.3), other=(None, None))
    mixed = IdentityReport(16, 4, (anna, dog))
    assert mixed.judges == ("faces", "things") and mixed.by("things") == (dog,)
    assert mixed.weakest == anna.score  # 0.25 of another judge says nothing against 0.65 of this one
    (tmp_path / f"clip{REPORT}").write_text(mixed.as_json(), encoding="utf-8")
    shown = identity_panel.panel(tmp_path / "clip.mp4", ["anna", "dog"])
    plots = shown.split("<svg")[1:]
    assert len(plots) == 2
    assert "@anna" in plots[0] and "@dog" not in plots[0] and "Judged by faces" in plots[0]
    assert "@dog" in plots[1] and "@anna" not in plots[1] and "Judged by things" in plots[1]
    assert ">5</text>" in shown and "<td>1, 5</td>" in shown  # the second figure is of frame five


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 99}', '{"version": 1, "judge": "x", "fps": 8, "subjects": [{"name": "a"}]}']
)
def test_what_is_no_report_is_not_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / f"clip{REPORT}").write_text(text, encoding="utf-8")
    assert read_report(tmp_path / "clip.mp4") is None
    assert identity_panel.panel(tmp_path / "clip.mp4", ["a"]) == ""
    assert identity_panel.line(tmp_path / "clip.mp4", ["a"]) == ""


def test_a_curve_breaks_where_the_subject_cannot_be_seen() -> None:
    plot = identity_panel.plot(REPORTED.subjects, ["fox", "kite"])
    assert len(re.findall('<polyline class="own"', plot)) == 2  # the fox's first two frames; the kite's four
    assert len(re.findall('<circle class="own"', plot)) == 1  # the fox's last frame
    highest, lowest = identity_panel._y(1.0), identity_panel._y(0.0)
    heights = [float(point.split(",")[1]) for line in re.findall('points="([^"]*)"', plot) for point in line.split()]
    assert all(highest <= height <= lowest for height in heights)


def test_the_panel_says_who_looks_like_somebody_else_and_escapes_names(tmp_path: Path) -> None:
    hostile = IdentityReport(8, 1, (SubjectReport("<i>", "<b>", (0.1,), (0.9,)), FOX))
    (tmp_path / f"clip{REPORT}").write_text(hostile.as_json(), encoding="utf-8")
    shown = identity_panel.panel(tmp_path / "clip.mp4", ["fox"])
    assert "&lt;i&gt; looks more like another" in shown
    assert "<i>" not in shown and "<b>;" not in shown
