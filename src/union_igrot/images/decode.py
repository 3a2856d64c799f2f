"""From an image's source to an upright image in RGB.

Opens files and images in memory, says what is wrong with those that cannot be opened, and names a
image for caches. Does not know what an image is used for.
"""

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from union_igrot.errors import ConfigError, ImageError
from union_igrot.images.arrays import image_from_array, image_from_tensor
from union_igrot.storage.paths import expand_user
from union_igrot.types import ImageSource, LazyImage

# How each EXIF orientation is undone (CIPA DC-008, tag 0x0112); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_MARK, _SCAN = 0xFF, 0xDA
_Source = TypeVar("_Source", bound=ImageSource)


def open_image(source: ImageSource, at_least: int | None = None) -> Image.Image:
    """Open an image as upright RGB.

    The first frame of an animation is taken, the EXIF orientation is applied (where the EXIF
    data are corrupt, the image stays as stored), transparency is laid over white, and 16-bit
    gray is scaled by its full range. 32-bit and float gray take the smallest of 1, 255 and 65535
    that holds the largest value as white, or that value itself. Warnings of Pillow stay inside.

    Args:
        source: A file, or a `LazyImage`, which is opened by its own `open`.
        at_least: If given, a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size as long as its
            short side keeps this many pixels. Faster; the pixels after a resize differ slightly.

    Returns:
        The decoded image in mode RGB; the file is closed.

    Raises:
        ImageError: Where the file is missing, empty, unreadable, truncated or has more than twice
            Pillow's `MAX_IMAGE_PIXELS` pixels. Names the file and the reason.
        ConfigError: Where `at_least` is below 1.
    """
    if at_least is not None and at_least < 1:
        raise ConfigError(f"at_least is {at_least}; give a number of pixels >= 1, or None for the full size")
    if not isinstance(source, Path):
        return as_rgb(source.open())
    check_image(source)
    return _decode(source, str(source), at_least)


def as_image(image: object, at_least: int | None = None) -> Image.Image:
    """Take an image in any of the forms that people have it in, as upright RGB.

    Args:
        image: A path or its text, a `LazyImage`, a PIL image (its EXIF orientation is applied), the bytes of an image
            file, an open binary file, which is read to its end, an array of HxW, HxWx1, HxWx3 or HxWx4, or a tensor of
            HxW, 1xHxW, 3xHxW or 4xHxW. Arrays and tensors hold uint8, uint16, bool or floats of 0..1. Transparency
            is laid over white.
        at_least: As for `open_image`.

    Raises:
        ImageError: Where it is none of these, or cannot be read.
        ConfigError: Where `at_least` is below 1.
    """
    if isinstance(image, str | Path):
        return open_image(expand_user(image), at_least)
    if isinstance(image, Image.Image):
        return _upright(image)
    if isinstance(image, np.ndarray | Tensor):
        return as_rgb(image_from_tensor(image) if isinstance(image, Tensor) else image_from_array(image))
    if (data := file_bytes(image)) is not None:
        named = str(getattr(image, "name", "an open file")) if hasattr(image, "read") else f"{len(data):,} bytes"
        return _decode(io.BytesIO(data), named, at_least)
    if isinstance(image, LazyImage):
        return open_image(image)
    raise ImageError(
        f"{type(image).__name__} is no image; give a path, a PIL image, bytes, an open file, an array or a tensor"
    )


def file_bytes(image: object) -> bytes | None:
    """Return the bytes of an image file, from bytes or an open file; None for an image in another form.

    Raises:
        ImageError: Where a file is open as text, or cannot be read.
    """
    if isinstance(image, Image.Image | np.ndarray | Tensor):
        return None
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not hasattr(image, "read"):
        return None
    named = str(getattr(image, "name", "an open file"))
    try:
        found = image.read()
    except (OSError, ValueError) as error:  # ValueError where it is closed
        raise ImageError(f"{named} cannot be read ({error}); give an open file or its path") from None
    if not isinstance(found, bytes | bytearray | memoryview):
        raise ImageError(f"{named} is open as text; open it with mode 'rb'")
    return bytes(found)


def _decode(source: Path | io.BytesIO, named: str, at_least: int | None) -> Image.Image:
    try:
        return decode_image(source, at_least)[0]
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        line = f"{named}: cannot be read as an image ({image_fault(error)}); replace the file or leave it out"
        raise ImageError(line) from error


def decode_image(
    source: Path | io.BytesIO | io.BufferedReader, at_least: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image as `open_image` does, and tell its true size.

    Args:
        source: A file, or its bytes as a stream.
        at_least: As for `open_image`.

    Returns:
        The upright image in mode RGB; the width and height that it has upright when nothing is left out.

    Raises:
        Exception: Nearly any, where the file is broken; `image_fault` puts it into words.
    """
    with _quiet_pillow(), Image.open(source) as image:
        size = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))  # a square bounds the short side, however the image is turned
        turned = _turned(image)
        if _orientation(image) in _ON_ITS_SIDE:
            size = size[::-1]
        return turned.copy() if turned is image else turned, size  # a plain image, without the closed file


def plain_jpeg(data: bytes) -> int | None:
    """Tell the JPEGs that every decoder reads alike: whole, of eight bits, gray or in three colors.

    Args:
        data: Bytes of a file.

    Returns:
        Number of pixels; None where it is no such JPEG, or no image at all.
    """
    try:
        with _quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            plain = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _comes_to_its_end(data)
            return image.width * image.height if plain else None
    except Exception:  # a broken file makes Pillow's readers raise nearly anything
        return None


def _comes_to_its_end(jpeg: bytes) -> bool:
    """Whether the mark of the end stands behind the first scan (ITU-T T.81, B.1): not in an image within the EXIF."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == _MARK:
        kind = jpeg[at + 1]
        if kind == _SCAN:
            return jpeg.rfind(b"\xff\xd9", at) >= 0
        at += 1 if kind == _MARK else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _upright(image: Image.Image) -> Image.Image:
    """Take an image that a caller opened or made; its file may not have been read yet."""
    if not (image.width and image.height):
        raise ImageError(f"the PIL image has {image.width} x {image.height} pixels; give one that has some")
    try:
        with _quiet_pillow():
            return _turned(image)
    except Exception as error:
        named = getattr(image, "filename", "") or "the PIL image"
        raise ImageError(f"{named}: cannot be read as an image ({image_fault(error)}); replace it") from error


def _turned(image: Image.Image) -> Image.Image:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    colours = as_rgb(image)
    return colours if turn is None else colours.transpose(turn)


def check_image(path: Path) -> os.stat_result:
    """See, without opening it, that a file can be an image: it exists, is a regular file and is not empty.

    Returns:
        What `os.stat` says of the file.

    Raises:
        ImageError: Where it cannot be one. Names the file and the reason.
    """
    try:
        found = os.stat(path)  # noqa: PTH116  (Path.stat is slower, and whole lists are checked)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"{path}: the image is missing; check the path") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: the image cannot be reached ({image_fault(error)}); check the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{path}: is not a regular file; name an image file")
    if found.st_size == 0:
        raise ImageError(f"{path}: the image is empty (0 bytes); replace the file or leave it out")
    return found


def image_key(source: ImageSource) -> str:
    """Return the identity of an image for caches: equal keys mean equal pixels.

    For a file its absolute path, size in bytes and time of change in nanoseconds; for a `LazyImage` its own key.

    Raises:
        ImageError: Where the file is missing, empty or not a file.
    """
    if not isinstance(source, Path):
        return source.key
    found = check_image(source)
    return f"{source.absolute()}|{found.st_size}|{found.st_mtime_ns}"


def broken_images(sources: Iterable[_Source], *, workers: int | None = None) -> list[tuple[_Source, str]]:
    """Find the images that cannot be opened, by decoding each of them.

    Args:
        sources: The images.
        workers: Number of threads; by default one a core, eight at most.

    Returns:
        Each broken image with the reason, in the order given.
    """

    def fault(source: ImageSource) -> str:
        try:
            open_image(source, at_least=1)  # a smaller JPEG costs less, and all of its data are read
        except ImageError as error:
            return str(error)
        return ""

    images = list(sources)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return [(image, why) for image, why in zip(images, pool.map(fault, images), strict=True) if why]


def as_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any mode to RGB: transparency is laid over white, see `open_image` for the rest."""
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    peak = float(values.max())
    white = 65535.0 if image.mode.startswith("I;16") else next((w for w in (1.0, 255.0, 65535.0) if peak <= w), peak)
    return Image.fromarray((values * (255.0 / white)).round().astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # corrupt EXIF: the pixels are sound, the orientation is not known
        return 1


def image_fault(error: Exception) -> str:
    """Say in a few words why an image could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


_lock = threading.Lock()
_inside: list[warnings.catch_warnings] = []  # one entry a running block; the first holds the saved filters


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    # `catch_warnings` replaces the filters of the whole process, so threads that decode side by side share
    # one: the first sets it, the last undoes it. Only warnings raised within Pillow are ignored.
    with _lock:
        _inside.append(_inside[0] if _inside else warnings.catch_warnings())
        if len(_inside) == 1:
            _inside[0].__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _lock:
            guard = _inside.pop()
            if not _inside:
                guard.__exit__(None, None, None)
