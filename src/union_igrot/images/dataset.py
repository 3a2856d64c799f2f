"""Images decoded and transformed in worker processes, in batches and in order.

Training, evaluation and indexing read images through the same `ImageDataset` and `image_loader`.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any, Final, Generic, Literal, NoReturn, TypeVar, final

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from union_igrot.errors import ImageError, UnionError
from union_igrot.images.transforms import open_pixels
from union_igrot.types import Preprocess

TIME_LIMIT: Final = 60.0
"""Seconds of computing for which a worker may decode one image; a reader that does not return is killed later."""
_KILL_AFTER: Final = 1.25  # when the worker is killed, as a multiple of the time limit
_PARENT_CHECK: Final = 1.0  # seconds between two looks of a worker for its main process

Source = TypeVar("Source")
Loaded = TypeVar("Loaded")
Collated = TypeVar("Collated")


@final
class WorkerDiedError(UnionError):
    """A decoding process was killed: by a lack of memory, by its time limit, or by a malicious image."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


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

    def __getitem__(self, item: Any) -> Loaded | ImageError:
        source: Source = item if self.sources is None else self.sources[item]
        try:
            with _time_limit():
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

    A worker decodes an image for at most `TIME_LIMIT` seconds, and ends soon after its main process. Batches pass
    through shared memory or, if there is not enough of it (64 MB in a container), through pipes.

    Args:
        dataset: What is read.
        batches: For each batch the positions in the dataset, or the sources if the dataset holds none.
        collate: Makes a batch of what the transform returned, in a worker. The result may have `pin_memory()`.
        workers: Processes; 0 reads in this one.
        pinned: Whether batches are put into pinned memory for a GPU.
        persistent: Whether workers live on from one pass to the next.
        prefetch: Batches that each worker reads ahead.
        start_method: How workers start; None for the system's default.

    Raises:
        UnionError: If processes cannot be started, as there is no room for their locks in `/dev/shm`.
    """
    try:
        # About what the workers and their queues need, a page of shared memory each; torch prints traces without.
        del [multiprocessing.Lock() for _ in range(3 * workers + 6 if workers else 0)][:]
    except OSError as error:
        raise UnionError(
            f"decoding processes cannot start ({error.strerror} in /dev/shm); enlarge it (docker run --shm-size=64m), "
            "or pass workers=0 (features.workers=0 in training and evaluation)"
        ) from None
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of sequences
        collate_fn=partial(_transfer, collate) if workers else collate,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_start_worker,
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
        except (RuntimeError, EOFError, ConnectionError) as error:
            reported = "DataLoader worker (pid" in str(error)
            # A worker that dies while it hands over shared memory closes a connection before torch sees its death.
            cut = isinstance(error, (EOFError, ConnectionError)) and "DataLoader worker process" not in str(error)
            if not (reported or cut):
                raise
            timed_out = getattr(signal, "SIGVTALRM", 0)
            workers = getattr(batches, "_workers", ())
            wait([worker.sentinel for worker in workers], timeout=_PARENT_CHECK if workers else 0)
            if timed_out and any(worker.exitcode == -timed_out for worker in workers):
                raise WorkerDiedError(f"decoding took more than {TIME_LIMIT:.0f} s", timed_out=True) from error
            raise WorkerDiedError(
                "a decoding process was killed, probably by a lack of memory; use fewer workers or smaller images"
            ) from error


def first_error(items: Iterable[Any]) -> ImageError | None:
    """Return the first `ImageError` among the results of a batch."""
    return next((item for item in items if isinstance(item, ImageError)), None)


def stack_pixels(items: list[Tensor | ImageError]) -> Tensor | ImageError:
    """Stack the images of a batch, or return its first error; a `collate` for `open_pixels`."""
    error = first_error(items)
    return torch.stack([item for item in items if isinstance(item, Tensor)]) if error is None else error


def load_pixels(
    sources: Sequence[Any],
    batches: Iterable[Sequence[int]],
    preprocess: Preprocess,
    workers: int,
    *,
    pinned: bool = False,
) -> Iterator[UInt8[Tensor, "batch 3 size size"]]:
    """Decode images and bring them to the size of a backbone, in worker processes; yields the pixels of each batch.

    Args:
        sources: The images: paths, `LazyImage`s, PIL images, arrays, ... as for `as_image`.
        batches: Positions of the images of each batch.
        preprocess: The backbone's.
        workers: Processes; 0 decodes in this one.
        pinned: Whether batches are put into pinned memory for a GPU.

    Raises:
        ImageError: For the first image that cannot be read.
        WorkerDiedError: If worker processes are killed, but not by a particular image.
    """
    dataset, batches, done = ImageDataset(sources, partial(open_pixels, preprocess=preprocess)), list(batches), 0
    try:
        for batch in read_batches(image_loader(dataset, batches, stack_pixels, workers=workers, pinned=pinned)):
            if isinstance(batch, ImageError):
                raise batch
            yield batch
            done += 1
    except WorkerDiedError:
        _raise_for_killer(dataset, batches[done])
        raise


def _raise_for_killer(dataset: ImageDataset[Any, Tensor], batch: Sequence[int]) -> None:
    """Read a batch image by image in another worker; raise an `ImageError` for the one that kills it."""
    done = 0
    try:
        for _ in read_batches(image_loader(dataset, [[at] for at in batch], stack_pixels, workers=1, prefetch=1)):
            done += 1
    except WorkerDiedError as error:
        assert dataset.sources is not None
        source = dataset.sources[batch[done]]
        raise ImageError(f"cannot decode image {source} ({error}); replace or remove it") from error


def _transfer(collate: Callable[[list[Any]], object], items: list[Any]) -> "_Pickled":
    """Make a batch in a worker, and send it through shared memory, or through a pipe if that is full.

    torch would move it there in a thread whose error nobody sees, so that the main process waits forever.
    """
    batch = collate(items)
    try:
        return _Pickled(bytes(ForkingPickler.dumps(batch)))
    except RuntimeError:  # no space in /dev/shm
        return _Pickled(pickle.dumps(batch))


@final
class _Pickled:
    """A pickled object, which is received as the object itself."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self._data,)


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


@contextmanager
def _time_limit() -> Iterator[None]:
    """Limit the time of computing in a worker: by an error if Python code runs meanwhile, else by its end."""
    if get_worker_info() is None or not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
    signal.setitimer(signal.ITIMER_VIRTUAL, _KILL_AFTER * TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _raise_timeout(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"decoding took more than {TIME_LIMIT:.0f} s")


def _start_worker(_: int) -> None:
    """Prepare a worker for the time limit, and end it soon after its main process was killed.

    It may be waiting for a result to be fetched meanwhile.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, _raise_timeout)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    parent, main = os.getppid(), parent_process()  # the parent may be a fork server, which outlives the main process

    def watch() -> None:
        while os.getppid() == parent and (main is None or main.is_alive()):
            time.sleep(_PARENT_CHECK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
