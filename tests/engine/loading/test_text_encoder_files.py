"""Text encoders from files as people have them: every layout gives the same states, and a wrong file its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, UMT5Config, UMT5EncoderModel

from engine import presets
from engine.hardware import costs
from engine.hub import pickles
from engine.loading import build, quantize
from engine.loading.parts import load_part
from engine.loading.pool import ModelPool
from engine.loading.quantize import Precision
from engine.messages import StudioError
from tests.support.wan_files import scaled_fp8, stirred, unscaled, write_gguf

CPU = torch.device("cpu")
LAYERS = 3
SIZES = {"vocab_size": 300, "d_model": 256, "d_kv": 16, "d_ff": 512, "num_layers": LAYERS, "num_heads": 8}
IDS = torch.tensor([[7, 250, 33, 12, 1]])
SPIECE = {"spiece_model": torch.tensor(list(b"a tokenizer"), dtype=torch.uint8)}  # in ComfyUI's copies


@pytest.fixture(scope="module")
def umt5() -> UMT5EncoderModel:
    """Three random blocks, in numbers that bf16 holds exactly."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    model: Any = stirred(UMT5EncoderModel(UMT5Config(**SIZES)))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def held(umt5: UMT5EncoderModel) -> dict[str, Tensor]:
    """Its weights by transformers' names, the embedding once."""
    return {key: tensor for key, tensor in umt5.state_dict().items() if key != "encoder.embed_tokens.weight"}


def as_wan(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of Wan's own code."""
    change = [
        ("shared.", "token_embedding."), ("encoder.final_layer_norm.", "norm."), ("encoder.block.", "blocks."),
        ("layer.0.SelfAttention.relative_attention_bias.", "pos_embedding.embedding."),
        ("layer.0.SelfAttention.", "attn."), ("layer.0.layer_norm.", "norm1."), ("layer.1.layer_norm.", "norm2."),
        ("layer.1.DenseReluDense.wi_0.", "ffn.gate.0."), ("layer.1.DenseReluDense.wi_1.", "ffn.fc1."),
        ("layer.1.DenseReluDense.wo.", "ffn.fc2."),
    ]  # fmt: skip
    made = {}
    for key, tensor in held.items():
        for ours, theirs in change:
            key = key.replace(ours, theirs)
        made[key] = tensor
    return made


def as_llama(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that llama.cpp's own library gives them."""
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, LAYERS)
    return {str(named.get_name(key, try_suffixes=(".weight",))): tensor for key, tensor in held.items()}


def read(path: Path, precision: Precision | None = None, usual: torch.dtype = torch.float32) -> UMT5EncoderModel:
    made: Any = build.build_encoder(UMT5EncoderModel, path, usual, precision=precision)
    return made.eval()


def states(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.bfloat16() for key, tensor in tensors.items()}


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "transformers": lambda held, path: save_file(halved(held) | SPIECE, path),
    "wan": lambda held, path: save_file(halved(as_wan(held)), path),
    "pth": lambda held, path: torch.save(halved(as_wan(held)), path.with_suffix(".pth")),
    "gguf": lambda held, path: write_gguf(path, as_llama(held), "BF16"),
}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("precision", [None, "bf16", "int8", "fp8", "nf4"])
def test_every_layout_gives_the_states_of_transformers_own_folder(
    umt5: UMT5EncoderModel, held: dict[str, Tensor], tmp_path: Path, layout: str, precision: Precision | None
) -> None:
    umt5.save_pretrained(tmp_path / "folder")
    path = tmp_path / "text.safetensors"
    WRITERS[layout](held, path)
    if layout == "pth":
        pickles.convert_pth(path.with_suffix(".pth"), path)
    made, expected = read(path, precision), read(tmp_path / "folder", precision)
    assert made.config.to_dict() == expected.config.to_dict() | {"architectures": None, "dtype": made.config.dtype}
    assert quantize.num_bytes(made) == quantize.num_bytes(expected)
    assert torch.equal(states(made), states(expected))
    if precision is None:
        assert torch.equal(states(made), states(umt5))
        assert not any(t.is_meta for t in (*made.parameters(), *made.buffers()))


def test_wans_own_way_of_computing_gives_these_states(umt5: UMT5EncoderModel, held: dict[str, Tensor]) -> None:
    """Source: Wan-Video/Wan2.1, wan/modules/t5.py."""
    theirs = as_wan(held)

    def norm(x: Tensor, name: str) -> Tensor:
        return theirs[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ theirs[f"{name}.weight"].T

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = theirs["token_embedding.weight"][IDS[0]]
    place = torch.arange(len(x))
    away = place[None, :] - place[:, None]  # as many as are told apart one by one: under 8
    for number in range(LAYERS):
        block = f"blocks.{number}"
        bias = theirs[f"{block}.pos_embedding.embedding.weight"][away.abs() + 16 * (away > 0)].permute(2, 0, 1)
        y = norm(x, f"{block}.norm1")
        q, k, v = (linear(y, f"{block}.attn.{name}").view(len(x), 8, 16).transpose(0, 1) for name in "qkv")
        y = ((q @ k.transpose(1, 2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(y, f"{block}.attn.o")
        y = norm(x, f"{block}.norm2")
        x = x + linear(linear(y, f"{block}.ffn.fc1") * gelu(linear(y, f"{block}.ffn.gate.0")), f"{block}.ffn.fc2")
    torch.testing.assert_close(norm(x, "norm")[None], states(umt5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("layout", [lambda held: held, as_wan])
def test_scaled_fp8_is_its_weights_times_their_scales(
    held: dict[str, Tensor], tmp_path: Path, layout: Any, new: bool
) -> None:
    packed = scaled_fp8(layout(held), new=new, inside=("blocks.", "encoder.block."))
    save_file(packed | SPIECE, tmp_path / "fp8.safetensors")
    save_file(unscaled(packed), tmp_path / "unpacked.safetensors")
    assert torch.equal(states(read(tmp_path / "fp8.safetensors")), states(read(tmp_path / "unpacked.safetensors")))


def test_plain_fp8_is_read_as_it_stands(held: dict[str, Tensor], tmp_path: Path) -> None:
    told = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in as_wan(held).items()}
    save_file(told, tmp_path / "fp8.safetensors")
    save_file({key: tensor.float() for key, tensor in told.items()}, tmp_path / "unpacked.safetensors")
    assert torch.equal(states(read(tmp_path / "fp8.safetensors")), states(read(tmp_path / "unpacked.safetensors")))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_is_what_its_own_library_reads(held: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    theirs = write_gguf(tmp_path / "text.gguf", as_llama(held), kind)
    made = read(tmp_path / "text.gguf").state_dict()
    back = dict(zip(as_llama(held), held, strict=True))
    assert all(torch.equal(made[back[name]], tensor) for name, tensor in theirs.items())


def test_a_folder_of_shards_without_a_config_is_read_by_its_shapes(held: dict[str, Tensor], tmp_path: Path) -> None:
    for number, part in enumerate((list(held)[::2], list(held)[1::2])):
        save_file({key: held[key] for key in part}, tmp_path / f"text-{number}.safetensors")
    assert load_part("text_encoder", tmp_path, CPU).config.d_ff == SIZES["d_ff"]


@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
def test_the_model_and_one_tensor_are_all_that_is_in_memory(
    held: dict[str, Tensor], tmp_path: Path, precision: Precision | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.loading.test_build import tensor_bytes

    save_file(halved(as_wan(held)), tmp_path / "wan.safetensors")
    size = quantize.num_bytes(read(tmp_path / "wan.safetensors", precision))
    alive: list[int] = []
    put = quantize.put

    def watched(model: Any, key: str, tensor: Tensor, *given: Any) -> None:
        put(model, key, tensor, *given)
        alive.append(tensor_bytes() - before)

    monkeypatch.setattr(quantize, "put", watched)
    before = tensor_bytes()
    read(tmp_path / "wan.safetensors", precision)
    largest = max(tensor.numel() for tensor in held.values())
    assert len(alive) == len(held) and max(alive) <= size + 4 * largest + 4096


# --- what is refused -------------------------------------------------------------------------------------------------


def _t5(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """As T5 1.1 and Flux's t5xxl: one table of distances for all blocks."""
    return {key: t for key, t in held.items() if "relative_attention_bias" not in key or ".block.0." in key}


def _without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {name: tensor for name, tensor in held.items() if name != key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_t5, "It is a T5, whose blocks share one table of distances, not a UMT5"),
        (lambda held: as_wan(_t5(held)), "It is a T5, whose blocks share one table of distances, not a UMT5"),
        (lambda held: as_llama(_t5(held)), "It is a T5, whose blocks share one table of distances, not a UMT5"),
        (_without("shared.weight"), "named as in no UMT5"),
        (lambda held: {**held, "shared.weight": torch.ones(300, 0)}, "not one of two sides"),
        (lambda held: {"blocks.0.self_attn.q.weight": torch.ones(2, 2)}, "named as in no UMT5"),
        (_without("encoder.block.2.layer.0.SelfAttention.o.weight"), "1 of its weights are missing"),
        (_without("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"), r"wi_0\.weight is missing"),
        (lambda held: {**held, "shared.weight": torch.ones(300, 255)}, "has the shape"),
        (lambda held: {**held, "decoder.block.0.layer.0.layer_norm.weight": torch.ones(256)}, "does not have"),
        (lambda held: {**as_wan(held), "blocks.0.cross_attn.q.weight": torch.ones(2)}, "does not have"),
        (
            lambda held: {key: t.T.contiguous() if "relative" in key else t for key, t in held.items()},
            "tables of distances have 8 rows, not 32",
        ),
    ],
)
def test_a_wrong_or_half_file_is_refused_by_name(
    held: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str
) -> None:
    save_file(change(held), tmp_path / "half.safetensors")
    with pytest.raises(StudioError, match=reason) as refusal:
        load_part("text_encoder", tmp_path / "half.safetensors", CPU)
    assert refusal.value.what == "half.safetensors cannot be loaded."


def test_a_umt5_of_another_width_than_the_presets_is_refused(held: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(held, tmp_path / "small.safetensors")
    wan = presets.load("wan-1.3b")
    parts = wan.components.model_copy(update={"text_encoder": str(tmp_path / "small.safetensors")})
    pool = ModelPool(CPU)
    with pytest.raises(StudioError, match=r"small\.safetensors cannot be loaded\. .* are 256 wide, not 4,096"):
        pool.part("text_encoder", wan.model_copy(update={"components": parts}))
    fitting = wan.shape.model_copy(update={"text_dim": 256}) if wan.shape else None
    made = pool.part("text_encoder", wan.model_copy(update={"components": parts, "shape": fitting}))
    assert torch.equal(states(made), states(read(tmp_path / "small.safetensors")))


def test_a_vlm_in_a_single_file_is_refused(held: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(held, tmp_path / "vlm.safetensors")
    with pytest.raises(StudioError, match="The folder is not there"):
        load_part("vlm", tmp_path / "vlm.safetensors", CPU)
    with pytest.raises(StudioError, match=r"The config\.json that belongs to its weights is not there"):
        build.build_encoder(Qwen2_5_VLForConditionalGeneration, tmp_path / "vlm.safetensors", torch.float32)


# --- counted beforehand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_plan_counts_the_same_whatever_the_layout(
    held: dict[str, Tensor], tmp_path: Path, precision: Precision
) -> None:
    save_file(halved(held), tmp_path / "ours.safetensors")
    save_file(halved(as_wan(held)), tmp_path / "wan.safetensors")
    assert load_file(tmp_path / "wan.safetensors").keys().isdisjoint(held)
    toybox = presets.load("toybox")

    def told(name: str) -> float:
        parts = toybox.components.model_copy(update={"text_encoder": str(tmp_path / name)})
        return costs.part_weights(toybox.model_copy(update={"components": parts}), "text_encoder").num_bytes(precision)

    assert told("ours.safetensors") == told("wan.safetensors")
    truly = quantize.num_bytes(read(tmp_path / "wan.safetensors", precision, torch.bfloat16))
    assert told("wan.safetensors") == pytest.approx(truly, rel=0.05)


def test_a_gguf_whose_header_is_not_read_beforehand_counts_as_the_published_one(
    held: dict[str, Tensor], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "text.gguf", as_llama(held), "Q8_0")
    toybox = presets.load("toybox")
    parts = toybox.components.model_copy(update={"text_encoder": str(tmp_path / "text.gguf")})
    told = costs.part_weights(toybox.model_copy(update={"components": parts}), "text_encoder")
    assert told == costs.UMT5_XXL
