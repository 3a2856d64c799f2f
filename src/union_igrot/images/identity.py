"""Identities of images across datasets, by file name, to find test images that were trained on."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from union_igrot.images.crop import Crop
from union_igrot.types import ImageSource

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
