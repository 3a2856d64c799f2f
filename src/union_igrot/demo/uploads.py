"""User input of the page: photos and sketch strokes."""

import io
from collections.abc import Sequence
from typing import Any, Final

from PIL import Image, ImageDraw

from union_igrot.demo.session import Reference, Stroke
from union_igrot.errors import DataError
from union_igrot.service.uploads import downscale

THUMBNAIL_SIDE, VIEW_SIDE = 160, 480
"""Longest sides of a thumbnail and of the query image, in pixels."""
GRID: Final = 1000  # stroke coordinates are 0..GRID
MAX_STROKES, MAX_POINTS = 500, 20_000
MAX_NAME: Final = 60

_CANVAS: Final = 512
_PEN: Final = 0.028  # stroke width relative to the pad's side
_INK, _PAPER = (24, 24, 24), "white"


def photo_reference(image: Image.Image, name: str) -> Reference:
    """Return an uploaded photo as a query image."""
    small, view = (encode_thumbnail(downscale(image, side)) for side in (THUMBNAIL_SIDE, VIEW_SIDE))
    return Reference("photo", name, small, view, image=encode_thumbnail(image))


def read_sketch(given: Any) -> Reference | None:
    """Read strokes, each a list of points, each two integers 0..1000; None for an empty pad."""
    if given is None or given == []:
        return None
    try:
        strokes = tuple(tuple(_point(point) for point in stroke) for stroke in given)
    except (TypeError, ValueError):
        raise DataError("The sketch is invalid; reload the page and draw again.") from None
    if len(strokes) > MAX_STROKES or sum(map(len, strokes)) > MAX_POINTS:
        raise DataError("The sketch has too many strokes; clear the pad and draw fewer.")
    strokes = tuple(stroke for stroke in strokes if stroke)
    if not strokes:
        return None
    return Reference(
        "sketch", "your sketch", encode_thumbnail(downscale(draw_strokes(strokes), THUMBNAIL_SIDE)), strokes=strokes
    )


def draw_strokes(strokes: Sequence[Stroke], scale: float = 1.0) -> Image.Image:
    """Draw strokes with a round pen on white, 512 x 512, RGB.

    Args:
        strokes: At least one, each of at least one point.
        scale: Largest size of the drawing relative to the page, above 0 and at most 1. A larger drawing is scaled
            down and centered, with the same pen width.
    """
    page = Image.new("RGB", (_CANVAS, _CANVAS), _PAPER)
    pen = ImageDraw.Draw(page)
    width = round(_PEN * _CANVAS)
    for stroke in _fit(strokes, scale):
        points = [(x * _CANVAS / GRID, y * _CANVAS / GRID) for x, y in stroke]
        pen.line(points, fill=_INK, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=_INK)
    return page


def _fit(strokes: Sequence[Stroke], scale: float) -> list[list[tuple[float, float]]]:
    xs, ys = ([point[axis] for stroke in strokes for point in stroke] for axis in (0, 1))
    side = max(max(xs) - min(xs), max(ys) - min(ys))
    if side <= scale * GRID:
        return [[(float(x), float(y)) for x, y in stroke] for stroke in strokes]
    by, middle = scale * GRID / side, ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    return [[(GRID / 2 + by * (x - middle[0]), GRID / 2 + by * (y - middle[1])) for x, y in s] for s in strokes]


def encode_thumbnail(image: Image.Image) -> bytes:
    """Encode an image: PNG if it is small, else JPEG."""
    file = io.BytesIO()
    if max(image.size) <= THUMBNAIL_SIDE // 2:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()


def decode_thumbnail(data: bytes) -> Image.Image:
    """Undo `encode_thumbnail`."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        return image.convert("RGB")


def short_file_name(name: str) -> str:
    """Return a file name without folders and control characters, cut to 60 characters."""
    plain = "".join(letter for letter in name.replace("\\", "/").rsplit("/", 1)[-1] if letter.isprintable()).strip()
    return (plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 1]}…") or "The photo"


def _point(given: Any) -> tuple[int, int]:
    x, y = given
    if not all(type(value) is int and 0 <= value <= GRID for value in (x, y)):
        raise ValueError(given)
    return x, y
