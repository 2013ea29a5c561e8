"""The measurement for cards, rehearsed on the processor at a tiny size: every way of keeping the model computes."""

from __future__ import annotations

import pytest
import torch

from app.bench_cards import SHAPES, WAYS, Way, drawn, measure
from engine import counts, quantize

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("where", ["device", "memory"])
def test_every_way_of_keeping_a_model_computes(precision: str, where: str) -> None:
    found = measure(Way("tiny", precision, where, 0, ""), CPU, frames=5, width=64, height=64)
    assert found["step_s"] > 0 and found["predicted"] > 0


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_random_weights_are_as_many_as_the_plan_counts(precision: str) -> None:
    model = drawn(SHAPES["tiny"], precision, CPU, CPU)
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.rope.buffers())
    held = quantize.num_bytes(model) - tables
    assert counts.transformer_weights(SHAPES["tiny"]).num_bytes(precision, 4) == pytest.approx(held, rel=0.02)


def test_every_row_for_cards_is_a_command_that_is_understood() -> None:
    assert len({tuple(way.arguments()) for way in WAYS}) == len(WAYS)
