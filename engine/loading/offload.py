"""Blocks that wait outside the device and come in one after the other, the next one while this one computes.

In:  a model on the CPU, the names of its lists of blocks, a device.
Out: the same model; its blocks' weights stay in memory or in files, all else is on the device. Results are bit-equal.
Knows nothing of presets or of what the blocks compute; quantized weights are moved as the library laid them out.

A list of equal blocks gets two places on the device, copies of a block made by the libraries' own `.to`. A block's
forward fills one of them, tensor by tensor and in place, and runs it there. On CUDA a thread copies the next block into
pinned memory and from there, on a stream of its own, into the other place; so two blocks' bytes are pinned, however
large the model is. (diffusers' group offloading pins all of them, and cannot move optimum-quanto's tensors.)
"""

from __future__ import annotations

import copy
import logging
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
PLACES = 2  # one computes while the other is being filled

log = logging.getLogger(__name__)


@contextmanager
def offload_blocks(
    model: nn.Module,
    lists: Iterable[str],
    device: torch.device,
    *,
    once: Iterable[str] = (),
) -> Iterator[None]:
    """Inside, the blocks of these lists visit the device and everything else of the model is there; after, all is back.

    Args:
        model: on the CPU, with whatever was added to its layers (LoRA).
        lists: dotted names of `nn.ModuleList`s, such as "blocks"; those the model lacks are passed over.
        device: where it computes.
        once: more lists, which run once per clip: their places leave the device after the last block.
    """
    named = [(name, name in set(once)) for name in (*lists, *once)]
    found = [(blocks, brief) for name, brief in named if (blocks := _find(model, name)) is not None]
    waiting = set()
    for blocks, _ in found:
        waiting |= {id(block) for block in blocks}
    lines = [_Line(list(blocks), device, brief=brief) for blocks, brief in found]
    try:
        _move_others(model, waiting, device)
        for line in lines:
            line.attach()
        yield
    finally:
        for line in lines:
            line.detach()
        _move_others(model, waiting, CPU)


def weights_of(module: nn.Module) -> list[tuple[Any, str]]:
    """Every tensor that holds weights, as its owner and the attribute to read or set, in a fixed order.

    Of a quantized weight these are the tensors inside it.
    """
    found: list[tuple[Any, str]] = []
    for owner in module.modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is not None:
                found += _inside(tensor)
    return found


def _inside(tensor: Tensor) -> Iterator[tuple[Any, str]]:
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # bitsandbytes: packed weights, and their scales beside them
        yield tensor, "data"
        yield from _of_state(state)
    elif hasattr(tensor, "__tensor_flatten__"):  # optimum-quanto: a tensor made of tensors
        made: Any = tensor
        yield from ((tensor, name) for name in made.__tensor_flatten__()[0])
    else:
        yield tensor, "data"


def _of_state(state: Any) -> Iterator[tuple[Any, str]]:
    yield from ((state, name) for name in ("absmax", "code", "offset") if isinstance(getattr(state, name), Tensor))
    if state.state2 is not None:
        yield from _of_state(state.state2)


def _copied(block: nn.Module, device: torch.device) -> nn.Module:
    """A block of its own with the same weights, on the device.

    Every weight is remade. Left to themselves, bitsandbytes' tensors copy all that they are views of, a whole block's
    file for each of them (3 GB a block of UMT5-XXL); optimum-quanto's cannot be deep-copied, and their own `.to` may
    turn fp8 weights into a kernel's form that is compiled first.
    """
    remade: dict[int, Any] = {}
    for parameter in block.parameters():
        _remake(parameter, device, remade)
    for buffer in block.buffers():
        remade[id(buffer)] = buffer.to(device, copy=True)
    return copy.deepcopy(block, remade)


def _remake(parameter: Any, device: torch.device, remade: dict[int, Any]) -> None:
    """The same parameter on the device, and what its layer refers to beside it, under the old ones' ids."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        made = remade[id(state)] = _state_copied(state, device)
        told = {name: getattr(parameter, name) for name in ("blocksize", "quant_type", "bnb_quantized")}
        remade[id(parameter)] = type(parameter)(parameter.data.to(device, copy=True), quant_state=made, **told)
        return
    if hasattr(parameter, "__tensor_flatten__"):
        names, layout = parameter.__tensor_flatten__()
        inner = {name: getattr(parameter, name).to(device, copy=True) for name in names}
        whole = type(parameter).__tensor_unflatten__(inner, layout, parameter.size(), parameter.stride())
    else:
        whole = parameter.data.to(device, copy=True)
    remade[id(parameter)] = nn.Parameter(whole, requires_grad=False)


def _state_copied(state: Any, device: torch.device) -> Any:
    made = copy.copy(state)
    for owner, name in _of_state(state):
        if owner is state:
            setattr(made, name, getattr(state, name).to(device, copy=True))
    if state.state2 is not None:
        made.state2 = _state_copied(state.state2, device)
    return made


def _find(model: nn.Module, name: str) -> nn.ModuleList | None:
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.ModuleList) and len(module) else None


def _move_others(module: nn.Module, waiting: set[int], device: torch.device) -> None:
    """What is outside the blocks, wherever it hangs in the tree."""
    if id(module) in waiting:
        return
    if not any(id(inner) in waiting for inner in module.modules()):
        module.to(device)
        return
    for child in module.children():
        _move_others(child, waiting, device)
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                tensor.data = tensor.data.to(device)


@torch.no_grad()
def move_into_file(block: nn.Module, folder: Path) -> None:
    """The block's weights become views of a file, which the system pages in and out, instead of lying in memory.

    Args:
        folder: has to outlive the block.

    Raises:
        OSError: the disk is full; the block is then as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Never a name twice: Windows neither deletes nor rewrites a file that an earlier model still maps.
    path = folder / f"{secrets.token_hex(8)}.bin"
    spots = weights_of(block)
    sizes = [-(-_num_bytes(getattr(*spot)) // 64) * 64 for spot in spots]
    with path.open("wb") as written:  # a full disk is an error here; met through a mapped file it ends the process
        for spot, size in zip(spots, sizes, strict=True):
            tensor = getattr(*spot)
            written.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            written.write(bytes(size - _num_bytes(tensor)))
    file = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.uint8)
    start = 0
    for (owner, name), size in zip(spots, sizes, strict=True):
        tensor = getattr(owner, name)
        setattr(owner, name, file[start : start + _num_bytes(tensor)].view(tensor.dtype).view(tensor.shape))
        start += size


def _dress(visitor: nn.Module, owner: nn.Module) -> None:
    """What differs between equal blocks beside their weights: a LoRA's hooks, the number of a layer."""
    for here, there in zip(visitor.modules(), owner.modules(), strict=True):
        here._forward_hooks = there._forward_hooks
        plain = {name: value for name, value in there.__dict__.items() if isinstance(value, (bool, int, float, str))}
        here.__dict__.update(plain)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pinned(like: list[Tensor]) -> list[Tensor]:
    """Memory that the card reads by itself; where the system gives no more of it (WSL2 has little), plain memory."""
    try:
        return [torch.empty_like(tensor, pin_memory=True) for tensor in like]
    except RuntimeError as error:
        log.warning("Blocks visit the card more slowly: no pinned memory (%s).", str(error).splitlines()[0])
        return [torch.empty_like(tensor) for tensor in like]


# --- one list of blocks ---------------------------------------------------------------------------------------------


class _Place:
    """Room for one block on the device."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.tensors: list[Tensor] = [getattr(*spot) for spot in weights_of(block)]
        self.pinned: list[Tensor] = []
        self.holds = -1  # whose weights are in it
        self.filling: Future[None] | None = None
        self.filled: Any = None  # CUDA event: the last copy into it has ended
        self.free: Any = None  # CUDA event: the last forward in it has ended


class _Line:
    """Blocks that are run in their order, again and again, or once per clip."""

    def __init__(self, blocks: list[nn.Module], device: torch.device, *, brief: bool) -> None:
        self._blocks = blocks
        self._device = device
        self._brief = brief
        self._sources: list[list[Tensor]] = [[getattr(*spot) for spot in weights_of(block)] for block in blocks]
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks") if self._cuda else None
        self._kinds = [tuple((t.shape, t.dtype) for t in tensors) for tensors in self._sources]
        # Blocks as they are now: who wraps a forward later (a step cache) wraps what this line does, not its copies.
        self._models = {kind: _copied(blocks[self._kinds.index(kind)], CPU) for kind in dict.fromkeys(self._kinds)}
        self._places: dict[Any, list[_Place]] = {}
        self._own = [block.__dict__.get("forward") for block in blocks]  # of whoever wrapped a block's before (cards)

    def attach(self) -> None:
        """Take the blocks' forwards over."""
        for index, block in enumerate(self._blocks):
            block.forward = partial(self._forward, index)

    def detach(self) -> None:
        """Give the forwards back, and the device's memory."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._stream is not None:
            self._stream.synchronize()  # the block that would have been next may still be on its way into its place
        for block, own in zip(self._blocks, self._own, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.forward = own
        self._places.clear()

    def _forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        place = self._begin(index)
        if place.filling is not None:
            place.filling.result()
            place.filling = None
        if place.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(place.filled)
        _dress(place.block, self._blocks[index])
        result = place.block(*args, **kwargs)
        last = index + 1 == len(self._blocks)
        if self._brief and last:
            self._places.clear()
            return result
        if self._cuda:
            place.free = torch.cuda.current_stream(self._device).record_event()
            self._begin(0 if last else index + 1)
        return result

    def _begin(self, index: int) -> _Place:
        """The place that holds this block's weights, or is being filled with them from now on."""
        kind = self._kinds[index]
        places = self._places.setdefault(kind, [])
        place = next((each for each in places if each.holds == index), None)
        if place is not None:
            return place
        if len(places) < min(PLACES, self._kinds.count(kind)):
            places.insert(0, _Place(_copied(self._models[kind], self._device)))
        place = places.pop(0)  # the one that has waited longest
        places.append(place)
        place.holds = index
        if self._thread is None:
            self._fill(place, index)
        else:
            place.filling = self._thread.submit(self._fill, place, index)
        return place

    @torch.no_grad()
    def _fill(self, place: _Place, index: int) -> None:
        """Copy one block's weights in. On CUDA this runs in the thread, through pinned memory."""
        try:
            sources = self._sources[index]
            if not self._cuda:
                for target, source in zip(place.tensors, sources, strict=True):
                    target.copy_(source)
                return
            if place.filled is not None:
                place.filled.synchronize()  # until then its pinned memory is being read
            place.pinned = place.pinned or _pinned(sources)
            for target, source in zip(place.pinned, sources, strict=True):
                target.copy_(source)
            with torch.cuda.stream(self._stream):
                if place.free is not None:
                    torch.cuda.current_stream(self._device).wait_event(place.free)
                for target, source in zip(place.tensors, place.pinned, strict=True):
                    target.copy_(source, non_blocking=True)
                place.filled = torch.cuda.current_stream(self._device).record_event()
        except BaseException:
            place.holds = -1
            raise
