"""What has to be done: the images that are there against the rows that are there.

Knows entries and an index. Opens no image.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, final

import numpy as np
import torch

from union_igrot.errors import DataError
from union_igrot.gallery.engines.base import Rows, VectorIndex, validate_rows
from union_igrot.gallery.engines.filters import ColumnKind, match_any
from union_igrot.gallery.ingest.chunks import Fact
from union_igrot.gallery.ingest.entries import ADDED, MISSING, OWN, Entry, Listing, Value
from union_igrot.gallery.ingest.skipped import Skip

FEW: Final = 256
"""Images for which an index is not read as a whole, where none of its rows is to be removed."""
_TAIL: Final = 4096


class Row(NamedTuple):
    """What an index holds of an image.

    Attributes:
        size: Bytes.
        mtime: Time of change in ns.
        digest: See `Fact`.
        source: What brought it.
        own: Whether that is the source at hand, which removes and renews it.
        columns: The user's, without None.
    """

    size: int
    mtime: int
    digest: str
    source: str
    own: bool
    columns: Mapping[str, Value]

    def with_columns(self, given: Mapping[str, Value], named: Collection[str]) -> tuple[dict[str, Value], str]:
        """Return the user's columns and the source of this row when it is written.

        Columns that the source at hand does not name stay: another has given them. Of those that it names for other
        images, its own rows lose theirs. What was added by itself stays so, whoever lists it too; and who says
        nothing new takes nothing over.

        Args:
            given: The columns of the image.
            named: The columns that the source gives to any image.
        """
        lost = named if self.own and self.source != ADDED else ()
        kept = {name: value for name, value in self.columns.items() if name not in lost}
        return {**kept, **given}, self.source if self.source == ADDED or self.says(given) else ""

    def says(self, given: Mapping[str, Value]) -> bool:
        """Whether columns hold nothing that this row does not hold."""
        return all(self.columns.get(name) == value for name, value in given.items())


@final
@dataclass(frozen=True, slots=True)
class There:
    """The rows that matter.

    Attributes:
        rows: By id: those of this source's, and those of its entries.
        digests: 64-bit beginnings of the hashes of rows that were read.
    """

    rows: dict[str, Row]
    digests: np.ndarray


@final
@dataclass(slots=True)
class Plan:
    """What has to be done.

    Attributes:
        todo: Images that have to be read.
        known: Images of which all is known but that have to be written again: their columns are new, or their source.
        skips: Images that cannot be read: seen from outside, or tried before.
        unchanged: Images whose rows are right.
    """

    todo: list[Entry] = field(default_factory=list)
    known: list[Fact] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    unchanged: int = 0


def read_rows(index: VectorIndex, listing: Listing, *, prune: bool = True) -> There:
    """Read what an index holds, but for vectors and thumbnails.

    Where few images are added and nothing is removed, only their own rows are read: an image that stands there
    under another name is then embedded again, which costs less than reading a large index does.

    Args:
        index: The index.
        listing: The images; their columns are given the kinds that the index has.
        prune: Whether rows of this source are to be removed, and so have to be known.

    Raises:
        DataError: Where a column of the images has another kind than in the index, or a name that cannot be kept.
    """
    kinds = index.columns
    _fit_columns(listing, kinds, index.dim)
    users = [name for name in kinds if name not in OWN]
    wanted = {entry.id for entry in listing.entries}
    rows: dict[str, Row] = {}
    digests = []
    where = match_any("id", wanted) if wanted and len(wanted) <= FEW and not prune else None
    for batch in index.scan(["id", "size", "mtime", "hash", "source", *users], where) if len(index) else ():
        digests.append(np.array([int(str(one)[:16], 16) for one in batch["hash"] if one], dtype=np.uint64))
        for at, name in enumerate(batch["id"]):
            source = str(batch["source"][at] or "")
            own = source == listing.source
            if own or name in wanted:
                columns = {user: batch[user][at] for user in users if batch[user][at] is not None}
                size, mtime = int(batch["size"][at] or 0), int(batch["mtime"][at] or 0)
                rows[str(name)] = Row(size, mtime, str(batch["hash"][at] or ""), source, own, columns)  # type: ignore[arg-type]
    return There(rows, np.concatenate([np.empty(0, dtype=np.uint64), *digests]))


def make_plan(
    listing: Listing, rows: Mapping[str, Row], done: Mapping[str, tuple[int, int]], skipped: Mapping[str, Skip]
) -> Plan:
    """Compare.

    Args:
        listing: The images.
        rows: What the index holds, by id.
        done: Size and time of change of images that an interrupted run embedded, by id.
        skipped: Images that could not be read at an earlier run, by id.
    """
    plan, named = Plan(), columns_of(listing.entries)
    for entry in listing.entries:
        row, skip = rows.get(entry.id), skipped.get(entry.id)
        facts = (entry.size, entry.mtime)
        if entry.fault is not None:
            plan.skips.append(Skip(entry.id, entry.fault, *facts))
        elif done.get(entry.id) == facts:
            continue
        elif row is not None and row.digest and _is_current(entry, row):
            if _says_the_same(entry, row, named):
                plan.unchanged += 1
            else:
                plan.known.append(Fact(entry.id, *facts, digest=row.digest))
        elif skip is not None and (skip.size, skip.mtime) == facts and entry.data is None:
            plan.skips.append(skip)
        else:
            plan.todo.append(entry)
    return plan


def gone(listing: Listing, rows: Mapping[str, Row]) -> list[str]:
    """Name this source's rows whose image is no longer there; of one that cannot be reached this is not known.

    Raises:
        DataError: Where the source is empty: rather a disk that is not there than the end of all images.
    """
    there = {entry.id for entry in listing.entries if entry.fault != MISSING}
    unseen = tuple(f"{folder}/" for folder in listing.unseen)
    own = [name for name, row in rows.items() if row.own]
    if own and not there:
        raise DataError(
            f"{listing.source} is empty, but {len(own):,} rows of the index come from it; is its disk there? "
            "Rows are not removed on such a ground; delete the index, or give prune=false"
        )
    return [name for name in own if name not in there and not name.startswith(unseen)]


def spoilt(skips: Iterable[Skip], rows: Mapping[str, Row]) -> list[str]:
    """Name this source's rows whose image was replaced by what cannot be read."""
    return [skip.path for skip in skips if (row := rows.get(skip.path)) and row.own and (skip.size or skip.mtime)]


def shares(entries: Sequence[Entry], count: int) -> list[list[Entry]]:
    """Deal images to processes so that equal ones, which have equal sizes, come to the same.

    Args:
        entries: The images.
        count: Processes.

    Returns:
        One list a process, of about equal length; each image in one of them.
    """
    if count == 1:
        return [list(entries)]
    sizes = Counter(entry.size for entry in entries)
    dealt: list[list[Entry]] = [[] for _ in range(count)]
    for entry in entries:
        # Of a size that many have (bitmaps of a camera), the end of the file tells them apart.
        many = sizes[entry.size] > 16 + len(entries) // (16 * count)
        key = f"{entry.size}/{_tail(entry)}" if many else str(entry.size)
        dealt[zlib.crc32(key.encode()) % count].append(entry)
    return dealt


def _is_current(entry: Entry, row: Row) -> bool:
    if entry.data is not None:
        return hashlib.sha256(entry.data).hexdigest()[:32] == row.digest
    return (entry.size, entry.mtime) == (row.size, row.mtime)


def columns_of(entries: Iterable[Entry]) -> set[str]:
    """Name the columns that any of some images has."""
    return {name for entry in entries for name in entry.columns}


def _says_the_same(entry: Entry, row: Row, named: Collection[str]) -> bool:
    columns, _ = row.with_columns(entry.columns, named)
    return {name: value for name, value in columns.items() if value is not None} == row.columns


def _tail(entry: Entry) -> int:
    if entry.data is not None:
        return zlib.crc32(entry.data)
    try:
        with open(entry.path, "rb") as file:  # noqa: PTH123 - odd bytes in a name
            file.seek((entry.offset or 0) + max(0, entry.size - _TAIL))
            return zlib.crc32(file.read(min(_TAIL, entry.size)))
    except OSError:
        return 0  # whoever gets it will say why


def _fit_columns(listing: Listing, kinds: Mapping[str, ColumnKind], dim: int) -> None:
    """Return columns the kinds that they have in the index, and refuse early what it would refuse late."""
    first: dict[str, Value] = {}
    for entry in listing.entries:
        for name, value in entry.columns.items():
            if value is not None:
                kind = kinds.get(name)
                if kind == "str" and not isinstance(value, str):
                    entry.columns[name] = str(value).lower() if isinstance(value, bool) else str(value)
                first.setdefault(name, entry.columns[name])
    try:
        validate_rows(Rows(["a"], torch.zeros(1, dim), {name: [value] for name, value in first.items()}), dim, kinds)
    except DataError as error:
        raise DataError(f"{listing.source}: {error}; change it there, or make another index") from None


def digests_of(names: Collection[str]) -> np.ndarray:
    """Return the sorted 64-bit beginnings of hashes."""
    return np.array(sorted({int(name[:16], 16) for name in names}), dtype=np.uint64)
