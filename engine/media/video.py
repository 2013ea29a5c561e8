"""Video files: frames in, frames out, and the document that rides inside.

In:  RGB frames one by one, and the text of a document; or a finished file.
Out: an mp4 that plays everywhere; its document; its frames; a poster; GIF, WebM and PNG copies.
Knows nothing of torch, of jobs, of presets: a document is text, `display_scale` a number.

Everything goes through the ffmpeg binary that comes with imageio-ffmpeg (there is no ffprobe in it). Frames are
streamed: neither side ever holds more than one of them.

Shapes: H x W pixels of a native frame, 3 colours R G B, uint8. In the file each of them is `display_scale` pixels wide
and high, because 4:2:0 colour ruins flat art drawn at one pixel per pixel.
"""

from __future__ import annotations

import io
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.messages import StudioError

CRF = 12  # x264's quality: past this the eye sees nothing more, and a toybox clip stays below 10 KB
MAX_DOCUMENT = 8 * 2**20  # bytes; ours carry at most 1 MB of pictures
PART = ".part"  # a clip that is still being written is `.<name>.<random>.part.mp4`
POSTER_SIDE = 384  # longest side of a poster, pixels

# What a dropped file may be. Playlists (HLS, concat, DASH) are not on it: they make ffmpeg open other files and hosts.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg"
_SAFE_INPUT = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _FORMATS]


class ClipWriter:
    """Writes one mp4 (H.264, yuv420p, faststart) frame by frame, with a document inside.

    A context manager. The clip appears under its name only when it is complete: it is written beside it under a hidden
    name, and removed when the block is left by an exception.

    Args:
        path: the mp4 to make; its folder is made when missing. A file of that name is replaced.
        fps: frames a second.
        size: (width, height) of the frames that will be written, native pixels.
        display_scale: every pixel is written this many times across and down.
        document: text to carry inside, "" for none.

    Raises:
        StudioError: the folder cannot be written, the disk is full, or ffmpeg stopped.
    """

    def __init__(
        self, path: Path, *, fps: float, size: tuple[int, int], display_scale: int = 1, document: str = ""
    ) -> None:
        self.path = Path(path)
        """Where the clip is. Differs from the one asked for only if that one was held open by another program."""
        self.frames = 0
        """Frames written so far."""
        self._fps = fps
        self._width, self._height = size
        self._scale = display_scale
        self._document = document

    def __enter__(self) -> ClipWriter:
        folder = self.path.parent
        self._part = folder / f".{self.path.stem}.{secrets.token_hex(4)}{PART}.mp4"
        with _explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._scratch = tempfile.TemporaryDirectory(prefix="clip-", ignore_cleanup_errors=True)
            self._log = (Path(self._scratch.name) / "ffmpeg.log").open("w+b")
        try:
            with _explain_os_errors(folder):
                self._ffmpeg = subprocess.Popen(
                    self._command(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, **_POPEN
                )
        except BaseException:
            self._clean_up()
            raise
        return self

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append one frame, (H, W, 3) uint8 RGB of the size given.

        Raises:
            ValueError: another shape or type.
            StudioError: the frame cannot be written.
        """
        if frame.shape != (self._height, self._width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"a frame is uint8 of shape {(self._height, self._width, 3)}, got {frame.dtype} of {frame.shape}"
            )
        enlarged = frame.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        high, wide = enlarged.shape[:2]
        even = np.pad(enlarged, ((0, high % 2), (0, wide % 2), (0, 0)), mode="edge")  # 4:2:0 takes even sizes only
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(np.ascontiguousarray(even).data)
        except OSError:  # a broken pipe: ffmpeg is gone, and its log says why
            raise self._failure() from None
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._clean_up()

    def _command(self) -> list[str]:
        wide, high = (side * self._scale + side * self._scale % 2 for side in (self._width, self._height))
        metadata: list[str] = []
        if self._document:
            # A file, not an argument: a document with pictures is longer than a command line may be.
            listed = Path(self._scratch.name) / "document.txt"
            text = f";FFMETADATA1\ncomment={_escape(self._document)}\n"
            listed.write_text(text, encoding="utf-8", newline="\n")
            metadata = ["-f", "ffmetadata", "-i", str(listed), "-map_metadata", "1"]
        return [
            *_ffmpeg("-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{wide}x{high}", "-r", f"{self._fps:g}"),
            *("-i", "pipe:0", *metadata, "-map", "0:v", "-c:v", "libx264", "-preset", "medium", "-crf", str(CRF)),
            # BT.709 both in the numbers and in the label; without it players guess the colours from the size.
            *("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=area+accurate_rnd+full_chroma_int"),
            *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
            *("-pix_fmt", "yuv420p", "-movflags", "+faststart", str(self._part.resolve())),
        ]

    def _finish(self) -> None:
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.close()
        except OSError:
            raise self._failure() from None
        if self._ffmpeg.wait() != 0 or not self.frames:
            raise self._failure()
        with _explain_os_errors(self.path.parent):
            self.path = _move_into_place(self._part, self.path)

    def _failure(self) -> StudioError:
        """The reason of an ffmpeg that stopped."""
        self._ffmpeg.wait()
        self._log.seek(0)
        return _explain_write_error(self._log.read().decode("utf-8", "replace"), self.path.parent)

    def _clean_up(self) -> None:
        ffmpeg = getattr(self, "_ffmpeg", None)
        if ffmpeg is not None:
            if ffmpeg.poll() is None:
                ffmpeg.kill()
            ffmpeg.wait()
            with _ignore_broken_pipe():
                ffmpeg.stdin.close()
        self._log.close()
        self._part.unlink(missing_ok=True)
        self._scratch.cleanup()


# --- the document inside ---------------------------------------------------------------------------------------------


def read_document(path: Path) -> str | None:
    """The document a clip carries, as the text that was put in; None when it carries none.

    Nothing in it is checked or opened: that is `engine.job.read_job`'s work.

    Raises:
        StudioError: not a video, or a document larger than 8 MB.
    """
    command = _ffmpeg(*_SAFE_INPUT, "-i", _input_path(path), "-f", "ffmetadata", "pipe:1")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **_POPEN
    ) as ffmpeg:
        assert ffmpeg.stdout is not None
        listing = ffmpeg.stdout.read(2 * MAX_DOCUMENT)  # twice: every quote and comma may come escaped
        if len(listing) == 2 * MAX_DOCUMENT:
            ffmpeg.kill()
    if not listing and ffmpeg.returncode != 0:
        raise _not_a_video_error(path)
    comment = _find_comment(listing.decode("utf-8", "replace"))
    if ffmpeg.returncode != 0 or len(comment or "") > MAX_DOCUMENT:
        raise StudioError(
            f"The document inside {path.name} was not read.",
            f"It is larger than {MAX_DOCUMENT // 2**20} MB, and no studio writes such.",
            "Use a clip that this studio made.",
        )
    return comment or None


def _escape(text: str) -> str:
    """As ffmpeg's metadata format wants it: = ; # \\ and line ends behind a backslash."""
    return re.sub(r"([=;#\\\n\r])", r"\\\1", text)


def _find_comment(listing: str) -> str | None:
    """The `comment` entry of an ffmetadata listing, unescaped."""
    for line in re.finditer(r"((?:\\.|[^\\\n])+)(?:\n|\Z)", listing, re.DOTALL):
        if line[1].startswith("["):  # [STREAM] and [CHAPTER] sections follow the file's own entries
            return None
        key, separator, value = line[1].partition("=")
        if separator and key.lower() == "comment":  # WebM spells it in capitals
            return re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
    return None


# --- frames out ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipInfo:
    """What a video file says about itself. `fps` and `seconds` are 0 when it does not say."""

    width: int
    height: int
    fps: float
    seconds: float


def probe(path: Path) -> ClipInfo:
    """Size in pixels of the file (not native ones), frames a second, length.

    Raises:
        StudioError: not a video.
    """
    ran = subprocess.run(
        _ffmpeg(*_SAFE_INPUT, "-i", _input_path(path), level="info"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        **_POPEN,
    )
    said = ran.stderr.decode("utf-8", "replace")
    stream = re.search(r"Stream #.*: Video: .*?\b(\d{1,5})x(\d{1,5})\b.*", said)
    if stream is None:
        raise _not_a_video_error(path)
    fps = re.search(r"([\d.]+) fps", stream[0])
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", said)
    seconds = int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length else 0.0
    return ClipInfo(int(stream[1]), int(stream[2]), float(fps[1]) if fps else 0.0, seconds)


def iter_frames(path: Path, *, display_scale: int = 1, start_s: float = 0.0) -> Iterator[NDArray[np.uint8]]:
    """The frames of a clip one by one, (H, W, 3) uint8, at native size.

    Args:
        display_scale: how many pixels of the file make one, across and down. The middle of each such square is
            averaged: its rim is where 4:2:0 colour and the codec mix neighbours.
        start_s: seconds to skip.

    Raises:
        StudioError: not a video, or it breaks off in the middle.
    """
    # PPM frames name their own size, so a rotated or cropped file cannot be misread.
    seek = ["-ss", f"{start_s:.3f}"] if start_s > 0 else []
    command = _ffmpeg(*_SAFE_INPUT, *seek, "-i", _input_path(path), "-map", "0:v:0", "-fps_mode", "passthrough")
    # ffmpeg's default conversion is off by up to 3 levels a colour (43 dB on flat art; 50 dB so). An enlarged clip has
    # colour samples of its own for every native pixel, so the nearest is the right one; at scale 1 they are mixed.
    chroma = "neighbor" if display_scale > 1 else "bicubic"
    command += ["-vf", f"scale=flags={chroma}+accurate_rnd+full_chroma_int+full_chroma_inp"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    with tempfile.TemporaryFile() as log:
        ffmpeg = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, **_POPEN)
        try:
            assert ffmpeg.stdout is not None
            count = 0
            while (frame := _read_ppm(ffmpeg.stdout)) is not None:
                count += 1
                yield _average_to_native(frame, display_scale)
            if ffmpeg.wait() != 0 or not count:
                raise _not_a_video_error(path)
        finally:
            if ffmpeg.poll() is None:  # the caller has seen enough
                ffmpeg.kill()
            ffmpeg.communicate()


def read_frames(path: Path, *, display_scale: int = 1) -> NDArray[np.uint8]:
    """All native frames of a clip, (F, H, W, 3) uint8. For short clips: use `iter_frames` where one at a time will do.

    Raises:
        StudioError: not a video.
    """
    return np.stack(list(iter_frames(path, display_scale=display_scale)))


def _read_ppm(stream: IO[bytes]) -> NDArray[np.uint8] | None:
    if stream.readline() != b"P6\n":
        return None
    wide, high = (int(number) for number in stream.readline().split())
    stream.readline()  # the largest value, always 255
    pixels = stream.read(wide * high * 3)
    return np.frombuffer(pixels, np.uint8).reshape(high, wide, 3) if len(pixels) == wide * high * 3 else None


def _average_to_native(frame: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    high, wide = (side // scale for side in frame.shape[:2])  # drops the row or column that made the size even
    squares = frame[: high * scale, : wide * scale].reshape(high, scale, wide, scale, 3)
    rim = (scale - 1) // 2 if scale < 4 else 1
    middle = squares[:, rim : scale - rim, :, rim : scale - rim]
    return np.rint(middle.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)


# --- copies ----------------------------------------------------------------------------------------------------------


def write_poster(clip: Path, poster: Path | None = None) -> Path:
    """A still for lists and galleries: the frame a third into the clip, as WebP, longest side at most 384 px.

    Args:
        clip: a finished clip.
        poster: where to; beside the clip under its name with `.webp` when left out.

    Raises:
        StudioError: not a video, or the poster cannot be written.
    """
    poster = clip.with_suffix(".webp") if poster is None else poster
    info = probe(clip)
    third = int(info.seconds * info.fps + 0.5) // 3
    # Half a frame early: a seek takes the first frame at or after its time, and times in files are rounded.
    frame = next(iter_frames(clip, start_s=(third - 0.5) / info.fps if third else 0.0))
    picture = Image.fromarray(frame)
    picture.thumbnail((POSTER_SIDE, POSTER_SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=90)
    with _explain_os_errors(poster.parent):
        poster.write_bytes(encoded.getvalue())
    return poster


def export(clip: Path, kind: Literal["gif", "webm", "png"]) -> Path:
    """A copy of the clip in another format, beside it: `.gif`, `.webm` (VP9, document inside), or a folder of PNGs.

    Returns:
        The file, or for "png" the folder `<name>-frames` with 00001.png and so on. An earlier copy is replaced.

    Raises:
        StudioError: not a video, the disk is full, or the copy cannot be written.
    """
    target = clip.with_name(f"{clip.stem}-frames") if kind == "png" else clip.with_suffix(f".{kind}")
    part = clip.with_name(f".{clip.stem}.{secrets.token_hex(4)}{PART}" + ("" if kind == "png" else f".{kind}"))
    how = {
        # One palette for the whole clip: a palette per frame flickers.
        "gif": ["-filter_complex", "split[a][b];[a]palettegen[p];[b][p]paletteuse=diff_mode=rectangle"],
        "webm": ["-c:v", "libvpx-vp9", "-crf", "18", "-b:v", "0", "-pix_fmt", "yuv420p"],
        "png": ["-fps_mode", "passthrough"],
    }[kind]
    command = _ffmpeg(*_SAFE_INPUT, "-i", _input_path(clip), *how)
    with _explain_os_errors(clip.parent):
        try:
            if kind == "png":
                part.mkdir()
                # Relative to its folder: a % in a folder's name would be read as a number's place.
                ran = subprocess.run(
                    [*command, "%05d.png"], cwd=part, capture_output=True, stdin=subprocess.DEVNULL, **_POPEN
                )
            else:
                ran = subprocess.run(
                    [*command, str(part.resolve())], capture_output=True, stdin=subprocess.DEVNULL, **_POPEN
                )
            if ran.returncode != 0:
                raise _explain_write_error(ran.stderr.decode("utf-8", "replace"), clip.parent)
            if target.is_dir():
                shutil.rmtree(target)
            return _move_into_place(part, target)
        finally:
            if part.is_dir():
                shutil.rmtree(part)
            part.unlink(missing_ok=True)


def sweep(folder: Path, *, older_than_s: float = 86_400.0) -> int:
    """Remove half-written clips that a killed run left anywhere below a folder. Returns how many."""
    old = time.time() - older_than_s
    left = [path for path in folder.rglob(f".*{PART}.*") if path.is_file() and path.stat().st_mtime < old]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


# --- ffmpeg and the file system --------------------------------------------------------------------------------------

# SIGXFSZ stays ignored in the child, as Python has it: at a size limit ffmpeg then says "File too large" and ends in
# order, instead of dying without a word.
# No console window may pop up beside a page on Windows; elsewhere there is no such flag.
_POPEN: dict[str, Any] = {"restore_signals": False, "creationflags": 0x08000000 if sys.platform == "win32" else 0}


def _ffmpeg(*arguments: str, level: str = "error") -> list[str]:
    # Imported when first needed: the page opens without it.
    import imageio_ffmpeg

    try:
        binary = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise StudioError(
            "There is no ffmpeg to write and read clips with.",
            f"{str(error).splitlines()[0]}",
            "Run python launch.py doctor; it says how to install it.",
        ) from error
    return [binary, "-hide_banner", "-nostdin", "-loglevel", level, *arguments]


def _input_path(path: Path) -> str:
    """An absolute path, which ffmpeg cannot take for an option or a protocol.

    Raises:
        StudioError: there is no such file.
    """
    if not path.is_file():
        raise StudioError(f"There is no clip at {path}.", "It was moved or deleted.", "Choose a file that is there.")
    return str(path.resolve())


def _not_a_video_error(path: Path) -> StudioError:
    empty = path.is_file() and path.stat().st_size == 0
    return StudioError(
        f"{path.name} cannot be read as a video.",
        "The file is empty." if empty else "It is another kind of file, or only part of one.",
        "Use an mp4, WebM, MOV or GIF that plays.",
    )


def _move_into_place(part: Path, target: Path) -> Path:
    """Give a finished file its name; when a player holds an older one open, the next free name: work is never lost."""
    for number in range(1, 1000):
        free = target if number == 1 else target.with_stem(f"{target.stem}-{number}")
        try:
            free.unlink(missing_ok=True)
            return part.rename(free)
        except (PermissionError, IsADirectoryError, FileExistsError):
            if not free.exists():  # it is the folder that refuses
                raise
    raise FileExistsError(17, "every name is taken", str(target))


@contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explain_write_error(error.strerror or str(error), folder) from error


@contextmanager
def _ignore_broken_pipe() -> Iterator[None]:
    try:
        yield
    except OSError:
        # Closing flushes what the dead ffmpeg never read. Its end was already explained, or asked for.
        return


def _explain_write_error(said: str, folder: Path) -> StudioError:
    """What ffmpeg or the system said about a failed write, for a person."""
    what = f"The clip could not be written to {folder}."
    free_mb = shutil.disk_usage(folder).free // 2**20 if folder.is_dir() else None
    if "No space left" in said or (free_mb is not None and free_mb < 1):
        return StudioError(
            what,
            f"The disk is full: {free_mb} MB are free.",
            "Free some space or choose another folder with --outputs.",
        )
    if "File too large" in said:
        return StudioError(
            what, "The disk or a quota refuses a file that large.", "Choose another folder with --outputs."
        )
    if any(sign in said for sign in ("Read-only", "Permission denied", "Access is denied")):
        return StudioError(what, "The folder is read-only.", "Allow writing there, or choose another with --outputs.")
    if any(sign in said for sign in ("Not a directory", "File exists", "already exists", "cannot find the path")):
        return StudioError(what, "A file stands where the folder should be.", "Choose another folder with --outputs.")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = lines[-1][:200] if lines else "it gave no reason"
    return StudioError(what, f"ffmpeg stopped: {reason}.", "Try again; if it stays, run python launch.py doctor.")
