"""Images in batches, decoded ahead in worker processes; an image that kills its decoder is found and left out.

Each content is handed on once. Knows entries and decoders. Does not know a model.
"""

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final, final

import torch
from torch.utils.data import DataLoader

from union_igrot.gallery.ingest.codec import BatchDecoder
from union_igrot.gallery.ingest.decode import Batch, Decoded, Decoder, Handed, Seen, Wanted
from union_igrot.gallery.ingest.entries import Entry

_PART: Final = 32
"""Images that a worker decodes at once; many workers share a batch, and the first one is soon there."""
_AHEAD: Final = 4
"""Parts that each worker decodes ahead."""
_CONTEXT: Final = "fork" if sys.platform == "linux" else None
"""How workers start, at once where that is safe, as they touch neither the index nor the model."""


@final
@dataclass(slots=True)
class Waits:
    """Who waited for whom, in seconds.

    Attributes:
        model: The model for decoded images.
        decoding: Decoding for the model, mean of the workers.
        writing: The model for rows to be written.
        working: From the beginning to the last batch embedded.
    """

    model: float = 0.0
    decoding: float = 0.0
    writing: float = 0.0
    working: float = 0.0

    def __add__(self, other: "Waits") -> "Waits":
        return Waits(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@final
class Batches:
    """The images in batches, decoded ahead; of equal ones only the first is left to be embedded.

    Args:
        decoder: Decodes a batch.
        entries: The images.
        batch_size: Images a batch.
        workers: Processes that decode; 0 decodes in this one.
        force: Whether images are decoded even if equal ones are in the index.
        pinned: Whether a GPU will fetch the images.
        unpack: Makes what decodes the JPEGs that the decoder hands over, when the model's device is known.
    """

    def __init__(
        self,
        decoder: Decoder,
        entries: Sequence[Entry],
        *,
        batch_size: int,
        workers: int,
        force: bool = False,
        pinned: bool = False,
        unpack: Callable[[], BatchDecoder] | None = None,
    ) -> None:
        self._unpack = unpack
        self._decoder, self._entries, self._size = decoder, entries, batch_size
        self._workers = min(workers, math.ceil(len(entries) / min(batch_size, _PART)))
        self._force, self._pinned = force, pinned
        self._met: set[str] = set()
        self.waits = Waits()

    def __iter__(self) -> Iterator[Batch]:
        yield from self._read() if self._unpack is None else self._unpacked(self._unpack())

    def _unpacked(self, unpack: BatchDecoder) -> Iterator[Batch]:
        """Decode what was handed over, one batch ahead of the model."""
        waiting: Future[Batch] | None = None
        with closing(unpack), ThreadPoolExecutor(1, thread_name_prefix="unpack") as thread:
            for batch in self._read():
                following = thread.submit(unpack.whole, batch)
                if waiting is not None:
                    yield self._waited_for(waiting, unpack)
                waiting = following
            if waiting is not None:
                yield self._waited_for(waiting, unpack)

    def _waited_for(self, waiting: "Future[Batch]", unpack: BatchDecoder) -> Batch:
        start = time.perf_counter()
        batch = waiting.result()
        self.waits.model += time.perf_counter() - start
        unpack.used(batch)
        return batch

    def _read(self) -> Iterator[Batch]:
        """Return the batches as the workers leave them."""
        parts = self._read_parts()
        for start in range(0, len(self._entries), self._size):
            count = min(self._size, len(self._entries) - start)
            yield _joined([next(parts) for _ in range(math.ceil(count / _PART))])

    def _read_parts(self) -> Iterator[Batch]:
        starts = range(0, len(self._entries), self._size)
        ends = [min(start + self._size, len(self._entries)) for start in starts]
        spans = zip(starts, ends, strict=True)
        cuts = [(at, min(at + _PART, end)) for start, end in spans for at in range(start, end, _PART)]
        done = 0
        while done < len(cuts):
            try:
                wanted = (self._wanted(*cut) for cut in cuts[done:])
                for decoded in self._timed(self._load(self._decoder, wanted, self._workers)):
                    done += 1
                    yield self._first_ones(decoded)
            except RuntimeError as error:
                if not _is_crash(error) or self._workers == 0:
                    raise
                # The part that is missing or one that was decoded ahead: each is tried, image by image.
                yield self._first_ones(self._one_by_one(self._wanted(*cuts[done])))
                done += 1

    def _load(self, decoder: Decoder, wanted: Any, workers: int, ahead: int = _AHEAD) -> DataLoader[Decoded]:
        return DataLoader(
            decoder,
            batch_sampler=wanted,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            multiprocessing_context=_CONTEXT if workers else None,
            collate_fn=_as_it_is,  # type: ignore[arg-type] # what `__getitems__` gave
            pin_memory=self._pinned,
            # Of its own: random numbers of whoever calls must not shift.
            generator=torch.Generator(),
        )

    def _wanted(self, start: int, end: int) -> list[Wanted]:
        entries = ((number, self._entries[number]) for number in range(start, end))
        return [Wanted(number, one.path, one.size, one.offset, one.data, self._force) for number, one in entries]

    def _timed(self, loader: DataLoader[Decoded]) -> Iterator[Decoded]:
        """Return the batches, and count who waited."""
        start = time.perf_counter()
        with _quiet_fork():
            batches = iter(loader)
        with _deaths_in_turn():
            while (decoded := next(batches, None)) is not None:
                self.waits.model += time.perf_counter() - start
                self.waits.decoding += decoded.waited / max(1, self._workers)
                yield decoded
                start = time.perf_counter()

    def _one_by_one(self, wanted: Sequence[Wanted]) -> Decoded:
        """Decode a part in a process that may die; an image that kills it is broken."""
        found: list[Decoded] = []
        while len(found) < len(wanted):
            rest = wanted[len(found) :]
            try:
                with _quiet_fork():
                    each = iter(self._load(self._decoder.alone(), [[one] for one in rest], 1, 1))
                with _deaths_in_turn():
                    found += each
            except RuntimeError as error:
                if not _is_crash(error):
                    raise
                # `+=` has kept what came before, and with one part ahead the next is the one that was at work.
                reason = "decoding it ended the process; it may be too large for the memory, or made to do harm"
                dead = Seen(wanted[len(found)].number, reason=reason)
                found.append(Decoded(self._decoder.no_images(), [dead]))
        return Decoded(torch.cat([one.images for one in found]), [seen for one in found for seen in one.seen])

    def _first_ones(self, decoded: Decoded) -> Batch:
        """Leave out images whose content was met before in this run."""
        handed = {one.place: one for one in decoded.handed()}
        seen, rows, row = list(decoded.seen), [], 0
        for place, one in enumerate(decoded.seen):
            if one.thumbnail is None and place not in handed:
                continue
            if one.digest in self._met:
                seen[place] = Seen(one.number, one.digest)
                handed.pop(place, None)
            elif one.thumbnail is not None:
                rows.append(row)
            self._met.add(one.digest)
            row += one.thumbnail is not None
        images = decoded.images if len(rows) == row else decoded.images[rows]
        return Batch([images], seen, list(handed.values()))


def _joined(parts: Sequence[Batch]) -> Batch:
    """Make one batch of parts; pixels stay where they are until the model fetches them."""
    seen: list[Seen] = []
    handed: list[Handed] = []
    for part in parts:
        handed += [one._replace(place=one.place + len(seen)) for one in part.handed]
        seen += part.seen
    return Batch([images for part in parts for images in part.images], seen, handed)


def _as_it_is(decoded: Decoded) -> Decoded:
    return decoded


def _is_crash(error: RuntimeError) -> bool:
    return "DataLoader worker" in str(error)


@contextmanager
def _deaths_in_turn() -> Iterator[None]:
    """Hear of a dead worker where its batch is asked for, not by a signal in the midst of anything else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Let workers be forked beside an open index: they never touch it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        yield
