"""A preset's files at full size, filled with random weights: what can be measured where nothing can be fetched.

In:  a preset whose parts lie on the Hub, and room on the disk.
Out: files of the names, layouts and shapes that the preset asks for, where it looks for them.
Knows nothing of what they are used for. A file is written tensor by tensor, so that no model is ever in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.messages import StudioError
from engine.presets import HubFiles, Preset, Shape

POOL = 2**24  # random numbers that all weights are cut from
SPREAD = 0.02
# diffusers' names -> Wan's own, in this order.
THEIRS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".norm2.": ".norm3.",
    ".scale_shift_table": ".modulation",
    "proj_out.": "head.head.",
}
Shapes = Mapping[str, tuple[int, ...]]


# --- files -----------------------------------------------------------------------------------------------------------


def write_files(preset: Preset, cache: Path, models: Path) -> int:
    """Write all parts that a clip cannot be made without and that are not there; gives their bytes.

    Args:
        preset: with a shape, its parts as published.
        cache: huggingface_hub's folder.
        models: the creator's own, for a transformer that is not on the Hub.

    Raises:
        StudioError: the disk has no room for them.
    """
    from engine.hub.cache import Hub

    total = 0
    for part in WRITERS:
        named = getattr(preset.components, part)
        if isinstance(named, HubFiles):
            place = Hub(cache).place(named.repo, named.path, named.revision)
        else:
            place = models / named
        if named and not any(place.glob("*")) and not place.is_file():
            total += WRITERS[part](preset, place)
    return total


def write_random(file: Path, shapes: Shapes, dtype: str = "F32") -> int:
    """A safetensors file of random weights, written tensor by tensor; gives its bytes.

    Raises:
        StudioError: the disk has no room for it.
    """
    import torch

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        size = kind.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    file.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(file.parent).free
    if free < end + 2**30:
        raise StudioError(
            f"The file needs {end / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
            f"It is written to {file.parent}.",
            "Make room, or set TMPDIR to a larger disk.",
        )
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).to(kind)
    numbers: Any = pool.view(torch.uint8).numpy()
    raw = memoryview(numbers).cast("B")
    with file.open("wb") as handle:
        handle.write(len(told).to_bytes(8, "little") + told)
        for number, told_of in enumerate(header.values()):
            first, last = told_of["data_offsets"]
            start = number * 4096 % len(raw)  # so that two layers of one shape are not the same
            while first < last:
                piece = raw[start : start + last - first]
                handle.write(piece)
                first, start = first + len(piece), 0
    return end


def wan(shape: Shape) -> Any:
    """An empty model of that shape: plain Wan, VACE, or Wan with identity blocks."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

    from engine.models.identity_wan import IdentityWanTransformer3DModel

    config: dict[str, Any] = {
        "num_attention_heads": shape.num_heads,
        "attention_head_dim": shape.dim // shape.num_heads,
        "num_layers": shape.num_layers,
        "ffn_dim": shape.ffn_dim,
        "text_dim": shape.text_dim,
    }
    if shape.vace_layers:
        config["vace_layers"] = list(range(0, shape.num_layers, shape.num_layers // shape.vace_layers))
        config["vace_in_channels"] = 2 * shape.z_dim + shape.vae_spatial**2
        return WanVACETransformer3DModel(**config)
    if shape.identity_layers:
        config |= {"identity_layers": shape.identity_layers, "vlm_dim": shape.vlm_dim}
        return IdentityWanTransformer3DModel(**config)
    return WanTransformer3DModel(**config)


def in_wans_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names of diffusers' plain Wan as Wan's own code has them."""
    renamed = {}
    for name, shape in shapes.items():
        key = name
        if name == "scale_shift_table":
            key = "head.modulation"
        for ours, own in THEIRS.items():
            key = key.replace(ours, own)
        renamed[key] = shape
    return renamed


def shapes_of(build: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights; no weight is made."""
    from engine.loading import quantize

    with quantize.no_weights():
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}


def _transformer(preset: Preset, place: Path) -> int:
    assert preset.shape is not None, "a preset of the Hub has one"
    shape = preset.shape
    shapes = shapes_of(lambda: wan(shape))
    if place.suffix == ".safetensors":
        return write_random(place, in_wans_names(shapes), "F16")
    from engine.loading import quantize

    with quantize.no_weights():
        wan(shape).save_config(place)
    return write_random(place / "diffusion_pytorch_model.safetensors", shapes, "BF16")


def _vae(_: Preset, place: Path) -> int:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    AutoencoderKLWan().save_config(place)
    return write_random(place / "diffusion_pytorch_model.safetensors", shapes_of(AutoencoderKLWan))


def _text_encoder(_: Preset, place: Path) -> int:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64)
    shapes = shapes_of(lambda: UMT5EncoderModel(config))
    shapes.pop("encoder.embed_tokens.weight")  # the same table as `shared.weight`
    if place.suffix == ".safetensors":
        return write_random(place, shapes, "F16")
    config.save_pretrained(place)
    return write_random(place / "model.safetensors", shapes, "BF16")


def _tokenizer(_: Preset, place: Path) -> int:
    from engine import tiny

    tiny.tokenizer().save_pretrained(place)
    return 0


def _vlm(_: Preset, place: Path) -> int:
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = qwen_7b()
    config.save_pretrained(place)
    _vlm_tokenizer(_, place)  # as published, in the same folder
    shapes = shapes_of(lambda: Qwen2_5_VLForConditionalGeneration(config))
    return write_random(place / "model.safetensors", shapes, "BF16")


def _vlm_tokenizer(_: Preset, place: Path) -> int:
    from engine import tiny

    tiny.vlm_tokenizer().save_pretrained(place)
    return 0


def qwen_7b() -> Any:
    """Config of the VLM that ID-Crafter reads with; its special tokens are those of `tiny.vlm_tokenizer`."""
    from transformers import AutoConfig

    from engine import tiny

    return AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        image_token_id=tiny.VLM_SPECIAL.index("<|image_pad|>"),
        vision_start_token_id=tiny.VLM_SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=tiny.VLM_SPECIAL.index("<|vision_end|>"),
    )


# Each writes one part of a preset to a place, and gives its bytes.
WRITERS: dict[str, Callable[[Preset, Path], int]] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "tokenizer": _tokenizer,
    "vlm": _vlm,
    "vlm_tokenizer": _vlm_tokenizer,
}
