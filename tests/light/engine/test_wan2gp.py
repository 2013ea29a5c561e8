"""Settings of Wan2GP become a job; what cannot be carried over is said, and nothing hostile gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from app.library.clips import open_clip
from engine import presets, wan2gp
from engine.media import video
from engine.messages import StudioError
from engine.resolve import resolve

# The settings of one clip, as they are written with it.
SETTINGS: dict[str, Any] = {
    "type": "WanGP v10.951 by DeepBeepMeep - Phantom 14B",
    "model_type": "phantom_14B",
    "settings_version": 2.74,
    "image_mode": 0,
    "prompt": "A red fox runs along the beach, kite@home above it",
    "negative_prompt": "blurry",
    "resolution": "832x480",
    "video_length": 81,
    "seed": 1234567890123,
    "num_inference_steps": 25,
    "guidance_scale": 5,
    "flow_shift": 7,
    "video_prompt_type": "I",
    "activated_loras": ["https://example.invalid/style.safetensors", "motion.safetensors"],
    "loras_multipliers": "0.8 1;0",
}


@pytest.fixture
def phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A studio that has a preset for Phantom beside the toybox, and one of the LoRAs."""
    toybox = presets.load("toybox")
    size = toybox.sizes[0]
    sizes = tuple(size.model_copy(update={"width": w, "height": h}) for w, h in ((832, 480), (480, 832), (624, 624)))
    update = {"name": "phantom-14b", "title": "Phantom 14B", "sizes": sizes, "size_multiple": 16, "max_frames": 121}
    folder = tmp_path / "presets"
    folder.mkdir()
    for preset in (toybox, toybox.model_copy(update=update)):
        (folder / f"{preset.name}.json").write_text(preset.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(presets, "PRESETS", folder)
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    (tmp_path / "models" / "loras").mkdir(parents=True)
    (tmp_path / "models" / "loras" / "style.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("model", wan2gp.NEAREST)
def test_every_model_that_has_a_preset_here_is_drawn_with_it(model: str) -> None:
    found = wan2gp.read(json.dumps({**SETTINGS, "model_type": model}))
    assert found.job.preset == wan2gp.NEAREST[model][0] and "model" not in found.said


def clip(folder: Path, settings: dict[str, Any], name: str = "wan2gp.mp4") -> Path:
    with video.ClipWriter(folder / name, fps=16, size=(64, 64), document=json.dumps(settings)) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    return folder / name


def read(**changes: Any) -> wan2gp.ForeignJob:
    return wan2gp.read(json.dumps({**SETTINGS, **changes}))


def test_a_clip_of_wan2gp_opens_with_prompt_seed_size_length_and_steps(phantom: Path) -> None:
    found = open_clip(clip(phantom, SETTINGS))
    job = found.job
    assert (job.preset, job.prompt) == ("phantom-14b", "A red fox runs along the beach, kitehome above it")
    assert (job.seed, job.width, job.height, job.num_frames) == (1234567890123, 832, 480, 81)
    assert (job.sampling.num_inference_steps, job.sampling.shift, job.sampling.guidance_scale) == (25, 7, 5)
    assert job.negative_prompt == "blurry"
    assert [(lora.path, lora.weight) for lora in job.loras] == [("style.safetensors", 0.8)]
    assert found.said == (
        "From Wan2GP, to be drawn with Phantom 14B; not carried over: 1 LoRA and its reference pictures."
    )
    resolve(job)


def test_without_its_model_the_first_preset_takes_its_place_with_a_size_and_length_of_its_own(phantom: Path) -> None:
    found = read(model_type="hunyuan", video_length=600, activated_loras=[])
    job, toybox = found.job, presets.load("toybox")
    assert (job.preset, job.width, job.height) == ("toybox", toybox.sizes[0].width, toybox.sizes[0].height)
    assert job.num_frames == toybox.max_frames
    assert (job.sampling.shift, job.sampling.guidance_scale) == (None, None)
    for said in ("its model (hunyuan)", "its length of 600 frames", "its size of 832 x 480", "its reference pictures"):
        assert said in found.said
    resolve(job)


def test_a_finetune_is_known_by_its_base_and_a_tall_clip_stays_tall(phantom: Path) -> None:
    job = read(model_type="my_phantom", base_model_type="phantom_14B", resolution="1080x1920").job
    assert (job.preset, job.width, job.height) == ("phantom-14b", 480, 832)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_of_wan2gp_opens_as_a_clip_of_one_frame(phantom: Path, suffix: str) -> None:
    path, words = phantom / f"picture.{suffix}", json.dumps({**SETTINGS, "image_mode": 1, "prompt": "Ein Füchslein"})
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_itxt("comment", words)
    exif.get_ifd(wan2gp.EXIF_FOLDER)[wan2gp.USER_COMMENT] = b"UNICODE\0" + words.encode("utf-16-le")
    Image.new("RGB", (64, 64)).save(path, **({"pnginfo": text} if suffix == "png" else {"exif": exif}))
    job = open_clip(path).job
    assert (job.num_frames, job.prompt) == (1, "Ein Füchslein" if suffix == "png" else json.loads(words)["prompt"])


def test_our_own_documents_are_never_taken_for_wan2gps(tmp_path: Path) -> None:
    assert not wan2gp.is_foreign('{"version": 3, "preset": "toybox", "prompt": "a beach"}')
    for text in ("", "[1]", "{", '{"type": "WanGP"}', "just a comment", "[" * 9000, "{" * 9000, "1" * 2**21):
        assert not wan2gp.is_foreign(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "letter.jpg").write_bytes(b"Dear aunt,")
    for name, said in (("plain.png", "carries no settings"), ("letter.jpg", "cannot be read as a picture")):
        with pytest.raises(StudioError, match=said):
            open_clip(tmp_path / name)


HOSTILE = [
    True,
    None,
    -1,
    1e308,
    -1e308,
    10**400,
    float("nan"),
    float("inf"),
    "9" * 500,
    [],
    {},
    [[[]]],
    {"a": 1},
    "\0",
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:12])
def test_a_hostile_value_in_any_place_is_left_behind(phantom: Path, value: object) -> None:
    for field in SETTINGS:
        if field == "prompt":
            continue
        found = wan2gp.read(json.dumps({**SETTINGS, field: value}))
        assert resolve(found.job).document.prompt and len(found.said) < 400
    with pytest.raises(StudioError):
        wan2gp.read(json.dumps({**SETTINGS, "prompt": None}))


def test_a_lora_is_only_a_name_to_look_for(phantom: Path) -> None:
    (phantom / "secret.safetensors").write_bytes(b"")
    for path in ("../../secret.safetensors", str(phantom / "secret.safetensors"), "\\\\server\\x\\secret.safetensors"):
        assert read(activated_loras=[path], loras_multipliers="").job.loras == ()
    assert len(read(activated_loras=["style.safetensors"] * 50, loras_multipliers="").job.loras) == 8
