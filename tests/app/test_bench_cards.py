"""The measurement for cards, rehearsed at a tiny size: every way of keeping the model computes, also on a card."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from app.bench import cards as bench_cards
from app.bench.cards import (
    SHAPES,
    WAYS,
    WORDS,
    Way,
    _run_child,
    build_random_model,
    main,
    measure,
    measure_cards,
    measure_decode,
    measure_fits,
)
from engine import presets
from engine.hardware import costs
from engine.hardware.plan import CONTEXT
from engine.hardware.probe import GB, Hardware
from engine.loading import quantize
from engine.messages import StudioError
from tests.support.pretend_card import CPU, pretended

CARD = torch.device("cuda")  # without a number, as it is asked for
SMALL = {"frames": 5, "width": 64, "height": 64}
TINY = SHAPES["tiny"]
SIDE = TINY.model_copy(update={"identity_layers": 0, "vlm_dim": 0, "vace_layers": 2})


# diffusers' own group offloading does not move quantized weights.
KEPT = [(p, where) for p in ("fp32", "int8", "nf4") for where in WORDS if p == "fp32" or where != "plain-visiting"]


@pytest.mark.parametrize(("precision", "where"), KEPT)
def test_every_way_of_keeping_a_model_computes(precision: str, where: str) -> None:
    found = measure(Way("tiny", precision, where, 0, ""), CPU, **SMALL)
    assert found["step_s"] > 0 and found["predicted"] > 0


def test_every_other_way_of_computing_computes_or_says_that_it_cannot_be_had() -> None:
    drawn_beside = measure(Way("tiny", "fp32", "plain", 0, "", how="frames"), CPU, **SMALL)["predicted"]
    assert drawn_beside > measure(Way("tiny", "fp32", "plain", 0, ""), CPU, **SMALL)["predicted"]
    assert measure(Way("tiny", "fp32", "device", 0, "", how="uncached"), CPU, **SMALL)["step_s"] > 0
    with pytest.raises(StudioError, match="There is no flash3 here"):
        measure(Way("tiny", "fp32", "device", 0, "", how="flash3"), CPU, **SMALL)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("where", ["device", "memory", "plain"])
@pytest.mark.parametrize("shape", [TINY, SIDE])
def test_on_a_card_everything_is_on_the_card(precision: str, where: str, shape: Any) -> None:
    with pretended() as card:
        found = measure(Way("tiny", precision, where, 4, ""), CARD, shape=shape, lead=1, steps=0, **SMALL)
    assert found["step_s"] > 0 and card.fraction == pytest.approx((4 * GB - CONTEXT) / card.memory)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_decoder_is_measured_on_the_card(tiled: bool) -> None:
    with pretended():
        found = measure_decode(CARD, width=320, height=64, tiled=tiled, base_dim=8, z_dim=16, num_res_blocks=1)
    assert found["predicted"] > costs.DECODE * 64 * 256


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_random_weights_are_as_many_as_the_plan_counts(precision: str) -> None:
    model = build_random_model(TINY, precision, CPU, CPU)
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.rope.buffers())
    held = quantize.num_bytes(model) - tables
    assert costs.transformer_weights(TINY).num_bytes(precision, 4) == pytest.approx(held, rel=0.02)


def test_every_row_for_cards_is_a_command_that_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len({tuple(way.arguments()) for way in WAYS}) == len(WAYS)
    asked = []
    monkeypatch.setattr(bench_cards, "measure", lambda way, *_, **more: asked.append((way, more)) or {"step_s": 1.0})
    for way in WAYS:
        monkeypatch.setattr(sys, "argv", ["bench_cards", *way.arguments()])
        main()
        assert asked[-1][0].arguments() == way.arguments() and json.loads(capsys.readouterr().out) == {"step_s": 1.0}


def test_every_preset_size_and_profile_of_a_card_is_measured_once_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The children run in this process and measure what a plan says, so that every row comes out near nothing."""
    asked = []

    def child(arguments: list[str]) -> Any:
        asked.append(tuple(arguments))
        monkeypatch.setattr(sys, "argv", ["bench_cards", *arguments])
        main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    def measured(way: Way, *_: Any, shape: Any, reference: int, lead: int, **size: int) -> Any:
        frames = 1 + (size["frames"] - 1) // 4 + lead
        tokens = frames * (size["width"] // 16) * (size["height"] // 16)
        read = 2 * (reference // 16) ** 2 + costs.VLM_TOKENS
        weights = costs.transformer_weights(shape)
        held: Any = weights.num_bytes if way.where == "device" else weights.visiting
        beside = costs.cache_bytes(shape, costs.Load(tokens, frames, 0, 2, read, 1, 1), 2)
        return {"reserved": 1.05 * (held(way.precision, 2) + beside + costs.forward_bytes(shape, tokens, 2))}

    monkeypatch.setattr(bench_cards, "_run_child", child)
    monkeypatch.setattr(bench_cards, "measure", measured)
    rows = list(measure_fits(Hardware("cuda", "a card", 24 * GB, 64 * GB, 500 * GB)))
    assert len(asked) == len(set(asked)) < len(rows) == len({row.key for row in rows})
    there = {(row.key.rsplit("-", 2)[0]).removeprefix("fit-") for row in rows}
    assert there == set(presets.names()) - {"toybox"}
    assert {row.key.rsplit("-", 1)[1] for row in rows} == {"6", "8", "12", "16", "24", "all"}
    assert all(abs(float(row.value.split("%")[0])) < 1 for row in rows), [(row.key, row.value) for row in rows]


def test_a_child_that_is_killed_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(bench_cards.subprocess, "run", lambda *_, **__: killed)
    assert _run_child([]) == "failed: it ended with code -9 and said nothing"


def test_without_a_card_the_rows_stay_open() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert {row.value for row in measure_cards("")} == {"open: no card here"}
