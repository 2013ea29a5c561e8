"""Prompts, pictures and clips in the model's terms, and latents back to frames."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image

from engine import paths, presets, tiny
from engine.job import GenerateJob, Subject, make_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import StudioError
from engine.models import encoders
from engine.models import vae as decode
from engine.models.vae import _weights, clip_latents, decode_frames, decode_preview, picture_latents, to_levels
from engine.pipelines import encode
from engine.pipelines.prompt import clean, render_prompt
from tests.support.jobs import prepared


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def preset(folder):
    return tiny.preset_of(folder)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(torch.device("cpu"))


def _picture(seed: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _saved(folder: Path, seed: int) -> dict[str, str]:
    path = folder / f"{seed}.png"
    Image.fromarray(_picture(seed)).save(path)
    return {"path": str(path)}


def _job(folder: Path, **changes) -> GenerateJob:
    subjects = [
        {"name": "fox", "pictures": [_saved(folder, 1)]},
        {"name": "kite", "pictures": [_saved(folder, 2), _saved(folder, 3)]},
    ]
    values = {"prompt": "@fox chases @kite", "subjects": subjects, "sampling": {"guidance": "chained"}, **changes}
    return make_job(**values)


# --- mentions ---


def _cast(*nouns: str) -> list[Subject]:
    names = ("fox", "kite", "red_car")
    return [Subject(name=n, noun=noun, pictures=({"path": "x"},)) for n, noun in zip(names, nouns, strict=False)]


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("@fox chases @kite on a beach", "subject 1, a fox, chases subject 2, a kite, on a beach"),
        ("@kite over @fox", "subject 2, a kite, over subject 1, a fox"),
        ("@fox, then @kite. @fox waves.", "subject 1, a fox, then subject 2, a kite. subject 1 waves."),
        ("On a beach @Fox  waves", "On a beach subject 1, a fox, waves"),
        ("@fox's hat and @kite", "subject 1, a fox's hat and subject 2, a kite"),
    ],
)
def test_a_mention_becomes_its_slot_and_its_kind_once(prompt, written):
    assert render_prompt(prompt, _cast("", ""), "slot") == written


def test_a_noun_takes_its_article_and_keeps_its_own():
    cast = _cast("orange fox", "the old kite", "")
    assert render_prompt("@fox, @kite, @red_car", cast, "slot") == (
        "subject 1, an orange fox, subject 2, the old kite, subject 3, a red car"
    )


def test_a_model_without_slots_reads_nouns():
    cast = _cast("red fox", "kite")
    assert render_prompt("@fox sees @kite and @fox runs", cast, "noun") == "a red fox sees a kite and the red fox runs"


# --- text and VLM ---


def test_text_states_are_zero_behind_the_text_and_as_long_as_the_model_was_taught(pool, preset):
    states = encoders.text_states(["a fox", ""], pool.part("tokenizer", preset), pool.part("text_encoder", preset))
    assert states.shape == (2, tiny.TEXT_TOKENS, tiny.TEXT_DIM)
    written = states.abs().sum(-1) > 0
    assert written.sum(1).tolist() == [6, 1]  # five letters and the end; the end alone


def test_the_vlm_reads_a_batch_as_it_reads_each_alone(pool, preset):
    words, vlm = pool.part("vlm_tokenizer", preset), pool.part("vlm", preset)
    prompts = ["subject 1 runs", "subject 2 follows subject 1 for a while"]
    shown = [[[_picture(1)], [_picture(2), _picture(3)]], []]
    states, mask = encoders.vlm_states(prompts, shown, words, vlm)
    for row in range(2):
        alone, there = encoders.vlm_states(prompts[row : row + 1], shown[row : row + 1], words, vlm)
        assert bool(there.all()) and mask[row].sum() == alone.shape[1]
        torch.testing.assert_close(states[row, : alone.shape[1]], alone[0], rtol=0, atol=1e-4)


def test_what_a_picture_shows_reaches_the_words_behind_it(pool, preset):
    words, vlm = pool.part("vlm_tokenizer", preset), pool.part("vlm", preset)
    one, other = (encoders.vlm_states(["it runs"], [[[_picture(seed)]]], words, vlm)[0] for seed in (1, 2))
    assert (one[0, -1] - other[0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [64, 128, 500])
def test_a_picture_takes_at_most_64_tokens_of_the_vlm(pool, preset, size):
    inputs = encoders.vlm_inputs(
        ["x"], [[[_picture(1, size)]]], pool.part("vlm_tokenizer", preset), pool.part("vlm", preset)
    )
    count = int(inputs["mm_token_type_ids"].sum())
    assert 0 < count <= encoders.PICTURE_TOKENS
    assert count == 16 or size > 64


# --- pictures and clips ---


def test_a_picture_is_a_clip_of_one_frame_in_normalised_latents(pool, preset):
    vae = pool.part("vae", preset)
    picture = _picture(1)
    latents = picture_latents([picture], vae)
    assert latents.shape == (1, tiny.LATENT_CHANNELS, 16, 16)
    clip = clip_latents(torch.from_numpy(picture)[None, None], vae)
    assert torch.equal(clip[:, :, 0], latents)
    vae.register_to_config(latents_mean=[1.0] * 16, latents_std=[2.0] * 16)
    torch.testing.assert_close(picture_latents([picture], vae), (latents - 1) / 2)
    vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)


@pytest.mark.parametrize("latent_frames", [1, 2, 5])
def test_decoding_frame_by_frame_equals_decoding_at_once(pool, preset, latent_frames):
    vae = pool.part("vae", preset)
    latents = torch.randn(1, tiny.LATENT_CHANNELS, latent_frames, 6, 10)
    groups = list(decode_frames(latents, vae))
    assert [len(group) for group in groups] == [1] + [4] * (latent_frames - 1)
    streamed = np.concatenate([np.stack(group) for group in groups])
    with torch.no_grad():
        whole = to_levels(vae.decode(latents).sample[0])
    assert np.array_equal(streamed, whole)


@pytest.mark.parametrize("length", [5, 16, 17, 30, 33, 40, 61, 104])
def test_the_weights_of_all_tiles_sum_to_one_everywhere(length, monkeypatch):
    monkeypatch.setattr(decode, "OVERLAP", 24)
    total = torch.zeros(length * 4)
    for start, weight in _weights(length, 16, 4, torch.device("cpu")).items():
        assert weight.min() > 0
        total[start * 4 : start * 4 + len(weight)] += weight
    assert torch.allclose(total, torch.ones_like(total))


def test_a_clip_decoded_in_tiles_looks_like_the_clip_decoded_whole(monkeypatch):
    toybox = presets.load("toybox")
    pool = ModelPool(torch.device("cpu"))
    vae = pool.part("vae", toybox)
    clip = torch.from_numpy(video.read_frames(paths.ROOT / "assets/sanity.mp4", display_scale=toybox.display_scale)[:5])
    latents = clip_latents(clip[None], vae)
    whole = list(decode_frames(latents, vae))
    monkeypatch.setattr(decode, "TILE", 40)
    monkeypatch.setattr(decode, "OVERLAP", 16)
    tiled = list(decode_frames(latents, vae, tiled=True))
    assert [len(group) for group in tiled] == [len(group) for group in whole]
    error = np.concatenate(tiled).astype(float) - np.concatenate(whole)
    assert 0 < (error**2).mean() < 255**2 / 10**3, "at least 30 dB, and not the same: it was cut into tiles"


def test_decoding_a_longer_clip_takes_no_more_memory(pool, preset):
    vae = pool.part("vae", preset)
    latents = torch.randn(1, tiny.LATENT_CHANNELS, 9, 4, 4)
    alive = []
    for _ in decode_frames(latents, vae):
        tensors = {id(t): t for t in gc.get_objects() if type(t) is torch.Tensor}
        alive.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        del tensors
    assert alive[-1] == alive[2]  # the feature cache is full after the second group


def test_a_preview_shows_a_few_frames_side_by_side(pool, preset):
    strip = decode_preview(torch.randn(1, tiny.LATENT_CHANNELS, 3, 8, 8), pool.part("vae", preset))
    assert strip.shape == (32, 3 * 32, 3) and strip.dtype == np.uint8


def test_a_frame_of_nan_is_an_error_not_a_black_frame(pool, preset):
    latents = torch.full((1, tiny.LATENT_CHANNELS, 1, 8, 8), float("nan"))
    with pytest.raises(StudioError, match="NaN"):
        list(decode_frames(latents, pool.part("vae", preset)))


TEXTS = (
    "a \u201cred\u201d fox\u2019s  den",
    "caf\u00c3\u00a9 &amp;amp; \t rain\n",
    "\uff26\uff4f\uff58 &lt;3",
    " a fox, a kite ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_cleaned_as_wans_own_programs_clean_it(text):
    assert clean(text) == prompt_clean(text)
    assert clean(clean(text)) == clean(text)
    assert render_prompt(f"{text} @fox", [Subject(name="fox", pictures=[{"path": "-"}])], "noun").startswith(
        clean(text)
    )


def test_a_negative_prompt_is_cleaned_too(tmp_path, pool, preset):
    typographic, plain = (
        encode.encode_job(prepared(_job(tmp_path, negative_prompt=f"blur{mark}s edge"), preset), pool)
        for mark in ("\u2019", "'")
    )
    assert torch.equal(typographic.negative_prompt_embeds, plain.negative_prompt_embeds)


# --- a whole job ---


def test_a_job_is_read_with_padding_for_missing_pictures(tmp_path, pool, preset):
    encoded = encode.encode_job(prepared(_job(tmp_path), preset), pool)
    references = encoded.references
    assert references is not None and references.latents is not None and references.mask is not None
    assert references.latents.shape == (1, 2, 2, tiny.LATENT_CHANNELS, 16, 16)
    assert references.mask.tolist() == [[[True, False], [True, True]]] and references.weights is None
    assert references.vlm_states is not None and references.vlm_states.shape[-1] == tiny.VLM_DIM
    assert encoded.prompt_embeds.shape == encoded.negative_prompt_embeds.shape


def test_without_subjects_nothing_but_the_text_is_read(tmp_path, pool, preset):
    assert encode.encode_job(prepared(make_job(prompt="a beach"), preset), pool).references is None
    job = _job(tmp_path)
    silent = job.model_copy(
        update={"subjects": tuple(subject.model_copy(update={"weight": 0.0}) for subject in job.subjects)}
    )
    assert encode.encode_job(prepared(silent, preset), pool).references is None


def test_nothing_is_encoded_twice(tmp_path, preset):
    pool = ModelPool(torch.device("cpu"))
    first = encode.encode_job(prepared(_job(tmp_path), preset), pool)
    loaded = dict(pool._parts)
    for part in loaded:
        pool._parts[part] = (loaded[part][0], torch.nn.Module())  # an encoder that is asked again fails now
    second = encode.encode_job(prepared(_job(tmp_path, seed=5), preset), pool)
    assert torch.equal(first.prompt_embeds, second.prompt_embeds)
    assert first.references is not None and second.references is not None
    assert torch.equal(first.references.latents, second.references.latents)
    with pytest.raises(AttributeError):
        encode.encode_job(prepared(_job(tmp_path, prompt="@kite chases @fox"), preset), pool)


def test_a_subject_of_no_weight_is_shown_to_nobody(tmp_path, pool, preset):
    job = _job(tmp_path)
    silent = job.model_copy(update={"subjects": (job.subjects[0].model_copy(update={"weight": 0.0}), job.subjects[1])})
    encoded = encode.encode_job(prepared(silent, preset), pool)
    assert encoded.references is not None and encoded.references.mask is not None
    assert encoded.references.mask.tolist() == [[[False, False], [True, True]]]
    full = encode.encode_job(prepared(job, preset), pool).references
    assert full is not None and full.vlm_states is not None and encoded.references.vlm_states is not None
    assert full.vlm_states.shape[1] - encoded.references.vlm_states.shape[1] == 16 + 2  # its picture and two marks
