"""Quantized layers: what is rounded, how well, how large it is, and that filling one at a time changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from optimum.quanto import QLinear, freeze, qfloat8, qint8
from optimum.quanto import quantize as by_quanto
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from app.bench import weights
from engine import tiny
from engine.hardware.plan import make_plan
from engine.loading import build, quantize
from engine.loading.parts import Part, load_part
from engine.loading.pool import ModelPool
from engine.models import encoders
from engine.models.identity_wan import IdentityWanTransformer3DModel
from engine.paths import ROOT
from engine.resolve import resolve
from tests.support.wan_files import plain, side

CPU = torch.device("cpu")
ROUNDED: tuple[quantize.Precision, ...] = ("int8", "fp8", "nf4")


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def filled(model: nn.Module, precision: quantize.Precision, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A loaded model's weights, put one by one into an empty copy."""
    made = copy.deepcopy(model).to("meta")
    quantize.swap(made, precision)
    for key, tensor in model.state_dict().items():
        quantize.put(made, key, tensor, dtype, CPU)
    return made.eval()


def unrounded(module: Any) -> Tensor:
    if isinstance(module, Linear4bit):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return module.weight.dequantize() if isinstance(module, QLinear) else module.weight


class Block(nn.Module):
    """One linear layer of this width where a model keeps its own."""

    def __init__(self, across: int, down: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Linear(across, down))])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](x)


@pytest.mark.parametrize(("precision", "qtype"), [("int8", qint8), ("fp8", qfloat8)])
def test_eight_bits_are_rounded_as_quanto_rounds_a_loaded_layer(
    precision: quantize.Precision, qtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "ROWS_AT_ONCE", 7 * 96)  # several pieces, the last one shorter
    torch.manual_seed(0)
    model = Block(96, 40)
    ours = filled(model, precision)
    theirs = copy.deepcopy(model)
    by_quanto(theirs, weights=qtype)
    freeze(theirs)
    x = torch.randn(3, 96)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("across", [128, 96])  # rows of whole blocks of 64, and of 32
def test_four_bits_are_rounded_as_bitsandbytes_rounds_a_loaded_layer(
    across: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "ROWS_AT_ONCE", 7 * across)
    torch.manual_seed(0)
    model = Block(across, 64)
    ours: Any = filled(model, "nf4")
    theirs = Linear4bit(across, 64, quant_type="nf4", compute_dtype=torch.float32)
    theirs.support_avx512bf16_for_cpu = False
    theirs.load_state_dict(model.blocks[1][0].state_dict())
    theirs.weight = Params4bit(theirs.weight.data, quant_type="nf4", blocksize=64 if across == 128 else 32)
    theirs = theirs.to("cpu")
    x = torch.randn(3, across)
    assert isinstance(ours.blocks[1][0], Linear4bit) and torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("across", [160, 128, 96, 100])
def test_every_width_is_rounded_to_within_what_its_bits_allow(across: int, precision: quantize.Precision) -> None:
    """160 is not a multiple of 64, where a block would lie in two rows; 100 is none of 32 either."""
    torch.manual_seed(0)
    model = Block(across, 64)
    layer: Any = filled(model, precision).blocks[1][0]  # pyright: ignore
    exact = model.blocks[1][0].weight.detach()
    allowed = {"int8": 0.01, "fp8": 0.04, "nf4": 0.1}[precision if across != 100 or precision == "fp8" else "int8"]
    assert float((unrounded(layer) - exact).norm() / exact.norm()) < allowed


@pytest.mark.parametrize("precision", ROUNDED)
def test_a_projection_of_zeros_stays_zero(precision: quantize.Precision) -> None:
    """Stage 3 and VACE's branch start so; a scale of zero would make them not numbers."""
    model = Block(64, 32)
    nn.init.zeros_(model.blocks[1][0].weight)
    bias = model.blocks[1][0].bias
    for dtype in (torch.float32, torch.bfloat16):
        made = filled(model, precision, dtype)
        assert torch.equal(made(torch.randn(3, 64).to(dtype)), bias.to(dtype).expand(3, -1))


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_compute_dtype_may_be_bf16(precision: quantize.Precision) -> None:
    torch.manual_seed(0)
    model = Block(128, 64)
    x = torch.randn(5, 128)
    answer = filled(model, precision, torch.bfloat16)(x.bfloat16())
    assert answer.dtype == torch.bfloat16
    close = {"int8": 0.015, "fp8": 0.05, "nf4": 0.12}[precision]
    assert float((answer.float() - model(x)).norm() / model(x).norm()) < close


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("kind", ["plain", "side", "subjects"])
def test_loading_equals_rounding_a_loaded_model(tmp_path: Path, kind: str, precision: quantize.Precision) -> None:
    model: Any = {"plain": plain, "side": side, "subjects": lambda: tiny.stir(tiny.transformer())}[kind]()
    model.save_pretrained(tmp_path / kind)
    streamed = load_part("transformer", tmp_path / kind, CPU, precision)
    rounded = filled(model, precision)
    layers = [(name, m) for name, m in streamed.named_modules() if isinstance(m, (QLinear, Linear4bit))]
    assert len(layers) > 15
    for name, layer in layers:
        assert torch.equal(unrounded(layer), unrounded(rounded.get_submodule(name)))
    for name, parameter in streamed.named_parameters():
        assert not parameter.is_meta and not parameter.requires_grad
        if name.rpartition(".")[0] not in dict(layers):
            assert torch.equal(parameter, model.get_parameter(name))


def test_only_large_projections_inside_blocks_take_part() -> None:
    with quantize.no_weights():
        model = IdentityWanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    took = {name: quantize.form_of(name, module, "nf4") for name, module in model.named_modules()}
    assert all(name.startswith(("blocks.", "subject_blocks.")) for name, form in took.items() if form)
    assert not any("norm" in name for name, form in took.items() if form)
    sizes = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    held = sum(sizes[name] for name, form in took.items() if form) / sum(p.numel() for p in model.parameters())
    four = sum(sizes[n] for n, f in took.items() if f == "nf4") / sum(sizes[n] for n, f in took.items() if f)
    assert held > 0.95 and four > 0.85
    assert {form for name, form in took.items() if name.startswith("blocks.0.")} == {None, "int8"}
    assert took["blocks.7.attn1.to_out.0"] == "int8" and took["blocks.7.ffn.net.2"] == "nf4"
    assert not any(quantize.form_of(name, module, "bf16") for name, module in model.named_modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16", *ROUNDED])
@pytest.mark.parametrize("usual", [torch.float32, torch.bfloat16])
def test_the_size_is_known_beforehand(tmp_path: Path, precision: quantize.Precision, usual: torch.dtype) -> None:
    models: list[Any] = [plain(), side(), tiny.transformer()]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        told = quantize.predict_bytes(partial(type(model), **config), precision, usual)
        made = build.build_transformer(tmp_path / str(number), usual, precision=precision)
        assert quantize.num_bytes(made) == told
    text = tiny.text_encoder(300)
    text.save_pretrained(tmp_path / "text")
    made = build.build_encoder(UMT5EncoderModel, tmp_path / "text", usual, precision=precision)
    assert quantize.num_bytes(made) == quantize.predict_bytes(lambda: UMT5EncoderModel(text.config), precision, usual)


def test_full_sizes_are_a_few_gigabytes_and_take_no_memory() -> None:
    def wan(heads: int, ffn: int, layers: int) -> Any:
        return lambda: WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, num_layers=layers
        )

    small, large = wan(12, 8960, 30), wan(40, 13824, 40)
    told = [quantize.predict_bytes(small, p) / 1e9 for p in ("fp32", "bf16", "int8", "nf4")]
    assert told == sorted(told, reverse=True) and told[0] == pytest.approx(5.68, abs=0.1)
    assert told[2] == pytest.approx(1.5, abs=0.1) and told[3] < 1.0
    assert quantize.predict_bytes(large, "nf4") < 9e9
    text = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    text.is_gated_act, text.dense_act_fn = True, "gelu_new"
    assert quantize.predict_bytes(lambda: UMT5EncoderModel(text), "int8") == pytest.approx(6.8e9, rel=0.02)


@pytest.mark.parametrize("part", ["text_encoder", "vlm"])
def test_encoders_are_loaded_as_transformers_loads_them_and_rounded_the_same_way(part: Part) -> None:
    folder = ROOT / "assets" / "toybox" / part
    theirs, ours = load_part(part, folder, CPU), load_part(part, folder, CPU, "fp32")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in theirs.state_dict().items())
    assert all(torch.equal(ours.get_buffer(key), table) for key, table in theirs.named_buffers())
    for precision in ROUNDED:
        rounded = load_part(part, folder, CPU, precision)
        assert quantize.num_bytes(rounded) < 0.6 * quantize.num_bytes(theirs)
        assert sum(isinstance(m, (QLinear, Linear4bit)) for m in rounded.modules()) > 10


def test_rounded_text_states_stay_near_and_half_a_text_encoder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from engine.messages import StudioError

    folder = ROOT / "assets" / "toybox" / "text_encoder"
    words = load_part("tokenizer", folder.parent / "tokenizer", CPU)

    def states(precision: quantize.Precision | None) -> Tensor:
        return encoders.text_states(
            ["a fox chases a red car on a beach"], words, load_part(folder.name, folder, CPU, precision)
        )

    for precision, limit in (("int8", 0.01), ("nf4", 0.1)):
        assert 0 < float((states(precision) - states(None)).norm() / states(None).norm()) < limit
    (tmp_path / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    held = load_file(folder / "model.safetensors")
    del held["encoder.block.1.layer.0.SelfAttention.o.weight"]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(StudioError, match="1 of its weights are missing"):
        load_part("text_encoder", tmp_path, CPU, "int8")


def test_toyboxs_velocity_moves_by_no_more_than_promised() -> None:
    errors, sizes = weights.one_forward_errors("toybox", (("creaturething", 2, 2),), ("int8", "nf4"))
    for precision, error in errors.items():
        assert 0 < error <= (weights.LIMITS[precision] or 1)
    assert sizes["nf4"] < 0.8 * sizes["int8"] < 0.4 * sizes["full"]


def test_a_warm_worker_tells_one_precision_from_another(tiny_toybox: Path) -> None:
    from engine import presets
    from engine.job import make_job

    pool, preset = ModelPool(CPU), presets.load("toybox")

    def part(precision: str | None) -> Any:
        resolved = resolve(make_job(prompt="rain", precision=precision))
        pool.follow(make_plan(resolved, pool.hardware()))
        return pool.part("transformer", preset)

    first = part("int8")
    assert part("int8") is first
    plain_one = part(None)
    assert plain_one is not first and part("fp32") is plain_one
    assert quantize.num_bytes(first) < quantize.num_bytes(plain_one)
