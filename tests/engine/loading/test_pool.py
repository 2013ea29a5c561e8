"""What a warm worker holds at the same time: who leaves before who comes, as a plan has it."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import tiny
from engine.hardware.plan import SLACK, Plan, make_plan
from engine.hardware.probe import GB, Hardware
from engine.job import make_job
from engine.loading import offload, parts
from engine.loading import pool as pool_module
from engine.loading.parts import load_part
from engine.loading.pool import VISITING, ModelPool
from engine.loading.quantize import num_bytes
from engine.messages import StudioError
from engine.models.vae import picture_latents
from engine.paths import ROOT
from engine.pipelines import encode
from engine.presets import Preset
from engine.resolve import resolve
from tests.support.jobs import prepared

CPU = torch.device("cpu")
JOB = make_job(prompt="a beach", num_frames=5, width=32, height=32, sampling={"num_inference_steps": 1})
ROOMY = Hardware("cuda", "a card", 64 * GB, 64 * GB, 64 * GB)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    torch.set_num_threads(1)
    return tiny.preset_of(tiny.write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def plan_of(preset: Preset, here: Hardware = ROOMY, **fits: dict[str, Any]) -> Plan:
    """The plan for a roomy machine, then with this one in its place and parts changed."""
    made = make_plan(resolve(JOB, preset), ROOMY)
    parts = {part: replace(fit, **{"precision": "fp32", **fits.get(part, {})}) for part, fit in made.parts.items()}
    return replace(made, machine=here, parts=parts, plain=4)


def test_models_compute_in_what_their_plan_says_and_are_loaded_anew_for_another(preset: Preset) -> None:
    pool, exact = ModelPool(CPU), plan_of(preset)
    fast = replace(exact, plain=2, parts={part: replace(fit, precision="bf16") for part, fit in exact.parts.items()})
    fast = replace(fast, parts={**fast.parts, "vae": exact.parts["vae"]})
    for plan, dtype in ((exact, torch.float32), (fast, torch.bfloat16), (exact, torch.float32)):
        pool.follow(plan)
        for part in ("transformer", "text_encoder", "vlm"):
            assert pool.part(part, preset).dtype == dtype
        assert pool.part("vae", preset).dtype == torch.float32


def test_two_large_encoders_are_never_in_memory_together(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, others = ModelPool(CPU), []
    for kept, expected in ((2**40, [True]), (0, [False])):
        monkeypatch.setattr(pool_module, "KEEP_ENCODERS_BYTES", kept)
        for part, other in (("text_encoder", "vlm"), ("vlm", "text_encoder")):
            pool.empty()
            first = weakref.ref(pool.part(part, preset))
            others.clear()
            pool.telling(lambda _, share, first=first: others.append(first() is not None))
            with pool.at_work(other, preset):
                assert sorted(set(others)) == expected, "from the first tensor of the second one on"


def room_on(device: str) -> Callable[[int, int], Hardware]:
    def room(free: int, _: int) -> Hardware:
        return replace(ROOMY, device=device, vram=free, ram=free if device == "cpu" else ROOMY.ram)

    return room


def room_beside(_: int, free: int) -> Hardware:
    return replace(ROOMY, ram=free)


@pytest.mark.parametrize(
    ("where", "room"),
    [("device", room_on("cuda")), ("device", room_on("cpu")), ("disk", room_on("cpu")), ("memory", room_beside)],
    ids=["on the card", "shared", "shared, from files", "in memory beside it"],
)
@pytest.mark.parametrize("enough", [True, False])
def test_the_second_clips_text_encoder_makes_the_transformer_leave_where_both_do_not_fit(
    preset: Preset, where: Any, room: Callable[[int, int], Hardware], enough: bool
) -> None:
    pool = ModelPool(CPU)
    clip = plan_of(preset)
    fit = replace(clip.parts["text_encoder"], where=where)
    if where != "device":
        fit = replace(fit, device=fit.device // 4, memory=fit.device)
    pool.follow(replace(clip, parts={**clip.parts, "text_encoder": fit}))
    transformer = num_bytes(pool.part("transformer", preset))
    needed = fit.device + fit.working + (fit.memory if where == "disk" else 0) + transformer
    less = 1.1 if enough else 0.99
    here = room(int(needed * SLACK * less), int((fit.memory + transformer) * less))
    pool.follow(replace(clip, machine=here, parts={**clip.parts, "text_encoder": fit}))
    with pool.at_work("text_encoder", preset):
        assert ("transformer" in pool._parts) == enough


@pytest.mark.parametrize("enough", [True, False])
def test_pictures_are_encoded_without_what_leaves_the_vae_no_room(preset: Preset, enough: bool) -> None:
    pool = ModelPool(CPU)
    clip = plan_of(preset)
    beside = num_bytes(pool.part("transformer", preset)) + num_bytes(pool.part("vae", preset))
    free = beside + 1000 if enough else beside
    pool.follow(plan_of(preset, replace(ROOMY, vram=int(free * SLACK)), vae={"working": 900}))
    assert clip.parts["vae"].device == num_bytes(pool.part("vae", preset))
    with pool.at_work("vae", preset):
        assert ("transformer" in pool._parts) == enough and "vae" in pool._parts


def test_large_encoders_have_left_when_pictures_are_encoded(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "KEEP_ENCODERS_BYTES", 0)
    pool, there = ModelPool(CPU), []
    plain = picture_latents
    monkeypatch.setattr(encode, "picture_latents", lambda *given: there.append(set(pool._parts)) or plain(*given))
    subject = {"name": "fox", "pictures": [{"path": str(ROOT / "assets" / "samples" / "fox.png")}]}
    job = make_job(**{**JOB.model_dump(), "prompt": "@fox", "subjects": [subject]})
    states = encode.encode_job(prepared(job, preset), pool)
    assert states.references is not None and states.references.vlm_states is not None
    assert there and not any({"text_encoder", "vlm"} & parts for parts in there)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vlm"])
def test_blocks_that_are_to_wait_in_files_are_there_before_the_next_ones_are_read(
    preset: Preset, tmp_path: Path, part: Any
) -> None:
    folder, files = tmp_path / "files", []
    place = preset.place(part)
    model = load_part(part, place, CPU, keep=folder, tell=lambda _: files.append(len(list(folder.glob("*")))))
    lists = [offload._find(model, name) for names in VISITING[part] for name in names]
    blocks = [block for found in lists for block in found or ()]
    assert files[-1] == len(blocks) - 1 and sorted(files) == files and len(list(folder.glob("*"))) == len(blocks)
    mapped = sum(path.stat().st_size for path in folder.glob("*"))
    assert mapped >= sum(num_bytes(block) for block in blocks)
    whole = load_part(part, place, CPU).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_files_of_a_part_that_is_loaded_anew_go(preset: Preset, models: Path) -> None:
    pool = ModelPool(CPU)
    pool.follow(plan_of(preset, transformer={"where": "disk"}))
    pool.part("transformer", preset)
    before = set(models.rglob("*.bin"))
    pool.follow(plan_of(preset, transformer={"where": "disk", "precision": "int8"}))
    pool.part("transformer", preset)
    after = set(models.rglob("*.bin"))
    assert before and after and not before & after


def test_where_device_and_memory_are_one_what_is_held_on_either_counts_as_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = Hardware("mps", "Apple silicon", 8 * GB, 8 * GB, GB)
    monkeypatch.setattr(pool_module, "probe_hardware", lambda profile: free)
    pool = ModelPool(torch.device("mps"))
    monkeypatch.setattr(pool, "_held", lambda kind: {"transformer": {"mps": 4 * GB, "cpu": GB}.get(kind, 0)})
    assert pool.hardware().ram == pool.hardware().vram == 13 * GB


def test_a_mistake_of_ours_is_not_called_a_damaged_file(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is told to fetch 15 GB again, because a call in our code is wrong, has been lied to."""
    broken = tmp_path / "vae"
    shutil.copytree(preset.place("vae"), broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "dim_mult": 3}), encoding="utf-8")
    with pytest.raises(StudioError, match="cannot be loaded"):  # a TypeError inside diffusers
        parts.load_part("vae", broken, CPU)
    monkeypatch.setitem(parts._LOADERS, "vae", lambda place: None)
    with pytest.raises(TypeError):
        parts.load_part("vae", preset.place("vae"), CPU)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [("config.json", {"identity_layers": "two"}), ("diffusion_pytorch_model.safetensors.index.json", {"metadata": {}})],
)
def test_a_config_that_our_class_cannot_take_and_an_index_without_a_map_are_damaged_files(
    preset: Preset, tmp_path: Path, name: str, damaged: dict[str, Any]
) -> None:
    broken = tmp_path / "transformer"
    shutil.copytree(preset.place("transformer"), broken)
    held: dict[str, Any] = {}
    if (broken / name).is_file():
        held = json.loads((broken / name).read_text(encoding="utf-8"))
    (broken / name).write_text(json.dumps({**held, **damaged}), encoding="utf-8")
    with pytest.raises(StudioError, match="cannot be loaded"):
        parts.load_part("transformer", broken, CPU)
