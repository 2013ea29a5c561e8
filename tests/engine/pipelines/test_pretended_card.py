"""The whole engine on a card that is not there: every tensor of a run lies where it should, and no two streams race.

What cannot be told so: kernels that only a card has, its memory, its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optimum.quanto import WeightQBytesTensor

from engine import presets, run, tiny
from engine.hardware.plan import Plan, make_plan
from engine.hardware.probe import GB, Hardware
from engine.job import make_job
from engine.loading import build, quantize
from engine.loading.offload import offload_blocks
from engine.loading.parts import load_part
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import StudioError
from engine.models import vae
from engine.models.subject_tower import References
from engine.resolve import ResolvedJob
from tests.engine.loading.test_lora_clips import write_lora
from tests.engine.pipelines.test_public_models import job, preset, write_kinds
from tests.support.pretend_card import CARD, CPU, on_card, pretended

SAMPLING = {"num_inference_steps": 4, "shift": 5.0, "guidance_scale": 4.0, "subject_scale": 3.0, "text_scale": 5.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_kinds(tmp_path_factory.mktemp("card"))
    write_lora(root / "style.safetensors", seed=5)
    return root


@contextmanager
def kept(where: str, tiled: bool) -> Iterator[None]:
    """Every part is kept so and as precise as on a card, whatever would fit."""

    def fitted(resolved: ResolvedJob, here: Hardware) -> Plan:
        made = make_plan(resolved, replace(here, device="cuda"))
        parts = {part: replace(fit, where=where) if part != "vae" else fit for part, fit in made.parts.items()}
        return replace(made, parts=parts, tiled=tiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.run.plan_or_raise", fitted)
        yield


def clip(device: torch.device, given: Any, outputs: Path) -> NDArray[np.uint8]:
    saved = run.run(given, lambda message: None, outputs=outputs, pool=ModelPool(device))
    return video.read_frames(saved.clip, display_scale=4)


@pytest.mark.parametrize(
    ("transformer", "kind", "sampling", "precision", "where"),
    [
        ("transformer", "identity", {"guidance": "chained", "step_cache": "fast"}, "bf16", "device"),
        ("transformer", "identity", {"guidance": "dual", "scheduler": "unipc"}, "int8", "memory"),
        ("transformer", "identity", {"guidance": "cfg"}, "fp8", "disk"),
        ("plain", "none", {"guidance": "cfg", "scheduler": "wan_unipc", "step_cache": "careful"}, "nf4", "memory"),
        ("plain", "frames", {"guidance": "dual", "scheduler": "unipc"}, "bf16", "memory"),
        ("side", "side", {"guidance": "dual", "scheduler": "unipc"}, "int8", "device"),
    ],
)
def test_a_clip_is_made_on_the_card_and_is_the_clip_of_the_processor_in_that_precision(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transformer: str,
    kind: str,
    sampling: dict[str, str],
    precision: str,
    where: str,
) -> None:
    made = preset(folder, transformer, kind)
    monkeypatch.setattr(presets, "load", lambda name: made)
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(vae, "TILE", 24)
    monkeypatch.setattr(vae, "OVERLAP", 8)
    (tmp_path / "models" / "loras").mkdir(parents=True)
    (tmp_path / "models" / "loras" / "style.safetensors").write_bytes((folder / "style.safetensors").read_bytes())
    asked = {"num_frames": 5, "precision": precision, "loras": [{"path": "style.safetensors", "weight": 0.5}]}
    asked |= {"sampling": {**SAMPLING, "num_inference_steps": 6 if "step_cache" in sampling else 3, **sampling}}
    given = make_job(**{**job(0 if kind == "none" else 2, 32, 32).model_dump(), **asked})
    with kept(where, tiled=where == "disk"):
        with pretended():
            on_it = clip(CARD, given, tmp_path / "card")

        def card_dtype(part: str, _: torch.device) -> torch.dtype:
            return torch.float32 if part == "vae" else torch.bfloat16

        for module in ("parts", "pool"):
            monkeypatch.setattr(f"engine.loading.{module}.usual_dtype", card_dtype)
        assert np.array_equal(on_it, clip(CPU, given, tmp_path / "processor"))


def predict(model: Any, device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, model.dtype)

    latents, text = drawn(1, tiny.LATENT_CHANNELS, 2, 8, 8), drawn(1, 8, tiny.TEXT_DIM)
    with torch.no_grad():
        identity = model.encode_identity(References(drawn(1, 2, 1, tiny.LATENT_CHANNELS, 8, 8)))
        time = torch.tensor([500.0], device=device)
        return model(latents, time, text, identity=identity, return_dict=False)[0].cpu()


def test_blocks_come_and_go_without_a_race_and_leave_nothing_on_its_way() -> None:
    model = tiny.stir(tiny.transformer(num_layers=8, identity_layers=4))
    expected = predict(model, CPU)
    with pretended(watched=True), offload_blocks(model, ["blocks"], CARD, once=["subject_blocks"]):
        assert torch.equal(predict(model, CARD), expected)
        assert torch.equal(predict(model, CARD), expected), "the second step"
    assert not any(on_card(tensor) for tensor in (*model.parameters(), *model.buffers()))


def test_without_pinned_memory_blocks_still_visit(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    model = tiny.transformer()
    expected = predict(model, CPU)
    with pretended(watched=True) as card, offload_blocks(model, ["blocks"], CARD, once=["subject_blocks"]):
        card.pinnable = False
        assert torch.equal(predict(model, CARD), expected)
    assert "no pinned memory (CUDA error: out of memory)" in caplog.text


def test_eight_bits_visit_the_card_without_a_kernel_that_is_compiled_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build.build_transformer(folder / "transformer", torch.bfloat16, precision="fp8")

    def compiles(*_: object, **__: object) -> None:
        raise AssertionError("optimum-quanto chooses a kernel")

    monkeypatch.setattr(WeightQBytesTensor, "create", compiles)
    with pretended(), offload_blocks(model, ["blocks"], CARD, once=["subject_blocks"]):
        predict(model, CARD)


@pytest.mark.parametrize("precision", ["int8", "fp8", "nf4"])
def test_weights_rounded_on_the_card_are_all_there_and_no_others(folder: Path, precision: Any) -> None:
    with pretended():
        model = build.build_transformer(folder / "transformer", torch.bfloat16, precision=precision, where=CARD)
        held = [part for tensor in (*model.parameters(), *model.buffers()) for part in quantize._held(tensor)]
        assert held and all(on_card(tensor) for tensor in held)
        assert predict(model, CARD).isfinite().all()


@pytest.mark.parametrize(
    ("profile", "system", "held"), [("6", "linux", 5.4), ("auto", "linux", 8), ("auto", "win32", 7)]
)
def test_a_profile_is_held_to_and_on_windows_the_card_is(
    monkeypatch: pytest.MonkeyPatch, profile: str, system: str, held: float
) -> None:
    monkeypatch.setenv("IDCRAFTER_PROFILE", profile)
    with pretended() as card:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (7 * GB, card.memory))
        monkeypatch.setattr("engine.loading.pool.sys.platform", system)
        pool = ModelPool(torch.device("cuda"))
        assert pool.hardware().vram == (6 if profile == "6" else 7) * GB
        assert card.fraction == pytest.approx(held / 8)


def test_eight_bits_of_floating_point_are_refused_where_metal_has_none(folder: Path) -> None:
    with pytest.raises(StudioError, match="int8"):
        load_part("transformer", folder / "transformer", torch.device("mps"), "fp8")


def test_the_card_that_is_not_there_refuses_what_a_card_refuses() -> None:
    with pretended(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    with pretended(), pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()
    with pretended(), pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator("cpu"))


def test_the_card_that_is_not_there_notices_a_stream_that_waits_for_nobody() -> None:
    with pytest.raises(AssertionError, match="stream"), pretended(watched=True):
        told = torch.ones(2, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            told.copy_(torch.empty(2, pin_memory=True), non_blocking=True)
        told.sum()
