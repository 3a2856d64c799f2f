"""From an entry to pixels, digest and thumbnail; runs in decoding processes."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple, final

import numpy as np
import torch
from jaxtyping import UInt8, UInt64
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from union_igrot.gallery.ingest.entries import UNREACHABLE, Entry, content_digest
from union_igrot.gallery.ingest.plan import digest_prefix
from union_igrot.images.decode import decode_image, file_exif, image_fault
from union_igrot.images.exif import ExifColumns
from union_igrot.images.formats import describe_name
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

THUMBNAIL_SIZE: Final = 160  # longest side of a thumbnail in pixels
_QUALITY: Final = 80
_LARGE_FILE: Final = 2**26
"""Bytes from which a file is decoded before it is hashed, so that a video is not read to its end in vain."""


class DecodedImage(NamedTuple):
    """What is known of an image after it was read."""

    digest: str = ""  # see `content_digest`; "" if it could not be read
    width: int = 0  # width in pixels, upright
    height: int = 0
    # JPEG bytes. None if it was not decoded: it is broken, or equal bytes have been embedded already.
    thumbnail: bytes | None = None
    reason: str | None = None  # why it is broken, or None
    exif: ExifColumns | None = None  # see `read_exif`; None if it was not read


@final
@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """Images in the order of their entries."""

    images: Sequence[DecodedImage]  # all of them
    pixels: UInt8[Tensor, "decoded 3 size size"]  # pixels of those with a thumbnail, in order, in the size of the model

    def pin_memory(self) -> "DecodedBatch":
        """Move the pixels to pinned memory, from which a GPU copies while it computes."""
        return replace(self, pixels=self.pixels.pin_memory())

    def without_repeated(self, seen: set[str]) -> "DecodedBatch":
        """Drop the pixels of images whose digest was seen, here or earlier, and add the digests to those seen."""
        images: list[DecodedImage] = []
        kept, rows = [], 0
        for image in self.images:
            repeated = image.digest in seen
            images.append(DecodedImage(image.digest, exif=image.exif) if repeated else image)
            if image.digest:
                seen.add(image.digest)
            if image.thumbnail is not None:
                kept += [] if repeated else [rows]
                rows += 1
        return self if len(kept) == rows else replace(self, images=images, pixels=self.pixels[kept])


@final
class ImageReader:
    """Reads, hashes and decodes images: the transform and, with `collate`, the batches of an `image_loader`."""

    def __init__(
        self,
        preprocess: Preprocess,
        known: UInt64[np.ndarray, " digests"] | None = None,
        *,
        largest: float | int | None = None,
        exif: bool = True,
    ) -> None:
        self.preprocess, self.known, self.largest, self.exif = preprocess, known, largest, exif
        self._to_pixels = ImageToPixels(preprocess)
        self._shard: io.BufferedReader | None = None

    def __call__(self, entry: Entry) -> tuple[DecodedImage, Tensor | None]:
        """Return an image with its pixels, None if it was not decoded."""
        try:
            return self._read_image(entry)
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            fault = image_fault(error)
            if isinstance(error, UnidentifiedImageError):  # a name says more than bytes that nobody knows
                fault = describe_name(entry.id) or fault
            # An error of the system, such as a failing disk or a lack of memory, says nothing about the image.
            temporary = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            return DecodedImage(reason=f"{UNREACHABLE} ({fault})" if temporary else fault), None

    def collate(self, items: Sequence[tuple[DecodedImage, Tensor | None]]) -> DecodedBatch:
        """Join images into a batch."""
        pixels = [data for _, data in items if isinstance(data, Tensor)]
        size = self.preprocess.size
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return DecodedBatch([image for image, _ in items], stacked)

    def close(self) -> None:
        """Close the shard that was read last."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _read_image(self, entry: Entry) -> tuple[DecodedImage, Tensor | None]:
        if entry.size > _LARGE_FILE and entry.offset is None and entry.data is None:
            return self._read_large(entry)
        data = self._read_bytes(entry)
        digest = content_digest(hashlib.sha256(data), entry.text)
        if self._is_known(digest):
            return DecodedImage(digest, exif=file_exif(data) if self.exif else None), None
        exif: dict[str, str | float] | None = {} if self.exif else None
        image, size = decode_image(io.BytesIO(data), self.preprocess.size, self.largest, exif)
        large = image
        if max(image.size) < min(THUMBNAIL_SIZE, max(size)):  # a JPEG decoded small for the model
            large, _ = decode_image(io.BytesIO(data), THUMBNAIL_SIZE, self.largest)
        return DecodedImage(digest, *size, make_thumbnail(large), exif=exif), self._to_pixels(image)

    def _read_large(self, entry: Entry) -> tuple[DecodedImage, Tensor]:
        """Decode before hashing, which fails at once if it is no image; hash without reading all bytes into memory."""
        exif: dict[str, str | float] | None = {} if self.exif else None
        image, (width, height) = decode_image(Path(entry.path), self.preprocess.size, self.largest, exif)
        with open(entry.path, "rb") as file:  # noqa: PTH123 - undecodable bytes in a name
            digest = content_digest(hashlib.file_digest(file, "sha256"), entry.text)
        return DecodedImage(digest, width, height, make_thumbnail(image), exif=exif), self._to_pixels(image)

    def _read_bytes(self, entry: Entry) -> bytes:
        if entry.data is not None:
            return entry.data
        if entry.offset is None:
            with open(entry.path, "rb") as file:  # noqa: PTH123
                return file.read()
        if self._shard is None or self._shard.name != entry.path:
            self.close()
            self._shard = open(entry.path, "rb")  # noqa: PTH123, SIM115 - kept open for the next member
        data = os.pread(self._shard.fileno(), entry.size, entry.offset)
        if len(data) < entry.size:
            raise OSError("the shard ends before it")
        return data

    def _is_known(self, digest: str) -> bool:
        if self.known is None:
            return False
        prefix = np.uint64(digest_prefix(digest))
        at = int(np.searchsorted(self.known, prefix))
        return at < len(self.known) and bool(self.known[at] == prefix)


def make_thumbnail(image: Image.Image) -> bytes:
    """Return a small JPEG of an image; a small image is not enlarged."""
    scale = min(1.0, THUMBNAIL_SIZE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    file = io.BytesIO()
    # As sharp as a bicubic filter at half its time; integer factors are averaged, in a tenth of it.
    image.resize((width, height), Image.Resampling.HAMMING, reducing_gap=1.0).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
