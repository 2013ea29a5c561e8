"""`generate` from its arguments to the clip on disk, on a toybox of random weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import cli
from app.verbs import generate
from engine import presets
from engine.job import read_job
from engine.media import video
from engine.messages import Progress

QUICK = ["--steps", "2", "--frames", "5"]


@pytest.fixture
def here(tmp_path: Path, tiny_toybox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with two pictures."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("fox.png", "orange"), ("kite.png", "blue")):
        picture = Image.new("RGB", (96, 64), "white")
        picture.paste(colour, (30, 20, 66, 44))
        picture.save(name)
    return tmp_path


def two_subjects(out: str) -> list[str]:
    subjects = ["--subject", "fox=fox.png", "--subject", "kite=kite.png"]
    return ["generate", *subjects, "--prompt", "@fox chases @kite", "--seed", "7", *QUICK, "--out", out]


def frames(path: Path) -> np.ndarray:
    return video.read_frames(path, display_scale=presets.load("toybox").display_scale)


def test_stdout_is_the_path_of_a_clip_that_carries_its_document(here: Path, capfd: pytest.CaptureFixture[str]):
    assert cli.main(two_subjects("clip.mp4")) == 0
    said = capfd.readouterr()
    assert said.out == f"{here / 'clip.mp4'}\n"
    assert "Drawing" in said.err and "5 frames" in said.err
    assert frames(here / "clip.mp4").shape == (5, 64, 64, 3)
    inside = read_job(video.read_document(here / "clip.mp4") or "")
    assert inside == read_job((here / "clip.json").read_bytes())
    assert [subject.name for subject in inside.subjects] == ["fox", "kite"]
    assert (inside.seed, inside.sampling.num_inference_steps) == (7, 2)


def test_a_clip_alone_is_enough_to_make_it_again(here: Path):
    assert cli.main(two_subjects("first.mp4")) == 0
    for path in (*here.glob("*.png"), *here.glob("*.json")):
        path.unlink()
    assert cli.main(["generate", "first.mp4", "--out", "second.mp4"]) == 0
    assert np.array_equal(frames(here / "first.mp4"), frames(here / "second.mp4"))
    assert cli.main(["generate", "first.mp4", "--seed", "8", "--out", "third.mp4"]) == 0
    assert not np.array_equal(frames(here / "first.mp4"), frames(here / "third.mp4"))


def test_a_clip_may_not_open_files_of_this_machine(here: Path, capfd: pytest.CaptureFixture[str]):
    document = {
        "prompt": "@fox",
        "subjects": [{"name": "fox", "pictures": [{"path": str(here / "fox.png")}]}],
    }
    with video.ClipWriter(
        here / "hostile.mp4", fps=8, size=(64, 64), display_scale=4, document=json.dumps(document)
    ) as clip:
        clip.write(np.zeros((64, 64, 3), np.uint8))
    assert cli.main(["generate", "hostile.mp4", "--out", "clip.mp4"]) == 1
    assert "did not come with it" in capfd.readouterr().err
    assert not (here / "clip.mp4").exists()


def test_ctrl_c_leaves_nothing_behind(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    shown = generate.ProgressLine.progress

    def press(meter: generate.ProgressLine, message: Progress) -> None:
        shown(meter, message)
        if message.stage == "sample":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate.ProgressLine, "progress", press)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(two_subjects("clip.mp4")) == 130
    assert capfd.readouterr().err.endswith("Cancelled. Nothing was saved.\n")
    assert sorted(path.name for path in here.iterdir()) == ["fox.png", "kite.png"]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_to_leave_out_is_written_into_the_document(here: Path):
    assert cli.main([*two_subjects("clip.mp4"), "--cache", "fast"]) == 0
    assert read_job((here / "clip.json").read_bytes()).sampling.step_cache == "fast"
