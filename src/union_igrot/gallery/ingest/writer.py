"""Write embedded images as rows of an index, in batches and beside the work of the model.

A row is durable when its batch is written. Rows of images that are gone are removed only after everything else, so that
a moved or renamed image finds the embedding of its bytes.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.gallery.engines.base import ColumnValue, Rows, VectorIndex
from union_igrot.gallery.engines.filters import match_any
from union_igrot.gallery.ingest.decode import DecodedImage
from union_igrot.gallery.ingest.entries import ADDED_SOURCE, OWN_COLUMNS, UNREACHABLE, Entry, Listing
from union_igrot.gallery.ingest.plan import IndexedImage, columns_of
from union_igrot.gallery.ingest.report import SkippedFile, SkippedImage

BATCH_ROWS: Final = 2048
"""Rows per write."""
BATCH_SECONDS: Final = 15.0
"""Age at which a smaller batch is written; the most work that a kill can lose."""
_LOOKUP: Final = 1000
"""Digests per query to the index."""
_MAX_REPLACED: Final = 10_000
"""Overwritten contents that are kept in memory for images that were renamed to each other."""

_Item = tuple[Entry, DecodedImage, Tensor | None]


class _Content(NamedTuple):
    """What images with equal bytes share."""

    vector: Tensor
    width: int
    height: int
    thumbnail: bytes


@final
class RowWriter:
    """Writes rows in a thread; use it as a context manager, which writes the rest at the end, also after an error.

    Args:
        index: The index.
        listing: The images and their source.
        rows: The rows of the index at the start, by id.
        skipped: The list of skipped images.

    Attributes:
        added: New rows written.
        updated: Existing rows written.
        embedded: Rows written with an embedding of their own.
        broken: Images that cannot be read.
        waited: Seconds for which the caller waited for rows to be written.
    """

    def __init__(
        self, index: VectorIndex, listing: Listing, rows: Mapping[str, IndexedImage], skipped: SkippedFile
    ) -> None:
        self._index, self._source, self._rows, self._skipped = index, listing.source, rows, skipped
        self._named_columns = columns_of(listing.entries)
        self._buffer: list[_Item] = []
        self._buffered_since = time.monotonic()
        self._queue: queue.Queue[list[_Item] | None] = queue.Queue(1)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._replaced: OrderedDict[str, _Content] = OrderedDict()
        self._missing: list[Entry] = []
        self.added = self.updated = self.embedded = 0
        self.broken: list[SkippedImage] = []
        self.waited = 0.0

    def add(
        self, entries: Sequence[Entry], images: Sequence[DecodedImage], vectors: Float[Tensor, "embedded dim"]
    ) -> None:
        """Add images.

        Args:
            entries: The entries.
            images: For each entry what is known of it. One with a digest but without thumbnail reuses the embedding
                of equal bytes.
            vectors: The embeddings of the images with a thumbnail, in order.

        Raises:
            BaseException: If an earlier write failed.
        """
        following = iter(vectors)
        for entry, image in zip(entries, images, strict=True):
            self._buffer.append((entry, image, None if image.thumbnail is None else next(following)))
        if len(self._buffer) >= BATCH_ROWS or time.monotonic() - self._buffered_since > BATCH_SECONDS:
            self._submit()

    def flush(self) -> list[Entry]:
        """Write everything.

        Returns:
            Images whose embedding was expected in the index and is not there: another process removed it.

        Raises:
            BaseException: If a write failed.
        """
        self._submit()
        self._queue.join()
        self._raise_error()
        missing, self._missing = self._missing, []
        return missing

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._error is None:
            self._submit()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        if error is None:
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _submit(self) -> None:
        self._buffered_since = time.monotonic()
        if self._buffer:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="row-writer")
                self._thread.start()
            start = time.perf_counter()
            self._queue.put(self._buffer)
            self._buffer = []
            self.waited += time.perf_counter() - start
        self._raise_error()

    def _run(self) -> None:
        while (items := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write(items)
            except BaseException as error:
                self._error = error  # raised in the caller's thread
            finally:
                self._queue.task_done()

    def _write(self, items: Sequence[_Item]) -> None:
        broken = [_skipped_image(entry, image.reason) for entry, image, _ in items if image.reason is not None]
        self._skipped.add(broken)
        self.broken += broken
        contents = {
            image.digest: _Content(vector, image.width, image.height, image.thumbnail or b"")
            for _, image, vector in items
            if vector is not None
        }
        sound = [(entry, image.digest) for entry, image, _ in items if image.reason is None]
        contents |= self._find_contents({digest for _, digest in sound} - contents.keys())
        self._missing += [entry for entry, digest in sound if digest not in contents]
        ready = [(entry, digest) for entry, digest in sound if digest in contents]
        if ready:
            self._keep_replaced(ready)
            self._upsert(ready, contents)
        self.embedded += sum(vector is not None for _, _, vector in items)
        updated = sum(entry.id in self._rows for entry, _ in ready)
        self.updated += updated
        self.added += len(ready) - updated

    def _keep_replaced(self, ready: Sequence[tuple[Entry, str]]) -> None:
        """Keep the contents that a write replaces: they may belong to images that come later."""
        rows = [(entry.id, self._rows[entry.id], digest) for entry, digest in ready if entry.id in self._rows]
        replaced = {row_id: row.digest for row_id, row, digest in rows if row.digest not in ("", digest)}
        with suppress(DataError):  # a row was removed meanwhile; its content is embedded again
            for digest, content in self._fetch(replaced):
                self._replaced[digest] = content
        while len(self._replaced) > _MAX_REPLACED:
            self._replaced.popitem(last=False)

    def _find_contents(self, digests: set[str]) -> dict[str, _Content]:
        """Find contents by digest, in the index or among those that were replaced."""
        found = {digest: self._replaced[digest] for digest in digests & self._replaced.keys()}
        wanted = sorted(digests - found.keys()) if "hash" in self._index.columns else []
        for at in range(0, len(wanted), _LOOKUP):
            rows: dict[str, str] = {}
            for batch in self._index.scan(["id", "hash"], where=match_any("hash", wanted[at : at + _LOOKUP])):
                ids = {str(digest): str(row_id) for digest, row_id in zip(batch["hash"], batch["id"], strict=True)}
                rows |= {row_id: digest for digest, row_id in ids.items()}
            found |= dict(self._fetch(rows))
        return found

    def _fetch(self, digests: Mapping[str, str]) -> Iterator[tuple[str, _Content]]:
        """Read the contents of rows, given their digests by id."""
        if not digests:
            return
        rows = self._index.fetch(list(digests))
        for at, digest in enumerate(digests.values()):
            width, height, thumbnail = (rows.columns[name][at] for name in ("width", "height", "thumbnail"))
            yield digest, _Content(rows.vectors[at], int(width or 0), int(height or 0), bytes(thumbnail or b""))  # type: ignore[arg-type]

    def _upsert(self, ready: Sequence[tuple[Entry, str]], contents: Mapping[str, _Content]) -> None:
        columns: dict[str, list[ColumnValue]] = {name: [] for name in OWN_COLUMNS}
        merged = [self._columns_and_source(entry) for entry, _ in ready]
        names = dict.fromkeys(name for given, _ in merged for name in given)
        columns |= {name: [given.get(name) for given, _ in merged] for name in names}
        for (entry, digest), (_, source) in zip(ready, merged, strict=True):
            content = contents[digest]
            values: dict[str, ColumnValue] = {
                "hash": digest,
                "size": entry.size,
                "mtime": entry.mtime,
                "width": content.width,
                "height": content.height,
                "thumbnail": content.thumbnail,
                "source": source,
            }
            for name, value in values.items():
                columns[name].append(value)
        vectors = torch.stack([contents[digest].vector for _, digest in ready])
        self._index.upsert(Rows([entry.id for entry, _ in ready], vectors, columns))

    def _columns_and_source(self, entry: Entry) -> tuple[Mapping[str, ColumnValue], str]:
        row = self._rows.get(entry.id)
        if row is None:
            return entry.columns, self._source
        columns, source = row.merged(entry.columns, self._named_columns)
        if self._source == ADDED_SOURCE:  # a row that belongs to another source stays with it
            return columns, row.source or ADDED_SOURCE
        return columns, source or self._source


def _skipped_image(entry: Entry, reason: str | None) -> SkippedImage:
    """Describe a broken image; one that could not be reached, or whose reason can be removed, is tried again."""
    temporary = any(mark in (reason or "") for mark in (UNREACHABLE, "pip install", "max_megapixels"))
    return SkippedImage(entry.id, reason or "", 0 if temporary else entry.size, 0 if temporary else entry.mtime)
