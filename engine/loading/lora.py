"""LoRA files of every dialect, added to a transformer and taken away again.

In:  a transformer, full or quantized, and the `Lora`s of a job.
Out: the same transformer with low-rank branches beside its layers; how many of each file's weights found a place.
Knows nothing of jobs, of pages, or of where the folder of LoRAs lies. Nothing but safetensors is opened.

    y = W x + b   becomes   y + weight * (alpha / rank) * B A x

A branch leaves W alone: it works beside 4-bit weights, keeps in bf16 the small differences that W + BA would round
away, and is gone without a trace. What is no matrix product (norms, tables, convolutions) takes its difference in
place, and gets its old tensor back. `merge=True` adds everything into the weights instead, for good, before they are
quantized.

Dialects: diffusers and PEFT (`transformer.`, `base_model.model.`), Wan's own names (`diffusion_model.`, DiffSynth's
`pipe.dit.`; ai-toolkit writes these too), kohya and musubi (`lora_unet_`, with `.alpha`), VideoX-Fun (`lora_unet__`),
LyCORIS (`lycoris_`), and ComfyUI's full differences (`.diff`, `.diff_b`, `.diff_m`). All of them name the same modules,
so a name is looked up among those that this very model has, in each spelling. diffusers' own converters serve as the
measure in the tests; here they fall short: they stop at a file that trains only a part of a block, drop differences of
norms, and say nothing of what found no place (docs/log.md).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from engine import lora_files
from engine.job import Lora
from engine.messages import StudioError

log = logging.getLogger(__name__)

# --- names -----------------------------------------------------------------------------------------------------------

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
# diffusers' spelling of a module, and Wan's own. norm2 and norm3 changed places.
SPELLINGS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "norm3": "norm2",
    "scale_shift_table": "modulation",
}
_SPELLED = re.compile(r"(?<![^.])(?:" + "|".join(re.escape(name) for name in SPELLINGS) + r")(?![^.])")
_KINDS = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.[A-Za-z0-9_-]+)??\.(?P<leaf>weight|bias)$"
    r"|\.(?P<full>alpha|diff|diff_b|diff_m)$"
)
_OTHER_METHODS = {
    r"\.hada_w\d": "LoHa",
    r"\.lokr_w\d": "LoKr",
    r"\.(?:dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.oft_(?:blocks|diag|R)": "OFT",
    r"\.lora_mid\.": "LoCon with a middle part",
}
_OTHER_FAMILIES = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux or HunyuanVideo",
    r"down_blocks|input_blocks|mid_block|lora_te1_": "Stable Diffusion",
    r"joint_blocks|transformer_blocks.*(?:img_mlp|add_q_proj)": "Stable Diffusion 3 or Qwen-Image",
    r"transformer_blocks": "LTX or another video model",
}


def to_wan_name(name: str) -> str:
    """A module or parameter of diffusers' Wan as Wan itself calls it.

    Source: the inverse of diffusers' `convert_wan_transformer_to_diffusers`; a test compares the two.
    """
    if name.startswith("proj_out"):
        return name.replace("proj_out", "head.head", 1)
    if name == "scale_shift_table":
        return "head.modulation"
    name = re.sub(r"^(vace_blocks\.\d+)\.proj_in", r"\1.before_proj", name)
    name = re.sub(r"^(vace_blocks\.\d+)\.proj_out", r"\1.after_proj", name)
    return _SPELLED.sub(lambda found: SPELLINGS[found[0]], name)


def _places(model: nn.Module) -> dict[str, str]:
    """Every spelling of every module and bare parameter that a difference may be for -> its name in this model."""
    named = [name for name, module in model.named_modules() if name and (_is_linear(module) or _own(module))]
    named += [name for name, _ in model.named_parameters() if name.rpartition(".")[2] not in ("weight", "bias")]
    found: dict[str, str] = {}
    for spell in (
        lambda name: name.replace(".", "_"),
        lambda name: to_wan_name(name).replace(".", "_"),
        to_wan_name,
        str,
    ):
        found |= {spell(name): name for name in named}  # the model's own spelling last: it wins
    return found


def _own(module: nn.Module) -> bool:
    return any(name == "weight" for name, _ in module.named_parameters(recurse=False))


def _is_linear(module: nn.Module | None) -> bool:
    """Whatever multiplies by a matrix, whichever library holds its weights and in how many bits."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


# --- one file --------------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """What a file says of one module. `keys` are its names in the file."""

    keys: list[str] = field(default_factory=list)
    down: Tensor | None = None  # A: (rank, in), or (rank, in, *kernel)
    up: Tensor | None = None  # B: (out, rank), or (out, rank, 1, 1, 1)
    up_bias: Tensor | None = None
    alpha: float | None = None
    weight: Tensor | None = None  # a full difference of the weight, or of the bare parameter
    bias: Tensor | None = None

    def scale(self) -> float:
        """alpha / rank; kohya writes an alpha of 0 for "as it is"."""
        return self.alpha / len(self.down) if self.alpha and self.down is not None else 1.0

    def is_whole(self) -> bool:
        """Both halves of a product, or none of it."""
        return (self.down is None) == (self.up is None) and (self.down is not None or self.full())

    def full(self) -> bool:
        """Whether it holds a full difference."""
        return self.weight is not None or self.bias is not None

    def of_weight(self, weight: float) -> Tensor | None:
        """The whole difference of the weight, fp32."""
        product = None
        if self.down is not None and self.up is not None:
            flat = self.up.float().flatten(1) @ self.down.float().flatten(1) * (weight * self.scale())
            product = flat.view(len(flat), *self.down.shape[1:])
        if self.weight is None:
            return product
        return self.weight.float() * weight + (0.0 if product is None else product)

    def of_bias(self, weight: float) -> Tensor | None:
        """The whole difference of the bias, fp32."""
        scaled = [self.up_bias.float() * (weight * self.scale())] if self.up_bias is not None else []
        scaled += [self.bias.float() * weight] if self.bias is not None else []
        return sum(scaled[1:], scaled[0]) if scaled else None


def _read(path: Path) -> dict[str, Change]:
    """A file's changes by the name of the module, without a prefix; whatever is no change stays under its own key.

    Raises:
        StudioError: no safetensors file, damaged, or of a method that is not a LoRA.
    """
    changes: dict[str, Change] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            keys, scale = list(opened.keys()), _peft_scale(path, opened.metadata() or {})
            _refuse_other_methods(path, keys)
            for key in keys:
                _take(changes, key, opened.get_tensor(key), path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _refused(
            f"{path.name} cannot be read as a LoRA.",
            f"It is damaged or cut short ({str(error)[:120]}).",
            "Fetch the file again.",
        ) from None
    for name, change in changes.items():
        if change.alpha is None and change.down is not None:
            change.alpha = scale(name, len(change.down))
    return changes


def _take(changes: dict[str, Change], key: str, tensor: Tensor, path: Path) -> None:
    found = _KINDS.search(key)
    name = _without_prefix(key[: found.start()] if found else key)
    if found and found["full"] == "diff_m":
        name += ".modulation"
    change = changes.setdefault(name, Change())
    change.keys.append(key)
    if found is None:
        return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise _refused(f"{path.name} is broken.", f"{key} holds values that are no numbers.", "Choose another file.")
    if found["down"]:
        change.down = tensor
    elif found["up"] and found["leaf"] == "bias":
        change.up_bias = tensor
    elif found["up"]:
        change.up = tensor
    elif found["full"] == "alpha":
        change.alpha = float(tensor.flatten()[0]) if tensor.numel() else None
    elif found["full"] == "diff_b":
        change.bias = tensor
    else:
        change.weight = tensor


def _without_prefix(name: str) -> str:
    """One prefix may stand behind another: `base_model.model.transformer.`"""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _peft_scale(path: Path, metadata: dict[str, str]) -> Callable[[str, int], float | None]:
    """PEFT keeps alpha beside the weights: in adapter_config.json, or in the header where diffusers wrote the file."""
    text = metadata.get("lora_adapter_metadata", "")
    beside = path.with_name("adapter_config.json")
    if not text and path.stem == "adapter_model" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    config = json.loads(text) if text else {}
    config = {str(key).rpartition(".")[2]: value for key, value in config.items()} if isinstance(config, dict) else {}
    patterns = config.get("alpha_pattern") or {}

    def alpha(name: str, rank: int) -> float | None:
        own = next((a for key, a in patterns.items() if re.search(rf"(?:^|\.){re.escape(key)}$", name)), None)
        found = config.get("lora_alpha") if own is None else own
        if not isinstance(found, (int, float)):
            return None
        return float(found) * (rank**0.5 if config.get("use_rslora") else 1.0)  # alpha / sqrt(rank)

    return alpha


def _refuse_other_methods(path: Path, keys: Sequence[str]) -> None:
    for pattern, method in _OTHER_METHODS.items():
        count = sum(bool(re.search(pattern, key)) for key in keys)
        if count:
            raise _refused(
                f"{path.name} is a {method}, not a LoRA.",
                f"{count} of its weights are of a kind that this studio does not add.",
                "Choose a plain LoRA, or have it converted into one by the program that trained it.",
            )


# --- what fits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How one file fits a model. `left` are its keys that found no place."""

    name: str
    total: int
    left: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """For the log, and as a note where something was left over."""
        said = f"{self.total - len(self.left)} of {self.total} weights of {self.name}"
        if not self.left:
            return f"{said}."
        first, *others = self.left
        more = f" and {len(others)} more" if others else ""
        return f"{said}; this model has no place for {first[:120]}{more}."


Fitting = list[tuple[str, Change]]


def match_file(transformer: nn.Module, path: Path) -> tuple[Fitting, Match]:
    """The changes of a file that have a place in this model, by its module's or parameter's name there.

    Raises:
        StudioError: field "loras"; the file cannot be read, is for another width or another model, or fits nowhere.
    """
    changes, places = _read(path), _places(transformer)
    found = [(places[name], change) for name, change in changes.items() if name in places]
    _refuse_other_width(transformer, path, found)
    modules, parameters = dict(transformer.named_modules()), dict(transformer.named_parameters())
    fits = [(name, change) for name, change in found if _fits(modules.get(name), parameters.get(name), change)]
    placed = set(chain.from_iterable(change.keys for _, change in fits))
    keys = list(chain.from_iterable(change.keys for change in changes.values()))
    if not placed:
        family = next(
            (said for pattern, said in _OTHER_FAMILIES.items() if any(re.search(pattern, k) for k in keys)), ""
        )
        raise _refused(
            f"None of the {len(keys)} weights of {path.name} belongs to this model.",
            f"It looks like a LoRA for {family}." if family else f"The first of them is called {_short(keys)}.",
            "Choose a LoRA that was trained for the Wan model of this preset.",
        )
    return fits, Match(path.name, len(keys), tuple(key for key in keys if key not in placed))


def _short(keys: Sequence[str]) -> str:
    return keys[0][:120] if keys else "nothing: the file is empty"


def _refuse_other_width(transformer: nn.Module, path: Path, found: Fitting) -> None:
    """A 14B's LoRA on a 1.3B model: some biases would fit by chance, and the clip would be worse for them."""
    config: Any = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    reads = [change for name, change in found if re.search(r"attn\d\.to_q$", name)]
    sides = [t.size(1) for change in reads for t in (change.down, change.weight) if t is not None and t.ndim == 2]
    if sides and all(side != width for side in sides):
        raise _refused(
            f"{path.name} is for another model.",
            f"It was made for a model {sides[0]} wide, this one is {width} wide.",
            "Choose a LoRA for this model's size, or the preset that it belongs to.",
        )


def _fits(module: nn.Module | None, parameter: nn.Parameter | None, change: Change) -> bool:
    """Whether every part of a change has the shape of its place."""
    if not change.is_whole():
        return False
    shape, takes_bias = _shape(module, parameter)
    if change.down is not None and change.up is not None:
        product = (change.up.numel(), *change.down.shape[1:])
        if len(shape) < 2 or product != (shape[0] * len(change.down), *shape[1:]):
            return False
    if change.weight is not None and tuple(change.weight.shape) != shape:
        return False
    biases = [bias for bias in (change.bias, change.up_bias) if bias is not None]
    return all(takes_bias and tuple(bias.shape) == shape[:1] for bias in biases)


def _shape(module: Any, parameter: nn.Parameter | None) -> tuple[tuple[int, ...], bool]:
    """Of a layer's weight, as if it were not quantized, or of a bare parameter; and whether a bias can be added."""
    if module is None:
        return (() if parameter is None else tuple(parameter.shape)), False
    if _is_linear(module):
        return (module.out_features, module.in_features), True
    return tuple(module.weight.shape), getattr(module, "bias", None) is not None


def _refused(what: str, why: str, next_step: str) -> StudioError:
    return StudioError(what, why, next_step, field="loras")


# --- on and off ------------------------------------------------------------------------------------------------------

_UNDO: WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = WeakKeyDictionary()


def apply(transformer: nn.Module, loras: Sequence[Lora], *, merge: bool = False) -> tuple[Match, ...]:
    """Add these LoRAs, and no others, to a transformer; one of weight 0 is not even opened.

    Args:
        transformer: diffusers' Wan, VACE, or ours with identity blocks; full or quantized.
        merge: into the weights themselves and for good. Before quantizing; `remove` does not undo it.

    Returns:
        How each file fits, in order.

    Raises:
        StudioError: field "loras"; a file is missing or does not fit. The transformer is then as it was before any.
        ValueError: `merge` into weights that are already quantized.
    """
    remove(transformer)
    if merge:
        return _merge(transformer, loras)
    changes, matched = _chosen(transformer, loras)
    undo = _UNDO.setdefault(transformer, [])
    modules = dict(transformer.named_modules())
    try:
        for name, several in changes.items():
            module = modules.get(name)
            if module is not None and _is_linear(module):
                undo.append(module.register_forward_hook(_Branches(several)).remove)
                continue
            owner, _, leaf = name.rpartition(".")
            places = [(modules[owner], leaf)] if module is None else [(module, "weight"), (module, "bias")]
            for (holder, own), kind in zip(places, (Change.of_weight, Change.of_bias), strict=False):
                if (difference := _sum(several, kind)) is not None:
                    old = getattr(holder, own)
                    _replace(holder, own, old.detach().float() + difference.to(old.device))
                    undo.append(partial(setattr, holder, own, old))
    except BaseException:
        remove(transformer)
        raise
    if undo:
        _forget_compiled(transformer)
    return matched


def _merge(transformer: nn.Module, loras: Sequence[Lora]) -> tuple[Match, ...]:
    add, matched = prepare_merge(transformer, loras)
    for key, old in list(transformer.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        if (new := add(key, old)) is not old:
            _replace(transformer.get_submodule(owner), leaf, new)
    return matched


def prepare_merge(
    transformer: nn.Module, loras: Sequence[Lora]
) -> tuple[Callable[[str, Tensor], Tensor], tuple[Match, ...]]:
    """For weights that are quantized while they come off the disk: what adds these LoRAs to one of them.

    Args:
        transformer: its modules tell what fits where; its weights are not looked at and may be on the meta device.

    Returns:
        A function of a weight's name and the weight: the sum, fp32, or that very tensor where nothing is to be added.
        And how each file fits.

    Raises:
        StudioError: as `apply` does.
    """
    changes, matched = _chosen(transformer, loras)

    def add(key: str, tensor: Tensor) -> Tensor:
        owner, _, leaf = key.rpartition(".")
        several = changes.get(key) or (changes.get(owner) if leaf in ("weight", "bias") else None)
        kind = Change.of_bias if leaf == "bias" else Change.of_weight
        difference = _sum(several, kind) if several else None
        return tensor if difference is None else tensor.detach().float() + difference.to(tensor.device)

    return add, matched


def _chosen(
    transformer: nn.Module, loras: Sequence[Lora]
) -> tuple[dict[str, list[tuple[float, Change]]], tuple[Match, ...]]:
    """All changes by the name of their place, each with its LoRA's weight."""
    changes: dict[str, list[tuple[float, Change]]] = {}
    matched: list[Match] = []
    for lora in loras:
        if not lora.weight:
            continue
        fits, match = match_file(transformer, lora_files.place(lora))
        matched.append(match)
        log.info("%s", match.sentence)
        for name, change in fits:
            changes.setdefault(name, []).append((lora.weight, change))
    return changes, tuple(matched)


def _sum(several: Sequence[tuple[float, Change]], kind: Callable[[Change, float], Tensor | None]) -> Tensor | None:
    parts = [part for weight, change in several if (part := kind(change, weight)) is not None]
    return sum(parts[1:], parts[0]) if parts else None


def remove(transformer: nn.Module) -> None:
    """Take away what `apply` added: the weights are then the very tensors that they were before."""
    undo = _UNDO.pop(transformer, [])
    for step in reversed(undo):
        step()
    if undo:
        _forget_compiled(transformer)


@contextmanager
def use_loras(transformer: nn.Module, loras: Sequence[Lora]) -> Iterator[tuple[Match, ...]]:
    """These LoRAs for the length of a block, whichever way it ends.

    Raises:
        StudioError: see `apply`.
    """
    try:
        yield apply(transformer, loras)
    finally:
        remove(transformer)


class _Branches:
    """What several LoRAs add to the output of one layer: a forward hook.

    A hook and not a module of its own: names, state dict and device hooks of offloading stay as they are. Its tensors
    belong to nobody, so that nothing offloads them: they are small and stay where they were last needed.
    """

    def __init__(self, several: Sequence[tuple[float, Change]]) -> None:
        self._parts = [_branch(change, weight) for weight, change in several]

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = arguments[0]
        if any(part is not None and (part.device, part.dtype) != (x.device, x.dtype) for part in self._parts[0]):
            self._parts = [
                [None if part is None else part.to(x.device, x.dtype) for part in one] for one in self._parts
            ]
        for down, up, weight, bias in self._parts:
            if down is not None and up is not None:
                output = output + linear(linear(x, down), up)
            if weight is not None:
                output = output + linear(x, weight)
            if bias is not None:
                output = output + bias
        return output


def _branch(change: Change, weight: float) -> list[Tensor | None]:
    """A, B with its scale, the full difference of the weight, and what is added to the bias."""
    up = None if change.up is None else change.up.float() * (weight * change.scale())
    full = None if change.weight is None else change.weight.float() * weight
    return [change.down, up, full, change.of_bias(weight)]


def _replace(holder: nn.Module, name: str, new: Tensor) -> None:
    """Another tensor in a parameter's place, in the precision of the old one."""
    old = getattr(holder, name)
    if type(old) is not nn.Parameter or not old.is_floating_point() or old.element_size() < 2:
        raise ValueError(f"{name} of {type(holder).__name__} is quantized, and a difference is added before that.")
    setattr(holder, name, nn.Parameter(new.to(old.dtype), requires_grad=False))


def _forget_compiled(transformer: nn.Module) -> None:
    """Compiled blocks do not look whether hooks came or went since; the next forward has to trace them anew."""
    if any(module._compiled_call_impl is not None for module in transformer.modules()):
        torch._dynamo.reset()
