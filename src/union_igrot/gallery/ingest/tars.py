"""WebDataset tar shards: what each member is, where it lies, and which columns stand beside it.

Members whose names agree up to the first dot are one sample. Its `.json` (an object), `.txt`
and `.cls` become columns of its images, every other member should be an image. Only heads of
members are read, and the columns. Does not open images.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Final

from union_igrot.gallery.ingest.entries import TAKEN, Entry, Value, as_text, plain_value

COLUMNS: Final = (".json", ".txt", ".cls")
_MOST: Final = 2**24
"""Bytes of a member of columns."""


def members(path: str) -> tuple[list[Entry], str | None]:
    """List a shard.

    Args:
        path: Absolute path of an uncompressed tar.

    Returns:
        The members that should be images, and why the shard could not be read to its end, or None.
    """
    entries: list[Entry] = []
    beside: dict[str, dict[str, Value]] = {}
    fault = None
    try:
        changed = os.stat(path).st_mtime_ns  # noqa: PTH116 - paths may hold odd bytes
        with tarfile.open(path, "r:") as shard:
            for member in _each(shard):
                sample, suffix = _sample(member.name)
                columns = beside.setdefault(sample, {})
                reason = _add_columns(shard, member, suffix, columns) if suffix in COLUMNS else _fault(member)
                if suffix not in COLUMNS or reason:
                    name = f"{path}/{member.name.removeprefix('./')}"
                    place = member.offset_data
                    entries.append(Entry(as_text(name), path, member.size, changed, place, columns, reason))
    except FileNotFoundError:
        fault = "the shard is missing"
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        fault = f"the shard cannot be read to its end ({getattr(error, 'strerror', None) or error})"
    last = {entry.id: entry for entry in entries}  # of several with one name, a tar means the last
    return list(last.values()), fault


def _each(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in shard:
        shard.members = []  # type: ignore[attr-defined] # it keeps all it has seen, without end
        hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
        if not member.isdir() and not hidden:
            yield member


def _sample(name: str) -> tuple[str, str]:
    """Split a member's name into its sample and what it is of it."""
    folder, _, file = name.rpartition("/")
    stem, _, rest = file.partition(".")
    return f"{folder}/{stem}", f".{rest.lower()}"


def _fault(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.sparse is not None:
        return "is not a regular member of its shard"
    return None if member.size else "is empty (0 bytes)"


def _add_columns(shard: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, columns: dict[str, Value]) -> str | None:
    """Read a member of columns; give the reason where it cannot be read."""
    if not member.isreg() or member.size > _MOST:
        return f"is not a regular member, or larger than {_MOST:,} bytes"
    file = shard.extractfile(member)
    assert file is not None
    with file:
        text = file.read().decode("utf-8", "backslashreplace")
    if suffix != ".json":
        label = text.strip()
        columns[suffix[1:]] = int(label) if suffix == ".cls" and re.fullmatch(r"-?\d{1,18}", label) else label
        return None
    try:
        values = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        return f"is no JSON object ({error})"
    for key, value in values.items():
        # A shard's names are not the user's to change: what cannot be a column's name is made one, or left out.
        name = "".join(letter if letter.isprintable() and letter not in '."`\\' else "_" for letter in key).lstrip("_")
        if name and name not in TAKEN:
            columns[name] = plain_value(value)
    return None
