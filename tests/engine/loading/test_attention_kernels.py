"""Attention kernels and compiled blocks: what does not run here is left out with one line, and the numbers stay."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from engine import tiny
from engine.hardware.options import MachineOptions
from engine.loading import attention_kernels
from engine.models.subject_tower import References

CPU = torch.device("cpu")


@pytest.fixture
def transformer():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return tiny.stir(tiny.transformer(), 1.0)


def velocity(transformer) -> torch.Tensor:
    torch.manual_seed(1)
    references = References(torch.randn(1, 2, 1, tiny.LATENT_CHANNELS, 4, 4), vlm_states=torch.randn(1, 5, 48))
    noisy, text = torch.randn(1, tiny.LATENT_CHANNELS, 2, 4, 4), torch.randn(1, 8, tiny.TEXT_DIM)
    with torch.no_grad():
        identity = transformer.encode_identity(references)
        return transformer(noisy, torch.tensor([500.0]), text, identity=identity, return_dict=False)[0]


@pytest.mark.parametrize("name", ["sage", "cudnn"])
def test_kernels_that_do_not_run_here_are_named_once_and_torchs_own_are_used(transformer, caplog, name):
    before = velocity(transformer)
    assert attention_kernels.use_attention(transformer, name, CPU) == "native"
    assert [record.levelno for record in caplog.records if record.name == "engine.loading.attention_kernels"] == [
        logging.WARNING
    ]
    assert f"Attention by {name} cannot be had here" in caplog.text
    assert torch.equal(velocity(transformer), before)


def test_auto_says_nothing_where_there_is_nothing_better(transformer, caplog):
    assert attention_kernels.use_attention(transformer, "auto", CPU) == "native" and not caplog.records


def test_only_attention_without_a_mask_changes_its_kernels(transformer, monkeypatch):
    """torch's plain formula stands in for a faster kernel; the subjects' attention, which may be masked, keeps its."""
    monkeypatch.setitem(attention_kernels.BACKENDS, "flash", AttentionBackendName._NATIVE_MATH)
    before = velocity(transformer)
    assert attention_kernels.use_attention(transformer, "flash", CPU) == "flash"
    changed = {
        name for name, part in transformer.named_modules() if _backend(part) is AttentionBackendName._NATIVE_MATH
    }
    assert changed == {f"blocks.{block}.{name}" for block in range(3) for name in ("attn1", "attn2")}
    torch.testing.assert_close(velocity(transformer), before)


def _backend(part: torch.nn.Module) -> object:
    return getattr(getattr(part, "processor", None), "_attention_backend", None)


def test_without_a_compiler_the_blocks_stay_as_they_are(transformer, caplog, monkeypatch):
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler")

    before = velocity(transformer)
    monkeypatch.setattr(torch, "compile", no_compiler)
    attention_kernels.set_up(transformer, MachineOptions(compile=True), CPU)
    assert "not compiled" in caplog.text and "no working C++ compiler" in caplog.text
    assert torch.equal(velocity(transformer), before)


def test_blocks_that_visit_are_not_compiled(transformer, caplog):
    before = velocity(transformer)
    attention_kernels.set_up(transformer, MachineOptions(compile=True), CPU, visiting=True)
    assert "they visit the device" in caplog.text and transformer.blocks[0]._compiled_call_impl is None
    assert torch.equal(velocity(transformer), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of every kind
def test_compiled_blocks_differ_by_rounding_alone(transformer, caplog):
    before = velocity(transformer)
    if not attention_kernels.compile_blocks(transformer):
        pytest.skip(caplog.text)
    torch.testing.assert_close(velocity(transformer), before, rtol=1e-4, atol=1e-4)
