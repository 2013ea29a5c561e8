"""Clips and pictures of Wan2GP: what this studio can make of the settings they carry.

In:  the text inside an mp4 or mkv, or a picture file.
Out: a `GenerateJob` for the nearest preset that is here, and one sentence on what was not carried over.
Knows nothing of torch and opens no file that a document names. No value is trusted: it is carried over only where its
type is right and it is within its limits.

Wan2GP writes its settings as one JSON object: into the comment of an mp4 or mkv, the text chunk "comment" of a png, the
EXIF user comment of a jpg or webp. Its own mark is `type`, "WanGP v<version> by DeepBeepMeep - <model>"; reference
pictures and videos are never in it, only letters that say that there were some.
Source: github.com/deepbeepmeep/Wan2GP, 8681e9f: shared/utils/video_metadata.py, shared/utils/audio_video.py,
docs/SETTINGS.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine import lora_files, presets
from engine.job import GenerateJob, make_job, read_job
from engine.media import video
from engine.messages import StudioError
from engine.presets import Preset
from engine.resolve import check_side

MAX_SETTINGS = 2**20  # characters; Wan2GP's own are a few thousand
MAX_PROMPT = 4000  # of one of our documents
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
USER_COMMENT, EXIF_FOLDER = 0x9286, 0x8769  # EXIF's numbers
# Wan2GP's models, and the presets that come nearest. What is not here gets the first preset there is.
NEAREST: Mapping[str, Sequence[str]] = {
    "phantom_1.3B": ("phantom-1.3b", "refalign-1.3b", "wan-1.3b"),
    "phantom_14B": ("phantom-14b", "wan-14b", "phantom-1.3b"),
    "vace_1.3B": ("vace-1.3b", "wan-1.3b"),
    "vace_14B": ("vace-14b", "vace-1.3b", "wan-14b"),
    "bernini_1.3B": ("bernini-r-1.3b", "wan-1.3b"),
    "t2v_1.3B": ("wan-1.3b",),
    "t2v": ("wan-14b", "wan-1.3b"),
}
# The letters that say what else a clip was made from.
MEDIA = {
    ("video_prompt_type", "I"): "its reference pictures",
    ("video_prompt_type", "V"): "its control video",
    ("video_prompt_type", "A"): "its mask",
    ("image_prompt_type", "S"): "its first picture",
    ("image_prompt_type", "E"): "its last picture",
    ("image_prompt_type", "V"): "the video it goes on from",
    ("image_prompt_type", "L"): "the video it goes on from",
}


@dataclass(frozen=True)
class ForeignJob:
    """A job from a file; `said` is one sentence on what is not the same where another program wrote it."""

    job: GenerateJob
    said: str


def is_foreign(text: str) -> bool:
    """Whether a document is Wan2GP's. The studio's own documents never have these names."""
    if len(text) > MAX_SETTINGS or not text.lstrip().startswith("{"):
        return False
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(values, dict) or "prompt" not in values:
        return False
    return "WanGP" in str(values.get("type", ""))[:80] or {"model_type", "settings_version"} <= set(values)


def read_picture(path: Path) -> str:
    """The settings that Wan2GP put into a picture.

    Raises:
        StudioError: no picture, or none of Wan2GP's.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            comment = image.info.get("comment") or image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StudioError(
            f"{path.name} cannot be read as a picture.",
            f"It is damaged, or of another kind ({str(error)[:80]}).",
            "Use the file as it was saved.",
        ) from None
    text = _decode_comment(comment)
    if not is_foreign(text):
        raise StudioError(
            f"{path.name} carries no settings.",
            "Only pictures of Wan2GP are read, and sites that re-encode pictures drop what they carry.",
            "Use the file as Wan2GP saved it, or a clip.",
        )
    return text


def _decode_comment(comment: object) -> str:
    """EXIF says its encoding in the first eight bytes."""
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes):
        return ""
    if comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-le", "replace")
    return comment.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace")


def read_file(path: Path) -> ForeignJob | None:
    """The job that a clip, or a picture of Wan2GP, carries: our own document or Wan2GP's settings; None if nothing.

    Raises:
        StudioError: it cannot be read, or what it carries is no job.
    """
    if path.suffix.lower() in PICTURES:
        return read(read_picture(path))
    text = video.read_document(path)
    if text is None:
        return None
    if is_foreign(text):
        return read(text)
    return ForeignJob(read_job(text), "")


def read(text: str) -> ForeignJob:
    """The job in Wan2GP's settings.

    Raises:
        StudioError: there is no prompt in them.
    """
    values: dict[str, Any] = json.loads(text)
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise StudioError(
            "These settings of Wan2GP hold no prompt.",
            "It is all that another model could follow.",
            "Write the prompt yourself, in Generate.",
            field="prompt",
        )
    model, preset = _nearest_preset(values)
    same = preset.name in NEAREST.get(model, ())
    left: list[str] = []
    if not same:
        left.append(f"its model ({model or 'unnamed'})")
    if len(prompt) > MAX_PROMPT:
        left.append("the end of its prompt")
    job = {
        "preset": preset.name,
        # Its prompts mention nobody: an @ would ask for a subject.
        "prompt": re.sub(r"@(?=[A-Za-z])", "", prompt[:MAX_PROMPT]),
        "seed": _seed(values, left),
        "num_frames": _frames(values, preset, left),
        **_size(values, preset, left),
        "sampling": _sampling(values, preset, same, left),
        "loras": _loras(values, left),
    }
    if isinstance(negative := values.get("negative_prompt"), str) and negative.strip():
        job["negative_prompt"] = negative[:MAX_PROMPT]
    for (key, letter), medium in MEDIA.items():
        if letter in _short_text(values.get(key)) and medium not in left:
            left.append(medium)
    said = f"From Wan2GP, to be drawn with {preset.title}"
    if left:
        said += f"; not carried over: {_join_phrases(left)}"
    return ForeignJob(make_job(**job), f"{said}.")


def _short_text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return value[:200]


def _join_phrases(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _nearest_preset(values: Mapping[str, Any]) -> tuple[str, Preset]:
    """Its model's name, and the preset that takes its place."""
    here = presets.names()
    named = [_short_text(values.get(key)) for key in ("model_type", "base_model_type")]
    named = [name for name in named if name]
    for name in named:
        for preset in NEAREST.get(name, ()):
            if preset in here:
                return name, presets.load(preset)
    shown = ""
    if named:
        shown = re.sub(r"[^\w. -]", "", named[0])[:40]
    return shown, presets.load(here[0])


def _number_within(value: object, low: float, high: float) -> float | None:
    """A number within limits; nothing for anything else, such as True, NaN or "many"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not low <= value <= high:  # NaN among them
        return None
    return value


def _integer_within(value: object, low: int, high: int) -> int | None:
    """A whole number within limits, or nothing."""
    number = _number_within(value, low, high)
    if number is None or number != int(number):
        return None
    return int(number)


def _seed(values: Mapping[str, Any], left: list[str]) -> int:
    seed = _integer_within(values.get("seed"), 0, 2**63 - 1)
    if seed is None:
        left.append("its seed")
    return seed or 0


def _frames(values: Mapping[str, Any], preset: Preset, left: list[str]) -> int:
    """Its length, or the nearest one that the preset makes."""
    if _integer_within(values.get("image_mode"), 1, 9):
        return 1
    wanted = _integer_within(values.get("video_length"), 1, 100_000)
    if wanted is None:
        left.append("its length")
        return preset.num_frames
    taken = min((wanted - 1) // 4 * 4 + 1, (preset.max_frames - 1) // 4 * 4 + 1)
    if taken != wanted:
        left.append(f"its length of {wanted} frames")
    return taken


def _size(values: Mapping[str, Any], preset: Preset, left: list[str]) -> dict[str, int]:
    """Its size where the preset takes it, else that one of the preset's own whose shape is nearest."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", _short_text(values.get("resolution")).strip())
    if found is None:
        left.append("its size")
        return {}
    width, height = int(found[1]), int(found[2])
    try:
        return {
            "width": check_side(width, "width", preset),
            "height": check_side(height, "height", preset),
        }
    except StudioError:
        left.append(f"its size of {width} x {height}")
    shape = math.log(max(width, 1) / max(height, 1))
    size = min(preset.sizes, key=lambda size: abs(math.log(size.width / size.height) - shape))
    return {"width": size.width, "height": size.height}


def _sampling(values: Mapping[str, Any], preset: Preset, same: bool, left: list[str]) -> dict[str, Any]:
    """Steps always; shift and the weight of guidance only for the very model they were chosen for."""
    sampling: dict[str, Any] = {}
    steps = _integer_within(values.get("num_inference_steps"), 1, 100)
    if steps is None:
        left.append("its number of steps")
    else:
        sampling["num_inference_steps"] = steps
    shift = _number_within(values.get("flow_shift"), 0.1, 20.0)
    if same and shift is not None:
        sampling["shift"] = shift
    scale = _number_within(values.get("guidance_scale"), 0.0, 20.0)
    if same and scale is not None and preset.sampling.guidance == "cfg":
        sampling["guidance_scale"] = scale
    return sampling


def _loras(values: Mapping[str, Any], left: list[str]) -> list[dict[str, Any]]:
    """Those of its LoRAs whose files lie in this studio's folder, by their names alone; nothing is fetched."""
    listed = values.get("activated_loras")
    if not isinstance(listed, list):
        return []
    texts = [_short_text(name) for name in listed]
    given = [lora_files.base_name(text) for text in texts if text]
    here = {lora_files.base_name(name) for name in lora_files.names()}
    weights = _short_text(values.get("loras_multipliers")).replace("|", " ").split()
    taken: list[dict[str, Any]] = []
    missing = 0
    for place, name in enumerate(given):
        weight: float | None = 1.0
        if place < len(weights):
            weight = _parse_weight(weights[place])
        if name in here and weight is not None and len(taken) < 8:
            taken.append({"path": name, "weight": weight})
        else:
            missing += 1
    if missing == 1:
        left.append("1 LoRA")
    elif missing:
        left.append(f"{missing} LoRAs")
    return taken


def _parse_weight(text: str) -> float | None:
    """A plain number; one for each step or phase ("1;0", "0.9,0.8") cannot be said here."""
    try:
        return _number_within(float(text), -4.0, 4.0)
    except ValueError:
        return None
