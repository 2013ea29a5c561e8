"""The parts of a preset, from folders on disk into memory.

In:  a preset and the name of a part.
Out: a loaded model or tokenizer on the right device, in the right precision, without gradients.
Knows nothing of jobs, of what the parts are used for, or of any network: only local files, only safetensors, and ONNX
for the two face networks, which OpenCV reads.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from engine import kernels, lora, machine
from engine.faces import FaceFiles
from engine.job import Lora
from engine.judges import Judges
from engine.messages import StudioError
from engine.model import IdentityWanTransformer3DModel
from engine.presets import Preset

Part = Literal[
    "transformer", "vae", "text_encoder", "tokenizer", "vlm", "vlm_tokenizer",
    "judges", "faces", "detector", "detector_tokenizer", "segmenter", "embedder",
]  # fmt: skip
JUDGES: tuple[Part, ...] = ("judges", "detector", "segmenter", "embedder")
ENCODERS: tuple[Part, ...] = ("text_encoder", "vlm")
KEEP_ENCODERS_BYTES = 2 * 2**30  # larger encoders leave memory before sampling starts
REMEMBERED_BYTES = 512 * 2**20  # encoded prompts and pictures that a warm worker keeps

disable_progress_bar()  # a bar per component says nothing; the run says how far it is


def device() -> torch.device:
    """The device this process was told to use, or else the fastest of this machine.

    Raises:
        StudioError: it was told to use one that is not there.
    """
    wanted = machine.of().device
    if wanted:
        return _present(torch.device(wanted))
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _present(wanted: torch.device) -> torch.device:
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise StudioError(
            what=f"There is no device {wanted} on this machine.",
            why=str(error).strip().splitlines()[0][:200],
            next_step="Start the studio with --devices naming those it has, or without --devices.",
        ) from error
    return wanted


def precision(part: Part, where: torch.device) -> torch.dtype:
    """bf16 on CUDA, fp32 elsewhere (on a CPU half precision crawls); the VAE in fp32 everywhere."""
    # The VAE is small, and in bf16 its flat areas show bands.
    return torch.bfloat16 if where.type == "cuda" and part != "vae" else torch.float32


def load(part: Part, folder: Path, where: torch.device, *, merge: Path | None = None) -> Any:
    """One part of a model.

    Args:
        part: which one.
        folder: in diffusers' or transformers' layout.
        where: device it goes to; whoever judges frames stays on the processor, where decoded frames are.
        merge: a LoRA that becomes a part of the weights.

    Raises:
        StudioError: a file is missing, cut short, or of another model.
    """
    if not folder.is_dir():
        raise _damaged(part, folder, "The folder is not there.")
    try:
        if part == "faces":
            return FaceFiles(folder)
        if part.endswith("tokenizer"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        where = torch.device("cpu") if part in JUDGES else where
        model = _LOADERS[part](folder, precision(part, where))
        if merge is not None:
            lora.apply(model, [Lora(path=str(merge), weight=1.0, sha256="")], merge=True)
    except StudioError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, cv2.error) as error:
        reason = str(error).strip().splitlines()
        raise _damaged(part, folder, reason[0][:200] if reason else type(error).__name__) from error
    model = model.to(where).eval().requires_grad_(False)
    if part == "transformer":
        kernels.set_up(model, machine.of())
    return model


def _transformer(folder: Path, dtype: torch.dtype) -> nn.Module:
    """With identity blocks, with VACE's side branch, or plain Wan: the folder's config says which."""
    written_by = _config(folder).get("_class_name")
    kinds = {
        kind.__name__: kind
        for kind in (IdentityWanTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel)
    }
    if written_by not in kinds:
        raise _damaged("transformer", folder, f"It holds a {written_by}, not one of {', '.join(kinds)}.")
    return _diffusers(kinds[written_by], folder, dtype, "transformer")


def _vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    return _diffusers(AutoencoderKLWan, folder, dtype, "vae")


def _diffusers(kind: Any, folder: Path, dtype: torch.dtype, part: Part) -> nn.Module:
    model, info = kind.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    _refuse_gaps(part, folder, info)
    return model


def _judges(folder: Path, dtype: torch.dtype) -> nn.Module:
    return Judges.load(folder)


def _text_encoder(folder: Path, dtype: torch.dtype) -> nn.Module:
    return _transformers(UMT5EncoderModel, folder, dtype, "text_encoder")


def _vlm(folder: Path, dtype: torch.dtype) -> nn.Module:
    return _transformers(Qwen2_5_VLForConditionalGeneration, folder, dtype, "vlm")


def _detector(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import GroundingDinoForObjectDetection

    return _transformers(GroundingDinoForObjectDetection, folder, dtype, "detector")


def _segmenter(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import Sam2Model

    return _transformers(Sam2Model, folder, dtype, "segmenter")


def _embedder(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import Dinov2Model

    return _transformers(Dinov2Model, folder, dtype, "embedder")


def _transformers(kind: Any, folder: Path, dtype: torch.dtype, part: Part) -> nn.Module:
    model, info = kind.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _refuse_gaps(part, folder, info)
    return model


_LOADERS: dict[Part, Callable[[Path, torch.dtype], nn.Module]] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "vlm": _vlm,
    "judges": _judges,
    "detector": _detector,
    "segmenter": _segmenter,
    "embedder": _embedder,
}


def _refuse_gaps(part: Part, folder: Path, info: dict[str, Any]) -> None:
    """The libraries fill missing weights with random ones and a warning; a clip from such a model is noise."""
    gaps = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in info.get(name) or ())
    if gaps:
        raise _damaged(part, folder, f"{len(gaps)} weights are missing or of another shape, the first is {gaps[0]}.")


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _damaged(part: str, folder: Path, reason: str) -> StudioError:
    return StudioError(
        what=f"The {part.replace('_', ' ')} in {folder.name} cannot be loaded.",
        why=reason,
        next_step="Fetch this model's files again, or choose another preset.",
        field="preset",
    )


# --- a warm worker --------------------------------------------------------------------------------------------------


class Warm:
    """What a worker keeps between two clips: loaded parts, and what was encoded before.

    A part is loaded again when its files have changed on disk, so a checkpoint that training has just written is the
    one that is used.
    """

    def __init__(self, where: torch.device | None = None) -> None:
        self.device = where or device()
        self._parts: dict[Part, tuple[tuple[Any, ...], Any]] = {}
        self._remembered: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def part(self, part: Part, preset: Preset) -> Any:
        """A part of this preset, from memory when it is the same as last time.

        Raises:
            StudioError: its files are missing or damaged.
        """
        place = preset.place(part)
        merge = preset.place("distill") if part == "transformer" and preset.components.distill else None
        mark = (fingerprint(place), fingerprint(merge) if merge is not None else ())
        kept = self._parts.pop(part, None)
        if kept is not None and kept[0] == mark:
            self._parts[part] = kept
            return kept[1]
        del kept  # the old one leaves before the new one comes: two large models may not fit
        loaded = load(part, place, self.device, merge=merge)
        self._parts[part] = (mark, loaded)
        return loaded

    def remembered(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The tensors made for this key before, or made now and kept; the oldest leave when there are too many."""
        if key not in self._remembered:
            self._remembered[key] = make()
        self._remembered.move_to_end(key)
        while len(self._remembered) > 1 and sum(map(_bytes, self._remembered.values())) > REMEMBERED_BYTES:
            self._remembered.popitem(last=False)
        return self._remembered[key]

    def make_room(self) -> None:
        """Encoders leave memory when they are large; the next clip with another prompt loads them again."""
        loaded: list[Part] = [part for part in ENCODERS if part in self._parts]
        if sum(num_bytes(self._parts[part][1]) for part in loaded) > KEEP_ENCODERS_BYTES:
            for part in loaded:
                del self._parts[part]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def fingerprint(place: Path) -> tuple[Any, ...]:
    """Changes when the file, or a file of the folder, does: its name, size and time of change."""
    files = sorted(place.glob("*")) if place.is_dir() else [place] if place.is_file() else []
    return (str(place), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def num_bytes(module: nn.Module) -> int:
    """Memory of a module's parameters and buffers, in bytes."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _bytes(value: Any) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(t.numel() * t.element_size() for t in parts if isinstance(t, Tensor))
