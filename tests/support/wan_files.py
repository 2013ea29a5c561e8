"""Small Wan models as the files people have: in Wan's original names, scaled fp8, GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from engine.paths import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "phantom.safetensors"
HEAD = 32
WIDE = {  # rows of 256 weights, as GGUF's K types need
    "num_attention_heads": 8, "attention_head_dim": HEAD, "in_channels": 4, "out_channels": 4, "text_dim": 256,
    "freq_dim": 256, "ffn_dim": 512, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
FOLDED = "blocks.0.ffn.2.weight"  # written to GGUF in rows of 256, as ComfyUI's tools do where rows fit no block
SIDE = {"vace_layers": [0, 1], "vace_in_channels": 24}


def plain(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Two random Wan blocks."""
    torch.manual_seed(seed)
    return stirred(WanTransformer3DModel(**{**WIDE, **changes}))


def side(seed: int = 0) -> WanVACETransformer3DModel:
    """The same with VACE's side branch beside both."""
    torch.manual_seed(seed)
    return stirred(WanVACETransformer3DModel(**WIDE, **SIDE))


def stirred(model: Any) -> Any:
    """Biases and norms off their zeros and ones, so that a mix-up of two shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand_like(parameter) + 0.5
    return model.eval().requires_grad_(False)


def in_wans_names(model: Any) -> dict[str, Tensor]:
    """A model's weights under the names of Wan's own code, which the fixture knows."""
    theirs = [key.removeprefix("model.") for key in load_file(FIXTURE) if key.startswith("model.")]
    marks = {key: torch.zeros(1) for key in theirs}
    key_of = {id(mark): key for key, mark in marks.items()}
    names = {new: key_of[id(mark)] for new, mark in convert_wan_transformer_to_diffusers(dict(marks)).items()}
    for name, key in list(names.items()):
        names[f"vace_{name}"] = f"vace_{key}"  # the side branch repeats the blocks' names
    for ours, own in (("proj_in", "before_proj"), ("proj_out", "after_proj")):
        for number in range(2):
            for leaf in ("weight", "bias"):
                names[f"vace_blocks.{number}.{ours}.{leaf}"] = f"vace_blocks.{number}.{own}.{leaf}"
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def scaled_fp8(
    tensors: dict[str, Tensor], *, new: bool = False, inside: tuple[str, ...] = ("blocks.",)
) -> dict[str, Tensor]:
    """The linear weights of the blocks as fp8 times a scale, the older or the newer way of ComfyUI."""
    made: dict[str, Tensor] = {} if new else {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in tensors.items():
        if not key.startswith(inside) or tensor.ndim != 2:
            made[key] = tensor
            continue
        scale, layer = tensor.abs().max() / 448, key.removesuffix(".weight")
        made[key] = (tensor / scale).to(torch.float8_e4m3fn)
        made[f"{layer}.weight_scale" if new else f"{layer}.scale_weight"] = scale
        if new:
            told = b'{"format": "float8_e4m3fn"}'
            made[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
        else:
            made[f"{layer}.scale_input"] = torch.ones(())
    return made


def unscaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What such a file stands for."""
    scales = {key.rpartition(".")[0]: t for key, t in tensors.items() if key.endswith((".scale_weight", "_scale"))}
    aside = (".scale_weight", ".weight_scale", ".scale_input", ".comfy_quant", "scaled_fp8")
    return {
        key: tensor.float() * scales[key.removesuffix(".weight")]
        if key.removesuffix(".weight") in scales
        else tensor.float()
        for key, tensor in tensors.items()
        if not key.endswith(aside)
    }


def write_gguf(path: Path, tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Write a GGUF file whose wide matrices are of this kind; gives back what the library reads from it."""
    writer = gguf.GGUFWriter(str(path), "wan")
    writer.add_array("a.list", ["of", "words"])
    read = {}
    for key, tensor in tensors.items():
        values = tensor.float().numpy()
        wide = tensor.ndim == 2 and tensor.shape[1] % 256 == 0 and key.startswith(("blocks.", "enc.blk.", "token_embd"))
        quant = gguf.GGMLQuantizationType[kind if wide else "F32"]
        if key == FOLDED:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [*tensor.shape])
        packed = _packed(values.reshape(-1, 256) if key == FOLDED else values, quant)
        writer.add_tensor(key, packed, raw_dtype=quant)
        read[key] = torch.from_numpy(gguf.quants.dequantize(packed, quant).reshape(values.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _packed(values: np.ndarray, quant: gguf.GGMLQuantizationType) -> np.ndarray:
    """The library packs no K types; any bytes are such a tensor, once its scales are ordinary numbers."""
    if not quant.name.endswith("_K"):
        return gguf.quants.quantize(values, quant)
    block, size = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(values.size)
    packed = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    places = [size - 2] if quant.name == "Q6_K" else [0, 2]
    for place in places:
        scales = (rng.random(len(packed)) * 0.01).astype(np.float16)
        packed[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return packed.reshape(*values.shape[:-1], -1)
