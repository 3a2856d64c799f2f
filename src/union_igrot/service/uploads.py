"""Uploaded images: checked, and decoded in processes of their own."""

import io
import math
import multiprocessing
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, final

from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.images.decode import as_image

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted formats (MPO of some cameras is JPEG); none starts another program, as PostScript would."""
KEPT_SIDE: Final = 1024  # longest side in pixels to which photos are reduced
_REUSES: Final = 100  # images that a process decodes before it is replaced, so that none grows


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of uploaded photos."""

    megabytes: float = 10.0  # file size in 10^6 bytes
    megapixels: float = 50.0  # number of pixels in 10^6

    @property
    def bytes(self) -> int:
        """Largest file size in bytes."""
        return round(self.megabytes * 1e6)


def decode_upload(data: bytes, name: str, limits: Limits) -> Image.Image:
    """Decode an uploaded image.

    Pixels are counted before decoding. The image is turned upright, transparency becomes white, and larger ones are
    reduced to 1,024 pixels.

    Raises:
        ImageError: If it is too large or has no accepted format; with a message for the user, which calls it `name`.
    """
    if len(data) > limits.bytes:
        raise ImageError(f"{name} is larger than {limits.megabytes:g} MB; use a smaller file.")
    if _pixel_count(data, name) > limits.megapixels * 1e6:
        raise ImageError(f"{name} has more than {limits.megapixels:g} million pixels; use a smaller image.")
    try:
        return downscale(as_image(data, at_least=KEPT_SIDE), KEPT_SIDE)
    except ImageError:
        raise ImageError(_unreadable(name)) from None


@final
class UploadDecoder:
    """Decodes images in processes of their own, one at a time each; after a time limit or a crash one is replaced."""

    def __init__(self, limits: Limits, seconds: float = 20.0) -> None:
        self._limits, self._seconds = limits, seconds
        self._idle: list[tuple[Any, Connection, int]] = []  # processes, their pipes, and what they have decoded
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # imports once, in the background; a process then starts in milliseconds
            self._context.set_forkserver_preload([__name__])
            import_module("multiprocessing.forkserver").ensure_running()

    def __call__(self, data: bytes, name: str) -> Image.Image:
        """Decode an image; one that takes too long is an ImageError."""
        if len(data) > self._limits.bytes:
            return decode_upload(data, name, self._limits)  # raises without decoding
        result: object = None
        process, pipe, count = self._take()
        try:
            pipe.send((data, name))
            if not pipe.poll(self._seconds):
                raise ImageError(f"{name} took longer than {self._seconds:g} s to decode; use another file.")
            result = pipe.recv()
        except (EOFError, OSError):  # the process crashed
            raise ImageError(_unreadable(name)) from None
        finally:
            if result is not None and count < _REUSES:
                self._idle.append((process, pipe, count + 1))
            else:
                process.kill()
                process.join()
                process.close()
                pipe.close()
        if isinstance(result, Image.Image):
            return result
        raise ImageError(str(result))

    def _take(self) -> "tuple[Any, Connection, int]":
        with suppress(IndexError):  # two threads may take the last one
            while not (taken := self._idle.pop())[0].is_alive():
                taken[1].close()
            return taken
        pipe, other = self._context.Pipe()
        process = self._context.Process(target=_decode_all, args=(other, self._limits), daemon=True)
        process.start()
        other.close()
        pipe.recv()  # it has started
        return process, pipe, 0


def _decode_all(pipe: "Connection", limits: Limits) -> None:
    """Send each image, or the message of its error, until the server has ended."""
    pipe.send(None)
    while True:
        try:
            data, name = pipe.recv()
            pipe.send(decode_upload(data, name, limits))
        except ImageError as error:
            pipe.send(str(error))
        except (EOFError, KeyboardInterrupt):
            return


def downscale(image: Image.Image, side: int) -> Image.Image:
    """Reduce an image to a longest side of at most `side` pixels; smaller ones are unchanged."""
    if max(image.size) <= side:
        return image
    smaller = image.copy()
    smaller.thumbnail((side, side))
    return smaller


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
