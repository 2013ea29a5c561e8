"""A clip from its document to its file, on tiny random weights."""

from __future__ import annotations

import shutil
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from engine import presets, tiny
from engine.hardware.oom import OutOfMemory, classify_oom
from engine.hardware.plan import make_plan
from engine.identity.report import STRIP, read_report
from engine.job import GenerateJob, make_job, read_job
from engine.loading.parts import _LOADERS, load_part
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import Cancelled, Message, Preview, Progress, Saved, StudioError
from engine.models.identity_wan import IdentityWanTransformer3DModel
from engine.pipelines import encode
from engine.pipelines import files as engine_run
from engine.run import run
from tests.support.jobs import prepared


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def toybox(weights, tmp_path, monkeypatch):
    """The preset "toybox", on tiny weights."""
    return _use(weights, tmp_path, monkeypatch)


def _use(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> presets.Preset:
    preset = tiny.preset_of(weights)
    folder = tmp_path / "presets"
    folder.mkdir(exist_ok=True)
    (folder / "toybox.json").write_text(preset.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(presets, "PRESETS", folder)
    return preset


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(torch.device("cpu"))


def _drawn(folder: Path, name: str, colour: str) -> dict[str, str]:
    picture = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(picture).ellipse((20, 40, 100, 90), fill=colour)
    picture.save(folder / f"{name}.png")
    return {"path": str(folder / f"{name}.png")}


def _job(folder: Path, **changes) -> GenerateJob:
    values = {
        "prompt": "@fox chases @kite on a beach",
        "subjects": [
            {"name": "fox", "pictures": [_drawn(folder, "fox", "red")]},
            {"name": "kite", "pictures": [_drawn(folder, "kite", "blue")]},
        ],
        "seed": 7,
        "num_frames": 9,
        "sampling": {"num_inference_steps": 3},
        **changes,
    }
    return make_job(**values)


class Listener:
    """Remembers what was said; stops the run at a message it was told to wait for."""

    def __init__(self, stop_at: Progress | None = None) -> None:
        self.heard: list[Message] = []
        self.stop_at = stop_at
        self.pictures: list[np.ndarray] = []

    def __call__(self, message: Message) -> None:
        self.heard.append(message)
        if isinstance(message, Preview):
            self.pictures.append(np.asarray(Image.open(message.picture)))
        stop = self.stop_at
        if isinstance(message, Progress) and stop and (message.stage, message.step) == (stop.stage, stop.step):
            raise Cancelled


def _frames(saved: Saved) -> np.ndarray:
    return video.read_frames(saved.clip, display_scale=4)


def _make(job: GenerateJob, outputs: Path, pool: ModelPool, **more) -> np.ndarray:
    return _frames(run(job, Listener(), outputs=outputs, pool=pool, **more))


_PLAIN: list[np.ndarray] = []


@pytest.fixture
def plain_frames(toybox, tmp_path, pool) -> np.ndarray:
    """The clip of the unchanged job, made once."""
    if not _PLAIN:
        _PLAIN.append(_make(_job(tmp_path), tmp_path / "plain", pool))
    return _PLAIN[0]


def test_the_same_job_gives_the_same_frames(toybox, tmp_path, plain_frames):
    first = plain_frames
    again = _make(_job(tmp_path), tmp_path / "b", ModelPool(torch.device("cpu")))
    assert first.shape == (9, 64, 64, 3) and np.array_equal(first, again)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"prompt": "@kite chases @fox on a beach"},
        {"sampling": {"num_inference_steps": 4}},
        {"sampling": {"num_inference_steps": 3, "guidance": "none"}},
        {"sampling": {"num_inference_steps": 3, "scheduler": "unipc"}},
        {"sampling": {"num_inference_steps": 3, "guidance": "dual", "subject_scale": 6.0}},
        {"sampling": {"num_inference_steps": 3, "guidance": "chained", "subject_scale": 6.0}},
    ],
)
def test_whatever_a_job_says_shows_in_its_frames(tmp_path, pool, plain_frames, changes):
    assert not np.array_equal(plain_frames, _make(_job(tmp_path, **changes), tmp_path / "b", pool))


def test_leaving_out_nothing_is_the_clip_itself_and_leaving_out_much_does_not_carry_over(
    toybox, tmp_path, pool, monkeypatch
):
    asked = []
    forward = IdentityWanTransformer3DModel.forward
    monkeypatch.setattr(
        IdentityWanTransformer3DModel, "forward", lambda *given, **more: asked.append(1) or forward(*given, **more)
    )

    def made(**word: str) -> tuple[np.ndarray, int]:
        asked.clear()
        job = _job(tmp_path, sampling={"num_inference_steps": 12, **word})
        return _make(job, tmp_path / "b", pool), len(asked)

    absent, forwards = made()
    fast, few = made(step_cache="fast")
    again, as_few = made(step_cache="fast")
    off, all_of_them = made(step_cache="off")
    assert np.array_equal(off, absent) and forwards == all_of_them == 24
    assert few == as_few < 24 and np.array_equal(fast, again) and not np.array_equal(fast, off)


def test_two_workers_that_begin_the_same_job_at_once_write_two_clips(tmp_path):
    names = [engine_run.free_name(tmp_path, _job(tmp_path)) for _ in range(3)]
    assert len(set(names)) == 3


def test_another_picture_or_weight_of_a_subject_gives_another_clip(tmp_path, pool, plain_frames):
    fox, kite = _job(tmp_path).subjects
    for changed in (
        fox.model_copy(update={"weight": 0.3}),
        make_job(prompt="@fox", subjects=[{"name": "fox", "pictures": [_drawn(tmp_path, "green", "green")]}]).subjects[
            0
        ],
    ):
        job = _job(tmp_path).model_copy(update={"subjects": (changed, kite)})
        assert not np.array_equal(plain_frames, _make(job, tmp_path / "b", pool))


def test_a_clip_remakes_itself_from_the_document_inside_it(toybox, tmp_path, pool):
    saved = run(_job(tmp_path), Listener(), outputs=tmp_path / "a", pool=pool)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()  # another machine has none of them
    document = video.read_document(saved.clip)
    assert document == saved.document.read_text(encoding="utf-8") and str(tmp_path) not in document
    assert np.array_equal(_frames(saved), _make(read_job(document), tmp_path / "b", pool))


def test_a_finished_clip_has_a_name_a_document_and_a_poster(toybox, tmp_path, pool):
    job = _job(tmp_path)
    first, second = (run(job, Listener(), outputs=tmp_path / "out", pool=pool) for _ in range(2))
    assert first.clip.name.endswith("-fox-chases-kite-on-a-beach-s7.mp4") and first.num_frames == 9
    assert first.clip != second.clip
    assert {path.suffix for path in first.clip.parent.glob(f"{first.clip.stem}.*")} == {".mp4", ".json", ".webp"}
    named = run(job, Listener(), outputs=tmp_path / "out", clip=tmp_path / "my clip.mp4", pool=pool)
    assert named.clip == tmp_path / "my clip.mp4" and named.clip.is_file()


def test_a_run_tells_every_step_every_latent_frame_and_some_previews(toybox, tmp_path, pool):
    listener = Listener()
    run(_job(tmp_path), listener, outputs=tmp_path / "out", pool=pool)
    told = [(m.stage, m.step, m.total) for m in listener.heard if isinstance(m, Progress)]
    assert [t for t in told if t[0] == "sample"] == [("sample", step, 3) for step in (0, 1, 2, 3)]
    assert [t for t in told if t[0] == "decode"] == [("decode", step, 3) for step in (0, 1, 2, 3)]
    assert [stage for stage, *_ in told if stage not in ("sample", "decode")] == ["encode", "load", "save"]
    assert [picture.shape for picture in listener.pictures] == [(256, 768, 3)]
    left = {m.stage: m.eta_s for m in listener.heard if isinstance(m, Progress)}
    assert left["sample"] == left["decode"] == 0 and not list((tmp_path / "out" / ".previews").iterdir())


@pytest.mark.parametrize(("stage", "step"), [("encode", 0), ("sample", 2), ("decode", 2)])
def test_a_cancelled_clip_leaves_nothing_behind(toybox, tmp_path, pool, stage, step):
    listener = Listener(stop_at=Progress(stage, step, 0))
    with pytest.raises(Cancelled):
        run(_job(tmp_path), listener, outputs=tmp_path / "out", pool=pool)
    last = listener.heard[-1]
    assert isinstance(last, Progress) and (last.stage, last.step) == (stage, step)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_clip_needs_no_subject_and_takes_one_frame(toybox, tmp_path, pool):
    frames = _make(_job(tmp_path, prompt="a beach", subjects=[], num_frames=1), tmp_path / "out", pool)
    assert frames.shape == (1, 64, 64, 3)


def test_another_size_is_made_at_that_size(toybox, tmp_path, pool):
    assert _make(_job(tmp_path, width=48, height=72), tmp_path / "out", pool).shape == (9, 72, 48, 3)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_drawn(toybox, tmp_path, pool):
    (tmp_path / "out").write_text("a file where the folder should be", encoding="utf-8")
    listener = Listener()
    with pytest.raises(StudioError, match="cannot be written"):
        run(_job(tmp_path), listener, outputs=tmp_path / "out", pool=pool)
    assert not listener.heard


# --- damaged or unfitting weights ---


def _copy(weights: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(weights, tmp_path / "weights"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "vlm"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "empty", "not weights"])
def test_a_damaged_file_is_named(weights, tmp_path, monkeypatch, part, fault):
    folder = _copy(weights, tmp_path)
    _use(folder, tmp_path, monkeypatch)
    file = next((folder / part).glob("*.safetensors"))
    if fault == "missing":
        file.unlink()
    else:
        content = {"truncated": file.read_bytes()[:-100], "empty": b"", "not weights": b"<html>no such file</html>"}
        file.write_bytes(content[fault])
    with pytest.raises(StudioError) as error:
        run(_job(tmp_path), Listener(), outputs=tmp_path / "out", pool=ModelPool(torch.device("cpu")))
    assert part.replace("_", " ") in error.value.what.replace("_", " ") and error.value.field == "preset"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_half_a_checkpoint_is_refused_rather_than_filled_with_noise(weights, tmp_path, monkeypatch):
    folder = _copy(weights, tmp_path)
    _use(folder, tmp_path, monkeypatch)
    model = IdentityWanTransformer3DModel.from_pretrained(folder / "transformer")
    del model.subject_blocks[1]
    model.save_pretrained(folder / "transformer")
    with pytest.raises(StudioError, match=r"weights are missing.*subject_blocks\.1"):
        run(_job(tmp_path), Listener(), outputs=tmp_path / "out", pool=ModelPool(torch.device("cpu")))


def test_weights_in_any_other_format_are_not_opened(weights, tmp_path, monkeypatch):
    folder = _copy(weights, tmp_path)
    _use(folder, tmp_path, monkeypatch)
    for file, other in (("transformer", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        old = next((folder / file).glob("*.safetensors"))
        torch.save({"x": torch.zeros(1)}, folder / file / other)
        old.unlink()
        with pytest.raises(StudioError, match="cannot be loaded"):
            ModelPool(torch.device("cpu")).part(file, presets.load("toybox"))


def test_plain_wan_is_not_passed_off_as_a_model_for_subjects(weights, tmp_path, monkeypatch):
    folder = _copy(weights, tmp_path)
    preset = _use(folder, tmp_path, monkeypatch)
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": tiny.TEXT_DIM, "freq_dim": 32}
    shutil.rmtree(folder / "transformer")
    WanTransformer3DModel(**config, ffn_dim=96, num_layers=2, rope_max_seq_len=64).save_pretrained(
        folder / "transformer"
    )
    with pytest.raises(StudioError, match="cannot take subjects"):
        run(_job(tmp_path), Listener(), outputs=tmp_path / "out", pool=ModelPool(torch.device("cpu")))
    plain = preset.model_copy(update={"conditioning": "none", "mention": "noun"})
    (presets.PRESETS / "toybox.json").write_text(plain.model_dump_json(), encoding="utf-8")
    frames = _make(_job(tmp_path), tmp_path / "out", ModelPool(torch.device("cpu")))
    assert frames.shape == (9, 64, 64, 3)


def test_a_new_checkpoint_on_disk_is_the_one_that_is_used(weights, tmp_path, monkeypatch):
    folder = _copy(weights, tmp_path)
    _use(folder, tmp_path, monkeypatch)
    pool = ModelPool(torch.device("cpu"))
    before = _make(_job(tmp_path), tmp_path / "a", pool)
    tiny.stir(IdentityWanTransformer3DModel.from_pretrained(folder / "transformer"), 2.0).save_pretrained(
        folder / "transformer"
    )
    assert not np.array_equal(before, _make(_job(tmp_path), tmp_path / "b", pool))


class RunsOut(Listener):
    """A machine whose memory runs out in the second step, so many times."""

    def __init__(self, times: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = times, error

    def __call__(self, message) -> None:
        super().__call__(message)
        if self.left and isinstance(message, Progress) and (message.stage, message.step) == ("sample", 2):
            self.left -= 1
            raise self.error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_once_costs_a_second_try_and_not_the_clip(toybox, tmp_path, error):
    listener = RunsOut(1, error)
    expected = _make(_job(tmp_path), tmp_path / "a", ModelPool(torch.device("cpu")))
    saved = run(_job(tmp_path), listener, outputs=tmp_path / "out", pool=ModelPool(torch.device("cpu")))
    assert np.array_equal(_frames(saved), expected)
    assert any("once more" in heard.note for heard in listener.heard if isinstance(heard, Progress))


def test_the_second_try_begins_when_the_model_of_the_first_has_left_memory(toybox, tmp_path):
    pool, first, there = ModelPool(torch.device("cpu")), [], []

    def say(message: Message) -> None:
        if not isinstance(message, Progress):
            return
        if message.stage == "load":
            there.append([model() is not None for model in first])
        elif (message.stage, message.step, first) == ("sample", 2, []):
            first.append(weakref.ref(pool.part("transformer", toybox)))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    run(_job(tmp_path, precision="nf4"), say, outputs=tmp_path / "out", pool=pool)
    assert there[-1] == [False]


def test_memory_that_runs_out_while_a_part_is_read_is_no_damaged_file(toybox, monkeypatch):
    def too_large(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9437184 bytes.")

    monkeypatch.setitem(_LOADERS, "vae", too_large)
    with pytest.raises(OutOfMemory), classify_oom():
        load_part("vae", toybox.place("vae"), torch.device("cpu"))


def test_memory_that_runs_out_twice_is_explained_with_what_to_make_smaller(toybox, tmp_path):
    job = _job(tmp_path, num_frames=17)
    with pytest.raises(StudioError, match=r"memory.* ran out") as error:
        run(job, RunsOut(2, MemoryError()), outputs=tmp_path / "out", pool=ModelPool(torch.device("cpu")))
    assert "9 frames" in error.value.next_step and error.value.field == "num_frames"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_another_fault_in_the_middle_is_no_lack_of_memory(toybox, tmp_path):
    with pytest.raises(RuntimeError, match="something else"):
        run(_job(tmp_path), RunsOut(1, RuntimeError("something else")), outputs=tmp_path / "out", pool=None)


def test_what_was_sampled_outlives_a_decode_that_failed_and_goes_with_the_clip(toybox, tmp_path, pool):
    class Breaks(Listener):
        def __call__(self, message) -> None:
            super().__call__(message)
            if isinstance(message, Progress) and (message.stage, message.step) == ("decode", 2):
                raise RuntimeError("the disk of this test is full")

    with pytest.raises(RuntimeError, match="is full"):
        run(_job(tmp_path), Breaks(), outputs=tmp_path / "out", pool=pool)
    assert len(list((tmp_path / "out").rglob(f".*{video.PART}.*"))) == 1, "swept away, should nobody ask again"
    again = Listener()
    saved = run(_job(tmp_path), again, outputs=tmp_path / "out", pool=pool)
    assert "sample" not in {heard.stage for heard in again.heard if isinstance(heard, Progress)}
    assert np.array_equal(_frames(saved), _make(_job(tmp_path), tmp_path / "b", pool))
    assert not list(saved.clip.parent.glob(".*"))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_clip_whose_blocks_visit_the_device_is_the_same_clip(toybox, tmp_path, pool, where, monkeypatch):
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    expected = _make(_job(tmp_path), tmp_path / "a", pool)
    resolved = prepared(_job(tmp_path))
    plan = make_plan(resolved, pool.hardware())
    parts = {part: replace(fit, where=where) if part != "vae" else fit for part, fit in plan.parts.items()}
    sparing = ModelPool(torch.device("cpu"))
    sparing.follow(replace(plan, parts=parts))
    encoded = encode.encode_job(resolved, sparing)
    plain = encode.encode_job(resolved, pool)
    assert torch.equal(encoded.prompt_embeds, plain.prompt_embeds)
    assert torch.equal(encoded.references.vlm_states, plain.references.vlm_states)
    with monkeypatched_plan(replace(plan, parts=parts)):
        assert np.array_equal(_make(_job(tmp_path), tmp_path / "b", sparing), expected)
    spilled = list((tmp_path / "models").rglob("*.bin"))
    assert bool(spilled) == (where == "disk")
    sparing.empty()
    assert not any(path.exists() for path in spilled)


@contextmanager
def monkeypatched_plan(plan):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("engine.run.plan_or_raise", lambda *_: plan)
        yield


# --- the identity report ---


def test_a_clip_brings_a_report_of_everyone_who_is_to_be_recognised(toybox, tmp_path, pool):
    subjects = _job(tmp_path).subjects
    place = subjects[1].model_copy(update={"role": "background"})
    job = _job(tmp_path).model_copy(update={"subjects": (subjects[0], place)})
    saved = run(job, Listener(), outputs=tmp_path / "out", pool=pool)
    found = read_report(saved.clip)
    assert saved.report is not None and found is not None
    assert [subject.name for subject in found.subjects] == ["fox"]
    assert len(found.subjects[0].own) == saved.num_frames
    assert saved.weakest == found.weakest
    assert found.judges == ("toybox tiny",)
    if found.subjects[0].presence:
        with Image.open(saved.clip.with_suffix(STRIP)) as strip:
            assert strip.size == (9 * 64 * 4, 64 * 4)


def test_a_preset_without_judges_makes_clips_without_a_report(toybox, tmp_path, pool, monkeypatch):
    parts = toybox.components.model_copy(update={"judges": ""})
    silent = toybox.model_copy(update={"components": parts})
    (presets.PRESETS / "toybox.json").write_text(silent.model_dump_json(), encoding="utf-8")
    saved = run(_job(tmp_path), Listener(), outputs=tmp_path / "out", pool=pool)
    assert (saved.report, saved.weakest, read_report(saved.clip)) == (None, None, None)


def test_a_part_that_takes_long_to_load_says_how_far_it_is_and_may_be_cancelled(toybox, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pipelines.progress.LOADING_GAP_S", 0.0)
    listener = Listener()
    run(_job(tmp_path), listener, outputs=tmp_path / "a", pool=ModelPool(torch.device("cpu")))
    told = [m for m in listener.heard if isinstance(m, Progress) and m.note.startswith("loading the ")]
    assert {m.note.removeprefix("loading the ") for m in told} == {"transformer", "text encoder", "vlm"}
    assert {m.stage for m in told} == {"load", "encode"}
    assert all(0 <= m.step < m.total == 100 and (m.eta_s or 0) >= 0 for m in told)
    first = next(m for m in told if m.stage == "load")
    pool = ModelPool(torch.device("cpu"))
    with pytest.raises(Cancelled):
        run(_job(tmp_path), Listener(stop_at=first), outputs=tmp_path / "b", pool=pool)
    assert not list((tmp_path / "b").glob("*/*.mp4"))
    assert run(_job(tmp_path), Listener(), outputs=tmp_path / "c", pool=pool).num_frames
