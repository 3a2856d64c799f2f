"""From a file to a model's input: bytes read once, hashed, decoded, made a thumbnail of. Runs in worker processes.

Where JPEGs are decoded later, together and on the model's device (`indexing.codec`), their bytes are handed over.
Knows files and Pillow's images through `data.images`. Does not know a model or an index.
"""

import hashlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple, final

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from union_igrot.gallery.ingest.entries import UNREACHED
from union_igrot.images.decode import decode_image, image_fault, plain_jpeg
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

THUMBNAIL: Final = 160
"""Longest side of a thumbnail in pixels."""
_QUALITY: Final = 80
_LARGE: Final = 2**26
"""Bytes from which a file is looked at before it is read; a film is not read to its end to be no image."""


class Wanted(NamedTuple):
    """What a worker is told of an image; see `Entry`.

    Attributes:
        number: Its place in the list of those to be read.
        force: Whether it is decoded even if an equal image is in the index.
    """

    number: int
    path: str
    size: int
    offset: int | None = None
    data: bytes | None = None
    force: bool = False


class Seen(NamedTuple):
    """What a worker found out about an image; see `Fact`.

    Attributes:
        number: Its place in the list of those to be read.
        thumbnail: JPEG bytes; None where it was not decoded: it is broken, or an equal one is in the index.
    """

    number: int
    digest: str = ""
    width: int = 0
    height: int = 0
    thumbnail: bytes | None = None
    reason: str | None = None


class Handed(NamedTuple):
    """A JPEG that is still to be decoded.

    Attributes:
        place: Which of a batch's it is.
        pixels: Number of its pixels.
        jpeg: Its bytes.
    """

    place: int
    pixels: int
    jpeg: UInt8[Tensor, " bytes"]


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """What a worker gives at once.

    Attributes:
        images: Pixels of the decoded ones, of the model's size, in order.
        seen: All of them, in order.
        waited: Seconds for which the worker had nothing to do before.
        left: Place, number of pixels and of bytes of those that are still to be decoded; `seen` holds their hash alone.
        encoded: The bytes of those, one behind the other.
    """

    images: UInt8[Tensor, "decoded 3 height width"]
    seen: Sequence[Seen]
    waited: float = 0.0
    left: Sequence[tuple[int, int, int]] = ()
    encoded: UInt8[Tensor, " bytes"] | None = None

    def handed(self) -> list[Handed]:
        """Return those that are still to be decoded, each with its bytes."""
        if self.encoded is None:
            return []
        jpegs = self.encoded.split([length for _, _, length in self.left])
        return [Handed(place, pixels, jpeg) for (place, pixels, _), jpeg in zip(self.left, jpegs, strict=True)]

    def pin_memory(self) -> "Decoded":
        """Lay the images where a GPU fetches them while it computes."""
        return replace(self, images=self.images.pin_memory())


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Images that go through the model together.

    Attributes:
        images: Pixels of the decoded ones, of the model's size, in order; in one tensor or several.
        seen: All of them, in order.
        handed: Those that are still to be decoded, by the order of their places.
    """

    images: Sequence[UInt8[Tensor, "_ 3 height width"]]
    seen: Sequence[Seen]
    handed: Sequence[Handed] = ()


@final
class Decoder(Dataset[Decoded]):
    """Decodes batches; its "indices" are what is wanted, so that a worker needs no list.

    Args:
        preprocess: The model's.
        known: File of sorted 64-bit beginnings of the hashes of what is in the index, or None.
        hands_over: Whether plain JPEGs are left to who decodes many at once.
    """

    def __init__(self, preprocess: Preprocess, known: Path | None, *, hands_over: bool = False) -> None:
        self.preprocess, self._hands_over = preprocess, hands_over
        self._to_pixels, self._size = ImageToPixels(preprocess), preprocess.size
        self._known_at, self._known = known, np.empty(0, dtype=np.uint64)
        self._known_read = known is None
        self._shard: io.BufferedReader | None = None
        self._idle_since: float | None = None

    def __getitems__(self, wanted: Sequence[Wanted]) -> Decoded:
        """Decode a batch."""
        waited = 0.0 if self._idle_since is None else time.perf_counter() - self._idle_since
        if self._known_at is not None and not self._known_read:
            self._known, self._known_read = np.load(self._known_at, mmap_mode="r"), True
        found = [self._look(one) for one in wanted]
        pixels = [given for _, given in found if isinstance(given, Tensor)]
        images = torch.stack(pixels) if pixels else self.no_images()
        jpegs = [(place, given) for place, (_, given) in enumerate(found) if isinstance(given, _Jpeg)]
        left = [(place, jpeg.pixels, len(jpeg.data)) for place, jpeg in jpegs]
        joined = bytearray().join(jpeg.data for _, jpeg in jpegs)
        encoded = torch.frombuffer(joined, dtype=torch.uint8) if joined else None
        self._idle_since = time.perf_counter()
        return Decoded(images, [seen for seen, _ in found], waited, left, encoded)

    def close(self) -> None:
        """Close the shard that was read last."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def alone(self) -> "Decoder":
        """Return one that hands nothing over, for images tried one by one."""
        return Decoder(self.preprocess, self._known_at)

    def no_images(self) -> UInt8[Tensor, "0 3 height width"]:
        """Return a batch of none."""
        return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)

    def _look(self, one: Wanted) -> "tuple[Seen, Tensor | _Jpeg | None]":
        try:
            if one.size > _LARGE and one.offset is None and one.data is None:
                return self._look_at_large(one)
            data = self._read(one)
            digest = hashlib.sha256(data).hexdigest()[:32]
            if not one.force and self._is_known(digest):
                return Seen(one.number, digest), None
            if self._hands_over and (count := plain_jpeg(data)) is not None:
                return Seen(one.number, digest), _Jpeg(data, count)
            size, thumbnail, pixels = look_at(data, self._to_pixels)
            return Seen(one.number, digest, *size, thumbnail), pixels
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            fault = image_fault(error)
            # With a number it is the system's: the disk's fault, not the image's. Nor is it, where memory is short.
            away = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            return Seen(one.number, reason=f"{UNREACHED} ({fault})" if away else fault), None

    def _look_at_large(self, one: Wanted) -> tuple[Seen, Tensor | None]:
        """Decode first, which ends at once where it is no image; hash without holding all bytes."""
        image, size = decode_image(Path(one.path), self._size)
        with open(one.path, "rb") as file:  # noqa: PTH123 - odd bytes in a name
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        return Seen(one.number, digest, *size, thumbnail_of(image)), self._to_pixels(image)

    def _read(self, one: Wanted) -> bytes:
        if one.data is not None:
            return one.data
        if one.offset is None:
            with open(one.path, "rb") as file:  # noqa: PTH123
                return file.read()
        if self._shard is None or self._shard.name != one.path:
            self.close()
            self._shard = open(one.path, "rb")  # noqa: PTH123, SIM115 - kept open for the next member
        data = os.pread(self._shard.fileno(), one.size, one.offset)
        if len(data) < one.size:
            raise OSError("the shard ends before it")
        return data

    def _is_known(self, digest: str) -> bool:
        beginning = np.uint64(int(digest[:16], 16))
        at = int(np.searchsorted(self._known, beginning))
        return at < len(self._known) and bool(self._known[at] == beginning)


class _Jpeg(NamedTuple):
    """A JPEG that is handed over."""

    data: bytes
    pixels: int


def look_at(data: bytes, to_pixels: ImageToPixels) -> tuple[tuple[int, int], bytes, UInt8[Tensor, "3 height width"]]:
    """Decode an image with Pillow.

    Args:
        data: Bytes of a file.
        to_pixels: The model's.

    Returns:
        Its width and height, a thumbnail, and its pixels for the model.

    Raises:
        Exception: Nearly any, where the file is broken.
    """
    image, size = decode_image(io.BytesIO(data), to_pixels.preprocess.size)
    wide = image
    if max(image.size) < min(THUMBNAIL, max(size)):  # a JPEG decoded smaller than a thumbnail for a small model
        wide, _ = decode_image(io.BytesIO(data), THUMBNAIL)
    return size, thumbnail_of(wide), to_pixels(image)


def thumbnail_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height of an image's thumbnail; one that is small already is not enlarged."""
    share = min(1.0, THUMBNAIL / max(width, height))
    return max(1, round(width * share)), max(1, round(height * share))


def thumbnail_of(image: Image.Image) -> bytes:
    """Return a small JPEG of an image."""
    width, height = thumbnail_size(*image.size)
    file = io.BytesIO()
    # As sharp as a bicubic filter and half its time; whole factors are left to averages, a tenth of it.
    image.resize((width, height), Image.Resampling.HAMMING, reducing_gap=1.0).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
