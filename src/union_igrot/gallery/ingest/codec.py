"""Decode the plain JPEGs of a batch together on the device of the model, with TorchCodec.

On a GPU this uses its decoding engine. What TorchCodec refuses goes to Pillow, which also reports why it fails.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Final, final

import torch
import torchvision.transforms.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from union_igrot.errors import ConfigError
from union_igrot.gallery.ingest.decode import (
    MAX_PIXELS,
    DecodedBatch,
    DecodedImage,
    decode_with_thumbnail,
    make_thumbnail,
    thumbnail_size,
)
from union_igrot.images.decode import image_fault
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

_THREADS: Final = 4
"""Threads that write thumbnails, during which Pillow releases the GIL."""

_Decoded = tuple[tuple[int, int], bytes, UInt8[Tensor, "3 height width"]]
"""Width and height, thumbnail and pixels of an image."""


def require_codec() -> None:
    """Check that TorchCodec is installed.

    Raises:
        ConfigError: If it is not.
    """
    if importlib.util.find_spec("torchcodec") is None:
        raise ConfigError('decoder=torchcodec needs a package that is not installed; pip install "union-igrot[codec]"')


@final
class JpegBatchDecoder:
    """Decodes the JPEGs that decoding processes left undecoded.

    Args:
        preprocess: The model's.
        device: Device of the model.
    """

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
        with self._in_stream():
            decoded = self._decode_all([jpeg for part in parts for jpeg in _with_pixel_counts(part)])
            done = [self._complete(part, decoded) for part in parts]
            if self._stream is not None:
                self._stream.synchronize()
        return done

    def mark_used(self, parts: Sequence[DecodedBatch]) -> None:
        """Tell the allocator that the model reads what another stream decoded; call in the thread of the model."""
        for part in parts if self._stream is not None else ():
            if part.pixels.is_cuda:
                part.pixels.record_stream(torch.cuda.current_stream(self._device))

    def _in_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self._device))
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

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
                    images[at] = DecodedImage(image.digest, width, height, thumbnail)
                    pixels.append(own)
        size = self._to_pixels.preprocess.size
        stacked = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8, device=self._device)
        for at, one in enumerate(pixels):
            stacked[at] = one.to(self._device, non_blocking=True)
        return DecodedBatch(images, stacked)

    def _decode_all(self, jpegs: Sequence[tuple[int, UInt8[Tensor, " _"]]]) -> Iterator[_Decoded | str]:
        """Decode JPEGs, given with their numbers of pixels."""
        results: list[_Decoded | str] = []
        for group in split_by_pixels(jpegs):
            results += self._decode_group([jpeg for _, jpeg in group])
        return iter(results)

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


def _with_pixel_counts(part: DecodedBatch) -> Iterator[tuple[int, UInt8[Tensor, " _"]]]:
    return zip([image.jpeg[0] for image in part.images if image.jpeg is not None], part.split_jpegs(), strict=True)


def split_by_pixels(
    jpegs: Sequence[tuple[int, UInt8[Tensor, " _"]]],
) -> Iterator[Sequence[tuple[int, UInt8[Tensor, " _"]]]]:
    """Split JPEGs into groups of at most `MAX_PIXELS`; a larger image is alone."""
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
