"""Decode images: from a file, bytes, an array or a tensor to an upright RGB image."""

import io
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from union_igrot.errors import ConfigError, ImageError
from union_igrot.images.exif import ExifColumns, read_exif
from union_igrot.images.formats import decoded_formats, describe_name, is_raw, unknown_format
from union_igrot.storage.files import expand_user, find_path, is_web_address
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
_MAX_SCANS: Final = 100  # scans of a JPEG; encoders write about ten, and each takes as long as decoding the image
_MAX_SEGMENTS: Final = 10_000  # segments before the first scan of a JPEG, which Pillow reads one by one
_MAX_JUNK: Final = 2**16  # bytes between two segments of a JPEG, which Pillow skips one by one
_REDUCED_LIMIT: Final = 4
"""How many times the largest number of pixels a JPEG may have that is decoded at a fraction of its size."""
_BLOCK: Final = 2**20
_CHANNELS: Final = (1, 3, 4)
_DTYPES: Final = "uint8 (0..255), uint16 (0..65535), float (0..1) or bool"
_TOLERANCE: Final = 1e-4  # of rounding, beyond 0..1; a tenth of a gray level is 4e-4
REGION_FORMAT: Final = "FILE#x,y,width,height in pixels or percent, such as a.jpg#10%,20%,50%,50%"
"""How a region of an image is written behind its path."""
_NUMBER: Final = re.compile(r"\s*(\d+(?:\.\d+)?)(%?)\s*")
_NUMBERS: Final = re.compile(r"[-\d.,%\s]+")
ByteFile = io.BytesIO | io.BufferedReader
_Source = TypeVar("_Source", bound=ImageSource)


def open_image(source: ImageSource, at_least: int | None = None) -> Image.Image:
    """Open an image as upright RGB.

    Takes the first frame of an animation and applies the EXIF orientation (ignored if the EXIF data are
    corrupt). Transparency is blended over white, and 16-bit gray is scaled by its full range. In 32-bit and
    float gray, white is the smallest of 1, 255 and 65535 that is not below the largest value, or that value.
    Pillow's warnings are suppressed.

    Args:
        source: A file, or a `LazyImage`, which is opened by its own `open`.
        at_least: If given, a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size as long as its
            short side keeps this many pixels. Faster; the pixels after a resize differ slightly.

    Returns:
        The decoded image in mode RGB; the file is closed.

    Raises:
        ImageError: If the file is missing, empty, unreadable, truncated or has more than `max_pixels` pixels; names
            the file and the reason.
        ConfigError: If `at_least` is below 1.
    """
    if at_least is not None and at_least < 1:
        raise ConfigError(f"invalid value for at_least: {at_least} (expected an integer >= 1 or None)")
    if not isinstance(source, Path):
        return as_rgb(source.open())
    check_image(source)
    return _decode(source, str(source), at_least)


def as_image(image: object, at_least: int | None = None) -> Image.Image:
    """Convert an image of any common type to upright RGB.

    Args:
        image: A path, a `LazyImage`, a PIL image (its EXIF orientation is applied), the bytes of an image file, an
            open binary file, which is read to its end, an array of shape HxW, HxWx1, HxWx3 or HxWx4, or a tensor of
            shape HxW, 1xHxW, 3xHxW or 4xHxW. Arrays and tensors hold uint8, uint16, bool, or floats in 0..1.
            Transparency is blended over white.
        at_least: As for `open_image`.

    Raises:
        ImageError: If it is none of these or cannot be decoded.
        ConfigError: If `at_least` is below 1.
    """
    if isinstance(image, str) and is_web_address(image):
        raise ImageError(f"{image} is a web address; download the image and pass its path")
    if isinstance(image, str) and not image:
        raise ImageError("the path of the image is empty; check the list of paths")
    if isinstance(image, str | Path):
        return open_image(Path(find_path(str(expand_user(image)))), at_least)
    if isinstance(image, Image.Image):
        return _upright(image)
    if isinstance(image, np.ndarray | Tensor):
        return as_rgb(image_from_array(image))
    if (data := file_bytes(image)) is not None:
        named = str(getattr(image, "name", "an open file")) if hasattr(image, "read") else f"{len(data):,} bytes"
        return _decode(io.BytesIO(data), named, at_least)
    if isinstance(image, LazyImage):
        return open_image(image)
    hint = "; pass its .image" if hasattr(image, "image") else ""
    raise ImageError(
        f"not an image: {type(image).__name__} (expected a path, PIL image, bytes, open file, array or tensor){hint}"
    )


def split_region(path: str | Path) -> tuple[str, str | None]:
    """Split a path into the file and its region, None without one. An existing file of the whole name has no region."""
    file, mark, region = (text := str(path)).rpartition("#")
    if not mark or os.path.lexists(_found(text)):
        return text, None
    return (file, region) if _NUMBERS.fullmatch(region) or os.path.isfile(_found(file)) else (text, None)  # noqa: PTH113 - Path's raises for odd names


def open_region(image: object, at_least: int | None = None) -> Image.Image:
    """Open an image in any form that `as_image` accepts; of a path with a region that region alone.

    Args:
        image: The image; a region counts from the upper left corner after the EXIF orientation is applied.
        at_least: As for `open_image`; without effect on a region.

    Raises:
        ImageError: If the image cannot be decoded.
        ConfigError: If the region is not written as `REGION_FORMAT`, or not within the image.
    """
    file, region = split_region(image) if isinstance(image, str | Path) else (image, None)
    if region is None:
        return as_image(image, at_least)
    numbers = [_NUMBER.fullmatch(part) for part in region.split(",")]
    if len(numbers) != 4 or None in numbers:
        raise ConfigError(f"invalid region of {file}: #{region} (expected {REGION_FORMAT})")
    whole = as_image(file)
    sides = (whole.width, whole.height) * 2
    x, y, width, height = (
        float(one[1]) * (side / 100 if one[2] else 1) for one, side in zip(numbers, sides, strict=True) if one
    )
    box = round(x), round(y), round(x + width), round(y + height)
    if not (box[0] < box[2] <= whole.width and box[1] < box[3] <= whole.height):
        raise ConfigError(
            f"invalid region of {file}: #{region} (expected at least a pixel within its {whole.width} x {whole.height})"
        )
    return whole.crop(box)


def _found(path: str) -> str:
    return find_path(str(expand_user(path)))


def file_bytes(image: object) -> bytes | None:
    """Return the bytes of an image file from bytes or an open file; None for an image of another type."""
    if isinstance(image, Image.Image | np.ndarray | Tensor):
        return None
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not hasattr(image, "read"):
        return None
    named = str(getattr(image, "name", "an open file"))
    try:
        found = image.read()
    except (OSError, ValueError) as error:  # ValueError if it is closed
        raise ImageError(f"cannot read {named} ({error}); pass an open file or its path") from None
    if not isinstance(found, bytes | bytearray | memoryview):
        raise ImageError(f"{named} is open in text mode; open it with mode 'rb'")
    return bytes(found)


def _decode(source: Path | io.BytesIO, named: str, at_least: int | None) -> Image.Image:
    try:
        return decode_image(source, at_least)[0]
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise ImageError(f"cannot decode image {named} ({image_fault(error)}); replace or remove it") from error


def decode_image(
    source: Path | ByteFile,
    at_least: int | None = None,
    largest: float | int | None = None,
    exif: dict[str, str | float] | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image as `open_image` does, and return its width and height at full size, too.

    Args:
        source: A file, or its bytes as a stream.
        at_least: As for `open_image`.
        largest: Largest number of pixels; None for `max_pixels`.
        exif: Gets the columns of `read_exif`.

    Raises:
        Exception: Nearly any, if the file is broken; `image_fault` describes it.
    """
    with _opened(source) as image:
        size = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))  # a square bounds the short side in any orientation
        _check_pixels(image, size, max_pixels() if largest is None else largest)
        turned = _turned(image)
        if exif is not None:
            exif.update(read_exif(image))
        if _orientation(image) in _ON_ITS_SIDE:
            size = size[::-1]
        return turned.copy() if turned is image else turned, size  # without the closed file


def file_exif(data: bytes) -> ExifColumns:
    """Return the columns of `read_exif` for the bytes of an image file; most formats are not decoded for them."""
    try:
        with _opened(io.BytesIO(data)) as image:
            return read_exif(image)
    except Exception:  # a broken file makes Pillow's readers raise nearly anything
        return {}


def max_pixels() -> float | int:
    """Return the largest number of pixels that is decoded: `$UNION_MAX_MEGAPIXELS`, else twice Pillow's limit.

    Raises:
        ConfigError: If the variable is not a number above 0.
    """
    text = os.environ.get("UNION_MAX_MEGAPIXELS")
    if not text:
        limit = _limits[0] if _limits else Image.MAX_IMAGE_PIXELS
        return math.inf if limit is None else 2 * limit
    try:
        value = float(text) * 1e6
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ConfigError(f"invalid value for UNION_MAX_MEGAPIXELS: {text!r} (expected a number above 0)")
    return value


def _check_pixels(image: Image.Image, size: tuple[int, int], largest: float | int) -> None:
    """Refuse an image that takes too much memory; a JPEG may be decoded small, if not all of it has to be in memory."""
    pixels = size[0] * size[1]
    if image.size != size and not image.info.get("progressive"):
        pixels = max(image.width * image.height, pixels // _REDUCED_LIMIT)
    if pixels > largest:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels are more than the limit of {largest / 1e6:,.0f} megapixels; to accept it "
            "set UNION_MAX_MEGAPIXELS, or max_megapixels of union-index"
        )


@contextmanager
def _opened(source: Path | ByteFile) -> Iterator[Image.Image]:
    """Open an image of a known format with Pillow; its pixels are not decoded yet."""
    with ExitStack() as stack:
        stack.enter_context(_quiet_pillow())
        file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        head = file.read(32)
        if head.startswith(b"\xff\xd8"):
            check_jpeg(file)
        file.seek(0)
        try:
            image = stack.enter_context(Image.open(file, formats=decoded_formats()))
        except UnidentifiedImageError:
            raise UnidentifiedImageError(
                unknown_format(head, str(source) if isinstance(source, Path) else "")
            ) from None
        yield image


def check_jpeg(file: ByteFile) -> None:
    """Refuse a JPEG that would take far longer to decode than its size suggests, by a ValueError."""
    start, scans, last = _end_of_header(file), 1, b""
    while scans <= _MAX_SCANS and (block := file.read(_BLOCK)):
        scans += (last + block).count(b"\xff\xda")  # also within metadata and whatever follows the image
        last = block[-1:]
    if scans > _MAX_SCANS:
        file.seek(start)
        if _count_scans(file.read()) > _MAX_SCANS:
            raise ValueError(f"the JPEG has more than {_MAX_SCANS} scans")


def _end_of_header(file: ByteFile) -> int:
    """Move to the first scan of a JPEG, or to the end of a truncated one; return the position."""
    file.seek(2)
    for _ in range(_MAX_SEGMENTS):
        marker = file.read(2)
        if len(marker) < 2:
            return file.tell()
        if marker[0] != _MARK:
            junk = marker + file.read(_MAX_JUNK)
            at = junk.find(_MARK)
            if at < 0 and len(junk) >= _MAX_JUNK:
                raise ValueError("no image follows the header of the JPEG")
            file.seek((at if at >= 0 else len(junk)) - len(junk), os.SEEK_CUR)
        elif marker[1] == _MARK:  # padding
            file.seek(-1, os.SEEK_CUR)
        elif marker[1] == _SCAN:
            return file.tell()
        elif marker[1] not in (0x00, 0x01, *range(0xD0, 0xDA)):  # a segment with a length
            file.seek(max(0, int.from_bytes(file.read(2), "big") - 2), os.SEEK_CUR)
    raise ValueError(f"the JPEG has more than {_MAX_SEGMENTS:,} segments before its image")


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG (ITU-T T.81, B.1), given what follows the header of its first."""
    scans, at = 1, 0
    pattern = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # markers with a length; 01 and D0 to D7 have none
    while scans <= _MAX_SCANS and (marker := pattern.search(data, at)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _upright(image: Image.Image) -> Image.Image:
    """Convert an image that a caller opened or made; its file may not have been read yet."""
    if not (image.width and image.height):
        raise ImageError(f"the PIL image is empty ({image.width} x {image.height} pixels)")
    try:
        with _quiet_pillow():
            return _turned(image)
    except Exception as error:
        named = getattr(image, "filename", "") or "the PIL image"
        raise ImageError(f"cannot decode image {named} ({image_fault(error)}); replace it") from error


def _turned(image: Image.Image) -> Image.Image:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = as_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def check_image(path: Path) -> os.stat_result:
    """Check, without opening it, that a file exists, is regular and not empty; return the result of `os.stat`.

    Raises:
        ImageError: If it cannot be an image; names the file and the reason.
    """
    try:
        found = os.stat(path)  # noqa: PTH116  (Path.stat is slower, and whole lists are checked)
    except (FileNotFoundError, NotADirectoryError):
        if is_web_address(str(path)):
            raise ImageError(f"{path} is a web address; download the image and pass its path") from None
        advice = "check the path" if path.suffix else "check the path; a text is given as text= or texts="
        raise ImageError(f"{path}: the image is missing; {advice}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: the image cannot be reached ({image_fault(error)}); check the path") from None
    if stat.S_ISDIR(found.st_mode):
        advice = "pass a list of its image files, or index it (union-index, Gallery.add)"
        raise ImageError(f"{path} is a folder, not an image file; {advice}")
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{path}: not a regular file; pass an image file")
    if found.st_size == 0:
        raise ImageError(f"{path}: the image is empty (0 bytes); replace or remove the file")
    if is_raw(path.name):
        raise ImageError(f"{path}: {describe_name(path.name)}")
    return found


def image_key(source: ImageSource) -> str:
    """Return the cache key of an image: equal keys mean equal pixels.

    For a file its absolute path, size in bytes and modification time in nanoseconds; for a `LazyImage` its own key.

    Raises:
        ImageError: If the file is missing, empty or not a regular file.
    """
    if isinstance(source, str):
        raise ImageError(f"{source} is text (expected pathlib.Path, or a LazyImage)")
    if not isinstance(source, Path):
        return source.key
    found = check_image(source)
    return f"{source.absolute()}|{found.st_size}|{found.st_mtime_ns}"


def broken_images(sources: Iterable[_Source], *, workers: int | None = None) -> list[tuple[_Source, str]]:
    """Find the images that cannot be decoded, with the reasons, by decoding all of them in threads."""

    def fault(source: ImageSource) -> str:
        try:
            open_image(source, at_least=1)  # faster for a JPEG, of which all data are still read
        except ImageError as error:
            return str(error)
        return ""

    images = list(sources)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return [(image, why) for image, why in zip(images, pool.map(fault, images), strict=True) if why]


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparency is blended over white. See `open_image` for gray images."""
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
    except Exception:  # corrupt EXIF: the pixels are fine, the orientation is unknown
        return 1


def image_fault(error: Exception) -> str:
    """Describe in a few words why an image could not be decoded."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def image_from_array(given: np.ndarray | Tensor) -> Image.Image:
    """Convert an array of shape HxW or HxWxC, or a tensor of shape HxW or CxHxW, gray, RGB or RGBA, to an image.

    Args:
        given: uint8, uint16, bool, or floats in 0..1, which are rounded to 256 levels.

    Returns:
        An image in mode L, RGB or RGBA.

    Raises:
        ImageError: If the shape, type or range is invalid.
    """
    shape, is_tensor = tuple(given.shape), isinstance(given, Tensor)
    named = f"{'tensor' if is_tensor else 'array'} of {'x'.join(map(str, shape)) or 'no dimension'}"
    channels, others = (shape[:1], shape[-1:]) if is_tensor else (shape[-1:], shape[:1])
    if 0 in shape or not (len(shape) == 2 or (len(shape) == 3 and channels[0] in _CHANNELS)):
        advice = "expected HxW, 1xHxW, 3xHxW or 4xHxW" if is_tensor else "expected HxW, HxWx1, HxWx3 or HxWx4"
        if 0 in shape:
            advice = "it has no pixel"
        elif len(shape) == 4:
            advice = "pass one image at a time, or a list of images"
        elif len(shape) == 3 and others[0] in _CHANNELS:
            turned = "last: use permute(2, 0, 1)" if is_tensor else "first: use transpose(1, 2, 0)"
            advice += f"; its channels are {turned}"
        raise ImageError(f"invalid image: {named} ({advice})")
    named += f", {str(given.dtype).removeprefix('torch.')}"
    if isinstance(given, Tensor):
        here = given.detach().cpu()
        here = here.float() if here.is_floating_point() else here
        given = (here if here.ndim == 2 else here.permute(1, 2, 0)).numpy()
    return _from_levels(given, named)


def _from_levels(numbers: np.ndarray, named: str) -> Image.Image:
    kind = numbers.dtype
    if kind == np.bool_:
        levels = numbers.astype(np.uint8) * 255
    elif kind == np.uint16:
        levels = (numbers.astype(np.float32) * (255 / 65535)).round().astype(np.uint8)
    elif kind == np.uint8:
        levels = numbers
    elif np.issubdtype(kind, np.floating):
        low, high = float(numbers.min()), float(numbers.max())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # nan fails both
            raise ImageError(
                f"invalid image: {named} with values from {low:.4g} to {high:.4g} (expected floats in 0..1); "
                "scale them, and undo a normalization"
            )
        levels = (numbers.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    else:
        raise ImageError(f"invalid image: {named} (expected {_DTYPES})")
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[2:] == (1,) else levels))


_lock = threading.Lock()
_inside: list[warnings.catch_warnings] = []  # one entry per running block; the first holds the saved filters
_limits: list[int | None] = []  # Pillow's limit of pixels, while a block runs


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings and its limit of pixels, instead of which `max_pixels` counts.

    Both are settings of the whole process, so concurrent threads share one block: the first sets them, the last
    undoes it. Only warnings raised within Pillow are ignored.
    """
    with _lock:
        _inside.append(_inside[0] if _inside else warnings.catch_warnings())
        if len(_inside) == 1:
            _limits.append(Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = None
            _inside[0].__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _lock:
            guard = _inside.pop()
            if not _inside:
                guard.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = _limits.pop()
