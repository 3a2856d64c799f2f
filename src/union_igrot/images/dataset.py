"""Images decoded and transformed in worker processes, in batches and in order.

Training, evaluation and indexing read images through the same `ImageDataset` and `image_loader`.
"""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeVar, final

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from union_igrot.errors import ImageError, UnionError
from union_igrot.images.decode import open_image
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import ImageSource, Preprocess

_PARENT_CHECK = 1.0
"""Seconds between two looks of a worker for its main process."""

Source = TypeVar("Source")
Loaded = TypeVar("Loaded")
Collated = TypeVar("Collated")


@final
class WorkerDiedError(UnionError):
    """A decoding process was killed, usually by a lack of memory or by a malicious image."""


@final
class OpenAsPixels:
    """Open an image and bring it to the size of a backbone; the default transform. Can be pickled.

    Args:
        preprocess: The backbone's.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._to_pixels, self._size = ImageToPixels(preprocess), preprocess.size

    def __call__(self, source: ImageSource) -> UInt8[Tensor, "3 size size"]:
        """Return the image's pixels, as `model_input` takes them."""
        return self._to_pixels(open_image(source, at_least=self._size))


@final
class ImageDataset(Dataset[Any], Generic[Source, Loaded]):
    """Sources that are opened and transformed when they are read.

    An `ImageError` is returned as a value, so that the main process decides what to do about it.

    Args:
        sources: Anything that `transform` takes. None if the batches of the loader hold the sources themselves, which
            keeps a long list out of the workers.
        transform: Runs in the workers. May return anything that can be pickled: pixels, pixels with a thumbnail and
            facts, or the undecoded bytes of a JPEG.
    """

    def __init__(self, sources: Sequence[Source] | None, transform: Callable[[Source], Loaded]) -> None:
        self.sources, self.transform = sources, transform

    def __len__(self) -> int:
        return 0 if self.sources is None else len(self.sources)

    def __getitem__(self, item: Any) -> Loaded | ImageError:
        source: Source = item if self.sources is None else self.sources[item]
        try:
            return self.transform(source)
        except ImageError as error:
            return error


def image_loader(
    dataset: ImageDataset[Source, Loaded],
    batches: Iterable[Sequence[Any]],
    collate: Callable[[list[Loaded | ImageError]], Collated],
    *,
    workers: int,
    pinned: bool = False,
    persistent: bool = False,
    prefetch: int = 2,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
) -> DataLoader[Collated]:
    """Return a loader of batches, in the order of `batches`; torch's random numbers are not drawn from.

    Args:
        dataset: What is read.
        batches: For each batch the positions in the dataset, or the sources if the dataset holds none.
        collate: Makes a batch of what the transform returned, in a worker. The result may have `pin_memory()`.
        workers: Processes; 0 reads in this one.
        pinned: Whether batches are put into pinned memory for a GPU.
        persistent: Whether workers live on from one pass to the next.
        prefetch: Batches that each worker reads ahead.
        start_method: How workers start; None for the system's default.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of sequences
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_exit_with_parent,
        generator=torch.Generator(),  # a loader draws a number, which must not shift the training's
    )


def read_batches(loader: DataLoader[Collated]) -> Iterator[Collated]:
    """Iterate over a loader.

    Raises:
        WorkerDiedError: If a worker process was killed; the batches yielded before are the first ones, in order.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)  # workers never touch an index
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        batches = iter(loader)
    with _report_death_with_batch():
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDiedError(
                "a decoding process was killed, probably by a lack of memory; use fewer workers or smaller images"
            ) from error


def first_error(items: Iterable[Any]) -> ImageError | None:
    """Return the first `ImageError` among the results of a batch."""
    return next((item for item in items if isinstance(item, ImageError)), None)


def stack_pixels(items: list[Tensor | ImageError]) -> Tensor | ImageError:
    """Stack the images of a batch, or return its first error; a `collate` for `OpenAsPixels`."""
    error = first_error(items)
    return torch.stack([item for item in items if isinstance(item, Tensor)]) if error is None else error


def load_pixels(
    sources: Sequence[ImageSource],
    batches: Iterable[Sequence[int]],
    preprocess: Preprocess,
    workers: int,
    *,
    pinned: bool = False,
) -> Iterator[UInt8[Tensor, "batch 3 size size"]]:
    """Decode images and bring them to the size of a backbone, in worker processes.

    Args:
        sources: The images.
        batches: Positions of the images of each batch.
        preprocess: The backbone's.
        workers: Processes; 0 decodes in this one.
        pinned: Whether batches are put into pinned memory for a GPU.

    Yields:
        Pixels of one batch, for `model_input`.

    Raises:
        ImageError: For the first image that cannot be read.
        WorkerDiedError: If a worker process was killed.
    """
    dataset = ImageDataset(sources, OpenAsPixels(preprocess))
    for batch in read_batches(image_loader(dataset, batches, stack_pixels, workers=workers, pinned=pinned)):
        if isinstance(batch, ImageError):
            raise batch
        yield batch


@contextmanager
def _report_death_with_batch() -> Iterator[None]:
    """Report a dead worker when its batch is requested, not by a signal at any point of the program."""
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)  # torch's, which raises anywhere
    signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


def _exit_with_parent(_: int) -> None:
    """End this worker soon after its main process was killed, even if it waits for a result to be fetched."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
