"""Entries of a listing: images with their columns, and captions from files beside them."""

import datetime as dt
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from union_igrot.errors import DataError, ImageError
from union_igrot.images.decode import as_image, file_bytes
from union_igrot.images.formats import describe_name, is_image_name, is_raw
from union_igrot.storage.files import absolute_path, is_web_address
from union_igrot.storage.text import read_text

UserValue = str | int | float | bool | None  # a value of a user's column
OWN_COLUMNS: Final = frozenset({"hash", "size", "mtime", "width", "height", "thumbnail", "source"})
"""Columns that ingestion writes itself."""
ADDED_SOURCE: Final = "added"
"""Value of the column `source` for an image that was added alone, not with a folder or list."""
FILE_MISSING: Final = "the file is missing"
WEB_ADDRESS: Final = "is a web address; download the image and list its path"
IS_FOLDER: Final = "is a folder"
UNREACHABLE: Final = "the file cannot be reached"
"""Prefix of faults that may be temporary; such an image is tried again at the next run."""
RESERVED_COLUMNS: Final = OWN_COLUMNS | {"id", "vector", "row", "score"}  # names that a user's column cannot have

_INT64: Final = 2**63


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a part of a file (a member of a tar shard) or bytes in memory that should be an image."""

    id: str  # the id of its row: the absolute path as text, `<shard>/<member>` for a member
    path: str = ""  # the file; may contain undecodable bytes as surrogates. "" for bytes in memory
    size: int = 0
    mtime: int = 0  # modification time of the file in ns; 0 for bytes in memory
    offset: int | None = None  # start of a member in its shard, or None
    columns: dict[str, UserValue] = field(default_factory=dict)  # the user's columns
    fault: str | None = None  # why it cannot be an image, if that is known without opening it
    data: bytes | None = None  # the bytes of an image in memory
    found: dict[str, UserValue] = field(default_factory=dict)  # columns that were found in or beside the file
    text: str = ""  # the text that is embedded with it, see `IngestOptions.embed_text`


@dataclass(frozen=True, slots=True)
class Listing:
    """Images and their source."""

    source: str  # the folder, pattern or list, resolved, or a name chosen by the caller
    entries: Sequence[Entry]
    # Folders and shards that could not be read completely. Images listed before may still exist there.
    unreadable: Sequence[str] = ()
    # How many files and folders were left out, by name: hidden, of the system, or by `exclude`.
    excluded: Mapping[str, int] = field(default_factory=dict)


def file_entry(path: str, columns: dict[str, UserValue] | None = None, found: os.stat_result | None = None) -> Entry:
    """Make the entry of a file without opening it."""
    fault = None
    try:
        found = found or os.stat(path)  # noqa: PTH116 - undecodable bytes, and speed
    except (FileNotFoundError, NotADirectoryError):
        fault = WEB_ADDRESS if is_web_address(path) else FILE_MISSING
    except (OSError, ValueError) as error:
        fault = f"{UNREACHABLE} ({getattr(error, 'strerror', None) or error})"
    if found is None:
        return Entry(path_as_text(path), path, columns=columns or {}, fault=fault)
    if not stat.S_ISREG(found.st_mode):
        fault = IS_FOLDER if stat.S_ISDIR(found.st_mode) else "is not a regular file"
    elif found.st_size == 0:
        fault = "is empty (0 bytes)"
    elif is_raw(path):
        fault = describe_name(path)
    return Entry(path_as_text(path), path, found.st_size, found.st_mtime_ns, columns=columns or {}, fault=fault)


def content_digest(digest: "hashlib._Hash", text: str) -> str:
    """Return the first 32 hex digits of a SHA-256 of an image's bytes, followed by the text embedded with it."""
    digest.update(text.encode())
    return digest.hexdigest()[:32]


def digest_prefix(digest: str) -> int:
    """Return the first 64 bits of a digest."""
    return int(digest[:16], 16)


def is_file_name(name: str | Path) -> bool:
    """Return whether a text can be the name of a file: if it holds no unpaired surrogate."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def path_as_text(path: str) -> str:
    """Return a path as valid Unicode; undecodable bytes become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace") if not path.isascii() else path


def unique_entries(entries: Iterable[Entry], source: str) -> list[Entry]:
    """Keep the first of several entries with the same id."""
    first: dict[str, Entry] = {}
    clashes = []
    for entry in entries:
        kept = first.setdefault(entry.id, entry)
        if kept is entry or (kept.path == entry.path and kept.columns == entry.columns):
            continue
        if kept.path == entry.path:
            raise DataError(f"{source}: {entry.id} is listed twice with different columns; keep one")
        reason = "another file has the same name after its undecodable bytes are escaped; rename it"
        clashes.append(Entry(f"{entry.id} (another file)", entry.path, entry.size, entry.mtime, fault=reason))
    return [*first.values(), *clashes]


def column_value(value: Any) -> UserValue:
    """Convert a value to what a column can hold.

    NaN and other missing values become None, NumPy and torch scalars Python numbers, times and nested values text.
    """
    if not isinstance(value, UserValue) and _is_missing(value):
        return None
    if getattr(value, "ndim", None) == 0 and not isinstance(value, np.datetime64 | np.timedelta64):
        value = value.item()  # a NumPy or torch scalar
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64 < value < _INT64 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        raise DataError("holds bytes; a column holds text, numbers or booleans")
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return str(value).encode("utf-8", "backslashreplace").decode()


def _is_missing(value: Any) -> bool:
    """Return whether a value is NaN, NaT or pandas' NA."""
    try:
        return bool(value != value)  # noqa: PLR0124 - true only of NaN and NaT
    except (TypeError, ValueError, RuntimeError):  # pandas' NA, and containers of several values
        return type(value).__name__ == "NAType"


def first_repeated(names: Sequence[str]) -> str | None:
    """Return the first name that occurred before, or None."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def check_column_names(names: Iterable[str], source: str) -> None:
    """Refuse reserved column names."""
    if clash := sorted(set(names) & RESERVED_COLUMNS):
        raise DataError(f"{source}: reserved column name: {', '.join(clash)}; rename the column")


def unify_column_types(rows: Sequence[MutableMapping[str, UserValue]]) -> None:
    """Convert each column to one type in all rows: integers and floats become floats, any other mixture text."""
    types: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                types.setdefault(name, set()).add(type(value))
    mixed = {name: float if found == {int, float} else str for name, found in types.items() if len(found) > 1}
    if not mixed:
        return
    for row in rows:
        for name in mixed.keys() & row.keys():
            value = row[name]
            if value is not None and mixed[name] is float:
                row[name] = float(value)
            elif value is not None:
                row[name] = json.dumps(value) if isinstance(value, bool) else str(value)


def list_additions(
    images: Sequence[Any], ids: Iterable[str] | None = None, columns: Mapping[str, Iterable[Any]] | None = None
) -> Listing:
    """List images in any form that `as_image` accepts; those that cannot be read have a fault.

    Without ids, files are named by their paths, and others by the hash of their content. Invalid ids or columns are a
    DataError.
    """
    # Values belong to images by position, whatever labels the rows of a table have.
    names = None if ids is None else _as_list([ids] if isinstance(ids, str) else ids, "ids", len(images))
    values = {name: _as_list(one, name, len(images)) for name, one in (columns or {}).items()}
    for what, strings in (("an id", names or ()), ("a column name", list(values))):
        if wrong := [one for one in strings if not isinstance(one, str)]:
            raise DataError(f"invalid value for {what}: {wrong[0]!r} (expected str, not {type(wrong[0]).__name__})")
    if wrong := [name for name in names or () if any("\ud800" <= char <= "\udfff" for char in name)]:
        raise DataError(f"the id {wrong[0]!r} is not valid Unicode; use another")
    check_column_names(values, "the columns given")
    if names is not None and (repeated := first_repeated(names)) is not None:
        raise DataError(f"the id {repeated!r} is repeated among {len(names)}; each image needs its own")
    rows = [{name: column_value(given[i]) for name, given in values.items()} for i in range(len(images))]
    unify_column_types(rows)
    entries = [_entry(image, None if names is None else names[i], rows[i], i) for i, image in enumerate(images)]
    return Listing(ADDED_SOURCE, unique_entries(entries, "the images given"))


def _as_list(values: Any, what: Any, count: int) -> list[Any]:
    try:
        found = list(values)
    except TypeError:
        raise DataError(f"invalid value for {what}: {values!r} (expected a list, one value per image)") from None
    if isinstance(values, str) or len(found) != count:
        given = "one string" if isinstance(values, str) else f"{len(found)} values"
        raise DataError(f"{what}: {given} for {count} images (expected one value per image)")
    return found


def _entry(image: Any, name: str | None, columns: dict[str, Any], position: int) -> Entry:
    if isinstance(image, str | Path):
        if not is_file_name(image):
            return Entry(name or ascii(image), columns=columns, fault="not a valid file name")
        entry = file_entry(absolute_path(image), columns)
        if entry.fault == IS_FOLDER:
            entry = replace(entry, fault=f"{IS_FOLDER}; add it alone: add(folder)")
        return entry if name is None else replace(entry, id=name)
    try:
        data, content = _file_content(image)
    except ImageError as error:
        return Entry(name or f"image {position + 1} ({type(image).__name__})", columns=columns, fault=str(error))
    name = f"sha256:{hashlib.sha256(content).hexdigest()[:32]}" if name is None else name
    return Entry(name, size=len(data), columns=columns, data=data)


def _file_content(image: Any) -> tuple[bytes, bytes]:
    """Return an image as the bytes of a file, and the bytes that identify it."""
    if (data := file_bytes(image)) is not None:
        return data, data
    decoded = as_image(image)
    file = io.BytesIO()
    decoded.save(file, format="PNG", compress_level=1)
    # Pixels identify it: how they are compressed depends on the version of a library.
    return file.getvalue(), f"{decoded.width}x{decoded.height}".encode() + decoded.tobytes()


_SUFFIXES: Final = (".txt", ".json")
_KEYS: Final = ("captions", "caption")
_MAX_BYTES: Final = 2**16
"""Largest caption file; a larger one is something else."""


def add_found_columns(entries: Sequence[Entry], exists: Callable[[str], bool], root: str | None) -> list[Entry]:
    """Add the columns `caption` and, in class folders, `class` to images.

    Args:
        entries: Images and other files. Caption files among them are left out of the result.
        exists: Whether there is a file beside an image.
        root: The folder that was listed; None without one. Its subfolders are classes if there are at least two of
            them, each image lies directly in one, and none in the folder itself.
    """
    images = {entry.path for entry in entries if entry.fault is None and is_image_name(entry.path)}
    folders = {os.path.dirname(path) for path in images}  # noqa: PTH120 - undecodable bytes
    classes = root is not None and len(folders) > 1 and {os.path.dirname(folder) for folder in folders} == {root}  # noqa: PTH120
    used: set[str] = set()
    captions: dict[str, str | None] = {}  # by path without suffix, as several images may share one file
    found: list[Entry] = []
    for entry in entries:
        if entry.path not in images:
            found.append(entry)
            continue
        stem = os.path.splitext(entry.path)[0]  # noqa: PTH122
        if stem not in captions:
            files = {path: _read_captions(path) for path in map(stem.__add__, _SUFFIXES) if exists(path)}
            used |= {path for path, texts in files.items() if texts}
            captions[stem] = "\n".join(dict.fromkeys(text for texts in files.values() for text in texts)) or None
        label = os.path.basename(os.path.dirname(entry.path)) if classes else None  # noqa: PTH119, PTH120
        name = None if label is None else os.fsencode(label).decode("utf-8", "backslashreplace")
        found.append(replace(entry, found={"class": name, "caption": captions[stem]}))
    return [entry for entry in found if entry.path not in used]


def _read_captions(path: str) -> list[str]:
    """Read the captions of a file; none if it holds something else."""
    try:
        if os.path.getsize(path) > _MAX_BYTES:  # noqa: PTH202
            return []
        text = read_text(path, "backslashreplace")
        texts = _json_texts(json.loads(text)) if path.endswith(".json") else text.splitlines()
    except (DataError, OSError, ValueError, RecursionError):
        return []
    lines = (" ".join(one.encode("utf-8", "backslashreplace").decode().split()) for one in texts)
    return [line for line in lines if line]


def _json_texts(value: object) -> list[str]:
    """Return a text, the texts of a list, or those under `captions` or `caption` of an object."""
    parts = [value.get(key) for key in _KEYS] if isinstance(value, dict) else [value]
    lists = [part if isinstance(part, list) else [part] for part in parts]
    return [text for part in lists for text in part if isinstance(text, str)]
