"""JPEGs of a batch decoded together, on the model's device, by TorchCodec: on a GPU by its own decoding engine.

A batch comes here with the bytes of its plain JPEGs and leaves with their pixels and thumbnails. What TorchCodec
refuses goes to Pillow, which says why where it cannot read it either. Knows bytes, pixels and devices. Does not know
files, a model or an index.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from typing import Any, Final, final

import torch
import torchvision.transforms.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from union_igrot.errors import ConfigError
from union_igrot.gallery.ingest.decode import Batch, Handed, Seen, look_at, thumbnail_of, thumbnail_size
from union_igrot.images.decode import image_fault
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

MOST_PIXELS: Final = 2**27
"""Pixels that are decoded at once; 400 MB, and four times that while they are resized."""
_THREADS: Final = 4
"""Threads that write thumbnails; the codec lets go of the interpreter."""

Looked = tuple[tuple[int, int], bytes, UInt8[Tensor, "3 height width"]]
"""Width and height, thumbnail and pixels of an image."""


def require_codec() -> None:
    """Look whether TorchCodec is installed.

    Raises:
        ConfigError: Where it is not.
    """
    if importlib.util.find_spec("torchcodec") is None:
        raise ConfigError('decoder=torchcodec needs a package that is not installed; pip install "union-igrot[codec]"')


@final
class BatchDecoder:
    """Decodes what workers handed over.

    Args:
        preprocess: The model's.
        device: Where the model works.
    """

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        self._to_pixels, self._device = ImageToPixels(preprocess), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbnails")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def whole(self, batch: Batch) -> Batch:
        """Decode what is still to be decoded; the pixels lie on the device.

        May be called in another thread than the model works in: a GPU decodes beside the model.
        """
        if not batch.handed:
            return batch
        size = self._to_pixels.preprocess.size
        with self._beside():
            found: dict[int, Looked | str] = {}
            for some in _cut(batch.handed):
                found |= zip([one.place for one in some], self._decoded([one.jpeg for one in some]), strict=True)
            seen, pixels, ready = list(batch.seen), [], chain.from_iterable(batch.images)
            for place, one in enumerate(batch.seen):
                looked = found.get(place)
                if one.thumbnail is not None:
                    pixels.append(next(ready))
                elif isinstance(looked, str):
                    seen[place] = Seen(one.number, reason=looked)
                elif looked is not None:
                    (width, height), thumbnail, own = looked
                    seen[place] = one._replace(width=width, height=height, thumbnail=thumbnail)
                    pixels.append(own)
            images = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8, device=self._device)
            for at, one_of_them in enumerate(pixels):
                images[at] = one_of_them.to(self._device, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
        return Batch([images], seen)

    def used(self, batch: Batch) -> None:
        """Tell the allocator that the model's work will read what was decoded beside it; in the model's thread."""
        for images in batch.images if self._stream is not None else ():
            if images.is_cuda:
                images.record_stream(torch.cuda.current_stream(self._device))

    def _beside(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self._device))
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def _decoded(self, jpegs: list[UInt8[Tensor, " _"]]) -> list[Looked | str]:
        """Decode some JPEGs; of one that cannot be read the reason."""
        from torchcodec.decoders import decode_jpeg  # noqa: PLC0415 - an extra

        try:
            images: Any = decode_jpeg(jpegs, mode="RGB", device=self._device)
        except RuntimeError:  # of one of them at least, and it does not say of which
            return list(self._threads.map(self._by_pillow, jpegs))
        return self._looked(images)

    def _looked(self, images: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[Looked | str]:
        """Bring decoded images to the model's size and to thumbnails, those of one size together."""
        alike: dict[tuple[int, int], list[int]] = {}
        for at, image in enumerate(images):
            alike.setdefault((image.shape[2], image.shape[1]), []).append(at)
        looked: dict[int, Looked] = {}
        for (width, height), places in alike.items():
            stack = torch.stack([images[at] for at in places])
            small = list(reversed(thumbnail_size(width, height)))
            pixels = self._to_pixels.resize_batch(stack)
            shown = F.resize(stack, small, InterpolationMode.BILINEAR, antialias=True).cpu()
            files = self._threads.map(_written, shown.permute(0, 2, 3, 1).contiguous().unbind())
            for at, thumbnail, own in zip(places, files, pixels.unbind(), strict=True):
                looked[at] = (width, height), thumbnail, own
        return [looked[at] for at in range(len(images))]

    def _by_pillow(self, jpeg: UInt8[Tensor, " bytes"]) -> Looked | str:
        try:
            return look_at(jpeg.numpy().tobytes(), self._to_pixels)
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            return image_fault(error)


def _cut(handed: Sequence[Handed]) -> Iterator[Sequence[Handed]]:
    """Cut a batch into parts of so many pixels as may be decoded at once; a larger image is alone."""
    begin, held = 0, 0
    for at, one in enumerate(handed):
        if at > begin and held + one.pixels > MOST_PIXELS:
            yield handed[begin:at]
            begin, held = at, 0
        held += one.pixels
    yield handed[begin:]


def _written(pixels: UInt8[Tensor, "height width 3"]) -> bytes:
    return thumbnail_of(Image.fromarray(pixels.numpy()))
