"""What stays loaded between two clips: the parts of a preset as the plan has them, and what was encoded before.

In:  a preset, the name of a part, and the plan of the clip.
Out: the loaded part, from memory where its files have not changed; its blocks visit the device where the plan says so.
Knows nothing of jobs, of pictures, or of how a part is read from its files (`engine.loading.parts`).
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from engine.hardware.options import machine_options
from engine.hardware.plan import CONTEXT, SLACK, Fit, Plan
from engine.hardware.probe import Hardware, probe_hardware
from engine.loading import offload
from engine.loading.parts import CARDS, CPU, ENCODERS, Part, device, load_part, usual_dtype
from engine.loading.quantize import num_bytes
from engine.paths import models_dir
from engine.platform_calls import give_memory_back
from engine.presets import Preset

VISITING: dict[Part, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transformer": (("blocks", "vace_blocks"), ("subject_blocks",)),
    "text_encoder": ((), ("encoder.block",)),
    "vlm": ((), ("model.visual.blocks", "model.language_model.layers")),
}

KEEP_ENCODERS_BYTES = 2 * 2**30  # larger encoders leave memory before sampling starts

REMEMBERED_BYTES = 512 * 2**20  # encoded prompts and pictures that a pool keeps


def _expected(part: Part, place: Path, preset: Preset) -> dict[str, int] | None:
    """The sizes that a single file has to have, as its plan was made for; a folder's own config tells its sizes."""
    if preset.shape is None or not place.is_file():
        return None
    if part == "transformer":
        return {"dim": preset.shape.dim, "layers": preset.shape.num_layers}
    return {"dim": preset.shape.text_dim} if part == "text_encoder" else None


class ModelPool:
    """What a worker keeps between two clips: loaded parts, and what was encoded before.

    A part is loaded again when its files have changed on disk, so a checkpoint that training has just written is the
    one that is used.
    """

    def __init__(self, where: torch.device | None = None) -> None:
        self.device = where or device()
        self._parts: dict[Part, tuple[tuple[Any, ...], Any]] = {}
        self._remembered: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._plan: Plan | None = None
        self._tell: Callable[[Part, float], None] = lambda part, share: None

    # --- what fits ---

    def hardware(self) -> Hardware:
        """What there is to work with; what this worker holds already is counted as free, since it may let go of it."""
        found = probe_hardware("all")
        held = sum(self._held("cpu").values()) + sum(self._held("mps").values())
        ram = found.ram + held
        if self.device.type in CARDS:
            card: Any = CARDS[self.device.type]
            free, total = card.mem_get_info(self.device)
            vram = total if machine_options().profile == "all" else free + card.memory_reserved(self.device)
            name = card.get_device_name(self.device)
            found = replace(found, device=self.device.type, name=name, vram=vram, ram=ram)
            found = found.limited(machine_options().profile)
            self._hold_to(found.vram, total)
            return found
        found = replace(found, device=self.device.type, vram=ram, ram=ram)
        return found.limited(machine_options().profile)

    def _hold_to(self, vram: int, total: int) -> None:
        """Let memory run out where it ends: a profile's promise, or the card's own on Windows.

        There the driver lends the machine's memory instead of saying that the card's is full, and a step takes ten
        times as long; torch refuses by itself what it was not allowed.
        """
        whole = machine_options().profile in ("auto", "all")
        if whole and sys.platform != "win32":
            return
        allowed = vram if whole else vram - CONTEXT
        # Of the current device where this one has no number: torch takes a number or nothing here.
        where = self.device if self.device.index is not None else None
        CARDS[self.device.type].set_per_process_memory_fraction(min(1.0, allowed / total), where)

    def _held(self, device: str) -> dict[Part, int]:
        """Bytes of the models that are on a kind of device."""
        models: dict[Part, nn.Module] = {
            p: model for p, (_, model) in self._parts.items() if isinstance(model, nn.Module)
        }
        return {part: num_bytes(m) for part, m in models.items() if next(m.parameters()).device.type == device}

    def telling(self, tell: Callable[[Part, float], None]) -> None:
        """From now on `tell` hears which part is being loaded, and the share of it that is here."""
        self._tell = tell

    def follow(self, plan: Plan | None) -> None:
        """From now on parts are loaded as this plan has them; without one, whole and exact."""
        self._plan = plan

    @property
    def decodes_in_tiles(self) -> bool:
        """Whether the VAE decodes in tiles, as the plan has it."""
        return self._plan is not None and self._plan.tiled

    def empty(self) -> None:
        """Let go of every part."""
        self._drop(self._parts)

    def part(self, part: Part, preset: Preset, *, build: Callable[[Path], Any] | None = None) -> Any:
        """A part of this preset as the plan has it, from memory when it is the same as last time.

        Args:
            build: as in `load_part`.

        Raises:
            StudioError: its files are missing or damaged.
        """
        place = preset.place(part)
        merge = preset.place("distill") if part == "transformer" and preset.components.distill else None
        fit = self._fit(part)
        dtype = self._dtype(part)
        exact = "bf16" if dtype == torch.bfloat16 else "fp32"
        precision = None if fit is None or fit.precision == exact else fit.precision
        keep = None if fit is None else {"device": None, "memory": CPU, "disk": _spill_folder(part)}[fit.where]
        mark = (precision, dtype, str(keep), fingerprint(place), fingerprint(merge) if merge is not None else ())
        kept = self._parts.pop(part, None)
        if kept is not None and kept[0] == mark:
            self._parts[part] = kept
            return kept[1]
        if kept is not None:
            del kept  # the old one leaves before the new one comes: two large models may not fit
            _release_memory(self.device, [part])
        self._give_way(part)
        asked: Any = {"expect": _expected(part, place, preset), "merge": merge, "build": build, "dtype": dtype}
        loaded = load_part(part, place, self.device, precision, keep=keep, tell=partial(self._tell, part), **asked)
        self._parts[part] = (mark, loaded)
        return loaded

    @contextmanager
    def at_work(self, part: Part, preset: Preset) -> Iterator[Any]:
        """A part ready to compute on the device; where the plan says so, its blocks visit it one by one.

        Raises:
            StudioError: see `part`.
        """
        self._give_way(part)
        model = self.part(part, preset)
        with self.visiting(part, model):
            yield model

    def visiting(self, part: Part, model: Any) -> AbstractContextManager[None]:
        """For the length of a block, a loaded part's blocks visit the device, where the plan says that they do."""
        fit = self._fit(part)
        if fit is None or fit.where == "device":
            return nullcontext()
        lists, once = VISITING[part]
        return offload.offload_blocks(model, lists, self.device, once=once)

    def remembered(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The tensors made for this key before, or made now and kept; the oldest leave when there are too many."""
        if key not in self._remembered:
            self._remembered[key] = make()
        self._remembered.move_to_end(key)
        while len(self._remembered) > 1 and sum(map(_bytes, self._remembered.values())) > REMEMBERED_BYTES:
            self._remembered.popitem(last=False)
        return self._remembered[key]

    def make_room(self) -> None:
        """Everybody has read: encoders leave memory when they are large, or in the way; another prompt loads them."""
        loaded: list[Part] = [part for part in ENCODERS if part in self._parts]
        total = sum(self._size(part) for part in loaded)
        plan = self._plan
        in_the_way = plan is not None and plan.peak + total > plan.machine.vram
        if total > KEEP_ENCODERS_BYTES or in_the_way:
            self._drop(loaded)

    def _dtype(self, part: Part) -> torch.dtype:
        """What a part computes in: bf16 where the plan has that for models, else what is usual on the device."""
        if self._plan is not None and self._plan.plain == 2 and part in VISITING:
            return torch.bfloat16
        return usual_dtype(part, self.device)

    def _fit(self, part: Part) -> Fit | None:
        return None if self._plan is None else self._plan.parts.get(part)

    def _give_way(self, part: Part) -> None:
        """What would not fit beside this part at its work leaves: another large encoder, since one reads after the
        other, and whatever an earlier clip left where there is no room for both."""
        others: list[Part] = [p for p in VISITING if p in self._parts and p != part]
        if part in ENCODERS:
            self._drop([p for p in others if p in ENCODERS and self._size(p) > KEEP_ENCODERS_BYTES])
        fit = self._fit(part)
        if fit is None or self._plan is None:
            return
        here = self._plan.machine
        on_device = fit.device + fit.working + self._beside(part, self.device.type)
        in_memory = fit.memory + (0 if here.shared else self._beside(part, "cpu"))
        on_device += in_memory if here.shared else 0
        if on_device * SLACK > here.vram or in_memory > here.ram:
            self._drop([p for p in others if p in self._parts])

    def _beside(self, part: Part, device: str) -> int:
        """Bytes of all other models on a kind of device."""
        return sum(size for other, size in self._held(device).items() if other != part)

    def _size(self, part: Part) -> int:
        return num_bytes(self._parts[part][1])

    def _drop(self, parts: Iterable[Part]) -> None:
        parts = list(parts)
        if not parts:
            return
        for part in parts:
            del self._parts[part]
        _release_memory(self.device, parts)


def _release_memory(where: torch.device, parts: Iterable[Part]) -> None:
    """Give back what nothing refers to: a model may hold itself in a circle, the allocators keep what was freed, and
    the files that blocks of these parts visited from are still there."""
    gc.collect()
    give_memory_back()
    if where.type in CARDS:
        CARDS[where.type].empty_cache()
    elif where.type == "mps":
        torch.mps.empty_cache()
    for part in parts:
        shutil.rmtree(_spill_folder(part), ignore_errors=True)  # Windows keeps mapped files for a while


def _spill_folder(part: Part) -> Path:
    """Where this process keeps weights that blocks visit from; what processes that are gone have left there goes.

    Beside the models, since the system's folder for passing files may be memory itself.
    """
    root = models_dir() / ".visiting"
    for old in root.glob("*") if root.is_dir() else ():
        if not old.name.isdigit() or not psutil.pid_exists(int(old.name)):
            shutil.rmtree(old, ignore_errors=True)
    return root / str(os.getpid()) / part


def fingerprint(place: Path) -> tuple[Any, ...]:
    """Changes when the file, or a file of the folder, does: its name, size and time of change."""
    files = sorted(place.glob("*")) if place.is_dir() else [place] if place.is_file() else []
    return (str(place), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def _bytes(value: Any) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(t.numel() * t.element_size() for t in parts if isinstance(t, Tensor))
