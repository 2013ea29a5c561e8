"""Clips on disk: what is written is what is read, the document rides along, and trouble is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.media import video
from engine.messages import Cancelled, StudioError
from engine.paths import ROOT

Frames = NDArray[np.uint8]
AWKWARD = 'a = b; c # d \\ e\nnext line\r\n[STREAM]\n;"füchsin 狐" \t 100 %'


def flat_art(frames: int = 9, side: int = 64) -> Frames:
    """A sky, a beach and two outlined things that move two pixels a frame: what toybox draws."""
    clip = np.full((frames, side, side, 3), (120, 190, 250), np.uint8)
    clip[:, side * 2 // 3 :] = (240, 220, 150)
    for t in range(frames):
        x = (4 + 2 * t) % (side - 16)
        clip[t, 20:36, x : x + 16] = (20, 20, 20)
        clip[t, 21:35, x + 1 : x + 15] = (230, 40, 30)
        clip[t, 44:58, side - 16 - x : side - 4 - x] = (30, 140, 60)
    return clip


def write(path: Path, frames: Frames, *, display_scale: int = 4, document: str = "", fps: float = 8) -> Path:
    high, wide = frames.shape[1:3]
    with video.ClipWriter(path, fps=fps, size=(wide, high), display_scale=display_scale, document=document) as writer:
        for frame in frames:
            writer.write(frame)
    return writer.path


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal to noise, dB."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("scale", "least_db"), [(2, 40), (3, 40), (4, 45)])
def test_flat_art_comes_back_at_native_size_almost_unchanged(tmp_path: Path, scale: int, least_db: float) -> None:
    art = flat_art()
    back = video.read_frames(write(tmp_path / "a.mp4", art, display_scale=scale), display_scale=scale)
    assert back.shape == art.shape
    assert min(psnr(a, b) for a, b in zip(art, back, strict=True)) >= least_db


def test_an_odd_size_is_filled_up_in_the_file_and_cut_again_when_read(tmp_path: Path) -> None:
    art = flat_art(side=65)[:, :63]
    path = write(tmp_path / "odd.mp4", art, display_scale=3)
    info = video.probe(path)
    assert (info.width, info.height) == (196, 190)
    assert video.read_frames(path, display_scale=3).shape == art.shape


def test_the_file_says_its_size_rate_and_length(tmp_path: Path) -> None:
    info = video.probe(write(tmp_path / "a.mp4", flat_art(17)))
    assert (info.width, info.height, info.fps) == (256, 256, 8.0)
    assert info.seconds == pytest.approx(17 / 8, abs=0.02)


def test_the_index_comes_before_the_pictures_so_that_a_browser_can_start_at_once(tmp_path: Path) -> None:
    content = write(tmp_path / "a.mp4", flat_art()).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("document", [AWKWARD, "{}", json.dumps({"png": "iVBOR/+=" * 115_000})], ids=len)
def test_the_document_comes_back_letter_by_letter(tmp_path: Path, document: str) -> None:
    path = write(tmp_path / "a.mp4", flat_art(2), document=document)
    assert video.read_document(path) == document


def test_a_clip_without_a_document_has_none(tmp_path: Path) -> None:
    assert video.read_document(write(tmp_path / "a.mp4", flat_art(2))) is None


@pytest.mark.parametrize("content", [b"", b"once upon a time", b"\x00\x00\x00\x20ftypisom" + b"\x00" * 40])
def test_what_is_no_video_is_refused_by_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    for read in (video.read_document, video.probe, video.read_frames, video.write_poster):
        with pytest.raises(StudioError, match=r"clip\.mp4 cannot be read as a video"):
            read(path)


def test_half_a_file_is_refused_by_a_sentence(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", flat_art(17)).read_bytes()
    half = tmp_path / "half.mp4"
    half.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(StudioError, match="cannot be read as a video"):
        video.read_frames(half)


def test_a_clip_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="no clip at"):
        video.read_document(tmp_path / "gone.mp4")


def test_a_playlist_named_mp4_opens_nothing_else(tmp_path: Path) -> None:
    real = write(tmp_path / "real.mp4", flat_art(2), document="a secret")
    lists = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{real.name}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{real.name}'\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(StudioError, match="cannot be read as a video"):
            video.read_frames(tmp_path / name)


def test_a_document_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", flat_art(2), document="x" * (video.MAX_DOCUMENT + 1))
    with pytest.raises(StudioError, match="larger than 8 MB"):
        video.read_document(path)


def test_a_cancelled_clip_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(Cancelled), video.ClipWriter(tmp_path / "a.mp4", fps=8, size=(64, 64)) as writer:
        while not names(tmp_path):  # until ffmpeg has begun its file
            writer.write(flat_art()[0])
        raise Cancelled
    assert names(tmp_path) == []


def test_until_the_clip_is_complete_the_older_one_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", flat_art(2), document="older")
    with video.ClipWriter(path, fps=8, size=(64, 64), document="newer") as writer:
        writer.write(flat_art()[0])
        assert video.read_document(path) == "older"
    assert video.read_document(path) == "newer"
    assert names(tmp_path) == ["a.mp4"]


def test_a_name_that_cannot_be_freed_makes_the_clip_take_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()  # stands for a file that a player holds open on Windows: it cannot be unlinked
    path = write(tmp_path / "a.mp4", flat_art(2))
    assert path == tmp_path / "a-2.mp4" and path.is_file()


def test_a_frame_of_another_shape_is_a_programmers_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="uint8 of shape"),
        video.ClipWriter(tmp_path / "a.mp4", fps=8, size=(64, 64)) as writer,
    ):
        writer.write(np.zeros((64, 63, 3), np.uint8))
    assert names(tmp_path) == []


def test_a_file_in_the_outputs_folders_place_is_explained(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("in the way", encoding="utf-8")
    with pytest.raises(StudioError, match="could not be written") as caught:
        write(tmp_path / "outputs" / "today" / "a.mp4", flat_art(2))
    assert "file stands where" in caught.value.why


def test_a_folder_without_permission_is_explained(tmp_path: Path) -> None:
    if sys.platform == "win32" or os.geteuid() == 0:
        pytest.skip("this system lets this user write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StudioError, match="read-only"):
        write(tmp_path / "a.mp4", flat_art(2))


WRITE_LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from engine.media import video
from engine.messages import StudioError
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
noise = np.random.default_rng(0)
try:
    with video.ClipWriter(Path(sys.argv[1]), fps=8, size=(64, 64)) as writer:
        for _ in range(400):
            writer.write(noise.integers(0, 256, (64, 64, 3), np.uint8))
except StudioError as error:
    print(error.what, error.why, error.next_step)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files, which Windows does not have")
def test_a_disk_that_takes_no_more_is_explained_and_the_part_removed(tmp_path: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(WRITE_LIMITED, encoding="utf-8")
    folder = tmp_path / "outputs"
    ran = subprocess.run(
        [sys.executable, str(script), str(folder / "a.mp4")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.stderr == ""
    assert "could not be written" in ran.stdout and "refuses a file that large" in ran.stdout
    assert names(folder) == []


def test_no_space_left_names_the_space_that_is_free(tmp_path: Path) -> None:
    error = video._explain_write_error("av_interleaved_write_frame(): No space left on device", tmp_path)
    assert "The disk is full" in error.why and "MB are free" in error.why


def test_an_ffmpeg_that_dies_in_the_middle_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(StudioError, match="could not be written"),
        video.ClipWriter(tmp_path / "a.mp4", fps=8, size=(64, 64), display_scale=8) as writer,
    ):
        writer.write(flat_art()[0])
        writer._ffmpeg.kill()
        for frame in flat_art(60):
            writer.write(frame)
    assert names(tmp_path) == []


def test_memory_while_writing_does_not_grow_with_frames(tmp_path: Path) -> None:
    peaks = []
    for frames in (17, 257):
        frame = flat_art(1)[0]
        tracemalloc.start()
        with video.ClipWriter(tmp_path / f"{frames}.mp4", fps=8, size=(64, 64), display_scale=4) as writer:
            for _ in range(frames):
                writer.write(frame)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert sum(1 for _ in video.iter_frames(tmp_path / "257.mp4")) == 257


def test_the_poster_shows_the_frame_a_third_into_the_clip(tmp_path: Path) -> None:
    art = flat_art(12)
    art[4:8] = (200, 30, 30)
    poster = video.write_poster(write(tmp_path / "a.mp4", art))
    assert poster == tmp_path / "a.webp"
    with Image.open(poster) as picture:
        assert picture.size == (256, 256)
        red, green, blue = np.asarray(picture.convert("RGB"))[100, 100]
    assert red > 180 and green < 60 and blue < 60


def test_a_single_frame_has_a_poster(tmp_path: Path) -> None:
    assert video.write_poster(write(tmp_path / "a.mp4", flat_art(1))).stat().st_size > 0


def test_exports_show_the_same_frames_and_webm_carries_the_document(tmp_path: Path) -> None:
    art = flat_art()
    clip = write(tmp_path / "100 %02d.mp4", art, document=AWKWARD)  # a name that ffmpeg would count with
    gif, webm, png = (video.export(clip, kind) for kind in ("gif", "webm", "png"))
    with Image.open(gif) as picture:
        assert (getattr(picture, "n_frames", 1), picture.size) == (len(art), (256, 256))
    assert video.read_document(webm) == AWKWARD
    assert psnr(video.read_frames(webm, display_scale=4), art) > 35
    stills = sorted(png.iterdir())
    assert [path.name for path in stills] == [f"{n:05d}.png" for n in range(1, len(art) + 1)]
    with Image.open(stills[3]) as picture:
        assert psnr(np.asarray(picture.convert("RGB"))[2::4, 2::4], art[3]) > 40
    assert video.export(clip, "png") == png  # a second time replaces the first
    assert names(tmp_path) == sorted([clip.name, gif.name, webm.name, png.name])


def test_a_sweep_removes_old_parts_and_nothing_else(tmp_path: Path) -> None:
    clip = write(tmp_path / "day" / "a.mp4", flat_art(1))
    old, new = (clip.with_name(f".a.{n}{video.PART}.mp4") for n in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert video.sweep(tmp_path) == 1
    assert names(clip.parent) == [new.name, clip.name]
