"""The parts of a preset, from files on disk into memory.

In:  a preset, the name of a part, and perhaps a precision for its large weights.
Out: a loaded model or tokenizer on the right device, in the right precision, without gradients.
Knows nothing of jobs, of what the parts are used for, or of any network: only local files, only safetensors and GGUF,
and ONNX for the two face networks, which OpenCV reads.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from engine.hardware.oom import which_memory
from engine.hardware.options import machine_options
from engine.loading import attention_kernels, context_parallel, offload
from engine.loading.build import build_encoder, build_transformer
from engine.loading.quantize import Precision
from engine.messages import StudioError
from engine.paths import ROOT

Part = Literal[
    "transformer", "vae", "text_encoder", "tokenizer", "vlm", "vlm_tokenizer",
    "judges", "faces", "detector", "detector_tokenizer", "segmenter", "embedder",
]  # fmt: skip
JUDGES: tuple[Part, ...] = ("judges", "detector", "segmenter", "embedder")
ENCODERS: tuple[Part, ...] = ("text_encoder", "vlm")
ONE_FILE: tuple[Part, ...] = ("transformer", "text_encoder")
"""Lists of blocks that may visit the device one by one: those that run in every step, and those that run once."""
CARDS = {"cuda": torch.cuda, "xpu": torch.xpu}  # devices with a memory of their own; both modules speak alike
CPU = torch.device("cpu")

disable_progress_bar()  # a bar per component says nothing; the run says how far it is


def device() -> torch.device:
    """The device this process was told to use, or else the fastest of this machine.

    Raises:
        StudioError: it was told to use one that is not there.
    """
    wanted = machine_options().device
    if wanted:
        return _present(torch.device(wanted))
    there = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return torch.device(next((kind for kind, backend in there.items() if backend.is_available()), "cpu"))


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


def usual_dtype(part: Part, where: torch.device) -> torch.dtype:
    """bf16 on a card, fp32 elsewhere (on a CPU half precision crawls); the VAE in fp32 everywhere."""
    # The VAE is small, and in bf16 its flat areas show bands.
    return torch.bfloat16 if where.type in CARDS and part != "vae" else torch.float32


def load_part(
    part: Part,
    place: Path,
    where: torch.device,
    precision: Precision | None = None,
    *,
    keep: torch.device | Path | None = None,
    expect: Mapping[str, int] | None = None,
    merge: Path | None = None,
    build: Callable[[Path], Any] | None = None,
    tell: Callable[[float], None] = lambda share: None,
    dtype: torch.dtype | None = None,
) -> Any:
    """One part of a model.

    Args:
        part: which one.
        place: a folder in diffusers' or transformers' layout; a transformer or a text encoder may be a single file or
            bare shards.
        where: device it computes on, which says in what; whoever judges frames stays on the processor, where decoded
            frames are.
        precision: of the large weights of the transformer, the text encoder and the VLM; None takes what the device
            computes in.
        keep: where its weights lie, if not there: blocks that visit the device wait on the processor, or in files of
            this folder, which each of them goes to before the next one is read.
        expect: "dim" and "layers" that a transformer has to have, "dim" of a text encoder's states.
        merge: a LoRA that becomes a part of the transformer's weights.
        build: makes the part from its place, where it is of a class that this module does not know (an evaluator's).
        tell: hears the share of a transformer or an encoder that is loaded, up to 1.
        dtype: what the transformer or an encoder computes in; None takes what is usual on the device.

    Raises:
        StudioError: a file is missing, cut short, or of another model; or the device has no such precision.
    """
    _check(part, place, where, precision)
    try:
        if part.endswith("tokenizer"):
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        where = CPU if part in JUDGES else where
        dtype, lies = dtype or usual_dtype(part, where), CPU if isinstance(keep, Path) else keep or where
        asked: Any = {"precision": precision, "where": lies, "expect": expect, "tell": tell}
        if isinstance(keep, Path):
            asked["settle"] = partial(offload.move_into_file, folder=keep)
        if build is not None:
            model = build(place)
        elif part == "transformer":
            model = build_transformer(place, dtype, merge=merge, **asked)
        elif part in _ENCODERS:
            model = build_encoder(_ENCODERS[part], place, dtype, **asked)
        else:
            model = _LOADERS[part](place, dtype)
    except StudioError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, cv2.error) as error:
        if which_memory(error) or _is_own_mistake(error):
            raise  # the files are whole: whoever planned this clip plans anew, and a fault of ours is told as one
        reason = str(error).strip().splitlines()
        raise _damaged(part, place, reason[0][:200] if reason else type(error).__name__) from error
    if not isinstance(model, nn.Module):
        return model  # face networks live in OpenCV
    model = model.to(lies).eval().requires_grad_(False)
    if part == "transformer":
        attention_kernels.set_up(cast(ModelMixin, model), machine_options(), where, visiting=keep is not None)
        context_parallel.split_tokens(cast(ModelMixin, model), where)
    return model


def _is_own_mistake(error: Exception) -> bool:
    """Whether a lookup or a call failed in our own code alone.

    One that passed through a library fails over what that read: a damaged file, or a config that our class cannot take.
    """
    if not isinstance(error, KeyError | TypeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return all(Path(frame.filename).is_relative_to(ROOT / "engine") for frame in frames)


def _check(part: Part, place: Path, where: torch.device, precision: Precision | None) -> None:
    if precision == "fp8" and where.type == "mps":
        raise StudioError(
            what="Weights in fp8 cannot be kept on Apple silicon.",
            why="Metal has no such numbers.",
            next_step="Choose int8, which is as small and more exact.",
            field="precision",
        )
    if not place.is_dir() and not (part in ONE_FILE and place.is_file()):
        raise _damaged(part, place, "The folder is not there.")


def _vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    return _diffusers(AutoencoderKLWan, folder, dtype, "vae")


def _diffusers(kind: Any, folder: Path, dtype: torch.dtype, part: Part) -> nn.Module:
    model, info = kind.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    _refuse_gaps(part, folder, info)
    return model


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


_ENCODERS: dict[Part, Any] = {"text_encoder": UMT5EncoderModel, "vlm": Qwen2_5_VLForConditionalGeneration}
_LOADERS: dict[Part, Callable[[Path, torch.dtype], nn.Module]] = {
    "vae": _vae,
    "detector": _detector,
    "segmenter": _segmenter,
    "embedder": _embedder,
}


def _refuse_gaps(part: Part, folder: Path, info: dict[str, Any]) -> None:
    """The libraries fill missing weights with random ones and a warning; a clip from such a model is noise."""
    gaps = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in info.get(name) or ())
    if gaps:
        raise _damaged(part, folder, f"{len(gaps)} weights are missing or of another shape, the first is {gaps[0]}.")


def _damaged(part: str, folder: Path, reason: str) -> StudioError:
    return StudioError(
        what=f"The {part.replace('_', ' ')} in {folder.name} cannot be loaded.",
        why=reason,
        next_step="Fetch this model's files again, or choose another preset.",
        field="preset",
    )
