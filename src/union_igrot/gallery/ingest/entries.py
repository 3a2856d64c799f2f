"""What should become a row of an index: a file, a tar shard's member or bytes, with the user's columns.

Knows file systems' facts and columns' values. Does not open an image, nor know where lists of them come from.
"""

import datetime as dt
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from union_igrot.errors import DataError

Value = str | int | float | bool | None
"""What a user's column may hold."""
OWN: Final = frozenset({"hash", "size", "mtime", "width", "height", "thumbnail", "source"})
"""Columns that indexing writes itself."""
ADDED: Final = "added"
"""What a row's column `source` says of an image that was added by itself, not with a folder or a list."""
MISSING: Final = "the file is missing"
"""The fault of what a list names and a disk lacks."""
FOLDER: Final = "is a folder"
"""The fault of a folder that stands where a file is expected."""
UNREACHED: Final = "the file cannot be reached"
"""How the fault begins of what may be there and sound."""
TAKEN: Final = OWN | {"id", "vector", "row", "score"}
"""Names that a user's column cannot have."""

_INT64: Final = 2**63


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a part of a file (a tar shard's member) or bytes in memory that should be an image.

    Attributes:
        id: What its row is called: the absolute path as text, `<shard>/<member>` for a member.
        path: The file that holds it; may hold bytes that are no text, as surrogates. "" for bytes in memory.
        size: Bytes.
        mtime: Time of the file's change in ns; 0 for bytes in memory.
        offset: Where a member begins in its file, or None.
        columns: The user's own.
        fault: Why it cannot be an image, where that is seen without opening it.
        data: The bytes of an image in memory.
    """

    id: str
    path: str = ""
    size: int = 0
    mtime: int = 0
    offset: int | None = None
    columns: dict[str, Value] = field(default_factory=dict)
    fault: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """Images and where they come from.

    Attributes:
        source: What they were asked for by, resolved: a folder, a pattern, a list, or a name given by the caller.
        entries: Each with an id of its own.
        unseen: Folders and shards that could not be read to their end. What they held before may still be there.
    """

    source: str
    entries: Sequence[Entry]
    unseen: Sequence[str] = ()


def file_entry(path: str, columns: dict[str, Value] | None = None, found: os.stat_result | None = None) -> Entry:
    """Make an entry of a file, and look at it from outside: a pipe is never opened.

    Args:
        path: An absolute path.
        columns: The user's own.
        found: What `os.stat` says, where it is known.
    """
    fault = None
    try:
        found = found or os.stat(path)  # noqa: PTH116 - bytes that are no text, and speed
    except (FileNotFoundError, NotADirectoryError):
        fault = MISSING
    except (OSError, ValueError) as error:
        fault = f"{UNREACHED} ({getattr(error, 'strerror', None) or error})"
    if found is None:
        return Entry(as_text(path), path, columns=columns or {}, fault=fault)
    if not stat.S_ISREG(found.st_mode):
        fault = FOLDER if stat.S_ISDIR(found.st_mode) else "is not a regular file"
    elif found.st_size == 0:
        fault = "is empty (0 bytes)"
    return Entry(as_text(path), path, found.st_size, found.st_mtime_ns, columns=columns or {}, fault=fault)


def data_entry(name: str, data: bytes, columns: Mapping[str, Value] | None = None) -> Entry:
    """Make an entry of an encoded image in memory: bytes of a JPEG, a PNG, ...

    Args:
        name: The id of its row.
        data: The bytes.
        columns: The user's own.

    Raises:
        DataError: Where a column has a name that is taken.
    """
    kept = {column: plain_value(value) for column, value in (columns or {}).items()}
    refuse_taken(kept, "the columns given")
    return Entry(name, size=len(data), columns=kept, data=data)


def as_text(path: str) -> str:
    """Write a path as text; bytes that are no UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace") if not path.isascii() else path


def distinct(entries: Iterable[Entry], where: str) -> list[Entry]:
    """Leave out what stands twice.

    Args:
        entries: In order; the first of several stays.
        where: What lists them, for the error.

    Raises:
        DataError: Where one image is given two different rows of columns.
    """
    kept: dict[str, Entry] = {}
    clashes = []
    for entry in entries:
        first = kept.setdefault(entry.id, entry)
        if first is entry or (first.path == entry.path and first.columns == entry.columns):
            continue
        if first.path == entry.path:
            raise DataError(f"{where}: {entry.id} stands twice with different columns; leave one")
        reason = "its name, written as text, is that of another file; rename it"
        clashes.append(Entry(f"{entry.id} (another file)", entry.path, entry.size, entry.mtime, fault=reason))
    return [*kept.values(), *clashes]


def plain_value(value: Any) -> Value:
    """Bring a value to what a column can hold.

    NaN and what else stands for nothing becomes None, scalars of numpy and torch Python's own, times and whatever is
    nested text.

    Raises:
        DataError: For bytes.
    """
    if not isinstance(value, Value) and _stands_for_nothing(value):
        return None
    if getattr(value, "ndim", None) == 0 and not isinstance(value, np.datetime64 | np.timedelta64):
        value = value.item()  # a scalar of numpy or torch
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64 < value < _INT64 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        raise DataError("holds bytes; a column holds text, numbers or true and false")
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return str(value).encode("utf-8", "backslashreplace").decode()


def _stands_for_nothing(value: Any) -> bool:
    """Whether a value is no value: pandas' NaT and NA, a NaN of numpy."""
    try:
        return bool(value != value)  # noqa: PLR0124 - true of NaN and NaT alone
    except (TypeError, ValueError, RuntimeError):  # of pandas' NA, and of what holds several values
        return type(value).__name__ == "NAType"


def first_twice(names: Sequence[str]) -> str | None:
    """Return the first name that stood before; None where all are distinct."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def refuse_taken(names: Iterable[str], where: str) -> None:
    """Refuse columns whose names are taken.

    Raises:
        DataError: Naming them.
    """
    if clash := sorted(set(names) & TAKEN):
        raise DataError(f"{where}: a column cannot be called {', '.join(clash)}; rename it")


def settle_kinds(rows: Sequence[MutableMapping[str, Value]]) -> None:
    """Return each column one kind in all rows: whole numbers among numbers become floats, any other mixture text."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                kinds.setdefault(name, set()).add(type(value))
    mixed = {name: float if found == {int, float} else str for name, found in kinds.items() if len(found) > 1}
    if not mixed:
        return
    for row in rows:
        for name in mixed.keys() & row.keys():
            value = row[name]
            if value is not None and mixed[name] is float:
                row[name] = float(value)
            elif value is not None:
                row[name] = json.dumps(value) if isinstance(value, bool) else str(value)
