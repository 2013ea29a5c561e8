"""LoRAs in whole clips: what the document keeps, what comes after, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app import cli
from engine import presets, tiny
from engine.job import GenerateJob, Lora, make_job, read_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import Cancelled, Message, Progress, Saved, StudioError
from engine.pipelines.files import KeptLatents
from engine.resolve import resolve
from engine.run import run

QUICK = ["--steps", "2", "--frames", "5"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(torch.device("cpu"))


@pytest.fixture
def shelf(tiny_toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models with one LoRA, for the toybox of random weights."""
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "models" / "loras"
    folder.mkdir(parents=True)
    write_lora(folder / "style.safetensors", seed=5)
    return folder


def write_lora(path: Path, seed: int, **more: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(seed)
    halves = {
        f"diffusion_model.blocks.{block}.{layer}.{half}.weight": torch.randn(*shape, generator=generator) * 0.2
        for block in range(3)
        for layer in ("self_attn.q", "self_attn.v", "cross_attn.o")
        for half, shape in (("lora_A", (4, 48)), ("lora_B", (48, 4)))
    }
    save_file(halves | more, path)


def job(*loras: dict) -> GenerateJob:
    sampling = {"num_inference_steps": 2}
    return make_job(prompt="a beach", seed=3, num_frames=5, sampling=sampling, loras=loras)


def make(wanted: GenerateJob, folder: Path, pool: ModelPool) -> tuple[np.ndarray, Saved, list[Message]]:
    heard: list[Message] = []
    saved = run(wanted, heard.append, outputs=folder, pool=pool)
    return frames(saved.clip), saved, heard


def frames(clip: Path) -> np.ndarray:
    return video.read_frames(clip, display_scale=presets.load("toybox").display_scale)


STYLE = {"path": "style.safetensors"}


def test_a_lora_changes_the_clip_says_how_it_fits_and_leaves_the_worker_as_it_was(shelf, tmp_path, pool):
    before, _, _ = make(job(), tmp_path / "a", pool)
    styled, saved, heard = make(job(STYLE), tmp_path / "b", pool)
    after, _, _ = make(job(), tmp_path / "c", pool)
    nought, _, _ = make(job({**STYLE, "weight": 0}), tmp_path / "d", pool)
    assert not np.array_equal(before, styled)
    assert np.array_equal(before, after) and np.array_equal(before, nought)
    assert "18 of 18 weights of style.safetensors." in [m.note for m in heard if isinstance(m, Progress)]
    make(job(STYLE), tmp_path / "e", pool)
    held = pool.part("transformer", presets.load("toybox"))
    assert not any(module._forward_hooks for module in held.modules()), "gone with its clip, not with the next one"
    assert saved.notes == ()


def test_a_clip_that_is_cancelled_takes_its_lora_with_it(shelf, tmp_path, pool):
    before, _, _ = make(job(), tmp_path / "a", pool)

    def stop(message: Message) -> None:
        if isinstance(message, Progress) and message.stage == "sample":
            raise Cancelled

    with pytest.raises(Cancelled):
        run(job(STYLE), stop, outputs=tmp_path / "b", pool=pool)
    assert np.array_equal(make(job(), tmp_path / "c", pool)[0], before)


def test_the_document_keeps_name_weight_and_hash_and_makes_the_clip_again(shelf, tmp_path, pool):
    styled, saved, _ = make(job({"path": str(shelf / "style.safetensors"), "weight": 0.5}), tmp_path / "a", pool)
    inside = read_job(video.read_document(saved.clip) or "")
    assert (inside.loras[0].path, inside.loras[0].weight) == ("style.safetensors", 0.5)
    assert len(inside.loras[0].sha256) == 64
    assert np.array_equal(make(inside, tmp_path / "b", pool)[0], styled)
    write_lora(shelf / "style.safetensors", seed=6)
    with pytest.raises(StudioError, match=rf"style\.safetensors is another file.*{inside.loras[0].sha256[:12]}"):
        make(inside, tmp_path / "c", pool)
    (shelf / "style.safetensors").unlink()
    with pytest.raises(StudioError, match=rf"style\.safetensors, {inside.loras[0].sha256[:12]}.* is not here"):
        make(inside, tmp_path / "c", pool)


def test_a_lora_of_the_subject_tower_alone_is_there_when_the_subjects_are_read(shelf, tmp_path, pool):
    """The identity cache is made once per clip; made before the LoRA came, it would know nothing of it."""
    picture = tmp_path / "fox.png"
    Image.new("RGB", (64, 64), "orange").save(picture)
    subject = {"name": "fox", "pictures": [{"path": str(picture)}], "cut_out": False}
    plain = make_job(**{**job().model_dump(), "prompt": "@fox runs", "subjects": [subject]})
    halves = {"base_model.model.subject_blocks.0.to_v.lora_A.weight": torch.randn(4, 48)}
    halves["base_model.model.subject_blocks.0.to_v.lora_B.weight"] = torch.randn(48, 4)
    save_file(halves, shelf / "tower.safetensors")
    before, _, _ = make(plain, tmp_path / "a", pool)
    tower = Lora(path="tower.safetensors")
    assert not np.array_equal(make(plain.model_copy(update={"loras": (tower,)}), tmp_path / "b", pool)[0], before)
    assert np.array_equal(make(plain, tmp_path / "c", pool)[0], before)


def test_weights_without_a_place_are_noted_with_the_clip(shelf, tmp_path, pool):
    write_lora(
        shelf / "part.safetensors", 5, **{"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.ones(4, 48)}
    )
    _, saved, _ = make(job({"path": "part.safetensors"}), tmp_path / "a", pool)
    assert saved.notes == (
        "18 of 19 weights of part.safetensors; this model has no place for "
        "diffusion_model.blocks.9.self_attn.q.lora_A.weight.",
    )


def test_what_was_noted_is_said_also_where_only_the_decoding_was_tried_again(shelf, tmp_path, pool):
    write_lora(
        shelf / "part.safetensors", 5, **{"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.ones(4, 48)}
    )
    heard: list[str] = []

    def say(message: Message) -> None:
        if isinstance(message, Progress):
            heard.append(message.stage)
            if message.stage == "decode" and heard.count("decode") == 2:
                raise MemoryError

    saved = run(job({"path": "part.safetensors"}), say, outputs=tmp_path / "a", pool=pool)
    assert "sample" not in heard[heard.index("decode") :] and heard.count("decode") > 3
    assert [note.split(";")[0] for note in saved.notes] == ["18 of 19 weights of part.safetensors"]


def test_a_presets_own_few_step_lora_is_merged_and_another_preset_loads_the_weights_anew(
    shelf, tiny_toybox, tmp_path, monkeypatch, pool
):
    before, _, _ = make(job(), tmp_path / "a", pool)
    beside, _, _ = make(job(STYLE), tmp_path / "b", pool)
    toybox = presets.load("toybox")
    parts = toybox.components.model_copy(update={"distill": "loras/style.safetensors"})
    quick = toybox.model_copy(update={"name": "quick", "components": parts})
    folder = tmp_path / "presets"
    folder.mkdir()
    for preset in (toybox, quick):
        (folder / f"{preset.name}.json").write_text(preset.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(presets, "PRESETS", folder)
    merged, _, _ = make(job().model_copy(update={"preset": "quick"}), tmp_path / "c", pool)
    assert np.abs(merged.astype(int) - beside).max() <= 3 and not np.array_equal(merged, before)
    assert np.array_equal(make(job(), tmp_path / "d", pool)[0], before)


def test_latents_that_were_drawn_with_another_few_step_lora_are_not_taken_over(shelf, tiny_toybox, tmp_path):
    toybox = presets.load("toybox")
    parts = toybox.components.model_copy(update={"distill": "loras/style.safetensors"})
    quick, target = toybox.model_copy(update={"components": parts}), tmp_path / "clip.mp4"
    drawn = torch.ones(1, 2, 1, 2, 2), ("a note",)
    KeptLatents(target, resolve(job(), quick)).write(*drawn)
    again = KeptLatents(target, resolve(job(), quick)).read(torch.device("cpu"))
    assert again is not None and torch.equal(again[0], drawn[0]) and again[1] == drawn[1]
    write_lora(shelf / "style.safetensors", seed=9)
    assert KeptLatents(target, resolve(job(), quick)).read(torch.device("cpu")) is None


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_verb_takes_files_and_names_with_weights_and_a_clip_brings_its_own(
    shelf, tmp_path, monkeypatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "here=odd.safetensors", seed=7)
    base = ["generate", "--prompt", "a beach", "--seed", "7", *QUICK]
    chosen = ["--lora", "style.safetensors=0.5", "--lora", "here=odd.safetensors"]
    assert cli.main([*base, *chosen, "--out", "first.mp4"]) == 0
    loras = read_job((tmp_path / "first.json").read_bytes()).loras
    assert [(lora.path, lora.weight) for lora in loras] == [("style.safetensors", 0.5), ("here=odd.safetensors", 1.0)]
    (tmp_path / "here=odd.safetensors").rename(shelf / "here=odd.safetensors")
    assert cli.main(["generate", "first.mp4", "--out", "second.mp4"]) == 0
    assert np.array_equal(frames(tmp_path / "first.mp4"), frames(tmp_path / "second.mp4"))
    assert cli.main(["generate", "first.mp4", "--lora", "style.safetensors=0", "--out", "third.mp4"]) == 0
    assert not np.array_equal(frames(tmp_path / "first.mp4"), frames(tmp_path / "third.mp4"))
    capfd.readouterr()
    for wrong, said in (("style.safetensors=x", "not understood"), ("gone.safetensors", "is not here")):
        assert cli.main([*base, "--lora", wrong, "--out", "no.mp4"]) == 1
        assert said in capfd.readouterr().err


def test_tiny_components_name_no_few_step_lora(tmp_path):
    assert tiny.preset_of(tmp_path).components.distill == ""
