"""From an entry to pixels, digest and thumbnail; runs in decoding processes."""

import hashlib
import importlib.util
import io
import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
import torchvision.transforms.functional as F
from jaxtyping import UInt8, UInt64
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode

from union_igrot.errors import ConfigError
from union_igrot.gallery.ingest.entries import UNREACHABLE, Entry, content_digest
from union_igrot.gallery.ingest.plan import digest_prefix
from union_igrot.images.decode import decode_image, file_exif, image_fault, plain_jpeg
from union_igrot.images.exif import ExifColumns
from union_igrot.images.formats import describe_name
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

THUMBNAIL_SIZE: Final = 160  # longest side of a thumbnail in pixels
MAX_PIXELS: Final = 2**27
"""Pixels that `JpegBatchDecoder` decodes at once, 400 MB and four times as much while they are resized."""
_QUALITY: Final = 80
_THREADS: Final = 4  # threads that write thumbnails, during which Pillow releases the GIL
_LARGE_FILE: Final = 2**26
"""Bytes from which a file is decoded before it is hashed, so that a video is not read to its end in vain."""
_Decoded = tuple[tuple[int, int], bytes, UInt8[Tensor, "3 height width"]]
"""Width and height, thumbnail and pixels of an image."""


class DecodedImage(NamedTuple):
    """What is known of an image after it was read."""

    digest: str = ""  # see `content_digest`; "" if it could not be read
    width: int = 0  # width in pixels, upright
    height: int = 0
    # JPEG bytes. None if it was not decoded: it is broken, or equal bytes have been embedded already.
    thumbnail: bytes | None = None
    reason: str | None = None  # why it is broken, or None
    jpeg: tuple[int, int] | None = None  # pixels and bytes of a JPEG that `JpegBatchDecoder` has yet to decode, or None
    exif: ExifColumns | None = None  # see `read_exif`; None if it was not read


@final
@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """Images in the order of their entries."""

    images: Sequence[DecodedImage]  # all of them
    pixels: UInt8[Tensor, "decoded 3 size size"]  # pixels of those with a thumbnail, in order, in the size of the model
    # The bytes of those with `jpeg`, concatenated.
    jpegs: UInt8[Tensor, " bytes"] = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    idle: float = 0.0  # seconds for which the worker had waited for work

    def pin_memory(self) -> "DecodedBatch":
        """Move the pixels to pinned memory, from which a GPU copies while it computes."""
        return replace(self, pixels=self.pixels.pin_memory())

    def split_jpegs(self) -> Sequence[UInt8[Tensor, " _"]]:
        """Return the bytes of each JPEG that has yet to be decoded."""
        sizes = [image.jpeg[1] for image in self.images if image.jpeg is not None]
        return list(self.jpegs.split(sizes))

    def without(self, digests: Collection[str]) -> "DecodedBatch":
        """Drop pixels and bytes of images that were read before, here or earlier; only their digests stay."""
        images: list[DecodedImage] = []
        seen: set[str] = set()
        rows, keep_rows, keep_jpegs = 0, [], []
        for image in self.images:
            repeated = bool(image.digest) and (image.digest in seen or image.digest in digests)
            seen.add(image.digest)
            images.append(DecodedImage(image.digest, exif=image.exif) if repeated else image)
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
    """Reads, hashes and decodes images: the transform and, with `collate`, the batches of an `image_loader`."""

    def __init__(
        self,
        preprocess: Preprocess,
        known: UInt64[np.ndarray, " digests"] | None = None,
        *,
        defer_jpegs: bool = False,
        largest: float | int | None = None,
        exif: bool = True,
    ) -> None:
        self.preprocess, self.known, self.largest, self._defer_jpegs = preprocess, known, largest, defer_jpegs
        self.exif = exif
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
        digest = content_digest(hashlib.sha256(data), entry.text)
        if self._is_known(digest):
            return DecodedImage(digest, exif=file_exif(data) if self.exif else None), None
        if self._defer_jpegs and (count := plain_jpeg(data)) is not None and count <= MAX_PIXELS:
            return DecodedImage(digest, jpeg=(count, len(data)), exif=file_exif(data) if self.exif else None), data
        exif: dict[str, str | float] | None = {} if self.exif else None
        (width, height), thumbnail, pixels = decode_with_thumbnail(data, self._to_pixels, self.largest, exif)
        return DecodedImage(digest, width, height, thumbnail, exif=exif), pixels

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


def decode_with_thumbnail(
    data: bytes,
    to_pixels: ImageToPixels,
    largest: float | int | None = None,
    exif: dict[str, str | float] | None = None,
) -> tuple[tuple[int, int], bytes, UInt8[Tensor, "3 height width"]]:
    """Decode an image with Pillow; `exif` gets the columns of `read_exif`."""
    image, size = decode_image(io.BytesIO(data), to_pixels.preprocess.size, largest, exif)
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


def require_codec() -> None:
    """Check that TorchCodec is installed."""
    if importlib.util.find_spec("torchcodec") is None:
        raise ConfigError('decoder=torchcodec needs a package that is not installed; pip install "union-igrot[codec]"')


@final
class JpegBatchDecoder:
    """Decodes the JPEGs that decoding processes left undecoded."""

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        self._to_pixels, self._device = ImageToPixels(preprocess), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbnails")

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def decode(self, parts: Sequence[DecodedBatch]) -> list[DecodedBatch]:
        """Decode what has yet to be decoded; its pixels are on the device.

        May run in another thread than the model: a GPU decodes beside the model.
        """
        with torch.cuda.stream(self._stream):  # None changes nothing
            counts = [image.jpeg[0] for part in parts for image in part.images if image.jpeg is not None]
            jpegs = [jpeg for part in parts for jpeg in part.split_jpegs()]
            decoded = self._decode_all(list(zip(counts, jpegs, strict=True)))
            done = [self._complete(part, decoded) for part in parts]
            if self._stream is not None:
                self._stream.synchronize()
        return done

    def mark_used(self, parts: Sequence[DecodedBatch]) -> None:
        """Tell the allocator that the model reads what another stream decoded; call in the thread of the model."""
        for part in parts if self._stream is not None else ():
            if part.pixels.is_cuda:
                part.pixels.record_stream(torch.cuda.current_stream(self._device))

    def _complete(self, part: DecodedBatch, decoded: Iterator[_Decoded | str]) -> DecodedBatch:
        """Fill in the next decoded images of a batch."""
        if not len(part.jpegs):
            return part
        images, pixels, ready = list(part.images), [], iter(part.pixels)
        for at, image in enumerate(part.images):
            if image.thumbnail is not None:
                pixels.append(next(ready))
            elif image.jpeg is not None:
                result = next(decoded)
                if isinstance(result, str):
                    images[at] = DecodedImage(reason=result)
                else:
                    (width, height), thumbnail, own = result
                    images[at] = DecodedImage(image.digest, width, height, thumbnail, exif=image.exif)
                    pixels.append(own)
        size = self._to_pixels.preprocess.size
        stacked = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8, device=self._device)
        for at, one in enumerate(pixels):
            stacked[at] = one.to(self._device, non_blocking=True)
        return DecodedBatch(images, stacked)

    def _decode_all(self, jpegs: Sequence[tuple[int, UInt8[Tensor, " _"]]]) -> Iterator[_Decoded | str]:
        for group in split_by_pixels(jpegs):
            yield from self._decode_group([jpeg for _, jpeg in group])

    def _decode_group(self, jpegs: list[UInt8[Tensor, " _"]]) -> list[_Decoded | str]:
        """Decode some JPEGs; return the reason for each that cannot be read."""
        from torchcodec.decoders import decode_jpeg  # noqa: PLC0415 - an extra

        try:
            images: Any = decode_jpeg(jpegs, mode="RGB", device=self._device)
        except RuntimeError:  # for at least one of them, and it does not say for which
            return list(self._threads.map(self._decode_with_pillow, jpegs))
        return self._resize(images)

    def _resize(self, images: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[_Decoded | str]:
        """Resize images for the model and to thumbnails, those of one size together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for at, image in enumerate(images):
            by_size.setdefault((image.shape[2], image.shape[1]), []).append(at)
        results: dict[int, _Decoded] = {}
        for (width, height), places in by_size.items():
            stack = torch.stack([images[at] for at in places])
            small = list(reversed(thumbnail_size(width, height)))
            pixels = self._to_pixels.resize_batch(stack)
            shown = F.resize(stack, small, InterpolationMode.BILINEAR, antialias=True).cpu()
            files = self._threads.map(_encode_thumbnail, shown.permute(0, 2, 3, 1).contiguous().unbind())
            for at, thumbnail, own in zip(places, files, pixels.unbind(), strict=True):
                results[at] = (width, height), thumbnail, own
        return [results[at] for at in range(len(images))]

    def _decode_with_pillow(self, jpeg: UInt8[Tensor, " bytes"]) -> _Decoded | str:
        try:
            return decode_with_thumbnail(jpeg.numpy().tobytes(), self._to_pixels)
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            return image_fault(error)


def split_by_pixels(
    jpegs: Sequence[tuple[int, UInt8[Tensor, " _"]]],
) -> Iterator[Sequence[tuple[int, UInt8[Tensor, " _"]]]]:
    """Split JPEGs, given with their numbers of pixels, into groups of at most `MAX_PIXELS`; a larger image is alone."""
    start, held = 0, 0
    for at, (pixels, _) in enumerate(jpegs):
        if at > start and held + pixels > MAX_PIXELS:
            yield jpegs[start:at]
            start, held = at, 0
        held += pixels
    if jpegs:
        yield jpegs[start:]


def _encode_thumbnail(pixels: UInt8[Tensor, "height width 3"]) -> bytes:
    return make_thumbnail(Image.fromarray(pixels.numpy()))
