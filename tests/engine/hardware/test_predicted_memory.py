"""Predictions of memory beside the models themselves, built on the meta device at their full size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import SafetensorError
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, UMT5Config, UMT5EncoderModel

from app.bench.random_files import qwen_7b, wan
from engine import presets
from engine.diffusion import conditioning
from engine.hardware import costs
from engine.hardware.oom import OutOfMemory, classify_oom
from engine.hardware.plan import make_plan
from engine.hardware.probe import Hardware
from engine.job import make_job
from engine.loading import quantize
from engine.loading.parts import usual_dtype
from engine.models.subject_tower import References
from engine.platform_calls import has_bf16_products
from engine.presets import Shape
from engine.resolve import resolve
from tests.support.live_bytes import LiveBytes, fused_attention

WAN = {"text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
SMALL = Shape(dim=1536, num_layers=30, ffn_dim=8960, num_heads=12, **WAN)
LARGE = Shape(dim=5120, num_layers=40, ffn_dim=13824, num_heads=40, **WAN)
SHAPES = {
    "wan-1.3b": SMALL,
    "wan-14b": LARGE,
    "vace-1.3b": SMALL.model_copy(update={"vace_layers": 15}),
    "vace-14b": LARGE.model_copy(update={"vace_layers": 8}),
    "id-crafter-1.3b": SMALL.model_copy(update={"identity_layers": 20, "vlm_dim": 3584}),
    "id-crafter-14b": LARGE.model_copy(update={"identity_layers": 20, "vlm_dim": 3584}),
}


def built(shape: Shape, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Any:
    """The class of that shape on the meta device, as loading leaves it: some modules stay in fp32."""
    layers = layers or shape.num_layers
    fewer = {"num_layers": layers, "identity_layers": min(layers, shape.identity_layers)}
    with torch.device("meta"):
        model: Any = wan(shape.model_copy(update=fewer)).to(dtype)
    for name, parameter in model.named_parameters():
        if any(part in model._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.float()
    model.rope.float()
    return model


def held(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_weights_of_every_shape_are_predicted_within_a_hundredth(name: str, precision: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = held(built(SHAPES[name], dtype))
    assert costs.transformer_weights(SHAPES[name]).num_bytes(precision) == pytest.approx(expected, rel=0.01)


def test_the_published_encoders_and_vae_are_counted_right() -> None:
    with torch.device("meta"):
        text = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64)
        )
        vlm = Qwen2_5_VLForConditionalGeneration(qwen_7b())
        vae = AutoencoderKLWan()
    for model, weights in ((text, costs.UMT5_XXL), (vlm, costs.QWEN_7B), (vae, costs.WAN_VAE)):
        assert weights.num_bytes("fp32") == pytest.approx(held(model), rel=0.01)


def test_the_headers_of_a_folder_say_what_its_model_holds() -> None:
    toybox = presets.load("toybox")
    for part in ("transformer", "text_encoder", "vlm", "vae"):
        numbers = sum(p.stat().st_size for p in toybox.place(part).glob("*.safetensors")) / 2  # they lie there in fp16
        assert costs.part_weights(toybox, part).num_bytes("fp32") == pytest.approx(4 * numbers, rel=0.02)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "vace-1.3b", "vace-14b"])
@pytest.mark.parametrize("plain", [2, 4])
@pytest.mark.parametrize("grid", [(21, 60, 104), (9, 90, 160)])
def test_what_a_forward_holds_beside_its_weights_is_predicted_within_three_hundredths(
    name: str, plain: int, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, dtype = SHAPES[name], torch.bfloat16 if plain == 2 else torch.float32
    model = built(shape, dtype, layers=None if shape.vace_layers else 2)
    beside: dict[str, Any] = {}
    with torch.device("meta"):
        latents, text = torch.empty(1, 16, *grid, dtype=dtype), torch.empty(1, 512, 4096, dtype=dtype)
        if shape.vace_layers:
            beside = {"control_hidden_states": torch.empty(1, 96, *grid, dtype=dtype)}
            beside["control_hidden_states_scale"] = torch.ones(shape.vace_layers)
        time = torch.empty(1)
    with torch.no_grad(), fused_attention(monkeypatch), LiveBytes(model) as live:
        model(latents, time, text, return_dict=False, **beside)
    tokens = grid[0] * grid[1] * grid[2] // 4
    assert costs.forward_bytes(shape, tokens, plain) == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize("plain", [2, 4])
@pytest.mark.parametrize("pictures", [1, 5])
def test_what_a_forward_holds_with_sources_beside_the_clip_is_predicted_within_three_hundredths(
    plain: int, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = presets.load("bernini-r-1.3b")
    subject = {"pictures": [{"path": "a.png"}], "cut_out": False}
    subjects = [{**subject, "name": f"s{number}"} for number in range(pictures)]
    resolved = resolve(
        make_job(preset=preset.name, prompt=" ".join(f"@s{n}" for n in range(pictures)), subjects=subjects)
    )
    load, dtype = costs.load_of(resolved), torch.bfloat16 if plain == 2 else torch.float32
    model = built(SMALL, dtype, layers=2)
    with torch.device("meta"):
        latents, text = torch.empty(1, 16, 21, 60, 106), torch.empty(1, 512, 4096)
        sources = tuple(torch.empty(1, 16, 1, 78, 78) for _ in subjects)
    encoded = conditioning.Encoded(text, text, sources=sources)
    with fused_attention(monkeypatch), LiveBytes(model) as live:
        conditions = conditioning.prepare("sources", model, encoded)
        seen: list[int] = []
        model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        conditions.predict(latents, 0.5, "full")
        conditions.predict(latents, 0.5, "none")
    assert seen == [load.tokens, load.tokens - load.source_tokens]
    assert costs.forward_bytes(SMALL, load.tokens, plain) == pytest.approx(live.peak, rel=0.03)


def test_the_identity_cache_is_predicted_within_a_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["id-crafter-1.3b"]
    model = built(shape)
    with torch.device("meta"):
        pictures, states = torch.empty(1, 3, 1, 16, 60, 60), torch.empty(1, costs.VLM_TOKENS, 3584)
    with torch.no_grad(), fused_attention(monkeypatch):
        cache = model.encode_identity(References(pictures, vlm_states=states))
    load = costs.Load(1, 1, 1, 3, 3 * 900 + costs.VLM_TOKENS, 1, 1)
    assert costs.cache_bytes(shape, load, 2) == pytest.approx(cache.num_bytes(), rel=0.01)


@pytest.mark.parametrize("frames", [3])
def test_what_the_vae_holds_while_it_decodes_is_predicted_within_three_hundredths(frames: int) -> None:
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan()
        latent = torch.empty(1, 16, 1, 30, 52)
    vae.clear_cache()
    with torch.no_grad(), LiveBytes(vae) as live:
        for index in range(frames):
            vae._conv_idx = [0]
            hidden = vae.post_quant_conv(latent)
            vae.decoder(hidden, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0)
    assert pytest.approx(live.peak, rel=0.03) == costs.DECODE * 240 * 416


def test_operations_of_a_forward_are_those_that_the_paper_of_the_model_has() -> None:
    load = costs.Load(32760, 21, 480 * 832, 0, 0, 1, 1)
    assert costs.flops(SMALL, load) == pytest.approx(283e12, rel=0.01)
    assert costs.flops(LARGE, load) == pytest.approx(1678e12, rel=0.01)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0not json"])
def test_a_file_with_a_lying_header_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Exception, match=r"model\.safetensors is no whole safetensors file"):
        costs.header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "RAM"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "VRAM"),
        (OSError(28, "No space left on device"), "disk"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "RAM"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "VRAM"),
        (RuntimeError("Cannot pin memory: cudaHostAlloc failed: out of memory"), "pinned RAM"),
        (OSError(122, "Disk quota exceeded") if sys.platform == "linux" else OSError(28, "full"), "disk"),
        (OSError(12, "Cannot allocate memory"), "RAM"),
        (OSError("Die Auslagerungsdatei ist zu klein. (os error 1455)"), "RAM"),
        (SafetensorError("Error while mapping: (os error 1455)"), "RAM"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9437184 bytes."), "RAM"),
        (RuntimeError("unable to mmap 8 bytes from file <a>: Cannot allocate memory (12)"), "RAM"),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), "VRAM"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "VRAM"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "VRAM"),
        (RuntimeError("Invalid buffer size: 19.38 GiB"), "VRAM"),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), "VRAM"),
    ],
)
def test_one_lack_of_memory_is_told_from_another(error: Exception, what: str) -> None:
    with pytest.raises(OutOfMemory) as lack, classify_oom():
        raise error
    assert lack.value.what == what


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(13, "Permission denied")])
def test_any_other_fault_passes_through_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as same, classify_oom():
        raise error
    assert same.value is error


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "vace-1.3b", "id-crafter-1.3b", "id-crafter-14b"])
@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_quantized_weights_are_predicted_within_a_hundredth_of_what_the_layers_hold(name: str, precision: Any) -> None:
    shape = SHAPES[name]
    expected = quantize.predict_bytes(lambda: wan(shape), precision)
    assert costs.transformer_weights(shape).num_bytes(precision) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda", "xpu"])
def test_a_plan_counts_in_what_each_device_computes_in(kind: str) -> None:
    resolved = resolve(make_job(preset="wan-1.3b", prompt="a beach"))
    made = make_plan(resolved, Hardware(kind, "a machine", 10**12, 10**12, 10**12))
    bits = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    for part in ("transformer", "text_encoder", "vae"):
        assert made.parts[part].precision == bits[usual_dtype(part, torch.device(kind))]


def test_where_torch_finds_bf16_products_on_linux_the_light_ring_finds_them_too() -> None:
    found = has_bf16_products()
    assert found or sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported()


def test_a_processor_with_bf16_products_computes_large_models_in_them_and_small_ones_exactly() -> None:
    here = Hardware("cpu", "a machine", 10**12, 10**12, 10**12, fast_bf16=True)
    resolved = resolve(make_job(preset="wan-1.3b", prompt="a beach"))
    large = make_plan(resolved, here)
    assert large.parts["transformer"].precision == large.parts["text_encoder"].precision == "bf16"
    assert large.parts["vae"].precision == "fp32" and large.plain == 2
    exact = make_plan(resolved.changed(precision="fp32"), here)
    assert exact.parts["transformer"].precision == "fp32", "what a document names is kept"
    small = make_plan(resolve(make_job(preset="toybox", prompt="a beach")), here)
    assert (small.parts["transformer"].precision, small.plain) == ("fp32", 4)
