"""One job document on every kind of model: tiny random folders, and Wan 1.3B at its full size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from app.bench import random_files
from engine import presets, run, tiny
from engine.job import GenerateJob, make_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import StudioError
from engine.paths import ROOT

SAMPLES = ROOT / "assets" / "samples"


def document(preset: str) -> GenerateJob:
    """The same words, pictures, size and seed, whatever the model."""
    subjects = [{"name": name, "pictures": [{"path": str(SAMPLES / f"{name}.png")}]} for name in ("fox", "kite")]
    return make_job(
        preset=preset, prompt="@fox chases @kite on a beach", subjects=subjects, seed=7, width=64, height=64,
        num_frames=5, sampling={"num_inference_steps": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts for every preset, a transformer for each conditioning among them."""
    torch.set_num_threads(1)
    root = tiny.write_tiny(tmp_path_factory.mktemp("tiny"))
    shape = tiny_shape()
    plain, side = shape, shape.model_copy(update={"vace_layers": 1})
    for name, each in (("none", plain), ("frames", plain), ("side", side)):
        torch.manual_seed(0)
        random_files.wan(each).save_pretrained(root / name)
    return root


def tiny_shape() -> presets.Shape:
    config = tiny.transformer().config
    return presets.Shape(
        dim=128, num_heads=1, num_layers=2, ffn_dim=64, text_dim=config["text_dim"], freq_dim=256, in_channels=16,
        out_channels=16, patch=(1, 2, 2), vae_spatial=4,
    )  # fmt: skip


def with_parts(name: str, **parts: str) -> presets.Preset:
    """A shipped preset with other files; everything else is its own."""
    made = presets.load(name)
    none = dict.fromkeys(presets.Components.model_fields, "")
    return made.model_copy(update={"components": presets.Components(**{**none, **parts})})


@pytest.mark.parametrize("name", ["toybox", "wan-1.3b", "phantom-1.3b", "refalign-1.3b", "vace-1.3b"])
def test_one_document_makes_a_clip_on_every_kind_of_model(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = presets.load(name)
    parts = {part: str(folder / part) for part in ("vae", "text_encoder", "tokenizer", "vlm", "vlm_tokenizer")}
    parts["transformer"] = str(folder / ("transformer" if name == "toybox" else own.conditioning))
    if name != "toybox":
        parts |= {"vlm": "", "vlm_tokenizer": ""}
    made = with_parts(name, **parts)
    monkeypatch.setattr("engine.presets.load", lambda _: made)
    saved = run.run(document(name), lambda message: None, outputs=tmp_path, pool=ModelPool(torch.device("cpu")))
    assert saved.num_frames == 5
    told = [note for note in saved.notes if "@fox and @kite were not used" in note]
    assert len(told) == (own.conditioning == "none")


def test_a_file_of_another_size_than_the_plan_was_made_for_is_refused(folder: Path, tmp_path: Path) -> None:
    source = next((folder / "frames").glob("*.safetensors"))
    file = shutil.copy(source, tmp_path / "called-1.3B.safetensors")
    shape = tiny_shape()
    fitting = with_parts("phantom-1.3b", transformer=str(file)).model_copy(update={"shape": shape})
    pool = ModelPool(torch.device("cpu"))
    assert pool.part("transformer", fitting) is not None
    larger = fitting.model_copy(update={"shape": shape.model_copy(update={"dim": 256, "num_heads": 2})})
    with pytest.raises(StudioError, match="Wan of another size: dim 128, not 256"):
        ModelPool(torch.device("cpu")).part("transformer", larger)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not stay behind for the next three runs, as `tmp_path` does: it holds 6 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_same_document_makes_a_clip_on_wan_at_its_full_size(
    folder: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.3B in fp32 as one file of 5.7 GB, in Wan's own names, and Wan's own VAE; only the encoder is small."""
    preset = presets.load("phantom-1.3b")
    assert preset.shape is not None
    shapes = random_files.shapes_of(lambda: random_files.wan(preset.shape))
    transformer = room / "phantom.safetensors"
    assert random_files.write_random(transformer, random_files.in_wans_names(shapes)) == 4 * 1_418_996_800
    random_files.WRITERS["vae"](preset, room / "vae")
    words = UMT5Config(vocab_size=len(tiny.tokenizer()), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1)
    UMT5EncoderModel(words).save_pretrained(room / "text_encoder")
    parts = {part: str(room / part) for part in ("vae", "text_encoder")}
    made = with_parts(preset.name, transformer=str(transformer), tokenizer=str(folder / "tokenizer"), **parts)
    monkeypatch.setattr("engine.presets.load", lambda _: made)
    saved = run.run(document(preset.name), lambda message: None, outputs=room, pool=ModelPool(torch.device("cpu")))
    assert saved.num_frames == 5
    assert video.read_frames(saved.clip).std() > 0
