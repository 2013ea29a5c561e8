"""A Wan transformer from a file as it lies on the Hub: one safetensors file, or shards, in whichever layout.

In:  a file, or a folder of shards.
Out: plain Wan or VACE in diffusers' classes, its sizes read off the weights themselves.
Knows nothing of presets. Nothing but safetensors is opened; a `.pth` has to be converted first.

Layouts: diffusers' own, and Wan's original (Phantom, RefAlign, ComfyUI's copies), with or without a prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.messages import StudioError

HEAD_DIM = 128  # of every Wan; the weights do not tell it, since queries are normed over all heads
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")


def transformer(source: Path, dtype: torch.dtype, *, head_dim: int = HEAD_DIM) -> nn.Module:
    """The transformer that a file or a folder of shards holds.

    Args:
        source: a `.safetensors` file, or a folder with some.
        dtype: of the loaded weights; tensors are converted one after the other.
        head_dim: width of an attention head.

    Raises:
        StudioError: not safetensors, damaged, of another model, or with weights missing.
    """
    tensors = _read(source, dtype)
    layout = _layout(tensors, source)
    if layout == "original":
        tensors = convert_wan_transformer_to_diffusers(tensors)
    kind, config = _config(tensors, source, head_dim)
    with init_empty_weights(include_buffers=False):
        model = kind(**config)
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise _refused(source, f"{len(missing)} of its weights are missing, the first is {missing[0]}.")
    for key, tensor in tensors.items():
        if key not in wanted:
            raise _refused(source, f"It holds {key}, which {kind.__name__} does not have.")
        if tensor.shape != wanted[key].shape:
            raise _refused(source, f"{key} has the shape {tuple(tensor.shape)}, not {tuple(wanted[key].shape)}.")
    model.load_state_dict(tensors, assign=True)
    return model


def _read(source: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors, without a prefix that all of them share."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    wrong = [file for file in files if file.suffix != ".safetensors"]
    if wrong or not files:
        raise _refused(source, f"{wrong[0].suffix if wrong else 'An empty folder'} is not a safetensors file.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - a safetensors file is not a dict
                    tensors[key] = opened.get_tensor(key).to(dtype)
        except (SafetensorError, OSError, ValueError) as error:
            raise _refused(source, f"{file.name} is damaged or cut short ({str(error)[:120]}).") from None
    listed = _listed(source)
    if listed - set(tensors):
        raise _refused(source, f"{len(listed - set(tensors))} weights of its index are in no file that is here.")
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), "")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _listed(source: Path) -> set[str]:
    """What the index of shards names, where there is one."""
    index = next(iter(sorted(source.glob("*.safetensors.index.json"))), None) if source.is_dir() else None
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index else set()


def _layout(tensors: Mapping[str, Tensor], source: Path) -> str:
    if "blocks.0.self_attn.q.weight" in tensors:
        return "original"
    if "blocks.0.attn1.to_q.weight" in tensors:
        return "diffusers"
    lora = any(".lora_" in key for key in tensors)
    what = "It is a LoRA, to be added to a model." if lora else "Its weights are named as in no Wan model."
    raise _refused(source, what)


def _config(tensors: Mapping[str, Tensor], source: Path, head_dim: int) -> tuple[Any, dict[str, Any]]:
    """The class, and its arguments as the shapes tell them."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise _refused(source, f"{key} is missing.")
        return tuple(tensors[key].shape)

    dim, channels, *patch = shape("patch_embedding.weight")
    if dim % head_dim:
        raise _refused(source, f"Its width of {dim} is not a multiple of {head_dim}, as every Wan's is.")
    layers = _count(tensors, "blocks")
    config = {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": layers,
        "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
    }
    if "vace_patch_embedding.weight" not in tensors:
        return WanTransformer3DModel, config
    every = layers // _count(tensors, "vace_blocks")
    side = {"vace_layers": list(range(0, layers, every)), "vace_in_channels": shape("vace_patch_embedding.weight")[1]}
    return WanVACETransformer3DModel, {**config, **side}


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    numbers = [int(found[1]) for key in tensors if (found := re.match(rf"{name}\.(\d+)\.", key))]
    return max(numbers) + 1


def _refused(source: Path, reason: str) -> StudioError:
    return StudioError(
        what=f"{source.name} cannot be loaded as a Wan transformer.",
        why=reason,
        next_step="Fetch the file again, or choose another one.",
        field="preset",
    )
