"""A model from whatever files people have, tensor by tensor, straight into the precision it is wanted in.

In:  a file or a folder, and a precision.
Out: plain Wan, VACE or Wan with identity blocks; or an encoder. On the way no more is in memory than the model itself
     and one tensor.
Knows nothing of presets. A `.pth` has to be converted first (`engine.hub.pickles`).

Layouts of transformers: diffusers' own with or without its config.json, and Wan's original (Phantom, RefAlign, GGUF,
ComfyUI's copies). Those of UMT5 are in `engine.models.umt5`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import Tensor, nn

from engine.job import Lora
from engine.loading import lora, quantize
from engine.loading.quantize import Precision
from engine.loading.tensor_files import Entry, TensorSource, load_error, open_tensors
from engine.models import umt5
from engine.models.identity_wan import IdentityWanTransformer3DModel, is_identity_key

HEAD_DIM = 128  # of every Wan; the weights do not tell it, since queries are normed over all heads
CPU = torch.device("cpu")
KINDS = {
    kind.__name__: kind for kind in (IdentityWanTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel)
}
FIRST_FRAME = ("img_emb.", ".k_img.", "image_embedder.", ".add_k_proj.")  # what only image-to-video models hold
LORA = re.compile(r"\.lora_|^lora_|\.lokr_|\.hada_")


def build_transformer(
    source: Path,
    dtype: torch.dtype,
    *,
    precision: Precision | None = None,
    where: torch.device = CPU,
    head_dim: int = HEAD_DIM,
    identity: Mapping[str, Any] | None = None,
    expect: Mapping[str, int] | None = None,
    merge: Path | None = None,
    tell: Callable[[float], None] = lambda share: None,
    settle: Callable[[nn.Module], None] = lambda block: None,
) -> nn.Module:
    """The transformer that a file or a folder holds.

    Args:
        source: a safetensors or GGUF file, or a folder: diffusers', or one with shards.
        dtype: what is computed in where `precision` does not say; what diffusers keeps in fp32 is fp32.
        precision: of the large weights; None keeps them in `dtype`.
        where: device the weights go to.
        head_dim: width of an attention head, for files without a config.json.
        identity: put plain Wan's weights into a model with identity blocks of this config (`identity_layers`, ...),
            which start as `init_identity` says.
        expect: "dim" and "layers" that it has to have.
        merge: a LoRA that becomes a part of the weights, before they are quantized.
        tell: hears the share that is loaded, up to 1.
        settle: given each repeated block once its weights are there, to put them elsewhere before the next ones come.

    Raises:
        StudioError: neither safetensors nor GGUF, damaged, of another model, or with weights missing.
    """
    dtype = quantize.compute_dtype(precision, dtype)
    with open_tensors(source) as held:
        names = _named(held)
        kind, config = _config_of(held, names, head_dim)
        _check_expected(source, config, expect or {})
        if identity is not None:
            kind, config = IdentityWanTransformer3DModel, {**config, **identity}
        with quantize.no_weights():
            model = kind(**config)
        own = is_identity_key if identity is not None else (lambda name: False)
        _check(held, model, names, missing_is_fine=own)
        merged = None if merge is None else lora.prepare_merge(model, [Lora(path=str(merge), weight=1.0, sha256="")])[0]
        quantize.swap(model, precision, lambda name: not own(name + "."))
        _fill(model, held, names, dtype, where, tell, settle, merged)
    if identity is not None:
        _start_identity(cast(IdentityWanTransformer3DModel, model), precision, dtype, where)
    return model


def build_encoder(
    kind: Any,
    source: Path,
    dtype: torch.dtype,
    *,
    precision: Precision | None = None,
    where: torch.device = CPU,
    expect: Mapping[str, int] | None = None,
    tell: Callable[[float], None] = lambda share: None,
    settle: Callable[[nn.Module], None] = lambda block: None,
) -> nn.Module:
    """UMT5 in any of its layouts (`engine.models.umt5`), or the VLM in transformers'.

    Args:
        kind: transformers' class.
        source: a folder with safetensors; of UMT5 also a single file, safetensors or GGUF. Where no config.json lies
            beside the weights, UMT5's sizes are read off their shapes.
        dtype, precision, where, tell, settle: as for `build_transformer`.
        expect: the "dim" that its states have to have.

    Raises:
        StudioError: damaged, of another model, or with weights missing.
    """
    dtype = quantize.compute_dtype(precision, dtype)
    with open_tensors(source) as held:
        names = umt5.names(held.entries) if _is_umt5(kind) else {key: key for key in held.entries}
        config = _encoder_config(kind, held, names)
        if expect and config.d_model != expect["dim"]:
            told = f"its states are {config.d_model:,} wide, not {expect['dim']:,}"
            raise load_error(source, f"It is a text encoder of another size: {told}.")
        with quantize.no_weights():
            model = kind(config)
        tied = set(model.all_tied_weights_keys)
        names = {key: name for key, name in _as_now(model, names).items() if name not in tied}
        _check(held, model, names, missing_is_fine=lambda name: name in tied)
        quantize.swap(model, precision)
        _fill(model, held, names, dtype, where, tell, settle)
    model.tie_weights()
    return model


def _is_umt5(kind: Any) -> bool:
    return kind.config_class.model_type == "umt5"


def _encoder_config(kind: Any, held: TensorSource, names: Mapping[str, str]) -> Any:
    if held.place.is_dir() and (held.place / "config.json").is_file():
        return kind.config_class.from_pretrained(held.place, local_files_only=True, trust_remote_code=False)
    if not _is_umt5(kind):
        raise load_error(held.place, "The config.json that belongs to its weights is not there.")
    try:
        return kind.config_class(**umt5.config({name: held.entries[key].shape for key, name in names.items()}))
    except ValueError as error:
        raise load_error(held.place, str(error)) from None


def _as_now(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """transformers' older names -> those of today's classes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    return {key: rename_source_key(name, renamings, [], prefix, wanted)[0] for key, name in names.items()}


def _fill(
    model: nn.Module,
    held: TensorSource,
    names: Mapping[str, str],
    dtype: torch.dtype,
    where: torch.device,
    tell: Callable[[float], None],
    settle: Callable[[nn.Module], None],
    merged: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    done, whole = 0, sum(math.prod(held.entries[key].shape) for key in names)
    block_of = {name: found[0].rstrip(".") for name in names.values() if (found := quantize.LAYERS.match(name))}
    to_come = Counter(block_of.values())
    # Block by block, in whichever order the file has them; what is in none comes first.
    for key, name in sorted(names.items(), key=lambda each: block_of.get(each[1], "")):
        kept = torch.float32 if quantize.keeps_fp32(model, name) else dtype
        tensor = held.read(key) if merged is None else merged(name, held.read(key))
        quantize.put(model, name, tensor, kept, where)
        done += tensor.numel()
        tell(done / whole)
        if name in block_of:
            to_come[block_of[name]] -= 1
            if not to_come[block_of[name]]:
                settle(model.get_submodule(block_of[name]))
    for name, table in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, table.to(where))


def _check(held: TensorSource, model: nn.Module, names: Mapping[str, str], missing_is_fine: Any) -> None:
    """Every weight of the model is there once and in its shape, and nothing else is."""
    wanted = model.state_dict()
    missing = sorted(name for name in set(wanted) - set(names.values()) if not missing_is_fine(name))
    if missing:
        raise load_error(held.place, f"{len(missing)} of its weights are missing, the first is {missing[0]}.")
    for key, name in names.items():
        if name not in wanted:
            raise load_error(held.place, f"It holds {name}, which {type(model).__name__} does not have.")
        shape = held.entries[key].shape
        if shape != tuple(wanted[name].shape):
            raise load_error(held.place, f"{name} has the shape {shape}, not {tuple(wanted[name].shape)}.")


def _start_identity(
    model: IdentityWanTransformer3DModel, precision: Precision | None, dtype: torch.dtype, where: torch.device
) -> None:
    """Start identity blocks, and quantize them, one layer after the other: all of them in fp32 are as large as Wan."""
    layers = [(f"blocks.{number}.", f"subject_blocks.{number}.") for number in range(model.config["identity_layers"])]
    tops = {name.split(".")[0] + "." for name, _ in model.named_parameters() if is_identity_key(name)}
    for group in (tuple(sorted(tops - {"blocks.", "subject_blocks."})), *layers):

        def inside(name: str, group: tuple[str, ...] = group) -> bool:
            return is_identity_key(name) and name.startswith(group)

        mine = [name for name, _ in model.named_parameters() if inside(name)]
        for name in mine:
            shape = model.get_parameter(name).shape
            quantize.put(model, name, torch.empty(shape), torch.float32, where)
        model.init_identity(inside)
        started = {name: model.get_parameter(name).detach() for name in mine}
        quantize.swap(model, precision, lambda name, inside=inside: inside(name + "."))
        for name in mine:
            kept = torch.float32 if quantize.keeps_fp32(model, name) else dtype
            quantize.put(model, name, started.pop(name), kept, where)


# --- whose weights they are -----------------------------------------------------------------------------------------


def _named(held: TensorSource) -> dict[str, str]:
    """Key in the file -> key in diffusers' classes, in the order of the file."""
    keys = held.entries
    if any(LORA.search(key) for key in keys):
        raise load_error(held.place, "It is a LoRA, to be added to a model.")
    if any(mark in key for key in keys for mark in FIRST_FRAME):
        raise load_error(held.place, "It is an image-to-video model, which needs a first frame.")
    if "blocks.0.attn1.to_q.weight" in keys:
        return {key: key for key in keys}
    if "blocks.0.self_attn.q.weight" not in keys:
        raise load_error(held.place, "Its weights are named as in no Wan model.")
    # diffusers renames a whole checkpoint at once; empty tensors go through it as marks.
    marks = {key: torch.empty(0, device="meta") for key in keys}
    came_from = {id(mark): key for key, mark in marks.items()}
    renamed = convert_wan_transformer_to_diffusers(dict(marks))
    names = {came_from.get(id(mark), ""): name for name, mark in renamed.items()}
    if set(names) != set(keys):
        raise load_error(held.place, "Its weights are named as in no Wan model that is known here.")
    return names


def _config_of(held: TensorSource, names: Mapping[str, str], head_dim: int) -> tuple[Any, dict[str, Any]]:
    """The class and its arguments: from config.json where diffusers wrote one, else as the shapes tell them."""
    entries = {name: held.entries[key] for key, name in names.items()}
    path = held.place / "config.json"
    if held.place.is_dir() and path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            written_by = str(config.get("_class_name"))
        except (ValueError, AttributeError) as error:
            raise load_error(held.place, f"Its config.json cannot be read ({str(error)[:80]}).") from None
        if written_by in KINDS:
            kind = KINDS[written_by]  # what a derived model has written beside its base's own config is no matter here
            return kind, {key: config[key] for key in signature(kind.__init__).parameters if key in config}
    if any(is_identity_key(name) for name in names.values()):
        raise load_error(held.place, "It holds identity blocks, and the config.json that belongs to them is not there.")
    return _config_from_shapes(entries, held.place, head_dim)


def _config_from_shapes(entries: Mapping[str, Entry], place: Path, head_dim: int) -> tuple[Any, dict[str, Any]]:
    def shape(key: str, dims: int = 2) -> tuple[int, ...]:
        if key not in entries:
            raise load_error(place, f"{key} is missing.")
        if len(entries[key].shape) != dims:
            raise load_error(place, f"{key} has the shape {entries[key].shape}, not one of {dims} sides.")
        return entries[key].shape

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    if dim % head_dim:
        raise load_error(place, f"Its width of {dim} is not a multiple of {head_dim}, as every Wan's is.")
    layers = _count(entries, "blocks")
    written = shape("proj_out.weight")[0] // (patch[0] * patch[1] * patch[2])
    if channels != written:
        raise load_error(place, f"It reads {channels} channels to write {written}: a model that needs a first frame.")
    config = {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": written,
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": layers,
        "cross_attn_norm": "blocks.0.norm2.weight" in entries,
    }
    if "vace_patch_embedding.weight" not in entries:
        return WanTransformer3DModel, config
    every = max(1, layers // max(1, _count(entries, "vace_blocks")))
    side_channels = shape("vace_patch_embedding.weight", 5)[1]
    side = {"vace_layers": list(range(0, layers, every)), "vace_in_channels": side_channels}
    return WanVACETransformer3DModel, {**config, **side}


def _count(keys: Iterable[str], name: str) -> int:
    numbers = [int(found[1]) for key in keys if (found := re.match(rf"{name}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _check_expected(place: Path, config: Mapping[str, Any], expect: Mapping[str, int]) -> None:
    found = {
        "dim": config.get("num_attention_heads", 40) * config.get("attention_head_dim", 128),
        "layers": config.get("num_layers", 40),
    }
    if any(found[name] != number for name, number in expect.items()):
        told = " and ".join(f"{name} {found[name]:,}, not {number:,}" for name, number in expect.items())
        raise load_error(place, f"It is a Wan of another size: {told}.")
