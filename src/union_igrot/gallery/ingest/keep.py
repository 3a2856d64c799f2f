"""Embedded images gathered into chunks, written to the work folder and merged, beside the model's work.

Knows chunks and one thread. Does not know an index: merging is handed in.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.gallery.ingest.chunks import SUFFIX, Chunk, Fact, write_chunk
from union_igrot.gallery.ingest.decode import Seen
from union_igrot.gallery.ingest.entries import Entry

ROWS: Final = 2048
"""Images in a chunk."""
SECONDS: Final = 15.0
"""Age at which a chunk is written though it is not full, which is what a kill can cost."""
_WAITING: Final = 4


@final
class Keeper:
    """Takes batches, writes them in chunks.

    Args:
        entries: The images, in the order of their numbers.
        folder: The work folder.
        stem: SearchMode the chunks' names begin.
        merge: What is done in the thread when chunks were written; None where another process does it.

    Attributes:
        waited: Seconds for which the model waited for chunks to be written.
    """

    def __init__(
        self, entries: Sequence[Entry], folder: Path, stem: str, merge: Callable[[], None] | None = None
    ) -> None:
        self._entries, self._folder, self._stem, self._merge = entries, folder, stem, merge
        self._facts: list[Fact] = []
        self._vectors: list[Tensor] = []
        self._thumbnails: list[bytes] = []
        self._since = time.monotonic()
        self._written = 0
        self._waiting: queue.Queue[Chunk | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.waited = 0.0

    def take(self, seen: Sequence[Seen], vectors: Float[Tensor, "embedded dim"]) -> None:
        """Take a batch: what was seen, and the vectors of those that hold a thumbnail, in order.

        Raises:
            BaseException: What went wrong in the thread.
        """
        for one in seen:
            entry, at = self._entries[one.number], None
            if one.thumbnail is not None:
                at = len(self._thumbnails)
                self._thumbnails.append(one.thumbnail)
            self._facts.append(
                Fact(entry.id, entry.size, entry.mtime, one.digest, one.width, one.height, at, one.reason)
            )
        self._vectors.append(vectors)
        if len(self._facts) >= ROWS or time.monotonic() - self._since > SECONDS:
            self._flush()

    def close(self) -> None:
        """Write what is left and wait until all is written and merged.

        Raises:
            BaseException: What went wrong in the thread.
        """
        if self._facts:
            self._flush()
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        chunk = Chunk(self._facts, torch.cat(self._vectors), self._thumbnails)
        self._facts, self._vectors, self._thumbnails = [], [], []
        if self._thread is None:  # not before: workers are forked from a process without it
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        start = time.perf_counter()
        self._waiting.put(chunk)
        self.waited += time.perf_counter() - start
        self._since = time.monotonic()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        last = False
        while not last:
            chunks = [self._waiting.get()]
            while not self._waiting.empty():
                chunks.append(self._waiting.get())
            last = chunks[-1] is None
            try:
                # Also after an error, which may have been the index's: the next run takes up what is written.
                for chunk in chunks:
                    if chunk is not None:
                        write_chunk(self._folder / f"{self._stem}-{self._written:08d}{SUFFIX}", chunk)
                        self._written += 1
                if self._merge is not None and self._error is None:
                    self._merge()
            except BaseException as error:
                self._error = self._error or error  # it is raised where the model works
