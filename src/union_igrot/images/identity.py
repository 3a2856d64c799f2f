"""Identities of images across datasets, by file name, to find test images that were trained on."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.images.decode import image_key, open_image
from union_igrot.types import ImageSource

Box = tuple[int | float, int | float, int | float, int | float]
DILATION = 0.7


@final
@dataclass(frozen=True, slots=True)
class Crop:
    """An object cropped from a photo with a margin and padded to a square with black.

    The box grows by `dilation` times its size, to the left and the top as far as the photo reaches, by the rest to
    the right and the bottom (facebookresearch/genecis, `datasets/vaw_dataset.py`).
    """

    path: Path  # the photo's file
    box: Box  # left, top, width and height in pixels
    dilation: float = DILATION  # how much is added, as a fraction of the box's size

    @property
    def key(self) -> str:
        """Cache key, made of the file's current key, the box and the dilation.

        Does not raise if the file is missing, since a check for `LazyImage` reads it, too; `open` raises.
        """
        try:
            file = image_key(self.path)
        except ImageError:
            file = f"{self.path.absolute()}|missing"
        return f"crop|{file}|{','.join(map(str, self.box))}|{self.dilation}"

    def open(self) -> Image.Image:
        """Crop the object."""
        photo = open_image(self.path)
        x, y, width, height = self.box
        left, top = max(0, x - self.dilation * width), max(0, y - self.dilation * height)
        right = min(photo.width, left + (1 + self.dilation) * width)
        bottom = min(photo.height, top + (1 + self.dilation) * height)
        corners = tuple(map(round, (left, top, right, bottom)))  # halves to even, as in Pillow's crop
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise ImageError(f"{self.path}: the box {self.box} lies outside of {photo.width} x {photo.height} pixels")
        cut = photo.crop((corners[0], corners[1], corners[2], corners[3]))
        side = max(cut.size)
        square = Image.new("RGB", (side, side))
        square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
        return square


# Names that mean the same image in every folder; the group is the collection's own number.
_KNOWN = (
    ("coco", re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")),
    ("imagenet", re.compile(r"(n\d{8}_\d+|ILSVRC2012_[a-z]+_\d{8})")),
    ("nlvr2", re.compile(r"((?:train|dev|test1|test2)-\d+-\d+-img[01])")),
    ("asin", re.compile(r"(B0[0-9A-Z]{8})")),
)


def image_identity(source: ImageSource) -> str:
    """Return an image's identity across datasets, from its name alone.

    Images of COCO, ImageNet, NLVR2 (CIRR) and Amazon's products (FashionIQ) are identified by the collection's
    own number, in any folder: `train2014/COCO_train2014_000000000009.jpg` is `train2017/000000000009.jpg`. Every
    other file is identified by the name of its folder, its own name and its size in bytes: `airplane/ext_12.jpg`,
    a `LazyImage` by its key, a `Crop` by its photo.

    An image is recognized in another copy of its dataset, another split, or another dataset that kept the name;
    not if it was renamed or, outside the four collections, saved again. Visual Genome's copies of COCO photos have
    other names. No file is read: 123,403 images take about a second.

    Returns:
        Sixteen hexadecimal digits.
    """
    if isinstance(source, Crop):
        source = source.path
    text = _file_identity(source) if isinstance(source, Path) else f"picture/{source.key}"
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def image_identities(sources: Iterable[ImageSource]) -> frozenset[str]:
    """Return the set of the images' identities."""
    return frozenset(map(image_identity, sources))


def _file_identity(path: Path) -> str:
    for collection, pattern in _KNOWN:
        if known := pattern.fullmatch(path.stem):
            return f"{collection}/{known.group(1)}"
    folder = path.parent.name.lower().replace(" ", "_").replace("-", "_")
    try:
        size = os.stat(path).st_size  # noqa: PTH116  (Path.stat is slower, and whole galleries are checked)
    except (OSError, ValueError):
        size = -1  # reported when it is opened
    return f"file/{folder}/{path.stem}/{size}"
