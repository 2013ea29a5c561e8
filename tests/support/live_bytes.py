"""How many bytes are alive at once while something runs, on any device, the meta device above all."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made inside the block, and when they go. `known` modules are not counted."""

    def __init__(self, *known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for module in known:
            for tensor in (*module.parameters(), *module.buffers()):
                self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention that holds its result alone, as on a card; on the meta device torch writes all scores out."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield
