"""A card that is not there: tensors that say "cuda", compute on the processor, and are refused where a card refuses.

In:  a block of code.
Out: inside it `torch.device("cuda")` can be used. What is put on the card stays there, mixing it with the processor
     raises, numpy wants `cpu` first, a generator has to be of the device, and what streams do is watched by torch's own
     race detector (`torch.cuda._sanitizer`), pinned memory and memory that is given back included.
Knows nothing of the engine. Numbers are the processor's, so what a card makes can be compared bit for bit.

A tensor is on the card when its storage bears the mark. Python's calls (`.to`, `.device`, `device=`) are seen by a
function mode, everything below them by a dispatch mode; both belong to a thread, and `Pool` takes them along.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._sanitizer import ArgumentHandler, EventHandler, zip_arguments
from torch.cuda._utils import _get_device_index
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
HOST, MAIN = -1, 0  # numbers of streams: what the processor itself does, and the card's first stream
DEVICE, IS_CUDA, IS_CPU = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
ACROSS = ("aten::copy_", "aten::_to_copy", "aten::set_")  # both sides may differ
PICKING = ("aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")  # by numbers from the processor, too


def on_card(tensor: Tensor) -> bool:
    """Whether a tensor, or what it is made of, lies on the card."""
    if hasattr(tensor, "__tensor_flatten__"):
        return any(on_card(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return getattr(tensor.untyped_storage(), "on_card", False)


class Card:
    """The card's book: which memory is its own, and which stream touched it last."""

    def __init__(self, watched: bool) -> None:
        self.watched = watched
        self.races: list[str] = []
        self.memory, self.pinnable, self.fraction = 8 * 10**9, True, 1.0
        self._events = EventHandler()
        self._numbers = iter(range(1, 10**9))
        self._here = threading.local()
        self._lock = threading.RLock()
        for stream in (HOST, MAIN):
            self._events._handle_stream_creation(stream)

    def mark(self, values: Any, there: bool) -> None:
        """Put what was just made on the card, or off it."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not hasattr(tensor, "__tensor_flatten__"):
                storage = tensor.untyped_storage()
                if there and not getattr(storage, "on_card", False):
                    weakref.finalize(storage, self._freed, storage.data_ptr())
                storage.on_card = there

    def hold_to(self, fraction: float, device: Any = None) -> None:
        """`torch.cuda.set_per_process_memory_fraction`, as choosy about its device as the real one."""
        if device is not None:
            _get_device_index(device)
        self.fraction = fraction

    # --- streams ---

    def current(self) -> Stream:
        """The stream that this thread's work goes to."""
        return getattr(self._here, "stream", None) or Stream(self, MAIN)

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, self._here.stream = self.current(), stream
        yield
        self._here.stream = before

    def new(self) -> int:
        """A number for a stream or an event."""
        return next(self._numbers)

    def told(self, name: str, *what: int) -> None:
        """Something about streams has happened; see the detector's own names."""
        with self._lock:
            getattr(self._events, f"_handle_{name}")(*what)

    def launched(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One operation, on this thread's stream if the card takes part in it, else on the processor."""
        if not self.watched:
            return
        touched = _Touched()
        touched.parse_inputs(func._schema, args, kwargs, is_factory=False)
        touched.parse_outputs(func._schema, out, is_factory=False)
        stream = self.current().number if touched.card else HOST
        with self._lock:
            if stream != HOST:  # what the processor did before, it did before
                now = self.new()
                self._events._handle_event_creation(now)
                self._events._handle_event_record(now, HOST)
                self._events._handle_event_wait(now, stream)
            found = self._events._handle_kernel_launch(
                stream,
                touched.dataptrs_read - touched.dataptrs_written,
                touched.dataptrs_written,
                touched.outputs,
                str(func),
                touched.tensor_aliases,
            )
            self.races += [str(error).split("\n\n")[0] for error in found]
            given = zip_arguments(func._schema, args, kwargs)
            waited = not any(value for argument, value in given if argument.name == "non_blocking")
            if touched.card and touched.processor and waited:
                self._events._handle_stream_synchronization(stream)  # a plain copy from or to the card is waited for

    def _freed(self, pointer: int) -> None:
        """The first stream's next tensor may lie there: whoever else still works on it would write into that."""
        with self._lock:
            seen = self._events.tensors_accessed.accesses.pop(pointer, None)
            for access in [] if seen is None else [*seen.reads, *([seen.write] if seen.write else [])]:
                if not self._events.syncs.is_ordered_after(MAIN, access.seq_num, access.stream):
                    self.races.append(f"memory is given back while stream {access.stream} works on it")


class _Touched(ArgumentHandler):
    """What an operation reads and writes: on the card, and in pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.card = self.processor = False

    def _handle_argument(
        self, value: Any, is_write: bool, metadata_only: bool, name: str | None = None, is_output: bool = False
    ) -> None:
        if not isinstance(value, Tensor) or hasattr(value, "__tensor_flatten__"):
            return
        storage = value.untyped_storage()
        there = getattr(storage, "on_card", False)
        self.card, self.processor = self.card or there, self.processor or bool(value.dim() and not there)
        if metadata_only or not (there or getattr(storage, "pinned", False)):
            return
        (self.dataptrs_written if is_write else self.dataptrs_read).add(storage.data_ptr())
        self.tensor_aliases.setdefault(storage.data_ptr(), []).append(name or "")


class Stream:
    """As much of `torch.cuda.Stream` as is used."""

    def __init__(self, card: Card, number: int | None = None) -> None:
        self.card, self.number = card, card.new() if number is None else number
        if number is None:
            card.told("stream_creation", self.number)

    def record_event(self) -> Event:
        """A mark in this stream."""
        event = Event(self.card)
        self.card.told("event_record", event.number, self.number)
        return event

    def wait_event(self, event: Event) -> None:
        """Go on when the mark is reached."""
        self.card.told("event_wait", event.number, self.number)

    def synchronize(self) -> None:
        """Wait until everything in it is done."""
        self.card.told("stream_synchronization", self.number)


class Event:
    """As much of `torch.cuda.Event` as is used."""

    def __init__(self, card: Card) -> None:
        self.card, self.number = card, card.new()
        card.told("event_creation", self.number)

    def synchronize(self) -> None:
        """Wait until the mark is reached."""
        self.card.told("event_synchronization", self.number)


class _Calls(TorchFunctionMode):
    """Python's calls: where they want something to be, and where it is."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in (DEVICE, IS_CUDA, IS_CPU):
            there = on_card(args[0])
            return (CARD if there else func(*args)) if func == DEVICE else there == (func == IS_CUDA)
        if name in ("numpy", "__array__") and on_card(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return self._moved(name, *args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if pinned and not self.card.pinnable:
            raise torch.AcceleratorError("CUDA error: out of memory")
        wanted = kwargs.pop("device", None)
        if wanted is not None:
            kwargs["device"] = CPU if torch.device(wanted).type == "cuda" else wanted
        generator = kwargs.get("generator")
        if generator is not None and (generator in CARDS_OWN) != (torch.device(wanted or "cpu").type == "cuda"):
            raise RuntimeError(f"Expected a '{torch.device(wanted or 'cpu').type}' generator device but found another")
        made = func(*args, **kwargs)
        if wanted is not None and torch.device(wanted).type != "meta":
            self.card.mark(made, torch.device(wanted).type == "cuda")
        elif name == "new_tensor" and on_card(args[0]):
            self.card.mark(made, True)
        if pinned:
            made.untyped_storage().on_card, made.untyped_storage().pinned = False, True
        return made

    def _moved(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`tensor.to(...)`, `.cpu()`, `.cuda()`."""
        if name == "to" and args and isinstance(args[0], Tensor):
            device, dtype, copy = (CARD if on_card(args[0]) else CPU), args[0].dtype, False
        elif name == "to":
            copy = kwargs.pop("copy", False)
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        else:
            device, dtype, copy = (CARD if name == "cuda" else CPU), None, False
        dtype = dtype or tensor.dtype
        if device is None or device.type == "meta" or (device.type == "cuda") == on_card(tensor):
            place = {"device": device} if device is not None and device.type == "meta" else {}
            return tensor.to(dtype=dtype, **place, **({"copy": True} if copy else {}))
        if hasattr(tensor, "__tensor_flatten__"):  # such a tensor moves its inner ones itself
            with self:
                asked = {"dtype": dtype, "device": device}
                moved = type(tensor).__torch_dispatch__(torch.ops.aten._to_copy.default, (), (tensor,), asked)
            self.card.mark([getattr(moved, inner) for inner in moved.__tensor_flatten__()[0]], device.type == "cuda")
            return moved
        with self:
            moved = torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False)
            return moved.copy_(tensor, non_blocking=bool(kwargs.get("non_blocking")))


class _Operations(TorchDispatchMode):
    """What is computed: all on one side, and its results there."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type != "meta"]
        there = [on_card(t) for t in given]
        wanted = kwargs.get("device")
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = CPU
        name = func._schema.name
        picks = name in PICKING or str(func) == "aten.index.Tensor"
        if any(there) and not name.startswith(ACROSS):
            strangers = [t for t, here in zip(given, there, strict=True) if not here and t.dim()]
            if strangers and not (picks and there[0]):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"(when checking {[tuple(t.shape) for t in strangers]} for {func})"
                )
        out = func(*args, **kwargs)
        if (wanted is not None and wanted.type == "cuda") or (any(there) and name != "aten::copy_"):
            self.card.mark(out, True)  # a "cpu" down here is what torch itself read off a tensor
        self.card.launched(func, args, kwargs, out)
        return out


CARDS_OWN: weakref.WeakSet[torch.Generator] = weakref.WeakSet()


@contextmanager
def _modes(card: Card) -> Iterator[None]:
    with _Calls(card), _Operations(card):
        yield


@contextmanager
def pretended(*, watched: bool = False) -> Iterator[Card]:
    """The card, for the length of a block.

    Args:
        watched: what raced on it fails the block; slow.

    Raises:
        AssertionError: two streams touched the same memory in no order.
    """
    card = Card(watched)

    class Pool(ThreadPoolExecutor):
        """Threads that see the card, too."""

        def submit(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            def seen() -> Any:
                with _modes(card):
                    return run(*args, **kwargs)

            return super().submit(seen)

    class Generator(torch.Generator):
        """A generator that knows where it belongs."""

        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, "cpu")
            if torch.device(device).type == "cuda":
                CARDS_OWN.add(made)
            return made

    wrap = torch.Tensor._make_wrapper_subclass
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in {
            "Stream": lambda device=None: Stream(card),
            "stream": card.using,
            "current_stream": lambda device=None: card.current(),
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: card.told("device_synchronization"),
            "memory_reserved": lambda device=None: 0,
            "mem_get_info": lambda device=None: (card.memory, card.memory),
            "get_device_name": lambda device=None: "a card that is not there",
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=card.memory),
            "set_per_process_memory_fraction": card.hold_to,
            "max_memory_allocated": lambda device=None: 1,
            "max_memory_reserved": lambda device=None: 1,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr("engine.loading.offload.ThreadPoolExecutor", Pool)
        patch.setattr(Tensor, "_make_wrapper_subclass", lambda *a, **k: wrap(*a, **{**k, "device": CPU}))
        with _modes(card):
            yield card
    assert not card.races, "\n".join(card.races)
