"""Reference pictures: odd ones are read right, broken ones refused, the same file gives the same pixels."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw

from engine import presets
from engine.job import GenerateJob, Picture, make_job, read_job, write_job
from engine.media import pictures
from engine.messages import StudioError
from tests.support.jobs import prepared

Pixels = NDArray[np.uint8]
RED, GREEN, BLUE, SAND = (220, 40, 30), (30, 140, 60), (40, 60, 200), (240, 220, 150)


def flag(size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Image.Image:
    """Red left, green right, a blue square at the top left: every turn and mirror of it differs."""
    image = Image.new("RGB", size, RED)
    draw = ImageDraw.Draw(image)
    draw.rectangle((size[0] // 2, 0, *size), fill=GREEN)
    draw.rectangle((0, 0, size[0] // 4, size[1] // 4), fill=BLUE)
    return image.convert(mode)


def creature(background: tuple[int, ...], mode: str = "RGB", side: int = 300) -> Image.Image:
    """A red round thing with eyes in the background's colour, left of the middle."""
    image = Image.new(mode, (side, side), background)
    draw = ImageDraw.Draw(image)
    edge = side // 10
    draw.ellipse((edge, 2 * edge, 5 * edge, 6 * edge), fill=RED, outline=(20, 20, 20), width=4)
    draw.ellipse((2 * edge, 3 * edge, 2 * edge + 16, 3 * edge + 16), fill=background)
    return image


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def near(image: Image.Image, expected: Image.Image, tolerance: int = 3) -> bool:
    a, b = (np.asarray(picture.convert("RGB")).astype(int) for picture in (image, expected))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance)


# --- reading what is odd ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "ppm"])
def test_every_common_kind_of_file_reads_alike(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    image = pictures.read(saved(tmp_path, flag(), f"a.{suffix}", **options))
    assert image.mode == "RGB" and near(image, flag())


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    assert near(pictures.read(saved(tmp_path, flag(), "a.jpg", format="PNG")), flag())


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_camera_picture_comes_out_upright(tmp_path: Path, turn: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = flag().transpose(undo[turn]) if turn > 1 else flag()
    exif = Image.Exif()
    exif[0x0112] = turn
    assert near(pictures.read(saved(tmp_path, stored, "a.png", exif=exif)), flag())


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    path = saved(tmp_path, flag(mode="CMYK"), "a.jpg", quality=100, subsampling=0)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert near(pictures.read(path), flag(), tolerance=8)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_becomes_eight_and_not_white(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    read = np.asarray(pictures.read(saved(tmp_path, Image.fromarray(ramp), f"a.{suffix}")))
    assert np.abs(read[..., 0] - ramp / 257).max() <= 0.5
    assert (read == read[..., :1]).all()


def png_of_sixteen_bit_colour(pixels: NDArray[np.uint16]) -> bytes:
    """Written by hand: Pillow cannot."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    high, wide = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_becomes_eight(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_of_sixteen_bit_colour(np.asarray(flag()).astype(np.uint16) * 257))
    assert near(pictures.read(path), flag(), tolerance=1)


def test_floating_grey_from_nought_to_one_is_not_black(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    read = np.asarray(pictures.read(saved(tmp_path, Image.fromarray(ramp), "a.tiff")))
    assert np.abs(read[..., 0] - ramp * 255).max() <= 0.5


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    others = [Image.new("RGB", (60, 40), colour) for colour in (BLUE, SAND)]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        path = saved(tmp_path, flag(), name, save_all=True, append_images=others, **options)
        assert near(pictures.read(path), flag())


@pytest.mark.parametrize("name", ["a.png", "a.webp", "palette.png", "a.gif"])
def test_what_is_transparent_stays_so(tmp_path: Path, name: str) -> None:
    image = creature((0, 0, 0, 0), "RGBA")
    if name == "palette.png":
        image = image.quantize(16)
    read = pictures.read(saved(tmp_path, image, name))
    assert read.mode == "RGBA"
    assert read.getchannel("A").getpixel((290, 290)) == 0 and read.getchannel("A").getpixel((60, 150)) == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_mode_becomes_plain_rgb(tmp_path: Path, mode: str) -> None:
    image = flag(mode="L").convert(mode) if mode in ("1", "L", "LA") else flag(mode=mode)
    read = pictures.read(saved(tmp_path, image, "a.png"))
    assert read.mode == "RGB" and near(read, image.convert("RGB"))


def test_a_colour_profile_is_followed(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    broken = saved(tmp_path, flag(), "broken.png", icc_profile=b"no profile at all")
    unfit = saved(tmp_path, flag(), "unfit.png", icc_profile=lab.tobytes())
    srgb = saved(
        tmp_path, flag(), "srgb.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    for path in (broken, unfit, srgb):
        assert near(pictures.read(path), flag())


# --- refusing what is broken -----------------------------------------------------------------------------------------


def png_bytes(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def noise(side: int = 120) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


BROKEN = {
    "empty.png": (b"", "is empty"),
    "letter.png": (b"Dear aunt, thank you for the picture.", "is not a picture"),
    "half.png": (png_bytes(noise())[:9000], "broken or cut off"),
    "head.png": (png_bytes(noise())[:40], "broken or cut off|is not a picture"),
    "page.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_by_a_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudioError, match=words) as caught:
        pictures.read(tmp_path / name)
    assert name in caught.value.what and caught.value.next_step and caught.value.field == "subjects"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif", "tiff", "bmp"])
def test_a_truncated_file_of_any_kind_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = saved(tmp_path, noise(), f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StudioError, match=r"broken or cut off|is not a picture"):
        pictures.read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(StudioError, match="cannot be read"):
            pictures.read(path)


def test_sixty_megapixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("1", (10_000, 6_000)), "large.png")
    with pytest.raises(StudioError, match="10000 x 6000 = 60 million pixels"):
        pictures.read(path)


def test_a_sixty_megapixel_jpeg_is_read_at_half_size(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("L", (10_000, 6_000), 200), "large.jpg")
    assert pictures.read(path).size == (5_000, 3_000)


def test_a_picture_bomb_is_refused(tmp_path: Path) -> None:
    content = bytearray(png_bytes(Image.new("1", (8, 8))))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(StudioError, match="pixels"):
        pictures.read(tmp_path / "bomb.png")


def test_a_picture_with_nothing_on_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="fully transparent"):
        pictures.read(saved(tmp_path, Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "a.png"))


# --- cutting out and preparing ---------------------------------------------------------------------------------------


def box_of(pixels: Pixels) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not white."""
    drawn = (pixels < 245).any(axis=2)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def textured(side: int = 300) -> Image.Image:
    """A creature before leaves: a background that is neither plain nor transparent."""
    random = np.random.default_rng(3)
    leaves = np.array([20, 110, 40]) + random.integers(0, 60, (side // 5, side // 5, 3))
    image = Image.fromarray(leaves.repeat(5, axis=0).repeat(5, axis=1).astype(np.uint8))
    cut = creature((0, 0, 0, 0), "RGBA", side)
    image.paste(cut, (side // 5, side // 10), cut)
    return image


def sunset(side: int = 300) -> Image.Image:
    """A creature before a sky whose colours change all the way across."""
    y, x = np.mgrid[:side, :side] / side
    sky = np.stack([120 + 80 * y, 140 + 60 * x, 100 + 50 * np.sin(10 * x)], axis=-1)
    image = Image.fromarray((sky + np.random.default_rng(1).normal(0, 3, sky.shape)).astype(np.uint8))
    cut = creature((0, 0, 0, 0), "RGBA", side)
    image.paste(cut, (side // 5, side // 10), cut)
    return image


CASES: dict[str, Callable[[], Image.Image]] = {
    "white": lambda: creature((255, 255, 255)),
    "sand": lambda: creature(SAND),
    "transparent": lambda: creature((0, 0, 0, 0), "RGBA"),
    "leaves": textured,
    "sunset": sunset,
}


@pytest.mark.parametrize("case", CASES)
def test_a_subject_is_centred_on_white_and_fills_four_fifths(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path, CASES[case](), "a.png")
    pixels = pictures.prepare(Picture(path=str(path)), size=64, cut_out=True)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert (pixels[:4] > 250).all() and (pixels[:, -4:] > 250).all()
    left, top, right, bottom = box_of(pixels)
    assert max(right - left, bottom - top) == pytest.approx(0.8 * 64, abs=3)
    assert left + right == pytest.approx(64, abs=3) and top + bottom == pytest.approx(64, abs=3)
    assert np.abs(pixels[40, 32].astype(int) - RED).max() < 12


def test_an_eye_in_the_backgrounds_colour_is_not_cut_out() -> None:
    _, mask = pictures.cut_out(creature(SAND))
    assert mask[98, 68] == 255 and mask[5, 5] == 0


def test_a_background_fills_the_square_with_the_middle_of_the_picture(tmp_path: Path) -> None:
    path = saved(tmp_path, flag((200, 100)), "a.png")
    pixels = pictures.prepare(Picture(path=str(path)), size=64, cut_out=False, background=True)
    assert np.abs(pixels[50, 5].astype(int) - RED).max() < 5 and np.abs(pixels[50, 60].astype(int) - GREEN).max() < 5


def test_without_cutting_out_the_whole_picture_stays(tmp_path: Path) -> None:
    path = saved(tmp_path, flag((200, 100)), "a.png")
    pixels = pictures.prepare(Picture(path=str(path)), size=64, cut_out=False)
    assert box_of(pixels) == (0, 16, 64, 48)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (400, 2)])
def test_tiny_and_thin_and_one_coloured_pictures_are_taken_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    path = saved(tmp_path, Image.new("RGB", size, RED), "a.png")
    pixels = pictures.prepare(Picture(path=str(path)), size=64, cut_out=True)
    assert (pixels[31:33, 32] == RED).all(axis=1).any() and (pixels[0] == 255).all()


@pytest.mark.parametrize("case", CASES)
def test_the_same_file_gives_the_same_pixels(tmp_path: Path, case: str) -> None:
    picture = Picture(path=str(saved(tmp_path, CASES[case](), "a.png")))
    first, second = (pictures.prepare(picture, size=64, cut_out=True) for _ in range(2))
    assert (first == second).all()


# --- pictures inside documents ---------------------------------------------------------------------------------------


def a_job(*paths: Path, **fields: object) -> GenerateJob:
    pictures_of = [{"path": str(path)} for path in paths]
    return make_job(prompt="@it hops", subjects=[{"name": "it", "pictures": pictures_of, **fields}])


def test_a_packed_job_needs_its_files_no_more(tmp_path: Path) -> None:
    path = saved(tmp_path, creature(SAND), "a.png")
    job = prepared(a_job(path)).document
    expected = pictures.prepare_subject(a_job(path).subjects[0], size=64)[0]
    assert job.subjects[0].pictures[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    again = read_job(write_job(pictures.drop_embedded_paths(job)))
    assert (pictures.prepare_subject(again.subjects[0], size=64)[0] == expected).all()
    assert again.subjects[0].pictures[0].path == ""
    assert prepared(again).document.subjects == again.subjects


def test_pictures_too_large_together_are_made_smaller_until_they_fit(tmp_path: Path) -> None:
    paths = [saved(tmp_path, noise(700), f"{n}.png") for n in range(3)]
    large = presets.load("toybox").model_copy(update={"reference_size": 512})
    resolved = prepared(a_job(*paths, cut_out=False), large)
    job = resolved.document
    lengths = [len(picture.png) for picture in job.subjects[0].pictures]
    assert 0.6 * pictures.MAX_EMBEDDED < sum(lengths) <= pictures.MAX_EMBEDDED
    read_again = pictures.prepare_subject(job.subjects[0], size=512)
    assert [image.shape for image in read_again] == [(512, 512, 3)] * 3
    for seen, then in zip(resolved.subjects[0].pictures, read_again, strict=True):
        assert np.array_equal(seen, then), "the clip sees what whoever opens its document sees"


def test_twelve_of_toyboxs_pictures_fit_as_they_are(tmp_path: Path) -> None:
    path = saved(tmp_path, noise(64), "a.png")
    png = prepared(a_job(path, cut_out=False)).document.subjects[0].pictures[0].png
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        assert image.size == (64, 64)
    assert 12 * len(png) < pictures.MAX_EMBEDDED


@pytest.mark.parametrize("png", ["not base64!", base64.b64encode(b"a letter").decode(), "iVBORw0KGgo="])
def test_hostile_pixels_in_a_document_are_refused(png: str) -> None:
    with pytest.raises(StudioError, match="inside the document"):
        pictures.prepare(Picture(png=png), size=64, cut_out=True)


def test_an_embedded_picture_of_many_megapixels_is_refused_before_it_is_decoded() -> None:
    png = base64.b64encode(png_bytes(Image.new("1", (6_000, 6_000)))).decode()
    with pytest.raises(StudioError, match="6000 x 6000"):
        pictures.prepare(Picture(png=png), size=64, cut_out=True)


def test_a_document_from_elsewhere_opens_no_file_of_this_machine(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "subjects", tmp_path / "private"
    ours.mkdir()
    theirs.mkdir()
    mine, secret = saved(ours, flag(), "a.png"), saved(theirs, flag(), "diary.png")
    assert pictures.drop_foreign_paths(a_job(mine), [ours]) == a_job(mine)
    sneaky = ours / ".." / "private" / "diary.png"
    for path in (secret, sneaky, Path("//host/share/a.png"), ours / "gone.png"):
        with pytest.raises(StudioError, match="did not come with it"):
            pictures.drop_foreign_paths(a_job(path), [ours])
        packed = make_job(
            prompt="@it hops", subjects=[{"name": "it", "pictures": [{"path": str(path), "png": "iVBORw0KGgo="}]}]
        )
        assert pictures.drop_foreign_paths(packed, [ours]).subjects[0].pictures[0].path == ""


def test_a_picture_on_a_clips_canvas_is_as_large_as_fits_keeps_its_shape_and_has_white_around() -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[20:40, 12:52] = (200, 30, 30)  # 40 wide, 20 high
    for width, height in ((80, 48), (32, 64)):
        page = pictures.place_on_canvas(picture, width, height)
        drawn = page.min(axis=2) < 250
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        assert page.shape == (height, width, 3)
        assert len(columns) == width and abs(len(rows) - width // 2) <= 1
        assert abs((rows[0] + rows[-1]) / 2 - (height - 1) / 2) <= 1
    white = np.full((64, 64, 3), 255, np.uint8)
    assert (pictures.place_on_canvas(white, 32, 16) == 255).all()
