"""The loop of a small stage: every update once, in order, and the state kept at the end, however often it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.runs import updates
from train.runs.updates import descend, run_updates


def test_a_stage_makes_each_update_once_and_says_when_all_are_made(tmp_path: Path) -> None:
    made: list[int] = []
    kept: list[int] = []

    def update(step: int) -> dict[str, float]:
        made.append(step)
        return {"loss": float(step)}

    assert not run_updates("stage", tmp_path, update, kept.append, start=0, total=5, seconds=0.0)
    assert made == [] and kept == [0]
    assert run_updates("stage", tmp_path, update, kept.append, start=2, total=5, seconds=60.0)
    assert made == [2, 3, 4] and kept == [0, 5]
    assert run_updates("stage", tmp_path, update, kept.append, start=5, total=5, seconds=60.0)
    assert kept == [0, 5], "what is whole is not written again"


def test_a_stage_is_kept_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "KEEP_S", -1.0)
    kept: list[int] = []
    run_updates("stage", tmp_path, lambda step: {}, kept.append, start=0, total=2, seconds=60.0)
    assert kept == [1, 2, 2]


def test_a_step_goes_down_the_loss_by_at_most_a_clipped_gradient_and_leaves_none_behind() -> None:
    weight = torch.nn.Parameter(torch.tensor([30.0, 40.0]))
    descend(weight.square().sum(), [weight], torch.optim.SGD([weight], lr=1.0))
    torch.testing.assert_close(weight.detach(), torch.tensor([30.0 - 0.6, 40.0 - 0.8]))
    assert weight.grad is None
