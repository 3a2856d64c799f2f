"""Write embedded images as rows of an index, in batches and beside the work of the model.

A row is durable when its batch is written. Rows of images that are gone are removed only after everything else, so that
a moved or renamed image finds the embedding of its bytes.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
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
from union_igrot.images.exif import EXIF_COLUMNS

BATCH_ROWS: Final = 2048  # rows per write
BATCH_SECONDS: Final = 15.0  # age at which a smaller batch is written; the most work that a kill can lose
_LOOKUP: Final = 1000  # digests per query to the index
_MAX_REPLACED: Final = 10_000  # overwritten contents that are kept in memory for images that were renamed to each other

_Item = tuple[Entry, DecodedImage, Tensor | None]


class _Content(NamedTuple):
    """What images with equal bytes share."""

    vector: Tensor
    width: int
    height: int
    thumbnail: bytes


@final
class RowWriter:
    """Writes rows in a thread; use it as a context manager, which writes the rest at the end, also after an error."""

    def __init__(
        self, index: VectorIndex, listing: Listing, rows: Mapping[str, IndexedImage], skipped: SkippedFile
    ) -> None:
        self._index, self._source, self._rows, self._skipped = index, listing.source, rows, skipped
        self._named_columns = columns_of(listing.entries)
        kinds = index.columns  # people may use a column for something else
        self._exif_names = [name for name, kind in EXIF_COLUMNS.items() if kinds.get(name, kind) == kind]
        self._buffer: list[_Item] = []
        self._buffered_since = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="row-writer")
        self._written: Future[None] | None = None
        self._replaced: OrderedDict[str, _Content] = OrderedDict()
        self._missing: list[Entry] = []
        self.added = self.updated = self.embedded = 0  # rows written; embedded: with an embedding of their own
        self.broken: list[SkippedImage] = []
        self.waited = 0.0  # seconds for which the caller waited for rows to be written

    def add(
        self, entries: Sequence[Entry], images: Sequence[DecodedImage], vectors: Float[Tensor, "embedded dim"]
    ) -> None:
        """Add images, and the embeddings of those with a thumbnail; one without reuses the embedding of equal bytes."""
        following = iter(vectors)
        for entry, image in zip(entries, images, strict=True):
            self._buffer.append((entry, image, None if image.thumbnail is None else next(following)))
        if len(self._buffer) >= BATCH_ROWS or time.monotonic() - self._buffered_since > BATCH_SECONDS:
            self._submit()

    def flush(self) -> list[Entry]:
        """Write everything; return images whose embedding was expected in the index, but another process removed it."""
        self._submit()
        self._submit()  # waits for the first
        missing, self._missing = self._missing, []
        return missing

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._thread:
            try:
                self._submit()
            except BaseException:  # an earlier write failed, which may be the error already
                if error is None:
                    raise
        if error is None and self._written is not None:
            self._written.result()

    def _submit(self) -> None:
        """Begin to write the buffer when the write before has ended; raises its error."""
        if self._written is not None:
            start = time.perf_counter()
            self._written.result()
            self.waited += time.perf_counter() - start
        self._buffered_since = time.monotonic()
        if self._buffer:
            items, self._buffer = self._buffer, []
            self._written = self._thread.submit(self._write, items)

    def _write(self, items: Sequence[_Item]) -> None:
        broken = [_skipped_image(entry, image.reason) for entry, image, _ in items if image.reason is not None]
        self._skipped.add(broken)
        self.broken += broken
        contents = {
            image.digest: _Content(vector, image.width, image.height, image.thumbnail or b"")
            for _, image, vector in items
            if vector is not None
        }
        sound = [(self._with_exif(entry, image), image.digest) for entry, image, _ in items if image.reason is None]
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

    def _with_exif(self, entry: Entry, image: DecodedImage) -> Entry:
        if image.exif is None:
            return entry
        return replace(entry, found=entry.found | {name: image.exif.get(name) for name in self._exif_names})

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
            found = {name: value for name, value in entry.found.items() if name not in self._named_columns}
            return {**found, **entry.columns}, self._source
        columns, source = row.merged(entry.columns, entry.found, self._named_columns)
        if self._source == ADDED_SOURCE:  # a row that belongs to another source stays with it
            return columns, row.source or ADDED_SOURCE
        return columns, source or self._source


def _skipped_image(entry: Entry, reason: str | None) -> SkippedImage:
    """Describe a broken image; one that could not be reached, or whose reason can be removed, is tried again."""
    temporary = any(mark in (reason or "") for mark in (UNREACHABLE, "pip install", "max_megapixels"))
    return SkippedImage(entry.id, reason or "", 0 if temporary else entry.size, 0 if temporary else entry.mtime)
