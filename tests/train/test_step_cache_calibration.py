"""What leaving out steps is measured to save and lose, on a toybox of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from app.bench import quality
from engine import presets
from train.evaluation import step_cache
from train.toybox import calibrate
from train.toybox.contact_sheet import held_out_job


@pytest.fixture
def own_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Presets in a folder that may be written."""
    folder = tmp_path / "presets"
    shutil.copytree(presets.PRESETS, folder)
    monkeypatch.setattr(presets, "PRESETS", folder)
    return folder


def test_forwards_are_counted_frames_compared_and_the_preset_learns_it(tiny_toybox: Path, own_presets: Path):
    job = held_out_job(0)
    job = calibrate.with_steps(job.model_copy(update={"num_frames": 5}), 8)
    found = step_cache.measure("toybox", [job])
    assert (found["off"]["computed"], found["off"]["psnr"], found["off"]["change"]) == (8, 99, 0)
    assert 4 <= found["fast"]["computed"] <= found["careful"]["computed"] <= 8
    assert found["fast"]["psnr"] <= found["careful"]["psnr"] <= 99

    before = presets.load("toybox")
    step_cache.write("toybox", found, 1)
    after = presets.load("toybox")
    assert after.step_cache.fast.share == pytest.approx(found["fast"]["computed"] / 8, abs=1e-3)
    assert (
        "(1 jobs)" in after.step_cache.fast.costs
        and after.step_cache.fast.tolerance == before.step_cache.fast.tolerance
    )
    assert after.model_copy(update={"step_cache": before.step_cache}) == before


def test_equal_clips_are_99_db_alike_and_one_level_apart_48():
    clip = np.full((2, 4, 4, 3), 100, np.uint8)
    assert step_cache.psnr(clip, clip) == 99
    assert step_cache.psnr(clip, clip + 1) == pytest.approx(48.13, abs=0.01)


def test_the_bench_says_that_a_set_has_no_kind_judge_yet(monkeypatch: pytest.MonkeyPatch):
    figures = {"own of 16": 0.95, "locator IoU": 0.9, "verb": 0.97, "place": 1.0, "critic": 0.8}
    planted = {"noticed": {"swapped": 1.0, "grain": 0.0}, "likeness": {"drawn above 0.85": 0.9}}
    monkeypatch.setattr(quality, "json_of", lambda module, *_: planted if "sanity" in module else figures)
    rows = {figure.key: figure for figure in quality.measure_judges("toybox")}
    assert rows["judges-test-own-of-16"].holds and not rows["judges-test-kind"].holds
    assert rows["judges-test-kind"].value == "no such judge yet"
    assert not rows["judges-reward-faults"].holds and not rows["judges-reward-drawn-above-0.85"].holds


def test_the_bench_holds_the_words_to_what_they_promise(monkeypatch: pytest.MonkeyPatch):
    def told(steps: float, computed: float, psnr: float, change: float) -> dict[str, float]:
        return {
            "steps": steps,
            "computed": computed,
            "psnr": psnr,
            "lowest": psnr,
            "weakest": 0.5 + change,
            "change": change,
        }

    found = {"off": told(30, 30, 99, 0), "careful": told(30, 25, 24, -0.02), "fast": told(30, 10, 30, -0.1)}
    monkeypatch.setattr(quality, "json_of", lambda *_: found)
    rows = {figure.key: figure.holds for figure in quality.measure_step_cache("toybox")}
    assert rows["cache-off-12"] and rows["cache-off-12-loss"] and rows["cache-fast-12"]
    assert not rows["cache-careful-12"] and not rows["cache-careful-12-loss"]
    assert rows["cache-fast-50-loss"] is None
