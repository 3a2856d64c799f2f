"""Compare the images of a source with the rows of an index. No image is opened."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final, NamedTuple, final

import numpy as np
import torch
from jaxtyping import UInt64

from union_igrot.errors import DataError
from union_igrot.gallery.engines.base import Rows, VectorIndex, validate_rows
from union_igrot.gallery.engines.filters import ColumnKind, match_any
from union_igrot.gallery.ingest.entries import (
    ADDED_SOURCE,
    FILE_MISSING,
    OWN_COLUMNS,
    Entry,
    Listing,
    UserValue,
    content_digest,
)
from union_igrot.gallery.ingest.report import SkippedImage

SMALL_ADDITION: Final = 256
"""Up to so many images are added without reading the whole index, if no rows are to be removed."""


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


@final
@dataclass(frozen=True, slots=True)
class IndexedRows:
    """The rows that an ingestion has to know."""

    by_id: dict[str, IndexedImage]  # the rows of the present source and of its entries
    digests: UInt64[np.ndarray, " digests"]  # sorted first 64 bits of the digests of all rows that were read
    sources: Mapping[str, int]  # number of rows by source, of all rows that were read


@final
@dataclass(slots=True)
class Plan:
    """What an ingestion has to do."""

    read: list[Entry] = field(default_factory=list)
    # Images whose row has the right content but needs new columns or another source.
    rewrite: list[Entry] = field(default_factory=list)
    # Images that cannot be read, as seen without opening them or at an earlier run.
    skip: list[SkippedImage] = field(default_factory=list)
    unchanged: int = 0  # number of images whose rows are up to date


def read_index(index: VectorIndex, listing: Listing, *, prune: bool = True) -> IndexedRows:
    """Read the rows of an index, without vectors and thumbnails.

    If few images are added and nothing is removed, only their own rows are read. An image that is in the index under
    another id is then embedded again, which costs less than reading a large index.
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
    return IndexedRows(by_id, np.unique(np.concatenate(digests)), sources)


def digest_prefix(digest: str) -> int:
    """Return the first 64 bits of a digest."""
    return int(digest[:16], 16)


def make_plan(
    listing: Listing,
    rows: Mapping[str, IndexedImage],
    skipped_before: Mapping[str, SkippedImage],
    embed_text: str | None = None,
    *,
    read_again: bool = False,
) -> Plan:
    """Decide what to do with each image.

    Args:
        listing: The images.
        rows: Their rows.
        skipped_before: Images that could not be read.
        embed_text: Column of the text that is embedded with an image.
        read_again: Whether unchanged files are read for their EXIF data.
    """
    plan, named = Plan(), columns_of(listing.entries)
    for entry in listing.entries:
        row, skip = rows.get(entry.id), skipped_before.get(entry.id)
        if entry.fault is not None:
            plan.skip.append(SkippedImage(entry.id, entry.fault, entry.size, entry.mtime))
        elif row is not None and row.digest and not read_again and _has_same_content(entry, row, embed_text):
            columns, _ = row.merged(entry.columns, entry.found, named)
            if {name: value for name, value in columns.items() if value is not None} == row.columns:
                plan.unchanged += 1
            else:
                plan.rewrite.append(entry)
        elif skip is not None and (skip.size, skip.mtime) == (entry.size, entry.mtime) and entry.data is None:
            plan.skip.append(skip)
        else:
            plan.read.append(entry)
    return plan


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
