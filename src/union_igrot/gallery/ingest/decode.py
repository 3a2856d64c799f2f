"""From an entry to pixels, digest and thumbnail; runs in decoding processes."""

import hashlib
import io
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple, final

import numpy as np
import torch
from jaxtyping import UInt8, UInt64
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from union_igrot.gallery.ingest.entries import UNREACHABLE, Entry
from union_igrot.gallery.ingest.plan import digest_prefix
from union_igrot.images.decode import decode_image, image_fault, plain_jpeg
from union_igrot.images.formats import describe_name
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

THUMBNAIL_SIZE: Final = 160
"""Longest side of a thumbnail in pixels."""
MAX_PIXELS: Final = 2**27
"""Pixels that `JpegBatchDecoder` decodes at once, 400 MB and four times as much while they are resized."""
_QUALITY: Final = 80
_LARGE_FILE: Final = 2**26
"""Bytes from which a file is decoded before it is hashed, so that a video is not read to its end in vain."""


class DecodedImage(NamedTuple):
    """What is known of an image after it was read.

    Attributes:
        digest: First 32 hex digits of the SHA-256 of its bytes; "" if it could not be read.
        width: Width in pixels, upright.
        height: Height in pixels, upright.
        thumbnail: JPEG bytes. None if it was not decoded: it is broken, or equal bytes have been embedded already.
        reason: Why it is broken, or None.
        jpeg: Pixels and bytes of a JPEG that `JpegBatchDecoder` has yet to decode, or None.
    """

    digest: str = ""
    width: int = 0
    height: int = 0
    thumbnail: bytes | None = None
    reason: str | None = None
    jpeg: tuple[int, int] | None = None


@final
@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """Images in the order of their entries.

    Attributes:
        images: All of them.
        pixels: Pixels of those with a thumbnail, in order, in the size of the model.
        jpegs: The bytes of those with `jpeg`, concatenated.
        idle: Seconds for which the worker had waited for work.
    """

    images: Sequence[DecodedImage]
    pixels: UInt8[Tensor, "decoded 3 size size"]
    jpegs: UInt8[Tensor, " bytes"] = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    idle: float = 0.0

    def pin_memory(self) -> "DecodedBatch":
        """Move the pixels to pinned memory, from which a GPU copies while it computes."""
        return replace(self, pixels=self.pixels.pin_memory())

    def split_jpegs(self) -> Sequence[UInt8[Tensor, " _"]]:
        """Return the bytes of each JPEG that has yet to be decoded."""
        sizes = [image.jpeg[1] for image in self.images if image.jpeg is not None]
        return list(self.jpegs.split(sizes))

    def without(self, digests: Collection[str]) -> "DecodedBatch":
        """Drop pixels and bytes of images that were read before, here or earlier; only their digests stay.

        Args:
            digests: Digests of images read earlier.
        """
        images: list[DecodedImage] = []
        seen: set[str] = set()
        rows, keep_rows, keep_jpegs = 0, [], []
        for image in self.images:
            repeated = bool(image.digest) and (image.digest in seen or image.digest in digests)
            seen.add(image.digest)
            images.append(DecodedImage(image.digest) if repeated else image)
            if image.thumbnail is not None:
                keep_rows += [] if repeated else [rows]
                rows += 1
            elif image.jpeg is not None:
                keep_jpegs.append(not repeated)
        if len(keep_rows) == rows and all(keep_jpegs):
            return self
        kept = [jpeg for jpeg, keep in zip(self.split_jpegs(), keep_jpegs, strict=True) if keep]
        return replace(self, images=images, pixels=self.pixels[keep_rows], jpegs=torch.cat([self.jpegs[:0], *kept]))


@final
class ImageReader:
    """Reads, hashes and decodes images: the transform and, with `collate`, the batches of an `image_loader`.

    Args:
        preprocess: The model's.
        known: Sorted first 64 bits of the digests of images that need not be decoded.
        defer_jpegs: Whether plain JPEGs are left to `JpegBatchDecoder`.
        largest: Largest number of pixels; None for `max_pixels`.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        known: UInt64[np.ndarray, " digests"] | None = None,
        *,
        defer_jpegs: bool = False,
        largest: float | int | None = None,
    ) -> None:
        self.preprocess, self.known, self.largest, self._defer_jpegs = preprocess, known, largest, defer_jpegs
        self._to_pixels = ImageToPixels(preprocess)
        self._shard: io.BufferedReader | None = None
        self._idle_since: float | None = None
        self._idle = 0.0

    def __call__(self, entry: Entry) -> tuple[DecodedImage, Tensor | bytes | None]:
        """Return an image with its pixels, or the bytes of a JPEG that has yet to be decoded."""
        if self._idle_since is not None:
            self._idle, self._idle_since = time.perf_counter() - self._idle_since, None
        try:
            return self._read_image(entry)
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            fault = image_fault(error)
            if isinstance(error, UnidentifiedImageError):  # a name says more than bytes that nobody knows
                fault = describe_name(entry.id) or fault
            # An error of the system, such as a failing disk or a lack of memory, says nothing about the image.
            temporary = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            return DecodedImage(reason=f"{UNREACHABLE} ({fault})" if temporary else fault), None

    def collate(self, items: Sequence[tuple[DecodedImage, Tensor | bytes | None]]) -> DecodedBatch:
        """Join images into a batch."""
        pixels = [data for _, data in items if isinstance(data, Tensor)]
        size = self.preprocess.size
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
        joined = bytearray().join(data for _, data in items if isinstance(data, bytes))
        jpegs = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        idle, self._idle, self._idle_since = self._idle, 0.0, time.perf_counter()
        return DecodedBatch([image for image, _ in items], stacked, jpegs, idle)

    def close(self) -> None:
        """Close the shard that was read last."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _read_image(self, entry: Entry) -> tuple[DecodedImage, Tensor | bytes | None]:
        if entry.size > _LARGE_FILE and entry.offset is None and entry.data is None:
            return self._read_large(entry)
        data = self._read_bytes(entry)
        digest = hashlib.sha256(data).hexdigest()[:32]
        if self._is_known(digest):
            return DecodedImage(digest), None
        if self._defer_jpegs and (count := plain_jpeg(data)) is not None and count <= MAX_PIXELS:
            return DecodedImage(digest, jpeg=(count, len(data))), data
        (width, height), thumbnail, pixels = decode_with_thumbnail(data, self._to_pixels, self.largest)
        return DecodedImage(digest, width, height, thumbnail), pixels

    def _read_large(self, entry: Entry) -> tuple[DecodedImage, Tensor]:
        """Decode before hashing, which fails at once if it is no image; hash without reading all bytes into memory."""
        image, (width, height) = decode_image(Path(entry.path), self.preprocess.size, self.largest)
        with open(entry.path, "rb") as file:  # noqa: PTH123 - undecodable bytes in a name
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        return DecodedImage(digest, width, height, make_thumbnail(image)), self._to_pixels(image)

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


def decode_with_thumbnail(
    data: bytes, to_pixels: ImageToPixels, largest: float | int | None = None
) -> tuple[tuple[int, int], bytes, UInt8[Tensor, "3 height width"]]:
    """Decode an image with Pillow.

    Args:
        data: The bytes of a file.
        to_pixels: The model's.
        largest: Largest number of pixels; None for `max_pixels`.

    Returns:
        Width and height, a thumbnail, and the pixels for the model.

    Raises:
        Exception: Nearly any, if the file is broken.
    """
    image, size = decode_image(io.BytesIO(data), to_pixels.preprocess.size, largest)
    large = image
    if max(image.size) < min(THUMBNAIL_SIZE, max(size)):  # a JPEG decoded smaller than a thumbnail for a small model
        large, _ = decode_image(io.BytesIO(data), THUMBNAIL_SIZE, largest)
    return size, make_thumbnail(large), to_pixels(image)


def thumbnail_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height of the thumbnail of an image; a small image is not enlarged."""
    scale = min(1.0, THUMBNAIL_SIZE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def make_thumbnail(image: Image.Image) -> bytes:
    """Return a small JPEG of an image."""
    width, height = thumbnail_size(*image.size)
    file = io.BytesIO()
    # As sharp as a bicubic filter at half its time; integer factors are averaged, in a tenth of it.
    image.resize((width, height), Image.Resampling.HAMMING, reducing_gap=1.0).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
