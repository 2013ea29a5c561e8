"""Documents and presets: what is read, what is filled in, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import paths, presets
from engine.job import MIGRATIONS, VERSION, GenerateJob, make_job, mentions, read_job, write_job
from engine.messages import Failed, Progress, Saved, StudioError, as_dict
from engine.resolve import resolve

FOX = {"name": "fox", "pictures": [{"path": "fox.png"}]}
KITE = {"name": "kite", "pictures": [{"path": "kite.png"}]}


def refused(**values: object) -> StudioError:
    with pytest.raises(StudioError) as caught:
        resolve(make_job(**values))
    error = caught.value
    assert all(part.endswith((".", "?")) for part in (error.what, error.why, error.next_step)), str(error)
    return error


def test_what_is_written_is_what_is_read() -> None:
    job = make_job(prompt="@fox chases @kite", subjects=[FOX, KITE], seed=7, num_frames=9)
    assert read_job(write_job(job)) == job
    assert read_job(json.loads(write_job(job, indent=None))) == job


def test_the_first_version_wrote_pictures_as_paths_and_still_reads() -> None:
    old = {"version": 1, "prompt": "@fox runs", "subjects": [{"name": "fox", "pictures": ["fox.png"]}]}
    assert read_job(old) == make_job(prompt="@fox runs", subjects=[FOX])


def test_version_3_had_its_own_words_for_the_step_cache_and_guidance() -> None:
    sampling = {"cache": "fast", "guidance": "projected", "subject_scale": 4.5}
    job = read_job({"version": 3, "prompt": "x", "sampling": sampling})
    assert (job.sampling.step_cache, job.sampling.guidance, job.sampling.subject_scale) == ("fast", "apg", 4.5)
    assert read_job({"version": 2, "prompt": "x", "sampling": {"guidance": "joint"}}).sampling.guidance == "cfg"
    assert read_job(write_job(job)) == job


def test_a_job_of_version_4_that_names_its_steps_still_goes_down_to_no_noise() -> None:
    preset = presets.load("toybox")
    assert preset.sampling.final_sigma, "or this test says nothing"
    old = read_job({"version": 4, "prompt": "x", "sampling": {"num_inference_steps": 30}})
    assert old.sampling.final_sigma == 0.0 and resolve(old).sampling.final_sigma == 0.0
    left_to_the_preset = resolve(read_job({"version": 4, "prompt": "x"})).sampling
    assert left_to_the_preset.final_sigma == preset.sampling.final_sigma
    assert left_to_the_preset.num_inference_steps == preset.sampling.num_inference_steps
    assert resolve(make_job(prompt="x", preset="wan-1.3b")).sampling.final_sigma == 0.0


def test_a_preset_written_before_version_4_still_opens() -> None:
    preset = presets.load("toybox")
    old = json.loads(preset.model_dump_json())
    old["caching"] = old.pop("step_cache")
    old["sampling"]["cache"] = old["sampling"].pop("step_cache")
    old["sampling"]["guidance"] = "joint"
    assert presets.parse_preset(json.dumps(old)) == preset


def test_every_older_version_has_its_migration() -> None:
    assert sorted(MIGRATIONS) == list(range(1, VERSION))


@pytest.mark.parametrize("version", [VERSION + 1, 10**30])
def test_a_newer_document_is_refused_with_what_to_do(version: int) -> None:
    with pytest.raises(StudioError, match="Update the studio"):
        read_job({"version": version, "prompt": "x"})


@pytest.mark.parametrize(
    "source",
    [b"\xff\xfe\x00", "", "[]", "nonsense", "{", '"text"', "[" * 100_000, '{"version": "two"}', '{"version": true}',
     '{"version": 1, "subjects": 5}', '{"version": 1, "subjects": [5], "prompt": "x"}', '{"prompt": 5}',
     '{"prompt": "x", "seed": 1e999}', '{"prompt": "x", "seed": NaN}', '{"prompt": "x", "preset": "../../etc"}',
     '{"prompt": "x", "__class__": "os.system"}', '{"kind": "replace", "prompt": "x"}'],
)  # fmt: skip
def test_whatever_is_no_document_is_refused_in_words(source: str | bytes) -> None:
    with pytest.raises(StudioError):
        read_job(source)


def test_a_subject_that_is_never_mentioned_is_refused_beside_the_prompt() -> None:
    error = refused(prompt="@fox runs", subjects=[FOX, KITE])
    assert error.field == "prompt" and "@kite" in error.what


def test_a_name_that_nobody_has_is_refused_beside_the_prompt() -> None:
    error = refused(prompt="@fox chases @dog", subjects=[FOX])
    assert error.field == "prompt" and "@dog" in error.what


def test_two_subjects_of_one_name_are_refused_beside_the_subjects() -> None:
    assert refused(prompt="@fox runs", subjects=[FOX, FOX]).field == "subjects"


def test_mentions_are_found_whatever_stands_around_them() -> None:
    assert mentions("(@Fox), @kite's tail, @fox again; mail@ is none") == ["fox", "kite"]


def test_an_empty_prompt_is_refused_beside_the_prompt() -> None:
    assert refused(prompt="  \n ").field == "prompt"


def test_eighty_frames_are_refused_with_the_two_nearest_lengths() -> None:
    error = refused(prompt="x", num_frames=80)
    assert error.field == "num_frames" and "77 or 81" in error.next_step


def test_five_hundred_pixels_are_refused_with_the_two_nearest_sizes() -> None:
    error = refused(prompt="x", width=500)
    assert error.field == "width" and "496 or 504" in error.next_step


@pytest.mark.parametrize(("count", "most"), [(5, "4"), (9, "8")])
def test_too_many_subjects_are_refused_with_how_many_fit(count: int, most: str) -> None:
    subjects = [{**FOX, "name": f"s{k}"} for k in range(count)]
    error = refused(prompt=" ".join(f"@s{k}" for k in range(count)), subjects=subjects)
    assert error.field == "subjects" and most in f"{error.why} {error.next_step}"


def test_an_unknown_preset_is_refused_with_those_that_are_there() -> None:
    error = refused(prompt="x", preset="phantom-99b")
    assert error.field == "preset" and "toybox" in error.why


def test_what_a_job_leaves_out_comes_from_its_preset_and_what_it_says_stays() -> None:
    resolved = resolve(make_job(prompt="x", sampling={"num_inference_steps": 5}))
    document, preset = resolved.document, resolved.preset
    assert (resolved.num_frames, resolved.width) == (preset.num_frames, preset.sizes[0].width)
    assert (document.num_frames, document.width, document.height) == (
        resolved.num_frames,
        resolved.width,
        resolved.height,
    )
    assert resolved.sampling.num_inference_steps == 5
    assert resolved.sampling.guidance == preset.sampling.guidance
    assert resolve(document) == resolved
    assert resolved.changed(num_frames=5).num_frames == 5


def test_a_preset_that_does_not_say_how_a_clip_is_drawn_is_named_with_what_it_lacks() -> None:
    preset = presets.load("toybox")
    silent = preset.model_copy(update={"sampling": preset.sampling.model_copy(update={"scheduler": None})})
    with pytest.raises(StudioError, match="scheduler") as caught:
        resolve(make_job(prompt="x"), silent)
    assert caught.value.field == "preset"
    assert resolve(make_job(prompt="x", sampling={"scheduler": "euler"}), silent).sampling.scheduler == "euler"


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_everything_its_sampling_needs(name: str) -> None:
    preset = presets.load(name)
    needed = {"cfg": ("guidance_scale",), "none": ()}.get(
        str(preset.sampling.guidance), ("subject_scale", "text_scale")
    )
    filled = ("num_inference_steps", "scheduler", "shift", "guidance", *needed)
    assert all(getattr(preset.sampling, field) is not None for field in filled)
    resolve(GenerateJob(prompt="x", preset=name))


def test_a_model_folder_is_looked_up_in_the_repository_and_then_in_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path / "repository")
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    preset = presets.load("toybox")
    with pytest.raises(StudioError, match="which is not there"):
        presets.check_files(preset)
    own, theirs = tmp_path / "models" / preset.components.vae, tmp_path / "repository" / preset.components.vae
    own.mkdir(parents=True)
    assert preset.place("vae") == own
    theirs.mkdir(parents=True)
    assert preset.place("vae") == theirs


def test_messages_become_plain_json() -> None:
    saved = Saved(Path("a.mp4"), Path("a.json"), Path("a.webp"), 1.5, 17)
    for message in (Progress("sample", 1, 2), saved, Failed.of(StudioError("a.", "b.", "c.", field="seed"))):
        assert json.loads(json.dumps(as_dict(message)))["kind"] == type(message).__name__.lower()


@pytest.mark.parametrize("subjects", ["fox", {"name": "fox"}, [{"pictures": "a.png"}], [{"pictures": 5}], None])
def test_an_old_document_of_another_shape_is_refused_not_migrated(subjects: object) -> None:
    with pytest.raises(StudioError):
        read_job({"version": 1, "prompt": "@fox runs", "subjects": subjects})
