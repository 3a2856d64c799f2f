"""Validated user input: uploaded photos and sketch strokes."""

import io
import math
import multiprocessing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, final

from PIL import Image, ImageDraw

from union_igrot.demo.session import Reference, Stroke
from union_igrot.errors import DataError, ImageError
from union_igrot.images.decode import as_image

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted formats (MPO of some cameras is JPEG); none starts another program, as PostScript would."""
KEPT_SIDE: Final = 1024  # longest side in pixels to which photos are reduced
THUMBNAIL_SIDE, VIEW_SIDE = 160, 480
"""Longest sides of a thumbnail and of the query image, in pixels."""
GRID: Final = 1000  # stroke coordinates are 0..GRID
MAX_STROKES, MAX_POINTS = 500, 20_000
MAX_NAME: Final = 60

_CANVAS: Final = 512
_PEN: Final = 0.028  # stroke width relative to the pad's side
_INK, _PAPER = (24, 24, 24), "white"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of uploaded photos."""

    megabytes: float = 10.0  # file size in 10^6 bytes
    megapixels: float = 50.0  # number of pixels in 10^6

    @property
    def bytes(self) -> int:
        """Largest file size in bytes."""
        return round(self.megabytes * 1e6)


def decode_photo(data: bytes, name: str, limits: Limits) -> Reference:
    """Decode an uploaded photo.

    Pixels are counted before decoding. The photo is turned upright, transparency becomes white, and larger ones are
    reduced to 1,024 pixels.

    Raises:
        ImageError: If it is too large or has no accepted format; with a message for the page.
    """
    name = short_file_name(name)
    if len(data) > limits.bytes:
        raise ImageError(f"{name} is larger than {limits.megabytes:g} MB; use a smaller file.")
    if _pixel_count(data, name) > limits.megapixels * 1e6:
        raise ImageError(f"{name} has more than {limits.megapixels:g} million pixels; use a smaller image.")
    try:
        image = as_image(data, at_least=KEPT_SIDE)
    except ImageError:
        raise ImageError(_unreadable(name)) from None
    image = downscale(image, KEPT_SIDE)
    small, view = (encode_thumbnail(downscale(image, side)) for side in (THUMBNAIL_SIDE, VIEW_SIDE))
    return Reference("photo", name, small, view, image=encode_thumbnail(image))


@final
class PhotoDecoder:
    """Decodes each photo in a process of its own, which is killed after a time limit."""

    def __init__(self, limits: Limits, seconds: float = 20.0) -> None:
        self._limits, self._seconds = limits, seconds
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # imports once, in the background; a process then starts in milliseconds
            self._context.set_forkserver_preload([__name__])
            import_module("multiprocessing.forkserver").ensure_running()

    def __call__(self, data: bytes, name: str) -> Reference:
        """Decode a photo; one that takes too long is an ImageError."""
        if len(data) > self._limits.bytes:
            return decode_photo(data, name, self._limits)  # raises without decoding
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_decode_into, args=(sender, data, name, self._limits), daemon=True)
        process.start()
        sender.close()
        try:
            receiver.recv_bytes()  # it has started
            if not receiver.poll(self._seconds):
                raise ImageError(
                    f"{short_file_name(name)} took longer than {self._seconds:g} s to decode; use another file."
                )
            result = receiver.recv()
        except (EOFError, OSError):  # the process crashed
            raise ImageError(_unreadable(short_file_name(name))) from None
        finally:
            process.kill()
            process.join()
            process.close()
            receiver.close()
        if isinstance(result, Reference):
            return result
        raise ImageError(str(result))


def _decode_into(sender: "Connection", data: bytes, name: str, limits: Limits) -> None:
    """Send the photo, or the message of its error."""
    sender.send_bytes(b"started")
    try:
        sender.send(decode_photo(data, name, limits))
    except ImageError as error:
        sender.send(str(error))


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


def downscale(image: Image.Image, side: int) -> Image.Image:
    """Reduce an image to a longest side of at most `side` pixels; smaller ones are unchanged."""
    if max(image.size) <= side:
        return image
    smaller = image.copy()
    smaller.thumbnail((side, side))
    return smaller


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


def _pixel_count(data: bytes, name: str) -> float:
    """Read the number of pixels from the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warning about large images
            with Image.open(io.BytesIO(data), formats=FORMATS) as found:
                return float(found.width * found.height)
    except Image.DecompressionBombError:
        return math.inf  # more than Pillow accepts
    except Exception:  # Pillow's readers raise nearly any exception for a broken file
        raise ImageError(_unreadable(name)) from None


def _unreadable(name: str) -> str:
    return f"Cannot decode {name}; use a JPEG, PNG, WebP, GIF, BMP or TIFF file."


def _point(given: Any) -> tuple[int, int]:
    x, y = given
    if not all(type(value) is int and 0 <= value <= GRID for value in (x, y)):
        raise ValueError(given)
    return x, y
