"""Render scenes as photo-like images and as wobbly sketches.

Pillow draws polygons at four times the size with integer coordinates; everything else is integer arithmetic or single
float32 operations on a guaranteed bit stream, so that a seed gives the same pixels on every machine.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from union_igrot.synthetic.scenes import Scene, Thing

PIXELS = 48
"""Height and width of an image."""
_FINE = 4
_TAU = 2 * math.pi
Array = NDArray[np.float32]
Point = tuple[float, float]

COLOR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35), "orange": (240, 130, 20), "yellow": (240, 220, 40), "green": (40, 150, 50),
    "cyan": (50, 205, 210), "blue": (35, 65, 200), "purple": (125, 45, 160), "pink": (245, 140, 185),
    "white": (240, 240, 240), "black": (28, 28, 32),
}  # fmt: skip
BACKGROUND_RGB: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ((88, 135, 62), (60, 105, 40)), "sand": ((214, 190, 140), (190, 165, 115)),
    "sea": ((50, 110, 150), (85, 150, 180)), "sky": ((150, 195, 235), (225, 235, 245)),
    "bricks": ((150, 80, 62), (190, 175, 160)), "wood": ((140, 100, 62), (108, 72, 42)),
    "snow": ((228, 233, 240), (200, 210, 222)), "night": ((22, 24, 48), (60, 64, 100)),
}  # fmt: skip
RADIUS = {"small": 0.16, "medium": 0.22, "large": 0.29}
CENTERS = {
    "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "middle": (0.5, 0.5),
}  # fmt: skip


def _around(count: int, radius: list[float], turn: float = -0.25) -> list[Point]:
    angles = [_TAU * (i / count + turn) for i in range(count)]
    return [
        (radius[i % len(radius)] * math.cos(a), radius[i % len(radius)] * math.sin(a)) for i, a in enumerate(angles)
    ]


def _flower() -> list[Point]:
    angles = [_TAU * i / 40 for i in range(40)]
    petals = [(a - _TAU / 4, 0.72 + 0.28 * math.cos(5 * a)) for a in angles]
    return [(radius * math.cos(a), radius * math.sin(a)) for a, radius in petals]


def _heart() -> list[Point]:
    turns = [_TAU * i / 28 for i in range(28)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in turns
    ]


def _crescent() -> list[Point]:
    outer = [(math.cos(a), math.sin(a)) for a in (_TAU * (0.14 + 0.72 * i / 20) for i in range(21))]
    tip = outer[0]
    inner = [
        (0.42 + 0.75 * math.cos(a), 0.82 * math.sin(a)) for a in (_TAU * (0.80 - 0.60 * i / 14) for i in range(15))
    ]
    return [*outer, *inner, tip]


def _drop() -> list[Point]:
    bowl = [(0.68 * math.cos(a), 0.32 + 0.68 * math.sin(a)) for a in (_TAU * (-0.05 + 0.6 * i / 20) for i in range(21))]
    return [(0.0, -1.0), *bowl]


def _mushroom() -> list[Point]:
    cap = [(math.cos(a), 0.05 + 0.95 * math.sin(a)) for a in (_TAU * (0.5 + 0.5 * i / 16) for i in range(17))]
    return [*cap, (0.32, 0.05), (0.38, 0.95), (-0.38, 0.95), (-0.32, 0.05)]


OUTLINES: dict[str, list[Point]] = {
    "circle": _around(28, [0.95]),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": _around(10, [1.05, 0.44]),
    "heart": _heart(),
    "cross": [(-.32, -1), (.32, -1), (.32, -.32), (1, -.32), (1, .32), (.32, .32), (.32, 1), (-.32, 1), (-.32, .32), (-1, .32), (-1, -.32), (-.32, -.32)],
    "arrow": [(-1, -.28), (.1, -.28), (.1, -.78), (1, 0), (.1, .78), (.1, .28), (-1, .28)],
    "crescent": _crescent(),
    "diamond": [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)],
    "drop": _drop(),
    "flower": _flower(),
    "house": [(0, -1), (.95, -.2), (.7, -.2), (.7, .9), (.2, .9), (.2, .3), (-.2, .3), (-.2, .9), (-.7, .9), (-.7, -.2), (-.95, -.2)],
    "fish": [(-1, -.6), (-.5, -.15), (0, -.52), (.5, -.48), (1, 0), (.5, .48), (0, .52), (-.5, .15), (-1, .6), (-.8, 0)],
    "tree": [(0, -1), (.5, -.4), (.25, -.4), (.75, .35), (.18, .35), (.18, 1), (-.18, 1), (-.18, .35), (-.75, .35), (-.25, -.4), (-.5, -.4)],
    "bolt": [(.25, -1), (-.6, .15), (-.08, .15), (-.3, 1), (.6, -.25), (.08, -.25), (.5, -1)],
    "hourglass": [(-.75, -.95), (.75, -.95), (.12, 0), (.75, .95), (-.75, .95), (-.12, 0)],
    "gear": _around(32, [1.0, 1.0, 0.7, 0.7]),
    "boat": [(-.08, -1), (.75, .1), (.08, .1), (.08, .3), (1, .3), (.6, .9), (-.6, .9), (-1, .3), (-.08, .3)],
    "mushroom": _mushroom(),
    "bottle": [(-.22, -1), (.22, -1), (.22, -.45), (.5, -.1), (.5, 1), (-.5, 1), (-.5, -.1), (-.22, -.45)],
}  # fmt: skip
"""Closed outlines roughly within the unit circle, y downwards."""


class BitStream:
    """Random numbers from PCG64's raw words, whose sequence NumPy guarantees in all versions."""

    def __init__(self, seed: int) -> None:
        self._source = np.random.PCG64(seed)
        self._words = iter(self._source.random_raw(64).tolist())

    def uniform(self, low: float, high: float) -> float:
        """Draw a float between low and high."""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._source.random_raw(64).tolist())
            word = next(self._words)
        return low + (high - low) * ((int(word) >> 11) / 9007199254740992.0)

    def below(self, bound: int) -> int:
        """Draw an integer in 0..bound-1."""
        return int(self.uniform(0.0, float(bound)))

    def noise(self, *shape: int) -> Array:
        """Draw approximately normal noise, mean 0, deviation about 1: the sum of four bytes."""
        count = math.prod(shape)
        raw = self._source.random_raw((count + 1) // 2).view(np.uint8).reshape(-1, 4)[:count]
        first, second, third, fourth = raw.astype(np.int32).T
        total = first + second + third + fourth - 510
        noise: Array = (total.astype(np.float32) / np.float32(147.8)).reshape(shape)
        return noise


@cache
def _ground_bank() -> dict[str, Array]:
    """One texture of 128 x 128 for each background, 0..1; images take random crops."""
    bits = BitStream(20251122)
    size = 128

    def smooth(field: Array, times: int, axes: tuple[int, ...] = (0, 1)) -> Array:
        for _ in range(times):
            for axis in axes:
                field = (np.roll(field, 1, axis) + field + field + np.roll(field, -1, axis)) * np.float32(0.25)
        span = np.float32(2.2) * np.float32(np.sqrt(np.mean(field.astype(np.float64) ** 2)))
        texture: Array = np.clip(field / span * np.float32(0.5) + np.float32(0.5), 0, 1).astype(np.float32)
        return texture

    y, x = np.mgrid[0:size, 0:size]
    bricks = ((y % 8 == 0) | ((x + 8 * ((y // 8) % 2)) % 16 == 0)).astype(np.float32)
    speckle = bits.noise(size, size)
    return {
        "grass": smooth(bits.noise(size, size), 4, (0,)),
        "sand": smooth(bits.noise(size, size), 1),
        "sea": smooth(bits.noise(size, size), 24, (1,)) * np.float32(0.5)
        + ((y // 3) % 2).astype(np.float32) * np.float32(0.35),
        "sky": smooth(bits.noise(size, size), 60),
        "bricks": bricks,
        "wood": smooth(bits.noise(size, size), 30, (0,)) * np.float32(0.6)
        + (x % 12 < 2).astype(np.float32) * np.float32(0.4),
        "snow": smooth(bits.noise(size, size), 10),
        "night": (speckle > np.float32(2.35)).astype(np.float32) * np.float32(2.5)
        + smooth(bits.noise(size, size), 40) * np.float32(0.6),
    }


@cache
def _fill_bank() -> dict[str, Array]:
    """Mask of the second tone of each fill, 0 or 1, twice the image's size."""
    y, x = np.mgrid[0 : 2 * PIXELS, 0 : 2 * PIXELS]
    ones = np.zeros((2 * PIXELS, 2 * PIXELS), dtype=np.float32)
    return {
        "plain": ones,
        "striped": ((x + y) // 3 % 2).astype(np.float32),
        "dotted": (((x % 5) - 2) ** 2 + ((y % 5) - 2) ** 2 <= 2).astype(np.float32),
        "checked": ((x // 4 + y // 4) % 2).astype(np.float32),
    }


def _outline(thing: Thing, bits: BitStream, scale: float) -> tuple[list[Point], float]:
    """Return the jittered outline of a thing in supersampled pixels, and its radius in pixels."""
    side = PIXELS * _FINE
    radius = RADIUS[thing.size] * bits.uniform(0.92, 1.08) * scale
    stretch = bits.uniform(0.9, 1.1)
    angle = bits.uniform(-0.2, 0.2)
    cx, cy = (c + bits.uniform(-0.035, 0.035) for c in CENTERS[thing.position])
    cos, sin = math.cos(angle), math.sin(angle)
    points = []
    for px, py in OUTLINES[thing.shape]:
        qx, qy = px * stretch, py / stretch
        points.append(((cx + radius * (qx * cos - qy * sin)) * side, (cy + radius * (qx * sin + qy * cos)) * side))
    return points, radius * PIXELS


def _coverage(points: list[Point]) -> Array:
    """Return the covered fraction of each pixel, 0..1."""
    mask = Image.new("L", (PIXELS * _FINE, PIXELS * _FINE))
    ImageDraw.Draw(mask).polygon([(round(x), round(y)) for x, y in points], fill=255)
    pixels = np.frombuffer(mask.reduce(_FINE).tobytes(), np.uint8)  # faster than asarray
    return pixels.reshape(PIXELS, PIXELS).astype(np.float32) * np.float32(1 / 255)


def _rolled(field: Array, by: int, axis: int) -> Array:
    """Shift along an axis, as `np.roll` does in four times the time."""
    before = (slice(None),) * axis
    return np.concatenate([field[(*before, slice(-by, None))], field[(*before, slice(None, -by))]], axis)


def _scaled(points: list[Point], by: float) -> list[Point]:
    cx = sum(x for x, _ in points) / len(points)
    cy = sum(y for _, y in points) / len(points)
    return [(cx + (x - cx) * by, cy + (y - cy) * by) for x, y in points]


def _tint(rgb: tuple[int, int, int], bits: BitStream, spread: float) -> Array:
    return np.array([[[c + bits.uniform(-spread, spread)]] for c in rgb], dtype=np.float32)


def _paint(canvas: Array, thing: Thing, bits: BitStream, scale: float) -> None:
    """Draw a thing on a canvas of shape 3 x height x width."""
    points, _ = _outline(thing, bits, scale)
    body = _coverage(points)
    rim = body - np.minimum(body, _coverage(_scaled(points, 0.84)))
    shade = np.float32(1) - np.float32(0.35) * _rolled(_rolled(body, 2, 0), 2, 1) * (1 - body)
    canvas *= shade
    color = _tint(COLOR_RGB[thing.color], bits, 14.0)
    second = color * np.float32(0.42) + np.float32(120 if thing.color == "black" else 8)
    dy, dx = bits.below(PIXELS), bits.below(PIXELS)
    tone = _fill_bank()[thing.fill][dy : dy + PIXELS, dx : dx + PIXELS]
    surface = color + tone * (second - color)
    surface *= np.float32(1) - np.float32(0.4) * rim
    canvas += body * (surface - canvas)


def render_photo(scene: Scene, seed: int) -> Image.Image:
    """Render a scene as a photo-like RGB image of `PIXELS` x `PIXELS`.

    The seed decides small shifts, scales, rotations and stretches of the things, and colors, texture, light, blur and
    noise.
    """
    bits = BitStream(seed)
    base, other = (_tint(rgb, bits, 12.0) for rgb in BACKGROUND_RGB[scene.background])
    dy, dx = bits.below(128 - PIXELS), bits.below(128 - PIXELS)
    field = _ground_bank()[scene.background][dy : dy + PIXELS, dx : dx + PIXELS]
    canvas: Array = base + field * (other - base)  # 3 x height x width: long rows are fast
    scale = 1.0 if len(scene.things) == 1 else 0.88
    for thing in scene.things:
        _paint(canvas, thing, bits, scale)
    ramp = np.arange(PIXELS, dtype=np.float32) * np.float32(1 / PIXELS) - np.float32(0.5)
    light = np.float32(bits.uniform(0.88, 1.1)) + np.float32(bits.uniform(-0.2, 0.2)) * ramp[:, None]
    canvas *= light + np.float32(bits.uniform(-0.2, 0.2)) * ramp[None, :]
    if bits.uniform(0.0, 1.0) < 0.5:
        for axis in (1, 2):
            canvas = (_rolled(canvas, 1, axis) + canvas + canvas + _rolled(canvas, -1, axis)) * np.float32(0.25)
    canvas += np.float32(bits.uniform(1.0, 7.0)) * bits.noise(PIXELS, PIXELS)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _wobbled(points: list[Point], bits: BitStream, amount: float) -> list[tuple[int, int]]:
    """Resample a closed outline and bend it along two low-frequency waves."""
    closed = [*points, points[0]]
    path: list[Point] = []
    for (ax, ay), (bx, by) in pairwise(closed):
        steps = max(1, int(math.hypot(bx - ax, by - ay) / 6))
        path.extend((ax + (bx - ax) * s / steps, ay + (by - ay) * s / steps) for s in range(steps))
    waves = [(bits.uniform(1.5, 4.0), bits.uniform(0.0, _TAU), bits.uniform(0.0, _TAU)) for _ in range(2)]
    bent = []
    for i, (x, y) in enumerate(path):
        at = _TAU * i / len(path)
        ox = sum(math.sin(f * at + p) for f, p, _ in waves)
        oy = sum(math.sin(f * at + q) for f, _, q in waves)
        bent.append((round(x + amount * ox), round(y + amount * oy)))
    gap = bits.below(3)
    return [*bent, bent[0]] if gap == 0 else bent[: len(bent) - gap]


def render_sketch(scene: Scene, seed: int) -> Image.Image:
    """Render the outlines of a scene's things as wobbly dark strokes on white, RGB."""
    bits = BitStream(seed)
    page = Image.new("L", (PIXELS * _FINE, PIXELS * _FINE), 255)
    pen = ImageDraw.Draw(page)
    scale = 1.0 if len(scene.things) == 1 else 0.88
    for thing in scene.things:
        points, radius = _outline(thing, bits, scale)
        for _ in range(1 + (bits.uniform(0.0, 1.0) < 0.3)):
            stroke = _wobbled(points, bits, 0.05 * radius * _FINE * bits.uniform(0.4, 1.2))
            pen.line(stroke, fill=bits.below(70), width=4 + bits.below(4), joint="curve")
    return page.reduce(_FINE).convert("RGB")
