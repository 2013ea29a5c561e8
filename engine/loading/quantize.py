"""Large weights in fewer bits: which layers, how, how large they become, and filled one tensor at a time.

In:  a model on the meta device, a precision, and its tensors one after the other.
Out: a model whose large projections are quantized layers of optimum-quanto (int8, fp8) or bitsandbytes (nf4).
Knows nothing of files, of what a model is for, or of activations, which are never quantized.

What takes part is in `LAYERS` and `EIGHT_BITS`, and nowhere else. All the rest keeps the precision of the loaded model,
or fp32 where its class says so (`keeps_fp32`): norms and modulation, which a rounding error shifts for a whole clip,
and the embedders of time, text and patches and the last projection, which are small and seen by every token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp8", "int8", "nf4"]
Form = Literal["int8", "fp8", "nf4"]

# --- which layers ---------------------------------------------------------------------------------------------------

LAYERS = re.compile(
    r"(blocks|vace_blocks|subject_blocks)\.\d+\."  # Wan, VACE's side branch, the subject tower
    r"|encoder\.block\.\d+\."  # UMT5
    r"|model\.(language_model\.layers|visual\.blocks)\.\d+\."  # Qwen2.5-VL
)
"""Every linear layer in a repeated block takes part."""

EIGHT_BITS = re.compile(
    r"(vace_)?blocks\.0\."  # the first block: every later one builds on what it rounds
    r"|(vace_)?blocks\.\d+\.attn\d\.to_out\."  # what attention adds to the stream, as it is
    r"|vace_blocks\.\d+\.proj_(in|out)"  # what the side branch takes and gives
    r"|encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo"  # transformers casts to this weight's own dtype
    r"|model\.visual\."  # small, and read by everything behind it
)
"""What "nf4" keeps in int8. Toybox, one forward over held-out jobs and six noise levels, relative error: nf4 everywhere
.112, so .07 (int8 .009). Alone, self-attention's output makes .8 of the error of either half of the FFN with a quarter
of its weights, the first block 1.6 times that of another, query and key .2 of it, the subject tower next to none."""

# How many weights share a scale in nf4. A row has to be whole blocks: where it is not, bitsandbytes' kernel for the CPU
# (0.50.2) takes the scales of other rows, and a weight's error is .3 instead of .09.
BLOCKS = (64, 32)
# Weights that are rounded at a time. Pieces of 16 MB in fp32 left holes between what stays: 1.1 GB over 1.3B in nf4.
ROWS_AT_ONCE = 2**18


def form_of(name: str, module: nn.Module, precision: Precision | None) -> Form | None:
    """How the weight of this module is kept, or None for as it is."""
    if precision not in ("int8", "fp8", "nf4") or not isinstance(module, nn.Linear) or not LAYERS.match(name):
        return None
    if precision == "nf4" and (EIGHT_BITS.match(name) or block_of(module) is None):
        return "int8"
    return precision


def block_of(module: nn.Linear) -> int | None:
    """How many weights share a scale in nf4; None where no whole number of blocks is a row."""
    return next((block for block in BLOCKS if module.in_features % block == 0), None)


def compute_dtype(precision: Precision | None, usual: torch.dtype) -> torch.dtype:
    """What is computed in: what the precision names, or what this device usually takes."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision or "", usual)


def keeps_fp32(model: nn.Module, name: str) -> bool:
    """Whether diffusers keeps this weight in fp32 whatever the model is loaded in.

    transformers keeps some so only against fp16, which is never computed in here.
    """
    kept = getattr(type(model), "_keep_in_fp32_modules", None) if hasattr(model, "load_config") else None
    return any(part in name.split(".") for part in kept or ())


# --- swapping and filling -------------------------------------------------------------------------------------------


def swap(model: nn.Module, precision: Precision | None, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Put empty quantized layers in the place of the linear layers that take part.

    Args:
        model: on the meta device, as far as its linear layers go.
        precision: fp32, bf16 and None leave everything as it is.
        wanted: asked for the name of each layer; the others stay.
    """
    for name, module in list(model.named_modules()):
        form = form_of(name, module, precision) if wanted(name) else None
        if form is None:
            continue
        linear = cast(nn.Linear, module)
        owner, _, leaf = name.rpartition(".")
        shape = linear.in_features, linear.out_features, linear.bias is not None
        made = _four_bits(shape) if form == "nf4" else _eight_bits(shape, form)
        made.train(linear.training)
        setattr(model.get_submodule(owner), leaf, made)


def _eight_bits(shape: tuple[int, int, bool], form: Form) -> nn.Module:
    from optimum.quanto import QLinear

    made = QLinear(*shape, device=torch.device("meta"), weights={"int8": "qint8", "fp8": "qfloat8"}[form])
    made.input_scale, made.output_scale = torch.ones(()), torch.ones(())  # of activations, which stay as they are
    return made


def _four_bits(shape: tuple[int, int, bool]) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit

    made = Linear4bit(*shape, compress_statistics=True, quant_type="nf4", device="meta")
    # Its kernel for AVX512-BF16 would repack the weights at the first call, into more bytes and only for bf16.
    made.support_avx512bf16_for_cpu = False
    return made


def put(model: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype, where: torch.device) -> None:
    """Put one tensor in its place, rounded where its layer is a quantized one.

    Args:
        model: after `swap`.
        key: of its state dict before `swap`.
        tensor: in any precision, anywhere; it is copied.
        dtype: that the layer is computed in, and that everything but quantized weights is kept in.
        where: device it goes to.
    """
    owner_name, _, leaf = key.rpartition(".")
    owner: Any = model.get_submodule(owner_name)
    quantized = leaf == "weight" and {"QLinear": _rows, "Linear4bit": _blocks}.get(type(owner).__name__)
    if quantized:
        owner.weight = quantized(owner, tensor, dtype, where)
        return
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    copied = tensor.detach().to(where, dtype, copy=True).contiguous()
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(copied, requires_grad=owner._parameters[leaf].requires_grad))
    else:
        setattr(owner, leaf, copied)


def _rows(owner: Any, tensor: Tensor, dtype: torch.dtype, where: torch.device) -> nn.Parameter:
    """Eight bits and a scale per row, as quanto rounds; the scale is rounded to `dtype` first, so that it fits."""
    from optimum.quanto import WeightQBytesTensor

    qtype = owner.weight_qtype
    info = torch.iinfo(qtype.dtype) if qtype.dtype == torch.int8 else torch.finfo(qtype.dtype)
    data = torch.empty(tensor.shape, dtype=qtype.dtype, device=where)
    scale = torch.empty(len(tensor), 1, dtype=dtype, device=where)
    for rows in _some(tensor):
        part = tensor[rows].to(where, torch.float32)
        # A row of zeros (a projection that starts at nothing) has no scale; any serves, but 0 / 0 is not a number.
        scale[rows] = (part.abs().amax(1, keepdim=True) / qtype.qmax).to(dtype).clamp_(min=torch.finfo(dtype).tiny)
        part = part / scale[rows].float()
        part = part if qtype.is_floating_point else part.round_()
        data[rows] = part.clamp_(info.min, info.max).to(qtype.dtype)
    # The class itself: its `create` may choose a kernel that is compiled on the user's machine first.
    made = WeightQBytesTensor(qtype, 0, tensor.size(), data.stride(), data, scale, None)
    return nn.Parameter(made, requires_grad=False)


def _blocks(owner: Any, tensor: Tensor, dtype: torch.dtype, where: torch.device) -> nn.Parameter:
    """nf4 with its scales in eight bits, as bitsandbytes rounds a whole tensor."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Params4bit

    block = block_of(owner)
    data = torch.empty(tensor.numel() // 2, 1, dtype=torch.uint8, device=where)
    scales, done = [], 0
    for rows in _some(tensor):
        part = tensor[rows].to(where, torch.float32)
        packed, state = functional.quantize_4bit(part, blocksize=block, quant_type="nf4")
        data[done : done + len(packed)] = packed
        done += len(packed)
        scales.append(state.absmax)
    largest = torch.cat(scales)
    offset = largest.mean()
    rounded, second = functional.quantize_blockwise(largest - offset, blocksize=256)
    state = functional.QuantState(
        absmax=rounded,
        shape=tensor.shape,
        dtype=dtype,
        blocksize=block,
        code=functional.get_4bit_type("nf4", device=where),
        quant_type="nf4",
        offset=offset,
        state2=second,
    )
    owner.quant_state = state
    make: Any = Params4bit  # its `__new__` takes more than a checker believes of a Parameter
    return make(data, quant_state=state, blocksize=block, quant_type="nf4", bnb_quantized=True)


def _some(tensor: Tensor) -> Iterator[slice]:
    """Rows, as many as are rounded at once."""
    step = max(1, ROWS_AT_ONCE // max(1, tensor[0].numel()))
    return (slice(first, first + step) for first in range(0, len(tensor), step))


# --- how large ------------------------------------------------------------------------------------------------------


def num_bytes(model: nn.Module) -> int:
    """Memory of a model's weights and tables, in bytes, as they truly are; what two layers share counts once."""
    found = {}
    for tensor in (*model.parameters(), *model.buffers()):
        found |= {id(held): held for held in _held(tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _held(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight consists of."""
    state = getattr(tensor, "quant_state", None)
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
        yield from (getattr(tensor, name) for name in inner)
        return
    yield tensor
    if state is not None:
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


@contextmanager
def no_weights() -> Iterator[None]:
    """Models made in here hold their tables, but no weights; a large one takes a second."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def predict_bytes(build: Callable[[], nn.Module], precision: Precision, usual: torch.dtype = torch.bfloat16) -> int:
    """What `num_bytes` will say of a model, before there is one.

    Args:
        build: makes the model, such as `lambda: WanTransformer3DModel(**config)`; no weight is made.
        precision: of its large weights.
        usual: what is computed in where the precision does not say, bf16 on CUDA.
    """
    dtype = compute_dtype(precision, usual)
    with no_weights():
        model = build()
    if hasattr(model, "tie_weights"):  # what transformers' models share counts once
        cast(Any, model).tie_weights()
    modules = dict(model.named_modules())
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for name, weight in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        form = form_of(owner, modules[owner], precision) if leaf == "weight" else None
        if form is None:
            kept = torch.float32 if keeps_fp32(model, name) else dtype
            total += weight.numel() * kept.itemsize
        elif form == "nf4":
            scales = weight.numel() // (block_of(cast(nn.Linear, modules[owner])) or 1)
            total += weight.numel() // 2 + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)
        else:
            total += weight.numel() + weight.shape[0] * dtype.itemsize + 2 * 4
    return total
