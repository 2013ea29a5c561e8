"""The gallery's side: the outputs folder as it is, with real clips and whatever else lies there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.library.clips import compare_clips, delete_clip, find_clip, list_clips, open_clip
from engine import presets
from engine.job import GenerateJob, make_job, write_job
from engine.media import pictures, video
from engine.messages import Message, StudioError
from tests.support.jobs import prepared
from tests.support.small_engine import write_clip


def silent(_: Message) -> None:
    """Nobody listens."""


def a_job(**values: object) -> GenerateJob:
    return make_job(**{"prompt": "a square walks", "num_frames": 5, **values})


def make(outputs: Path, name: str, job: GenerateJob | None = None, age_s: float = 0) -> Path:
    """A real clip with its document and poster, made `age_s` seconds ago."""
    clip = write_clip(outputs / "2026-11-23" / f"{name}.mp4", job or a_job(), 0.0, silent).clip
    os.utime(clip, (1e9 - age_s, 1e9 - age_s))
    return clip


def test_clips_come_newest_first_with_job_poster_and_length(tmp_path: Path) -> None:
    make(tmp_path, "old", a_job(seed=1), age_s=60)
    path = make(tmp_path, "new", a_job(seed=2))
    newest, oldest = list_clips(tmp_path)
    assert (newest.id, oldest.id) == ("2026-11-23/new", "2026-11-23/old")
    assert (newest.path, newest.poster, newest.job) == (path, path.with_suffix(".webp"), a_job(seed=2))
    assert newest.created == 1e9 and newest.seconds == 5 / presets.load("toybox").fps


def test_foreign_broken_and_hidden_files_do_no_harm(tmp_path: Path) -> None:
    make(tmp_path, "fine")
    for name in ("broken document", "binary document", "no document", "newer studio"):
        (tmp_path / f"{name}.mp4").write_bytes(b"whatever")
    (tmp_path / "broken document.json").write_text('{"prompt": ', encoding="utf-8")
    (tmp_path / "binary document.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "newer studio.json").write_text('{"version": 99}', encoding="utf-8")
    (tmp_path / "no document.webp").mkdir()
    (tmp_path / "notes.txt").write_text("buy milk", encoding="utf-8")
    (tmp_path / ".half.part.mp4").write_bytes(b"half")
    hidden = tmp_path / ".studio" / "uploads"
    hidden.mkdir(parents=True)
    (hidden / "upload.mp4").write_bytes(b"a person's upload")
    found = {clip.id: clip for clip in list_clips(tmp_path)}
    assert set(found) == {"2026-11-23/fine", "broken document", "binary document", "no document", "newer studio"}
    assert [id for id, clip in found.items() if clip.job] == ["2026-11-23/fine"]
    assert found["no document"].poster is None


def test_an_outputs_folder_that_is_not_there_yet_has_no_clips(tmp_path: Path) -> None:
    assert list_clips(tmp_path / "none") == []


def test_a_document_that_was_changed_on_disk_is_read_again(tmp_path: Path) -> None:
    clip = make(tmp_path, "a", a_job(seed=1))
    assert list_clips(tmp_path)[0].job == a_job(seed=1)
    clip.with_suffix(".json").write_text(write_job(a_job(seed=23)), encoding="utf-8")
    assert list_clips(tmp_path)[0].job == a_job(seed=23)


def test_without_the_document_beside_it_a_clip_is_found_with_the_one_inside(tmp_path: Path) -> None:
    make(tmp_path, "a", a_job(seed=5)).with_suffix(".json").unlink()
    assert find_clip(tmp_path, "2026-11-23/a").job == a_job(seed=5)


@pytest.mark.parametrize(
    "id", ["", ".", "gone", "../secret", "/etc/secret", "2026-11-23/../../secret", "..\\secret", "C:secret"]
)
def test_an_id_never_leads_out_of_the_outputs_folder(tmp_path: Path, id: str) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"private")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with pytest.raises(StudioError, match="no clip called"):
        find_clip(outputs, id)


def test_deleting_removes_the_clip_its_document_and_its_poster_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b")
    (tmp_path / "2026-11-23" / "a.gif").write_bytes(b"an export is the person's own")
    delete_clip(find_clip(tmp_path, "2026-11-23/a"))
    left = sorted(path.name for path in (tmp_path / "2026-11-23").iterdir())
    assert left == ["a.gif", "b.json", "b.mp4", "b.webp"]


def test_a_link_that_leads_outside_is_not_followed_for_deleting(tmp_path: Path) -> None:
    private = make(tmp_path / "private", "diary")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    try:
        (outputs / "link.mp4").symlink_to(private)
    except OSError:
        pytest.skip("this system lets this user make no links")
    with pytest.raises(StudioError, match="not deleted"):
        delete_clip(find_clip(outputs, "link"))
    assert private.is_file()


def test_comparing_names_what_differs_and_only_that(tmp_path: Path) -> None:
    a, b = (find_clip(tmp_path, "2026-11-23/" + make(tmp_path, n, a_job(seed=s)).stem) for n, s in (("a", 1), ("b", 2)))
    assert compare_clips(a, b) == [("seed", "1", "2")]
    assert compare_clips(a, a) == []


def test_comparing_knows_pictures_by_their_hash_and_sampling_by_its_field(tmp_path: Path) -> None:
    def job(colour: str, path: str, steps: int | None) -> GenerateJob:
        picture = {"path": path, "sha256": colour * 64}
        subjects = [{"name": "it", "pictures": [picture]}]
        return a_job(prompt="@it hops", subjects=subjects, sampling={"num_inference_steps": steps})

    make(tmp_path, "a", job("a", "one.png", 30))
    make(tmp_path, "moved", job("a", "elsewhere.png", 30))
    make(tmp_path, "other", job("b", "one.png", None))
    a, moved, other = (find_clip(tmp_path, f"2026-11-23/{name}") for name in ("a", "moved", "other"))
    assert compare_clips(a, moved) == []
    assert compare_clips(a, other) == [("num_inference_steps", "30", "-"), ("@it pictures", "aaaaaaaa", "bbbbbbbb")]


def test_a_dropped_clip_gives_back_its_job_with_its_pictures_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (80, 80), (200, 30, 30)).save(tmp_path / "red.png")
    subjects = [{"name": "it", "pictures": [{"path": str(tmp_path / "red.png")}]}]
    packed = prepared(a_job(prompt="@it hops", subjects=subjects)).document
    clip = make(tmp_path, "a", pictures.drop_embedded_paths(packed))
    (tmp_path / "red.png").unlink()
    job = open_clip(clip).job
    assert job.subjects[0].pictures[0].path == ""
    now, then = (pictures.prepare_subject(one.subjects[0], size=64)[0] for one in (job, packed))
    assert (now == then).all()


def test_a_dropped_file_without_a_document_or_that_is_no_video_is_refused(tmp_path: Path) -> None:
    with video.ClipWriter(tmp_path / "holiday.mp4", fps=8, size=(64, 64)) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(StudioError, match="carries no document"):
        open_clip(tmp_path / "holiday.mp4")
    (tmp_path / "letter.mp4").write_text("Dear aunt,", encoding="utf-8")
    with pytest.raises(StudioError, match="cannot be read as a video"):
        open_clip(tmp_path / "letter.mp4")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("just a comment by some camera", "not valid JSON"),
        ("[" * 5000, "not valid JSON|cannot be read"),
        ('{"prompt": "x", "seed": 1e999}', "seed"),
        ('{"prompt": "x", "num_frames": 99999999999999}', "The number of frames is 99,999,999,999,999"),
        ('{"prompt": "x", "__class__": "os.system"}', "__class__"),
        ('{"version": 99, "prompt": "x"}', "newer"),
    ],
)
def test_a_hostile_document_in_a_clip_is_refused_by_a_sentence(tmp_path: Path, document: str, words: str) -> None:
    with video.ClipWriter(tmp_path / "a.mp4", fps=8, size=(64, 64), document=document) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(StudioError, match=words):
        open_clip(tmp_path / "a.mp4")
