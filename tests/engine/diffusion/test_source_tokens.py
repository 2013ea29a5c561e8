"""Pictures as sources beside the clip: Bernini-R's published sampler, and what must hold whatever the weights."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from engine import presets, run, tiny
from engine.diffusion import conditioning, guidance, solvers
from engine.diffusion.conditioning import Encoded
from engine.job import GenerateJob, Sampling, make_job
from engine.loading.offload import move_into_file, offload_blocks
from engine.loading.pool import ModelPool
from engine.media import pictures, video
from engine.paths import ROOT
from engine.pipelines import encode, generate
from engine.pipelines.prompt import render_job, render_prompt
from engine.presets import Preset
from engine.resolve import resolve
from tests.support.jobs import prepared

# bytedance/Bernini 8c805a5 (its `sample` and its preparation of pictures) was run once on the weights that this holds.
FIXTURE = ROOT / "tests" / "fixtures" / "bernini.safetensors"
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
BRANCHES: tuple[guidance.Branch, ...] = ("none", "subjects", "text", "full")


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def held() -> dict[str, Tensor]:
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def transformer(held: dict[str, Tensor]) -> WanTransformer3DModel:
    """The library's own class: Bernini's weights have its names and shapes."""
    model = WanTransformer3DModel(**SIZES)
    model.load_state_dict({key[6:]: tensor.float() for key, tensor in held.items() if key.startswith("model.")})
    return model.eval().requires_grad_(False)


def encoded_of(case: dict[str, Tensor]) -> Encoded:
    sources = tuple(case[f"ref{number}"] for number in range(sum(name.startswith("ref") for name in case)))
    return Encoded(case["prompt"], case["negative"], sources=sources)


def of(held: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    return {name.removeprefix(case + "."): tensor for name, tensor in held.items() if name.startswith(case + ".")}


def final(transformer: Any, case: dict[str, Tensor], kind: Any = "apg") -> Tensor:
    """The clip that the preset's settings draw from the case's noise, in six steps."""
    conditions = conditioning.prepare("sources", transformer, encoded_of(case))
    settings = Sampling(guidance=kind, subject_scale=4.5, text_scale=4.0)
    solver = solvers.wan_unipc(6, 5.0)
    predict = generate.guided_prediction(settings, conditions, solver)
    return solvers.denoise(case["noise"], predict, solver, lambda step: None)


# --- the published sampler ---


@pytest.mark.parametrize("case", ["0.8x12", "1.8x12", "1.12x8", "2.8x12", "2.12x8", "4.8x12", "4.12x8", "7.8x12"])
def test_sources_beside_the_clip_are_berninis_published_sampler(transformer, held, case: str) -> None:
    """Of its `r2v_apg`; without pictures of `t2v_apg`, and with seven on numbers between those of training."""
    theirs = of(held, case)
    mine = final(transformer, theirs)
    assert float((mine - theirs["latents"]).abs().max()) < 1e-4 < float(mine.std())


def test_a_push_that_is_too_long_is_shortened_as_theirs(transformer, held, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = of(held, "limit")
    assert float((final(transformer, theirs) - theirs["latents"]).abs().max()) > 1e-2
    monkeypatch.setattr(guidance, "LONGEST", 4.0)
    assert float((final(transformer, theirs) - theirs["latents"]).abs().max()) < 1e-4


def test_dual_guidance_is_their_chain_without_projection(transformer, held) -> None:
    theirs = of(held, "chain")
    assert float((final(transformer, theirs, "dual") - theirs["latents"]).abs().max()) < 1e-4


def test_a_picture_gets_the_size_that_their_preparation_gives_it(held) -> None:
    for width, height, *theirs in held["sizes"].tolist():
        square = np.full((624, 624, 3), 255, np.uint8)
        square[:height, :width] = 7
        assert list(pictures.resize_to_multiple(square, 16).shape) == [*theirs[::-1], 3]


# --- what must hold ---


@pytest.fixture
def seen() -> tuple[Tensor, Encoded]:
    """Noisy latents, and two pictures of different sizes."""
    sources = torch.randn(1, 4, 1, 4, 6), torch.randn(1, 4, 1, 8, 2)
    return torch.randn(1, 4, 3, 6, 8), Encoded(torch.randn(1, 12, 16), torch.randn(1, 12, 16), sources=sources)


def test_without_pictures_it_is_plain_wan_bit_for_bit(transformer, seen) -> None:
    noisy, encoded = seen
    nobody = Encoded(encoded.prompt_embeds, encoded.negative_prompt_embeds)
    plain = conditioning.prepare("none", transformer, nobody)
    for branch in BRANCHES:
        expected = plain.predict(noisy, 0.7, branch)
        assert torch.equal(conditioning.prepare("sources", transformer, nobody).predict(noisy, 0.7, branch), expected)
        some = conditioning.prepare("sources", transformer, encoded).predict(noisy, 0.7, branch)
        assert torch.equal(some, expected) == (branch in ("none", "text"))


def test_pictures_are_read_and_never_come_into_the_clip(transformer, seen) -> None:
    noisy, encoded = seen
    conditions = conditioning.prepare("sources", transformer, encoded)
    assert conditions.lead == 0
    assert all(conditions.predict(noisy, 0.7, branch).shape == noisy.shape for branch in BRANCHES)


def test_pictures_are_told_apart_by_their_order_alone(transformer, seen) -> None:
    noisy, encoded = seen

    def full(*sources: Tensor) -> Tensor:
        of_these = Encoded(encoded.prompt_embeds, encoded.negative_prompt_embeds, sources=sources)
        return conditioning.prepare("sources", transformer, of_these).predict(noisy, 0.7, "full")

    one, two = encoded.sources
    assert float((full(one, two) - full(two, one)).abs().max()) > 1e-3
    assert float((full(one, one) - full(one)).abs().max()) > 1e-3


@pytest.mark.parametrize("in_a_file", [False, True])
def test_blocks_that_wait_outside_the_device_predict_the_same_bit_for_bit(
    transformer, seen, tmp_path: Path, in_a_file: bool
) -> None:
    noisy, encoded = seen
    expected = [conditioning.prepare("sources", transformer, encoded).predict(noisy, 0.7, b) for b in BRANCHES]
    for block in transformer.blocks if in_a_file else ():
        move_into_file(block, tmp_path)
    with offload_blocks(transformer, ["blocks"], torch.device("cpu")):
        conditions = conditioning.prepare("sources", transformer, encoded)
        assert all(torch.equal(conditions.predict(noisy, 0.7, b), e) for b, e in zip(BRANCHES, expected, strict=True))


# --- a job ---


def job(*shapes: tuple[int, int], **changes: Any) -> GenerateJob:
    """A subject for each picture, whose whole rectangle is drawn in a square of 64."""

    def picture(width: int, height: int) -> dict[str, str]:
        square, buffer = np.full((64, 64, 3), 255, np.uint8), io.BytesIO()
        square[2 : 2 + height, 2 : 2 + width] = np.random.default_rng(width).integers(0, 240, (height, width, 3))
        Image.fromarray(square).save(buffer, "PNG")
        return {"png": b64encode(buffer.getvalue()).decode()}

    names = ("ann", "ben", "cat")[: len(shapes)]
    subjects = [{"name": n, "noun": f"big {n}", "pictures": [picture(*s)]} for n, s in zip(names, shapes, strict=True)]
    return make_job(prompt=" and ".join("@" + name for name in names) + " meet", subjects=subjects, **changes)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    made = tiny.preset_of(tiny.write_tiny(tmp_path_factory.mktemp("sources")))
    return made.model_copy(update={"conditioning": "sources", "mention": "image", "size_multiple": 8})


def test_every_picture_is_encoded_at_its_own_size_in_the_order_of_the_subjects(preset: Preset) -> None:
    pool, made = ModelPool(torch.device("cpu")), job((40, 16), (23, 60))
    first, second = encode.encode_job(prepared(made, preset), pool).sources
    assert (first.shape[2:], second.shape[2:]) == ((1, 4, 10), (1, 16, 6))  # 4 pixels each; 23 x 60 becomes 24 x 64
    ann, ben = made.subjects
    half = ann.model_copy(update={"weight": 0.5}), ben.model_copy(update={"weight": 0.0})
    [alone] = encode.encode_job(prepared(made.model_copy(update={"subjects": half}), preset), pool).sources
    torch.testing.assert_close(alone, 0.5 * first)


def test_a_mention_names_the_pictures_by_their_numbers_among_those_that_are_shown() -> None:
    made = job((40, 16), (24, 60), (30, 30))
    ann, ben, cat = made.subjects
    ben = ben.model_copy(update={"weight": 0.0, "noun": "my ben"})
    cat = cat.model_copy(update={"pictures": cat.pictures * 2})
    written = render_prompt("@cat, @ann and @ben. @ann waves.", (ann, ben, cat), "image")
    expected = "the big cat from image1 and image2, the big ann from image0 and my ben. the big ann from image0 waves."
    assert written == expected


def test_the_prompt_says_first_what_is_asked_for(preset: Preset) -> None:
    words = "You are a helpful assistant specialized in"
    somebody, nobody = job((40, 16)), make_job(prompt="a beach")
    assert render_job(resolve(somebody, preset)) == f"{words} subject-to-video generation.the big ann from image0 meet"
    assert render_job(resolve(nobody, preset)) == f"{words} text-to-video generation.a beach"
    assert render_job(resolve(nobody, preset.model_copy(update={"conditioning": "frames"}))) == "a beach"


def test_a_job_with_sources_becomes_a_clip_of_its_own_frames_alone(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    plain = {key: value for key, value in tiny.transformer().config.items() if key in SIZES}
    WanTransformer3DModel(**plain).save_pretrained(tmp_path / "wan")
    parts = preset.components.model_copy(update={"transformer": str(tmp_path / "wan")})
    monkeypatch.setattr("engine.presets.load", lambda name: preset.model_copy(update={"components": parts}))
    projected = {"guidance": "apg", "scheduler": "wan_unipc", "num_inference_steps": 4, "subject_scale": 4.5,
                 "text_scale": 4.0}  # fmt: skip
    clips = []
    for shapes in (((40, 16), (24, 60)), ((24, 60), (40, 16))):
        made = job(*shapes, width=64, height=32, num_frames=9, sampling=projected)
        saved = run.run(made, lambda message: None, outputs=tmp_path / "out")
        clips.append(video.read_frames(saved.clip, display_scale=preset.display_scale))
        assert clips[-1].shape == (9, 32, 64, 3)
    assert not np.array_equal(*clips), "who is first is seen"


def test_the_preset_draws_as_its_makers_do() -> None:
    made = presets.load("bernini-r-1.3b")
    settings = made.sampling
    assert (settings.guidance, settings.subject_scale, settings.text_scale) == ("apg", 4.5, 4.0)
    assert (settings.scheduler, settings.shift, settings.num_inference_steps) == ("wan_unipc", 5.0, 40)
    assert (made.conditioning, made.mention) == ("sources", "image")
    assert made.max_subjects == conditioning.SourceTokens.TRAINED
