"""Regions of image files, written behind the path: `a.jpg#x,y,width,height`, in pixels or percent."""

import os
import re
from pathlib import Path
from typing import Final

from PIL import Image

from union_igrot.errors import ConfigError
from union_igrot.images.decode import as_image
from union_igrot.storage.files import expand_user, find_path

REGION_FORMAT: Final = "FILE#x,y,width,height in pixels or percent, such as a.jpg#10%,20%,50%,50%"
_NUMBER: Final = re.compile(r"\s*(\d+(?:\.\d+)?)(%?)\s*")
_NUMBERS: Final = re.compile(r"[-\d.,%\s]+")


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
