"""The rows of an index: compare them with the images of a source, and write embedded images in batches.

No image is opened here. Batches are written beside the work of the model. A row is durable when its batch is written.
Rows of images that are gone are removed only after everything else, so that a moved or renamed image finds the
embedding of its bytes.
"""

import hashlib
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import Final, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, UInt64
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.gallery.engines.base import ColumnValue, Rows, VectorIndex, validate_rows
from union_igrot.gallery.engines.filters import ColumnKind, match_any
from union_igrot.gallery.ingest.embedding import DecodedImage
from union_igrot.gallery.ingest.entries import (
    ADDED_SOURCE,
    FILE_MISSING,
    OWN_COLUMNS,
    UNREACHABLE,
    Entry,
    Listing,
    UserValue,
    content_digest,
    digest_prefix,
)
from union_igrot.gallery.ingest.report import SkippedFile, SkippedImage
from union_igrot.images.exif import EXIF_COLUMNS

SMALL_ADDITION: Final = 256
"""Up to so many images are added without reading the whole index, if no rows are to be removed."""
BATCH_ROWS: Final = 2048  # rows per write
BATCH_SECONDS: Final = 15.0  # age at which a smaller batch is written; the most work that a kill can lose
_LOOKUP: Final = 1000  # digests per query to the index
_MAX_REPLACED: Final = 10_000  # overwritten contents that are kept in memory for images that were renamed to each other

_Item = tuple[Entry, DecodedImage, Tensor | None]
_Content = tuple[DecodedImage, Tensor]  # what images with equal bytes share, and their embedding


class IndexedImage(NamedTuple):
    """The row of an image, without vector and thumbnail."""

    size: int  # bytes
    mtime: int  # modification time in ns
    digest: str  # first 32 hex digits of the SHA-256 of its bytes
    source: str  # the source that added it
    own: bool  # whether that is the present source, which updates and removes the row
    columns: Mapping[str, UserValue]  # the user's columns that are not None

    def merged(
        self, given: Mapping[str, UserValue], found: Mapping[str, UserValue], named: Collection[str]
    ) -> tuple[dict[str, UserValue], str]:
        """Return the columns and the source of the row after an update.

        Columns that the present source does not name stay: another source gave them. Columns that it names for other
        images are removed from its own rows. An image that was added alone keeps its source, and a source without
        new values does not take the row over. What was found in or beside the file never replaces what people gave.

        Args:
            given: The columns of the image.
            found: Columns that were found in or beside the file; None if there is none any more.
            named: The columns that the source gives to any image.
        """
        synchronized = self.own and self.source != ADDED_SOURCE
        kept = {name: value for name, value in self.columns.items() if not synchronized or name not in named}
        found = {name: value for name, value in found.items() if name not in named}
        columns = {**kept, **found} if synchronized else {**found, **kept}
        keeps_source = self.source == ADDED_SOURCE or all(self.columns.get(name) == given[name] for name in given)
        return {**columns, **given}, self.source if keeps_source else ""


def read_index(
    index: VectorIndex, listing: Listing, *, prune: bool
) -> tuple[dict[str, IndexedImage], UInt64[np.ndarray, " digests"], Mapping[str, int]]:
    """Read the rows of an index, without vectors and thumbnails.

    If few images are added and nothing is removed, only their own rows are read. An image that is in the index under
    another id is then embedded again, which costs less than reading a large index.

    Returns:
        The rows of the present source and of its entries, by id; and of all rows that were read the sorted first 64
        bits of their digests, and their number by source.
    """
    kinds = index.columns
    _match_column_types(listing, kinds, index.dim)
    users = [name for name in kinds if name not in OWN_COLUMNS]
    listed = {entry.id for entry in listing.entries}
    by_id: dict[str, IndexedImage] = {}
    sources: Counter[str] = Counter()
    digests = [np.empty(0, dtype=np.uint64)]
    where = match_any("id", listed) if listed and len(listed) <= SMALL_ADDITION and not prune else None
    for batch in index.scan(["id", "size", "mtime", "hash", "source", *users], where) if len(index) else ():
        digests.append(np.array([digest_prefix(str(one)) for one in batch["hash"] if one], dtype=np.uint64))
        for at, name in enumerate(batch["id"]):
            source = str(batch["source"][at] or "")
            sources[source] += 1
            own = source == listing.source
            if own or name in listed:
                columns = {user: batch[user][at] for user in users if batch[user][at] is not None}
                size, mtime = int(batch["size"][at] or 0), int(batch["mtime"][at] or 0)
                by_id[str(name)] = IndexedImage(size, mtime, str(batch["hash"][at] or ""), source, own, columns)  # type: ignore[arg-type]
    return by_id, np.unique(np.concatenate(digests)), sources


def make_plan(
    listing: Listing,
    rows: Mapping[str, IndexedImage],
    skipped_before: Mapping[str, SkippedImage],
    embed_text: str | None = None,
    *,
    read_again: bool = False,
) -> tuple[list[Entry], list[Entry], list[SkippedImage]]:
    """Decide what to do with each image.

    Args:
        listing: The images.
        rows: Their rows.
        skipped_before: Images that could not be read.
        embed_text: Column of the text that is embedded with an image.
        read_again: Whether unchanged files are read for their EXIF data.

    Returns:
        Images to read; those whose row has the right content but needs new columns or another source; and those that
        cannot be read, as seen without opening them or at an earlier run. The rows of all others are up to date.
    """
    read, rewrite, skips = list[Entry](), list[Entry](), list[SkippedImage]()
    named = columns_of(listing.entries)
    for entry in listing.entries:
        row, skip = rows.get(entry.id), skipped_before.get(entry.id)
        if entry.fault is not None:
            skips.append(SkippedImage(entry.id, entry.fault, entry.size, entry.mtime))
        elif row is not None and row.digest and not read_again and _has_same_content(entry, row, embed_text):
            columns, _ = row.merged(entry.columns, entry.found, named)
            if {name: value for name, value in columns.items() if value is not None} != row.columns:
                rewrite.append(entry)
        elif skip is not None and (skip.size, skip.mtime) == (entry.size, entry.mtime) and entry.data is None:
            skips.append(skip)
        else:
            read.append(entry)
    return read, rewrite, skips


def find_gone(listing: Listing, rows: Mapping[str, IndexedImage]) -> tuple[list[str], dict[str, int]]:
    """Find the rows of this source whose image no longer exists; not of those that cannot be reached.

    Returns:
        Their ids; and the number of rows by folder that are not among them, as the folder exists but is empty: more
        likely an unmounted disk than the removal of all images.

    Raises:
        DataError: If the source is empty: more likely an unmounted disk than the removal of all images.
    """
    existing = {entry.id for entry in listing.entries if entry.fault != FILE_MISSING}
    unreadable = tuple(f"{folder}/" for folder in listing.unreadable)
    own = [name for name, row in rows.items() if row.own]
    if own and not existing:
        raise DataError(
            f"{listing.source} is empty, but {len(own):,} rows of the index come from it; check that its disk is "
            "mounted. To remove its rows use remove=FILTER, to keep them prune=false"
        )
    gone, emptied = [], Counter[str]()
    empty = cache(_empty_folder)
    for name in own:
        if name in existing or name.startswith(unreadable):
            continue
        folder = empty(os.path.dirname(name))  # noqa: PTH120 - a member's name ends in its own way
        if folder:
            emptied[folder] += 1
        else:
            gone.append(name)
    return gone, dict(emptied)


def _empty_folder(path: str) -> str:
    """Return the innermost folder of a path that exists, if it is empty; otherwise an empty text."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)  # noqa: PTH120
    try:
        return "" if os.listdir(path) else path  # noqa: PTH208
    except OSError:  # a shard
        return ""


def find_lost_sources(sources: Mapping[str, int]) -> dict[str, int]:
    """Return the sources that no longer exist, renamed or not mounted, with their numbers of rows."""
    lost = {}
    for source, rows in sources.items():
        fixed = re.split(r"[*?\[{]", source)[0]  # of a pattern, the part before it
        path = source if fixed == source else os.path.dirname(fixed)  # noqa: PTH120
        if os.path.isabs(source) and not os.path.lexists(path) and not os.path.lexists(source):  # noqa: PTH117
            lost[source] = rows
    return lost


def find_broken(skips: Iterable[SkippedImage], rows: Mapping[str, IndexedImage]) -> list[str]:
    """Return the ids of this source's rows whose image was replaced by an unreadable file."""
    return [skip.path for skip in skips if (row := rows.get(skip.path)) and row.own and (skip.size or skip.mtime)]


def columns_of(entries: Iterable[Entry]) -> set[str]:
    """Return the names of all columns of some images."""
    return {name for entry in entries for name in entry.columns}


def with_texts(listing: Listing, rows: Mapping[str, IndexedImage], column: str | None) -> Listing:
    """Set the text that is embedded with each image: that of a column, which may be its row's; empty without one."""
    if column is None:
        return listing
    named, entries = columns_of(listing.entries), []
    for entry in listing.entries:
        row = rows.get(entry.id)
        columns = {**entry.found, **entry.columns} if row is None else row.merged(entry.columns, entry.found, named)[0]
        value = columns.get(column)
        entries.append(replace(entry, text=" ".join(str("" if value is None else value).split())))
    return replace(listing, entries=entries)


def _has_same_content(entry: Entry, row: IndexedImage, embed_text: str | None) -> bool:
    if embed_text is not None and " ".join(str(row.columns.get(embed_text, "")).split()) != entry.text:
        return False
    if entry.data is not None:
        return content_digest(hashlib.sha256(entry.data), entry.text) == row.digest
    return (entry.size, entry.mtime) == (row.size, row.mtime)


def _match_column_types(listing: Listing, kinds: Mapping[str, ColumnKind], dim: int) -> None:
    """Convert columns to the types that they have in the index, and validate them before anything is embedded."""
    first: dict[str, UserValue] = {}
    for entry in listing.entries:
        for name, value in entry.columns.items():
            if value is not None:
                if kinds.get(name) == "str" and not isinstance(value, str):
                    entry.columns[name] = str(value).lower() if isinstance(value, bool) else str(value)
                first.setdefault(name, entry.columns[name])
        for name in entry.found.keys() - (name for name in entry.found if kinds.get(name, "str") == "str"):
            del entry.found[name]  # people use the column for something else
    try:
        validate_rows(Rows(["a"], torch.zeros(1, dim), {name: [value] for name, value in first.items()}), dim, kinds)
    except DataError as error:
        raise DataError(f"{listing.source}: {error}; change it there, or make another index") from None


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
        contents = {image.digest: (image, vector) for _, image, vector in items if vector is not None}
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
            image = DecodedImage(digest, int(width or 0), int(height or 0), bytes(thumbnail or b""))  # type: ignore[arg-type]
            yield digest, (image, rows.vectors[at])

    def _upsert(self, ready: Sequence[tuple[Entry, str]], contents: Mapping[str, _Content]) -> None:
        rows: list[dict[str, ColumnValue]] = []
        for entry, digest in ready:
            image, _ = contents[digest]
            given, source = self._columns_and_source(entry)
            rows.append(
                {
                    **given,
                    "hash": digest,
                    "size": entry.size,
                    "mtime": entry.mtime,
                    "width": image.width,
                    "height": image.height,
                    "thumbnail": image.thumbnail or b"",
                    "source": source,
                }
            )
        names = dict.fromkeys(name for row in rows for name in row)
        vectors = torch.stack([contents[digest][1] for _, digest in ready])
        columns = {name: [row.get(name) for row in rows] for name in names}
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
