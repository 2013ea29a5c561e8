"""The ten named backgrounds of the toybox world, drawn once per scene on a board wider than the frame.

In:  a name, a seed.
Out: an RGB board and the part of it that a camera sees. Knows nothing of subjects, verbs or captions.

Board units: the frame at rest is x and y from 0 to 1; the board reaches from -MARGIN to 1 + MARGIN in x. Backgrounds
have no dark outlines and calmer colours than the palette, so that subjects stand out at 64x64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from train.toybox.world.drawing import SUPERSAMPLE, Brush, Colour, Pixels, cv, frame_size, mix, shrink, smooth

MARGIN = 0.2  # how far, in frame widths, a camera may move to either side
HORIZON = 0.46
Rng = np.random.Generator

WHITE: Colour = (250, 250, 250)


def _band(b: Brush, top: float, bottom: float, fill: Colour) -> None:
    b.poly([(-1, top), (2, top), (2, bottom), (-1, bottom)], fill, outline=False, inside=True)


def _blob(b: Brush, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
    b.ellipse(x, y, rx, ry, fill, outline=False, inside=True)


def _shape(b: Brush, points: list[tuple[float, float]], fill: Colour) -> None:
    b.poly(points, fill, outline=False, inside=True)


def _pick(rng: Rng, *choices: Colour) -> Colour:
    return choices[int(rng.integers(len(choices)))]


def _spread(rng: Rng, count: int) -> list[float]:
    """`count` places along the board, roughly even, each jittered."""
    step = (1 + 2 * MARGIN) / count
    return [-MARGIN + step * (k + float(rng.uniform(0.2, 0.8))) for k in range(count)]


def _sun(b: Brush, rng: Rng) -> None:
    if rng.random() < 0.6:
        _blob(b, float(rng.uniform(0, 1)), float(rng.uniform(0.08, 0.2)), 0.08, 0.08, (255, 238, 160))


def _clouds(b: Brush, rng: Rng, fill: Colour = WHITE) -> None:
    for x in _spread(rng, int(rng.integers(0, 4)) or 2):
        y, r = float(rng.uniform(0.06, 0.24)), float(rng.uniform(0.05, 0.09))
        for dx, k in ((-1.1, 0.7), (0, 1.0), (1.1, 0.75)):
            _blob(b, x + dx * r, y, k * r * 1.1, k * r * 0.8, fill)


def _beach(b: Brush, rng: Rng) -> None:
    _band(b, -1, 1, _pick(rng, (150, 214, 244), (186, 226, 240), (250, 214, 190)))
    _sun(b, rng)
    _clouds(b, rng)
    sea = _pick(rng, (72, 160, 206), (60, 176, 186), (92, 142, 204))
    _band(b, 0.32, 0.6, sea)
    for x in _spread(rng, 5):
        _blob(b, x, float(rng.uniform(0.37, 0.44)), 0.07, 0.008, mix(sea, WHITE, 0.5))
    sand = _pick(rng, (240, 218, 160), (232, 204, 146), (246, 228, 184))
    shore = [(x, 0.5 + 0.02 * math.sin(9 * x)) for x in np.linspace(-MARGIN, 1 + MARGIN, 20)]
    _shape(b, [*[(x, y - 0.025) for x, y in shore], (1.2, 1), (-0.2, 1)], mix(sea, WHITE, 0.7))
    _shape(b, [*shore, (1.2, 1), (-0.2, 1)], sand)
    for x in _spread(rng, int(rng.integers(3, 6))):
        _blob(b, x, float(rng.uniform(0.62, 0.96)), 0.025, 0.014, mix(sand, (150, 110, 70), 0.35))
    x = float(rng.choice([rng.uniform(-0.1, 0.12), rng.uniform(0.88, 1.1)]))
    b.stroke([(x, 0.6), (x + 0.02, 0.4), (x + 0.06, 0.22)], 0.03, (166, 124, 84), outline=False, inside=True)
    for k in range(5):
        leaf = b.at(x + 0.06, 0.2, -0.5 + 1.05 * k)
        leaf.ellipse(0.09, 0, 0.1, 0.026, (98, 172, 104), outline=False, inside=True)


def _forest(b: Brush, rng: Rng) -> None:
    _band(b, -1, 1, _pick(rng, (178, 220, 206), (196, 226, 190), (168, 208, 222)))
    far, near = _pick(rng, ((118, 176, 128)), (112, 164, 140)), _pick(rng, (84, 146, 94), (92, 140, 80))
    for x in _spread(rng, 9):
        _blob(b, x, 0.36, 0.12, 0.22, far)
    pines = rng.random() < 0.5
    ground = _pick(rng, (150, 190, 104), (172, 188, 110), (140, 176, 116))
    for x in _spread(rng, 5):
        h = float(rng.uniform(0.0, 0.1))
        _shape(b, [(x - 0.025, 0.3), (x + 0.025, 0.3), (x + 0.03, 0.58), (x - 0.03, 0.58)], (132, 104, 82))
        if not pines:
            _blob(b, x, 0.22 - h, 0.13, 0.17, near)
            continue
        for k in range(3):
            _shape(
                b,
                [
                    (x - 0.13 + 0.02 * k, 0.42 - 0.11 * k - h),
                    (x, 0.18 - 0.11 * k - h),
                    (x + 0.13 - 0.02 * k, 0.42 - 0.11 * k - h),
                ],
                mix(near, WHITE, 0.06 * k),
            )
    _band(b, 0.5, 1, ground)
    for x in _spread(rng, 6):
        y = float(rng.uniform(0.58, 0.97))
        _blob(b, x, y, 0.06, 0.018, mix(ground, near, 0.4))


def _night_city(b: Brush, rng: Rng) -> None:
    sky = _pick(rng, (44, 50, 98), (58, 46, 100), (36, 62, 100))
    _band(b, -1, 1, sky)
    for x in _spread(rng, 9):
        _blob(b, x, float(rng.uniform(0.02, 0.22)), 0.01, 0.01, (240, 236, 200))
    _blob(b, float(rng.uniform(0.05, 0.95)), 0.13, 0.07, 0.07, (246, 238, 190))
    for x in _spread(rng, 8):
        w, top = float(rng.uniform(0.06, 0.1)), float(rng.uniform(0.16, 0.36))
        wall = mix(sky, _pick(rng, (120, 110, 170), (90, 130, 170), (150, 110, 140)), 0.5)
        _shape(b, [(x - w, top), (x + w, top), (x + w, 0.62), (x - w, 0.62)], wall)
        for wx in (-0.5, 0.05, 0.55):
            for wy in np.arange(top + 0.05, 0.54, 0.085):
                if rng.random() < 0.6:
                    _shape(
                        b,
                        [
                            (x + wx * w - 0.014, wy),
                            (x + wx * w + 0.014, wy),
                            (x + wx * w + 0.014, wy + 0.04),
                            (x + wx * w - 0.014, wy + 0.04),
                        ],
                        (252, 222, 130),
                    )
    street = _pick(rng, (92, 94, 122), (104, 96, 116), (84, 100, 118))
    _band(b, 0.56, 1, mix(street, WHITE, 0.25))
    _band(b, 0.62, 1, street)
    for x in np.arange(-0.15, 1.2, 0.3):
        _shape(b, [(x, 0.77), (x + 0.13, 0.77), (x + 0.13, 0.79), (x, 0.79)], (226, 218, 170))


def _meadow(b: Brush, rng: Rng) -> None:
    _band(b, -1, 1, _pick(rng, (160, 218, 250), (190, 228, 250), (250, 222, 190)))
    _sun(b, rng)
    _clouds(b, rng)
    grass = _pick(rng, (146, 206, 112), (170, 212, 110), (126, 196, 128))
    for x in _spread(rng, 3):
        _blob(b, x, 0.56, 0.34, 0.17, mix(grass, (90, 160, 130), 0.35))
    _band(b, 0.5, 1, grass)
    for x in _spread(rng, int(rng.integers(6, 11))):
        y = float(rng.uniform(0.56, 0.98))
        petal = _pick(rng, (252, 250, 240), (250, 190, 210), (252, 226, 120), (206, 176, 240))
        _blob(b, x, y, 0.022, 0.022, petal)
        _blob(b, x, y, 0.008, 0.008, (230, 170, 60))


def _snow(b: Brush, rng: Rng) -> None:
    _band(b, -1, 1, _pick(rng, (176, 204, 232), (196, 208, 226), (160, 190, 222)))
    for x in _spread(rng, 4):
        _blob(b, x, 0.58, 0.3, 0.22, (222, 232, 244))
    for x in _spread(rng, 4):
        for k in range(3):
            _shape(
                b,
                [
                    (x - 0.09 + 0.015 * k, 0.52 - 0.09 * k),
                    (x, 0.36 - 0.09 * k),
                    (x + 0.09 - 0.015 * k, 0.52 - 0.09 * k),
                ],
                mix((96, 150, 140), WHITE, 0.22 * k),
            )
    ground = _pick(rng, (240, 244, 250), (230, 238, 250), (244, 242, 246))
    _band(b, 0.52, 1, ground)
    for x in _spread(rng, 4):
        _blob(b, x, float(rng.uniform(0.6, 0.96)), 0.11, 0.02, mix(ground, (150, 176, 214), 0.35))
    for x in _spread(rng, 14):
        _blob(b, x, float(rng.uniform(0.0, 0.5)), 0.013, 0.013, WHITE)
    if rng.random() < 0.5:  # a snowman
        x = float(rng.choice([rng.uniform(-0.05, 0.12), rng.uniform(0.88, 1.05)]))
        for y, r in ((0.56, 0.065), (0.465, 0.048)):
            _blob(b, x, y, r + 0.01, r + 0.01, (176, 196, 222))
            _blob(b, x, y, r, r, WHITE)


def _desert(b: Brush, rng: Rng) -> None:
    _band(b, -1, 1, _pick(rng, (250, 222, 170), (180, 222, 240), (246, 196, 160)))
    _blob(b, float(rng.uniform(0, 1)), 0.15, 0.09, 0.09, (255, 244, 190))
    sand = _pick(rng, (232, 178, 106), (226, 160, 104), (238, 196, 124))
    if rng.random() < 0.5:
        for x in _spread(rng, 3):
            _shape(b, [(x - 0.17, 0.52), (x, 0.27), (x + 0.17, 0.52)], mix(sand, (150, 90, 60), 0.2))
            _shape(b, [(x, 0.52), (x, 0.27), (x + 0.17, 0.52)], mix(sand, (150, 90, 60), 0.4))
    for x in _spread(rng, 3):
        _blob(b, x, 0.6, 0.36, 0.16, mix(sand, WHITE, 0.2))
    _band(b, 0.53, 1, sand)
    for x in _spread(rng, 4):
        _blob(b, x, float(rng.uniform(0.62, 0.96)), 0.14, 0.012, mix(sand, (150, 90, 60), 0.25))
    green = (110, 160, 104)
    for x in (float(rng.uniform(-0.12, 0.14)), float(rng.uniform(0.86, 1.1))):
        b.stroke([(x, 0.58), (x, 0.3)], 0.045, green, outline=False, inside=True)
        b.stroke([(x, 0.46), (x + 0.07, 0.46), (x + 0.07, 0.37)], 0.03, green, outline=False, inside=True)
        b.stroke([(x, 0.5), (x - 0.07, 0.5), (x - 0.07, 0.42)], 0.03, green, outline=False, inside=True)


def _space(b: Brush, rng: Rng) -> None:
    sky = _pick(rng, (34, 28, 66), (26, 36, 72), (50, 26, 66))
    _band(b, -1, 2, sky)
    for x in _spread(rng, 26):
        r = float(rng.uniform(0.006, 0.014))
        _blob(b, x, float(rng.uniform(0, 1)), r, r, _pick(rng, (252, 250, 230), (190, 214, 255), (255, 214, 190)))
    for x in (float(rng.uniform(-0.1, 0.3)), float(rng.uniform(0.6, 1.05))):
        y, r = float(rng.uniform(0.1, 0.4)), float(rng.uniform(0.07, 0.13))
        planet = _pick(rng, (206, 130, 110), (120, 160, 204), (212, 184, 120), (150, 190, 150))
        _blob(b, x, y, r, r, planet)
        _blob(b, x - 0.3 * r, y - 0.3 * r, 0.4 * r, 0.3 * r, mix(planet, WHITE, 0.3))
        if rng.random() < 0.5:
            b.stroke(
                [(x - 1.6 * r, y + 0.35 * r), (x, y + 0.2 * r), (x + 1.6 * r, y - 0.35 * r)],
                0.02,
                mix(planet, WHITE, 0.5),
                outline=False,
                inside=True,
            )
    ground = _pick(rng, (150, 146, 166), (170, 140, 134), (132, 150, 170))
    _blob(b, 0.5, 1.5, 1.3, 0.76, ground)
    for x in _spread(rng, 5):
        _blob(b, x, float(rng.uniform(0.86, 0.97)), 0.06, 0.018, mix(ground, sky, 0.3))


def _room(b: Brush, rng: Rng) -> None:
    wall = _pick(rng, (246, 220, 196), (206, 224, 214), (222, 210, 236), (246, 232, 180))
    _band(b, -1, 1, wall)
    if rng.random() < 0.5:
        for x in np.arange(-0.2, 1.2, 0.12):
            _shape(b, [(x, 0), (x + 0.04, 0), (x + 0.04, 0.6), (x, 0.6)], mix(wall, WHITE, 0.35))
    x = float(rng.uniform(0.1, 0.75))
    _shape(b, [(x - 0.02, 0.08), (x + 0.28, 0.08), (x + 0.28, 0.4), (x - 0.02, 0.4)], (168, 126, 90))
    pane = _pick(rng, (176, 220, 246), (250, 206, 160), (92, 100, 160))
    for px in (x, x + 0.14):
        for py in (0.1, 0.25):
            _shape(b, [(px, py), (px + 0.12, py), (px + 0.12, py + 0.13), (px, py + 0.13)], pane)
    x = (x + float(rng.uniform(0.45, 0.6))) % 1.0
    _shape(b, [(x, 0.14), (x + 0.14, 0.14), (x + 0.14, 0.3), (x, 0.3)], (190, 150, 90))
    _shape(
        b,
        [(x + 0.02, 0.16), (x + 0.12, 0.16), (x + 0.12, 0.28), (x + 0.02, 0.28)],
        _pick(rng, (150, 190, 170), (220, 150, 140), (150, 170, 216)),
    )
    floor = _pick(rng, (206, 158, 110), (178, 138, 112), (190, 170, 150))
    _band(b, 0.54, 0.58, WHITE)
    _band(b, 0.58, 1, floor)
    for y in (0.68, 0.8, 0.93):
        _band(b, y, y + 0.012, mix(floor, (90, 60, 40), 0.25))
    if rng.random() < 0.6:
        _blob(b, 0.5, 0.84, 0.4, 0.11, _pick(rng, (200, 130, 130), (130, 160, 196), (150, 180, 140)))


def _underwater(b: Brush, rng: Rng) -> None:
    water = _pick(rng, (66, 150, 196), (56, 160, 176), (78, 132, 200))
    for k in range(4):
        _band(b, -0.1 + 0.24 * k, 2, mix(mix(water, WHITE, 0.3), (30, 70, 120), 0.16 * k))
    for x in _spread(rng, 3):
        _shape(b, [(x, 0), (x + 0.09, 0), (x - 0.02, 0.8), (x - 0.2, 0.8)], mix(water, WHITE, 0.32))
    sand = _pick(rng, (222, 206, 160), (206, 190, 166), (196, 200, 176))
    for x in _spread(rng, 6):
        weed = _pick(rng, (70, 160, 110), (60, 140, 120), (206, 120, 130), (220, 150, 100))
        h = float(rng.uniform(0.16, 0.36))
        b.stroke(
            [(x + 0.025 * math.sin(9 * t), 0.88 - h * t) for t in np.linspace(0, 1, 7)],
            0.035,
            weed,
            outline=False,
            inside=True,
        )
    _shape(b, [*[(x, 0.84 + 0.02 * math.sin(7 * x)) for x in np.linspace(-0.2, 1.2, 20)], (1.2, 1), (-0.2, 1)], sand)
    for x in _spread(rng, 9):
        r = float(rng.uniform(0.01, 0.024))
        _blob(b, x, float(rng.uniform(0.05, 0.7)), r, r, mix(water, WHITE, 0.65))


def _mountains(b: Brush, rng: Rng) -> None:
    _band(b, -1, 1, _pick(rng, (186, 214, 240), (246, 210, 190), (206, 218, 232)))
    _sun(b, rng)
    rock = _pick(rng, (138, 146, 172), (150, 138, 156), (130, 150, 160))
    for shade, count, low, high in ((0.35, 5, 0.12, 0.24), (0.0, 4, 0.14, 0.3)):
        for x in _spread(rng, count):
            top, w = float(rng.uniform(low, high)), float(rng.uniform(0.2, 0.28))
            k = 0.36
            _shape(b, [(x - w, 0.56), (x, top), (x + w, 0.56)], mix(rock, WHITE, shade))
            cap = [
                (x - k * w, top + k * (0.56 - top)),
                (x, top),
                (x + k * w, top + k * (0.56 - top)),
                (x + 0.1 * w, top + 0.26 * (0.56 - top)),
                (x - 0.12 * w, top + 0.4 * (0.56 - top)),
            ]
            _shape(b, cap, (244, 246, 250))
    ground = _pick(rng, (150, 176, 124), (170, 170, 130), (130, 164, 134))
    _shape(b, [*[(x, 0.53 + 0.02 * math.sin(6 * x)) for x in np.linspace(-0.2, 1.2, 20)], (1.2, 1), (-0.2, 1)], ground)
    for x in _spread(rng, 5):
        y, r = float(rng.uniform(0.6, 0.97)), float(rng.uniform(0.03, 0.05))
        b.poly(
            smooth(((-1.0, 0.5), (-0.6, -0.5), (0.4, -0.7), (1.0, 0.1), (0.9, 0.5))) * r + (x, y),
            mix(ground, rock, 0.6),
            outline=False,
            inside=True,
        )


_PAINTERS: dict[str, Callable[[Brush, Rng], None]] = {
    "beach": _beach,
    "forest": _forest,
    "night city": _night_city,
    "meadow": _meadow,
    "snow": _snow,
    "desert": _desert,
    "space": _space,
    "room": _room,
    "underwater": _underwater,
    "mountains": _mountains,
}
BACKGROUNDS: tuple[str, ...] = tuple(_PAINTERS)


def draw_board(name: str, seed: int, size: tuple[int, int]) -> Pixels:
    """The whole board of a background, supersampled: uint8 (2H, 2W * (1 + 2 * MARGIN), 3) for a (width, height) frame.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _PAINTERS:
        raise ValueError(f"{name!r} is no background. Use one of {', '.join(BACKGROUNDS)}.")
    width, height = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    side = round(MARGIN * width)
    canvas = np.zeros((height, width + 2 * side, 3), np.uint8)
    brush = Brush(canvas, None, np.array([[width, 0.0, side], [0.0, height, 0.0]]))
    _PAINTERS[name](brush, np.random.default_rng([seed, BACKGROUNDS.index(name)]))
    return canvas


def view(whole: Pixels, size: tuple[int, int], offset: float, zoom: float) -> Pixels:
    """What the camera sees of a board: supersampled frame, uint8 (2H, 2W, 3).

    Args:
        whole: from `draw_board`, of the same size.
        offset: how far the camera has moved to the right, frame widths, within +-MARGIN.
        zoom: 1 is the frame at rest, larger is nearer; about the frame's centre.
    """
    width, height = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    left = (whole.shape[1] - width) / 2 + offset * width
    c = cv()
    if zoom == 1.0 and float(left).is_integer():
        return whole[:, int(left) : int(left) + width].copy()
    m = np.array([[zoom, 0.0, -zoom * left - (zoom - 1) * width / 2], [0.0, zoom, -(zoom - 1) * height / 2]])
    return np.asarray(c.warpAffine(whole, m, (width, height), flags=c.INTER_LINEAR, borderMode=c.BORDER_REPLICATE))


def background_picture(name: str, seed: int, size: int | tuple[int, int] = 64, camera_offset: float = 0.0) -> Pixels:
    """A background without subjects, uint8 (H, W, 3); the camera may be moved by up to +-MARGIN frame widths.

    The seed is a board's seed; a scene's own board is `scene.background_seed`.
    """
    frame = frame_size(size)
    offset = float(np.clip(camera_offset, -MARGIN, MARGIN))
    return shrink(view(draw_board(name, seed, frame), frame, offset, 1.0), frame)
