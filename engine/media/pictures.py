"""Reference pictures: from whatever a person has to what the model reads.

In:  picture files of every common kind, right or broken; the pictures of a job.
Out: upright RGB; a subject cut out on white at the model's size; a job that carries its own small pictures.
Knows nothing of torch, of the page, or of models.

Everything here gives the same pixels for the same file, on every machine.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from engine.job import GenerateJob, Picture, Subject
from engine.messages import StudioError
from engine.resolve import PreparedSubject, ResolvedJob

Pixels = NDArray[np.uint8]

MAX_PIXELS = 50_000_000  # decoded at once: 200 MB as RGBA. Larger JPEGs are read reduced, larger others refused
MAX_EMBEDDED = 1_000_000  # characters of base64 that all pictures of one document may take together
FILL = 0.8  # of the square's side, by the subject's longest one: what the models are trained on
# No EPS, PDF or PSD: Pillow reads those through other programs, or only in part.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "ICO")
_PREPARED_SIDE = 2048  # the largest `reference_size` a preset can have


def read(path: Path) -> Image.Image:
    """A picture file as upright RGB, or RGBA where something of it is transparent; the first frame of an animation.

    Camera colours become sRGB, sixteen bits become eight, CMYK becomes RGB. A JPEG of more than 50 megapixels is
    decoded at half, a quarter or an eighth of its size.

    Raises:
        StudioError: field "subjects"; missing, empty, broken, too large, or not a picture at all.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "No file is there." if not path.exists() else f"The system refuses it ({error.strerror})."
        raise _picture_error(
            f"{path.name or path} cannot be read.", reason, "Choose a picture that is there."
        ) from error
    if not content:
        raise _picture_error(
            f"{path.name} is empty.", "The file holds no bytes; a copy may have failed.", "Copy it again."
        )
    if content[4:8] == b"ftyp" and content[8:11] in (b"hei", b"hev", b"mif"):
        raise _picture_error(
            f"{path.name} is a HEIC picture.", "This studio does not read Apple's format.", "Export it as JPEG or PNG."
        )
    return _decode(content, path.name, FORMATS)


def cut_out(image: Image.Image) -> tuple[Pixels, Pixels]:
    """Tell a subject from its background.

    What is transparent is background. Otherwise, where most of the rim has one plain colour, what touches the rim in
    that colour is. Otherwise GrabCut separates the middle from the rim. Where all of this finds no subject, or nothing
    but subject, everything is kept.

    Returns:
        The picture (H, W, 3), and how much of every pixel belongs to the subject (H, W), 0 to 255.
    """
    rgb = np.asarray(image.convert("RGB"))
    if "A" in image.getbands():
        mask = np.asarray(image.getchannel("A"))
        return rgb, mask
    plain = _find_plain_background(rgb)
    mask = _mask_plain_background(rgb, plain) if plain is not None else _grab_cut(rgb)
    share = float((mask > 0).mean())
    return rgb, mask if 0.005 < share < 0.995 else np.full_like(mask, 255)


def prepare(picture: Picture, *, size: int, cut_out: bool, background: bool = False) -> Pixels:
    """One reference picture as the model reads it.

    Pixels that ride along in the document are taken as they are. Otherwise the file is read: a subject is cut out,
    centred on white, its longest side 80 % of the square; with `cut_out` off, the whole picture is fitted into the
    square on white; a background fills the square with the middle of the picture.

    Returns:
        (size, size, 3) uint8 RGB.

    Raises:
        StudioError: field "subjects"; the file or the embedded pixels cannot be read.
    """
    if picture.png:
        return _decode_embedded(picture, size)
    image = read(Path(picture.path))
    # Four times the wanted size is enough for any crop, and keeps a camera's 24 megapixels from costing seconds.
    enough = max(4 * size, 1024)
    image.thumbnail((enough, enough), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if background:
        return np.asarray(ImageOps.fit(_flatten_on_white(image), (size, size), Image.Resampling.LANCZOS))
    if cut_out:
        image, fill = _crop_to_subject(image), FILL
    else:
        image, fill = _flatten_on_white(image), 1.0
    scale = fill * size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(shape, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return np.asarray(square)


def prepare_subject(subject: Subject, *, size: int) -> list[Pixels]:
    """Every picture of a subject through `prepare`, as its role and its cut-out switch say."""
    is_background = subject.role == "background"
    return [
        prepare(picture, size=size, cut_out=subject.cut_out and not is_background, background=is_background)
        for picture in subject.pictures
    ]


def place_on_canvas(picture: Pixels, width: int, height: int) -> Pixels:
    """A prepared picture at a clip's size: its drawn part as large as fits, white around it, (height, width, 3).

    Source: Phantom's `generate.py`, which fits pictures into the clip's size on white.
    """
    canvas, part = Image.new("RGB", (width, height), "white"), _crop_white_border(picture)
    scale = min(width / part.width, height / part.height)
    shape = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
    small = part.resize(shape, Image.Resampling.LANCZOS)
    canvas.paste(small, ((width - shape[0]) // 2, (height - shape[1]) // 2))
    return np.asarray(canvas)


def resize_to_multiple(picture: Pixels, multiple: int) -> Pixels:
    """The drawn part of a prepared picture alone, each side made the nearest multiple of `multiple`, at least one.

    Source: `MaxLongEdgeMinShortEdgeResize` in bernini/data_utils.py, bytedance/Bernini 8c805a5, for a picture that is
    not too large; a prepared one never is.
    """
    part = _crop_white_border(picture)
    shape = (max(1, round(part.width / multiple)) * multiple, max(1, round(part.height / multiple)) * multiple)
    return np.asarray(part if part.size == shape else part.resize(shape, Image.Resampling.BICUBIC))


def _crop_white_border(picture: Pixels) -> Image.Image:
    """A prepared picture without the white around it; all of it where nothing is drawn."""
    drawn = picture.min(axis=2) < 250
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(rows):
        return Image.fromarray(picture)
    return Image.fromarray(picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


# --- pictures that travel inside a document --------------------------------------------------------------------------


def prepare_subjects(resolved: ResolvedJob) -> ResolvedJob:
    """The job with its subjects prepared, and with every picture's hash and very pixels in its document.

    Each picture is read once. All together take at most 1 MB of the document; where they would not fit, the largest are
    made smaller, and the model sees those. A picture that already carries its pixels keeps them.

    Raises:
        StudioError: field "subjects"; a picture cannot be read.
    """
    size = resolved.preset.reference_size
    shown = [prepare_subject(subject, size=size) for subject in resolved.document.subjects]
    cast = [
        [EmbeddedPicture(picture, pixels) for picture, pixels in zip(subject.pictures, own, strict=True)]
        for subject, own in zip(resolved.document.subjects, shown, strict=True)
    ]
    everyone = [each for own in cast for each in own]
    while sum(len(each.png) for each in everyone) > MAX_EMBEDDED:
        max(everyone, key=lambda each: len(each.png)).shrink()
    documents, subjects = [], []
    for subject, own in zip(resolved.document.subjects, cast, strict=True):
        documents.append(subject.model_copy(update={"pictures": tuple(each.as_document() for each in own)}))
        pictures = tuple(each.pixels_at(size) for each in own)
        subjects.append(PreparedSubject(subject.name, subject.role, subject.noun, subject.weight, pictures))
    document = resolved.document.model_copy(update={"subjects": tuple(documents)})
    return replace(resolved, document=document, subjects=tuple(subjects))


class EmbeddedPicture:
    """A prepared picture and its bytes in the document, which may have to be smaller."""

    def __init__(self, picture: Picture, pixels: Pixels) -> None:
        self._picture, self._pixels = picture, pixels
        self.png = picture.png or _encode_png(pixels)

    def shrink(self) -> None:
        """One step smaller."""
        side = self._pixels.shape[0] * 7 // 8
        smaller = Image.fromarray(self._pixels).resize((side, side), Image.Resampling.LANCZOS)
        self._pixels = np.asarray(smaller)
        self.png = _encode_png(self._pixels)

    def as_document(self) -> Picture:
        """With its pixels and the hash of its file."""
        found = self._picture.sha256 or sha256(Path(self._picture.path))
        return self._picture.model_copy(update={"png": self.png, "sha256": found})

    def pixels_at(self, size: int) -> Pixels:
        """(size, size, 3), as whoever opens the document sees it."""
        if self._pixels.shape[0] == size:
            return self._pixels
        return np.asarray(Image.fromarray(self._pixels).resize((size, size), Image.Resampling.LANCZOS))


def sha256(path: Path) -> str:
    """Hash of a file's bytes in hexadecimal; "" for a file that is not there any more."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def drop_embedded_paths(job: GenerateJob) -> GenerateJob:
    """The job without paths where the pixels ride along: what goes into a file that may be shown to others."""
    return _replace_paths(job, lambda picture: "" if picture.png else picture.path)


def drop_foreign_paths(job: GenerateJob, folders: Iterable[Path]) -> GenerateJob:
    """A job that arrived inside a clip, without the paths that are none of its business.

    A path is kept only where a file of these folders (subjects, uploads, outputs) is meant and is there. Nothing
    outside them is ever touched, not even to see whether it exists: on Windows, asking for a network share logs in.

    Raises:
        StudioError: field "subjects"; a picture has neither pixels nor a path that may be opened.
    """
    allowed = [Path(os.path.abspath(folder)) for folder in folders]  # noqa: PTH100 - resolve() would touch the disk

    def checked(picture: Picture) -> str:
        if not picture.path:
            return ""
        path = Path(os.path.abspath(picture.path))  # noqa: PTH100
        inside = any(
            path.is_relative_to(folder) and path.resolve().is_relative_to(folder.resolve()) for folder in allowed
        )
        if inside and path.is_file():
            return str(path)
        if picture.png:
            return ""
        raise _picture_error(
            f"The document names the picture {path.name!r}, which did not come with it.",
            "Files of this machine are not opened because a document says so.",
            "Add that picture to its subject again.",
        )

    return _replace_paths(job, checked)


def _replace_paths(job: GenerateJob, path_of: Callable[[Picture], str]) -> GenerateJob:
    subjects = []
    for subject in job.subjects:
        moved = tuple(picture.model_copy(update={"path": path_of(picture)}) for picture in subject.pictures)
        subjects.append(subject.model_copy(update={"pictures": moved}))
    return job.model_copy(update={"subjects": tuple(subjects)})


def _encode_png(pixels: Pixels) -> str:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", optimize=True)
    return base64.b64encode(encoded.getvalue()).decode("ascii")


def _decode_embedded(picture: Picture, size: int) -> Pixels:
    name = "A picture inside the document"
    try:
        content = base64.b64decode(picture.png, validate=True)
    except ValueError as error:
        raise _picture_error(
            f"{name} is not base64.", "The document was changed or cut off.", "Add it again."
        ) from error
    image = _flatten_on_white(_decode(content, name, ("PNG",), most=_PREPARED_SIDE**2))
    if image.size != (size, size):  # made for a preset of another size, or made smaller by `pack`
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


# --- decoding --------------------------------------------------------------------------------------------------------


def _decode(content: bytes, name: str, formats: tuple[str, ...], most: int = MAX_PIXELS) -> Image.Image:
    # What decoders remark on metadata is for programmers, and so is Pillow's own warning about large pictures: their
    # size is looked at here, before anything is decoded.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content), formats=formats)
            _check_size(image, name, most)
            image.load()
        except Image.DecompressionBombError as error:
            raise _too_large_error(name, "more than 178 million") from error
        except UnidentifiedImageError as error:
            raise _picture_error(
                f"{name} is not a picture.",
                "Its content is of another kind, whatever its name says.",
                "Choose a PNG, JPEG, WebP, GIF, BMP or TIFF.",
            ) from error
        except StudioError:
            raise
        except Exception as error:  # a decoder meets broken bytes with whatever it stumbles over: OSError, SyntaxError,
            # struct.error, zlib.error, IndexError ...
            raise _picture_error(
                f"{name} is broken or cut off.", f"Decoding stopped: {str(error)[:100]}.", "Copy or export it again."
            ) from error
        return _convert_to_rgb(_convert_to_srgb(ImageOps.exif_transpose(image)), name)


def _check_size(image: Image.Image, name: str, most: int) -> None:
    """Refuse a picture that would fill the memory, or have a JPEG decoder give a smaller one."""
    wide, high = image.size
    if wide * high > most and image.format in ("JPEG", "MPO"):
        factor = next((factor for factor in (2, 4, 8) if wide * high <= most * factor**2), 8)
        image.draft(None, (wide // factor, high // factor))
    if image.width * image.height > most:
        raise _too_large_error(name, f"{wide} x {high} = {round(wide * high / 1e6)} million", most)


def _too_large_error(name: str, pixels: str, most: int = MAX_PIXELS) -> StudioError:
    return _picture_error(
        f"{name} has {pixels} pixels.",
        f"Up to {most / 1e6:.0f} million are read, JPEG up to 178 million; a larger one could fill the memory.",
        "Save it smaller; 2000 pixels across are plenty.",
    )


def _convert_to_srgb(image: Image.Image) -> Image.Image:
    """Camera and print colours as the screen's. A phone's wide colours would otherwise come out pale."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):
        # A damaged profile says nothing; the picture without it is what every browser would show.
        return image


def _convert_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB, or RGBA where something is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        return _convert_to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if most == 0:
        raise _picture_error(
            f"{name} is fully transparent.", "There is nothing to see on it.", "Choose a picture that shows something."
        )
    return image.convert("RGB") if least == 255 else image


def _convert_to_eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit, 32-bit and floating grey; Pillow's own conversion would cut everything above 255 to white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    highest = float(values.max())
    if image.mode.startswith("I;16"):
        top = 65535.0
    elif image.mode == "F" and highest <= 1.0:
        top = 1.0
    else:
        top = 255.0 if highest <= 255 else max(65535.0, highest)
    return Image.fromarray(np.rint(values.clip(0, top) / top * 255).astype(np.uint8)).convert("RGB")


def _picture_error(what: str, why: str, next_step: str) -> StudioError:
    return StudioError(what, why, next_step, field="subjects")


# --- cutting out -----------------------------------------------------------------------------------------------------


def _flatten_on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _crop_to_subject(image: Image.Image) -> Image.Image:
    """The subject on white, cropped to its box."""
    rgb, mask = cut_out(image)
    solid = mask > 127 if (mask > 127).any() else mask > 0
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    white = Image.new("RGB", image.size, "white")
    white.paste(Image.fromarray(rgb), mask=Image.fromarray(mask))
    return white.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _find_plain_background(rgb: Pixels) -> Pixels | None:
    """The colour of the rim, (3,), where three quarters of it have one."""
    rim = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    colour = np.median(rim, axis=0)
    near = np.abs(rim - colour).max(axis=1) <= 16  # a JPEG of plain paper wavers by about 8
    return colour.astype(np.uint8) if near.mean() >= 0.75 else None


def _mask_plain_background(rgb: Pixels, colour: Pixels) -> Pixels:
    """255 but where the background's colour can be walked to from the rim: a white eye stays."""
    import cv2

    near = np.asarray(np.abs(rgb.astype(np.int16) - colour).max(axis=2) <= 24, np.uint8)
    _, labels = cv2.connectedComponents(near, connectivity=4)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    background = np.isin(labels, outside[outside > 0])
    return _clean_mask(np.where(background, 0, 255).astype(np.uint8))


def _grab_cut(rgb: Pixels) -> Pixels:
    """The middle told from the rim by colour, at 256 pixels: half a second of work at most."""
    import cv2

    high, wide = rgb.shape[:2]
    scale = min(1.0, 256 / max(high, wide))
    shape = (max(1, round(wide * scale)), max(1, round(high * scale)))
    small = np.asarray(cv2.resize(rgb, shape, interpolation=cv2.INTER_AREA), np.uint8)
    if min(shape) < 16:
        return np.full((high, wide), 255, np.uint8)
    labels = np.full(small.shape[:2], cv2.GC_PR_FGD, np.uint8)
    flowing = _flood_from_rim(small)
    if flowing.mean() < 0.95:  # past that it has leaked into the subject, and tells nothing
        labels[flowing] = cv2.GC_PR_BGD
    inset = max(1, max(shape) // 32)
    labels[:inset] = labels[-inset:] = labels[:, :inset] = labels[:, -inset:] = cv2.GC_BGD
    cv2.setRNGSeed(0)  # its colour models start from random centres
    cv2.grabCut(small, labels, (0, 0, 1, 1), np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK)
    mask = _clean_mask(np.where((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), 255, 0).astype(np.uint8))
    return np.asarray(cv2.resize(mask, (wide, high), interpolation=cv2.INTER_LINEAR), np.uint8)


def _flood_from_rim(rgb: Pixels) -> NDArray[np.bool_]:
    """(H, W): what can be reached from the rim without crossing an edge. GrabCut alone takes the far end of a sky that
    turns from blue to pink for a subject."""
    import cv2

    smooth = cv2.medianBlur(rgb, 5)
    high, wide = rgb.shape[:2]
    reached = np.zeros((high + 2, wide + 2), np.uint8)
    rim = []
    for y in (0, high - 1):
        rim += [(x, y) for x in range(0, wide, 4)]
    for x in (0, wide - 1):
        rim += [(x, y) for y in range(0, high, 4)]
    for x, y in rim:
        if not reached[y + 1, x + 1]:
            cv2.floodFill(smooth, reached, (x, y), 0, (5,) * 3, (5,) * 3, 4 | cv2.FLOODFILL_MASK_ONLY | 255 << 8)
    return reached[1:-1, 1:-1] > 0


def _clean_mask(mask: Pixels) -> Pixels:
    """Without specks, and on large pictures with an edge one pixel further in, past the background's shine."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if count > 2:
        specks = 1 + np.flatnonzero(areas < 0.01 * areas.max())
        mask = np.where(np.isin(labels, specks), 0, mask).astype(np.uint8)
    if min(mask.shape) >= 256:
        return np.asarray(cv2.GaussianBlur(cv2.erode(mask, np.ones((3, 3), np.uint8)), (3, 3), 0), np.uint8)
    return mask
