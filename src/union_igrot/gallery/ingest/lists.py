"""Lists of images: a text file of paths, or a table whose other columns are kept.

Text (`.txt`, a path a line, `#` comments), CSV, JSON lines and Parquet; a table has a column
`path`. Paths are absolute or start from the list's folder. Does not open images.
"""

import csv
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.ingest.entries import Entry, Value, file_entry, first_twice, plain_value, refuse_taken

Row = tuple[str, dict[str, Any]]
"""A path as it is written, and the other columns."""

_WHOLE: Final = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")


def listed(path: str) -> list[Entry]:
    """Read a list of images.

    Args:
        path: The list; its suffix says what it is.

    Raises:
        DataError: Where a line is not what the format says; names the line.
        ConfigError: Where a Parquet file needs a package that is not installed.
    """
    reader = READERS[Path(path).suffix.lower()]
    folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - paths may hold odd bytes
    try:
        rows = list(reader(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    columns = [_plain(values, path) for _, values in rows]
    places = (os.path.abspath(os.path.join(folder, name)) for name, _ in rows)  # noqa: PTH100, PTH118
    return [file_entry(place, kept) for place, kept in zip(places, columns, strict=True)]


def _plain(values: Mapping[str, Any], path: str) -> dict[str, Value]:
    refuse_taken(values, path)
    try:
        return {name: plain_value(value) for name, value in values.items()}
    except DataError as error:
        raise DataError(f"{path}: a column {error}; leave it out of the list") from None


def _lines(path: str) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:  # noqa: PTH123
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.removesuffix("\n").removesuffix("\r")


def _text(path: str) -> Iterator[Row]:
    return ((line, {}) for _, line in _lines(path) if not line.startswith("#"))


def _json_lines(path: str) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            values = json.loads(line)
            place = values.pop("path")
            os.fsencode(place)  # half a letter, "\\ud800", is no part of a name
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            place = None
        if not isinstance(place, str) or not place:
            raise DataError(f'{path}, line {number}: give an object with a path, {{"path": "a.jpg", ...}}')
        yield place, values


def _csv(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:  # noqa: PTH123
        reader = csv.DictReader(file, strict=True)  # an open quote would swallow all that follows
        try:
            if (twice := first_twice(reader.fieldnames or ())) is not None:
                raise DataError(f"{path}: the first line names the column {twice!r} twice; rename one")
            if "path" not in (reader.fieldnames or ()):
                raise DataError(f"{path}: the first line names no column path; it names {reader.fieldnames}")
            rows = []
            for row in reader:
                if None in row or not row["path"]:
                    raise DataError(f"{path}, line {reader.line_num}: more cells than the first line names, or no path")
                rows.append(row)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: {error}") from None
    kinds = {name: _kind([row[name] for row in rows]) for name in reader.fieldnames or () if name != "path"}
    for row in rows:
        yield row["path"], {name: kind(row[name]) if row[name] else None for name, kind in kinds.items()}


def _kind(cells: list[str | None]) -> Callable[[str], Value]:
    """Find what all cells of a column are; a number with zeros in front is a text."""
    given = [cell for cell in cells if cell]
    if all(_WHOLE.fullmatch(cell) for cell in given):
        return int
    if all(_NUMBER.fullmatch(cell) for cell in given):
        return float
    if all(cell.lower() in ("true", "false") for cell in given):
        return lambda cell: cell.lower() == "true"
    return str


def _parquet(path: str) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f'{path} needs a package that is not installed; pip install "union-igrot[gallery]"')
    import pyarrow.parquet  # noqa: PLC0415 - an extra

    with pyarrow.parquet.ParquetFile(path) as file:
        if "path" not in file.schema_arrow.names:
            raise DataError(f"{path} has no column path; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                place = values.pop("path")
                if not isinstance(place, str) or not place:
                    raise DataError(f"{path}: a row has no path, but {place!r}")
                yield place, values


READERS: Final[Mapping[str, Callable[[str], Iterator[Row]]]] = {
    ".txt": _text,
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
"""What reads a list, by its suffix."""
