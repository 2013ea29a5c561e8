"""The doctor asks torch, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.verbs import doctor


def test_torch_says_its_build_and_runs_a_tiny_forward():
    torch, device = doctor.torch_and_device()
    assert torch.level == "ok" and "2.13.0" in torch.says
    assert device.level in ("ok", "warn")


def test_a_torch_that_does_not_load_is_one_sentence_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "app" / "verbs").mkdir(parents=True)
    (tmp_path / "app" / "verbs" / "torch_probe.py").write_text(
        "raise OSError('libtorch is broken')\n", encoding="utf-8"
    )
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    [finding] = doctor.torch_and_device()
    assert finding.level == "FAIL" and "libtorch is broken" in finding.says and finding.cure
