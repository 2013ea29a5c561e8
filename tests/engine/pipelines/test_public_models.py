"""The same clip as the public implementations, on the same random weights: plain Wan, VACE, Phantom."""

from __future__ import annotations

import dataclasses
import io
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanVACEPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from engine import run, tiny
from engine.diffusion import conditioning, solvers
from engine.diffusion.guidance import apply_guidance
from engine.job import GenerateJob, Sampling, make_job
from engine.loading.pool import ModelPool
from engine.media import pictures
from engine.messages import StudioError
from engine.models.identity_wan import IdentityWanTransformer3DModel
from engine.paths import ROOT
from engine.pipelines import encode
from engine.presets import Preset
from tests.support.jobs import prepared

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": tiny.LATENT_CHANNELS,
    "out_channels": tiny.LATENT_CHANNELS, "text_dim": tiny.TEXT_DIM, "freq_dim": 32, "ffn_dim": 96, "num_layers": 3,
    "rope_max_seq_len": 128,
}  # fmt: skip
SIDE = {**WAN, "vace_layers": [0, 2], "vace_in_channels": 2 * tiny.LATENT_CHANNELS + 16}
GUIDED = Sampling(
    num_inference_steps=4, scheduler="unipc", shift=5.0, guidance="dual", subject_scale=1.0, text_scale=5.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kinds(tmp_path_factory.mktemp("public"))


def write_kinds(root: Path) -> Path:
    """Tiny components, and plain Wan and VACE beside the transformer with identity blocks."""
    torch.set_num_threads(1)
    tiny.write_tiny(root)
    torch.manual_seed(3)
    WanTransformer3DModel(**WAN).save_pretrained(root / "plain")
    side = WanVACETransformer3DModel(**SIDE)
    for block in side.vace_blocks:  # zero-started in training, and a side branch that says nothing shows nothing
        torch.nn.init.normal_(block.proj_out.weight, std=0.2)
    side.save_pretrained(root / "side")
    return root


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(torch.device("cpu"))


def preset(folder: Path, transformer: str, kind: str) -> Preset:
    made = tiny.preset_of(folder)
    parts = made.components.model_copy(update={"transformer": str(folder / transformer)})
    return made.model_copy(
        update={"components": parts, "conditioning": kind, "mention": "noun", "shared_noise": 0.0, "size_multiple": 8}
    )


def job(count: int, width: int, height: int) -> GenerateJob:
    def picture(seed: int) -> dict[str, str]:
        buffer = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 240, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        return {"png": b64encode(buffer.getvalue()).decode()}

    names = ("ann", "ben", "cat", "dog")[:count]
    subjects = [{"name": name, "noun": name, "pictures": [picture(n)]} for n, name in enumerate(names)]
    prompt = f"{' and '.join('@' + name for name in names)} meet" if names else "a beach"
    return make_job(
        prompt=prompt, subjects=subjects, width=width, height=height, num_frames=17, negative_prompt="blur",
        sampling=GUIDED,
    )  # fmt: skip


def ours(made: GenerateJob, kind: Preset, pool: ModelPool, noise: Tensor) -> Tensor:
    """Final latents of the clip, with the frames that a conditioning puts in front still there."""
    encoded = encode.encode_job(prepared(made, kind), pool)
    conditions = conditioning.prepare(kind.conditioning, pool.part("transformer", kind), encoded)
    steps = solvers.UniPC(4, 5.0)
    return solvers.denoise(
        noise,
        lambda x, t: apply_guidance(made.sampling, lambda b: conditions.predict(x, t, b)),
        steps,
        lambda step: None,
    )


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def pipeline_of(cls: type, kind: Preset, pool: ModelPool):
    parts = {"transformer": pool.part("transformer", kind), "vae": pool.part("vae", kind), "scheduler": scheduler()}
    made = cls(tokenizer=None, text_encoder=None, **parts)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("width", "height"), [(32, 48), (64, 32)])
def test_plain_wan_is_diffusers_wan_pipeline(folder: Path, pool: ModelPool, width: int, height: int) -> None:
    kind, made = preset(folder, "plain", "none"), job(0, width, height)
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 5, height // 4, width // 4)
    encoded = encode.encode_job(prepared(made, kind), pool)
    theirs = pipeline_of(WanPipeline, kind, pool)(
        prompt_embeds=encoded.prompt_embeds, negative_prompt_embeds=encoded.negative_prompt_embeds, latents=noise,
        num_inference_steps=4, guidance_scale=5.0, width=width, height=height, num_frames=17, output_type="latent",
    ).frames  # fmt: skip
    mine = ours(made, kind, pool, noise)
    assert float((mine - theirs).abs().max()) < 1e-4 < float(mine.std())


@pytest.mark.parametrize(("width", "height"), [(32, 48), (64, 32)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_side_branch_is_diffusers_vace_pipeline(
    folder: Path, pool: ModelPool, count: int, width: int, height: int
) -> None:
    kind, made = preset(folder, "side", "side"), job(count, width, height)
    noise = torch.randn(1, tiny.LATENT_CHANNELS, count + 5, height // 4, width // 4)
    encoded = encode.encode_job(prepared(made, kind), pool)
    pages = [
        Image.fromarray(pictures.place_on_canvas(pictures.prepare_subject(subject, size=64)[0], width, height))
        for subject in made.subjects
    ]
    theirs = pipeline_of(WanVACEPipeline, kind, pool)(
        prompt_embeds=encoded.prompt_embeds, negative_prompt_embeds=encoded.negative_prompt_embeds, latents=noise,
        reference_images=pages, num_inference_steps=4, guidance_scale=5.0, width=width, height=height, num_frames=17,
        output_type="latent",
    ).frames  # fmt: skip
    mine = ours(made, kind, pool, noise)
    assert mine.shape == noise.shape
    theirs = theirs if theirs.shape == mine.shape else torch.cat([mine[:, :, :count], theirs], 2)
    assert float((mine - theirs).abs().max()) < 1e-4 < float(mine.std())
    alone = ours(job(0, width, height), kind, pool, noise[:, :, count:])
    assert float((alone - mine[:, :, count:]).abs().max()) > 1e-2


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_behind_the_clip_never_leak_into_it(folder: Path, pool: ModelPool, count: int) -> None:
    """The clip has its own frames alone; the pictures are seen, and only in the branches that know of subjects."""
    kind, made = preset(folder, "plain", "frames"), job(count, 32, 32)
    encoded = encode.encode_job(prepared(made, kind), pool)
    assert encoded.frames is not None and encoded.frames.shape[2] == count
    conditions = conditioning.prepare("frames", pool.part("transformer", kind), encoded)
    noisy = torch.randn(1, tiny.LATENT_CHANNELS, 3, 8, 8)
    seen = {branch: conditions.predict(noisy, 0.8, branch) for branch in ("none", "subjects", "text", "full")}
    assert all(v.shape == noisy.shape for v in seen.values()) and conditions.lead == 0
    other = conditioning.ReferenceFrames(
        pool.part("transformer", kind),
        conditioning.Encoded(encoded.prompt_embeds, encoded.negative_prompt_embeds, frames=encoded.frames.flip(3)),
    )
    for branch, v in seen.items():
        same = torch.equal(other.predict(noisy, 0.8, branch), v)
        assert same == (branch in ("none", "text"))


def test_untrained_identity_blocks_leave_pictures_behind_the_clip_as_they_are_and_trained_ones_add(
    folder: Path, pool: ModelPool
) -> None:
    """So that Phantom's weights can be what ID-Crafter is trained upon."""
    kind = preset(folder, "plain", "identity+frames")
    kind = kind.model_copy(update={"components": kind.components.model_copy(update={"vlm": "", "vlm_tokenizer": ""})})
    encoded = encode.encode_job(prepared(job(2, 32, 32), kind), pool)
    assert encoded.frames is not None and encoded.references is not None
    plain = WanTransformer3DModel.from_pretrained(folder / "plain")
    phantom = conditioning.prepare("frames", plain, dataclasses.replace(encoded, references=None))
    model = IdentityWanTransformer3DModel.from_plain_wan(plain, identity_layers=2, vlm_dim=tiny.VLM_DIM).eval()
    noisy = torch.randn(1, tiny.LATENT_CHANNELS, 3, 8, 8)
    for trained in (False, True):
        both = conditioning.prepare("identity+frames", tiny.stir(model) if trained else model, encoded)
        for branch in ("none", "subjects", "text", "full"):
            same = torch.equal(both.predict(noisy, 0.8, branch), phantom.predict(noisy, 0.8, branch))
            assert same == (not trained or branch in ("none", "text"))


def test_the_side_branch_is_silent_where_subjects_are_not_asked_for(folder: Path, pool: ModelPool) -> None:
    kind = preset(folder, "side", "side")
    transformer, noisy = pool.part("transformer", kind), torch.randn(1, tiny.LATENT_CHANNELS, 6, 8, 8)
    encoded = encode.encode_job(prepared(job(1, 32, 32), kind), pool)
    assert encoded.side is not None
    other = dataclasses.replace(encoded, side=encoded.side.flip(3))
    for branch in ("none", "subjects", "text", "full"):
        one, two = (conditioning.prepare("side", transformer, e).predict(noisy, 0.8, branch) for e in (encoded, other))
        assert torch.equal(one, two) == (branch in ("none", "text"))


def test_a_subject_of_weight_zero_is_no_frame_and_a_light_one_is_nearer_to_nobody(
    folder: Path, pool: ModelPool
) -> None:
    kind, made = preset(folder, "plain", "frames"), job(2, 32, 32)

    def frames(weight: float) -> Tensor | None:
        subjects = tuple(subject.model_copy(update={"weight": weight}) for subject in made.subjects)
        return encode.encode_job(prepared(made.model_copy(update={"subjects": subjects}), kind), pool).frames

    whole, half = frames(1.0), frames(0.5)
    assert frames(0.0) is None and whole is not None and half is not None
    torch.testing.assert_close(half, 0.5 * whole)


@pytest.mark.parametrize(
    ("transformer", "kind"), [("side", "frames"), ("side", "sources"), ("plain", "side"), ("plain", "identity")]
)
def test_a_transformer_of_another_kind_is_refused(folder: Path, pool: ModelPool, transformer: str, kind: str) -> None:
    wrong = preset(folder, transformer, kind)
    encoded = encode.encode_job(prepared(job(1, 32, 32), wrong), pool)
    with pytest.raises(StudioError, match="take"):
        conditioning.prepare(kind, pool.part("transformer", wrong), encoded)


@pytest.mark.parametrize(("transformer", "kind"), [("side", "side"), ("plain", "frames"), ("plain", "sources")])
def test_a_clip_of_such_a_model_has_its_own_frames_alone(
    folder: Path, pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transformer: str, kind: str
) -> None:
    made = preset(folder, transformer, kind)
    monkeypatch.setattr("engine.presets.load", lambda name: made)
    saved = run.run(job(2, 32, 32), lambda message: None, outputs=tmp_path, pool=pool)
    assert saved.num_frames == 17 and saved.clip.is_file()


# --- Phantom: its published sampler was run once, on the weights that the fixture holds ---

FIXTURE = ROOT / "tests" / "fixtures" / "phantom.safetensors"


@pytest.fixture(scope="module")
def phantom() -> tuple[WanTransformer3DModel, dict[str, Tensor]]:
    held = load_file(FIXTURE)
    weights = {key.removeprefix("model."): t.float() for key, t in held.items() if key.startswith("model.")}
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    transformer.load_state_dict(convert_wan_transformer_to_diffusers(weights))
    return transformer.eval(), held


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pictures_behind_the_clip_are_phantoms_published_sampler(phantom, count: int) -> None:
    transformer, held = phantom
    of = {name: held[f"{count}.{name}"] for name in ("refs", "noise", "prompt", "negative", "latents")}

    def padded(words: Tensor) -> Tensor:
        return torch.nn.functional.pad(words, (0, 0, 0, 12 - len(words))).unsqueeze(0)

    encoded = conditioning.Encoded(padded(of["prompt"]), padded(of["negative"]), frames=of["refs"].unsqueeze(0))
    conditions = conditioning.prepare("frames", transformer, encoded)
    settings = Sampling(guidance="dual", subject_scale=5.0, text_scale=7.5)
    clip = of["latents"].shape[1]
    mine = solvers.denoise(
        of["noise"][None, :, :clip],
        lambda x, t: apply_guidance(settings, lambda b: conditions.predict(x, t, b)),
        solvers.wan_unipc(6, 5.0),
        lambda step: None,
    )
    assert float((mine[0] - of["latents"]).abs().max()) < 1e-4 < float(mine.std())
