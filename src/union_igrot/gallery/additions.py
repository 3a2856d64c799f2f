"""Pictures in any form, as entries that indexing takes.

Files stay files; what is in memory is handed on as the bytes of an image file, PNG where it was none. Knows the
forms. Does not know models or indexes.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from union_igrot.data.entries import (
    ADDED,
    FOLDER,
    Entry,
    Listing,
    data_entry,
    distinct,
    file_entry,
    first_twice,
    plain_value,
    refuse_taken,
    settle_kinds,
)
from union_igrot.data.pictures import as_picture, file_bytes
from union_igrot.errors import DataError, PictureError
from union_igrot.paths import absolute


def listing_of(
    pictures: Sequence[Any], ids: Iterable[str] | None = None, columns: Mapping[str, Iterable[Any]] | None = None
) -> Listing:
    """List pictures that are given one by one.

    Args:
        pictures: In any form that `as_picture` takes.
        ids: What they are called; their paths, or the hashes of their content, where None.
        columns: Values by column name, one a picture, in the pictures' order.

    Returns:
        The pictures; what is none has its fault noted.

    Raises:
        DataError: Where ids repeat or are no texts, or ids or columns are not as many as pictures, or a column cannot
            have its name.
    """
    # By place, whatever labels the rows of a table have.
    names = None if ids is None else [ids] if isinstance(ids, str) else list(ids)
    given = {name: values if isinstance(values, str) else list(values) for name, values in (columns or {}).items()}
    for name, values in [("ids", names), *given.items()]:
        if values is not None and (isinstance(values, str) or len(values) != len(pictures)):
            count = "one text" if isinstance(values, str) else f"{len(values)} values"
            raise DataError(f"{name}: {count} for {len(pictures)} pictures; give one each")
    for what, texts in (("an id", names or ()), ("a column's name", list(given))):
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise DataError(f"{wrong[0]!r} ({type(wrong[0]).__name__}) is {what}; give a text")
    refuse_taken(given, "the columns given")
    if names is not None and (twice := first_twice(names)) is not None:
        raise DataError(f"the id {twice!r} stands twice among {len(names)}; give each picture its own")
    rows = [{name: plain_value(values[place]) for name, values in given.items()} for place in range(len(pictures))]
    settle_kinds(rows)
    entries = [
        _entry(picture, None if names is None else names[place], rows[place]) for place, picture in enumerate(pictures)
    ]
    return Listing(ADDED, distinct(entries, "the pictures given"))


def _entry(picture: Any, name: str | None, columns: dict[str, Any]) -> Entry:
    if isinstance(picture, str | Path):
        entry = file_entry(absolute(picture), columns)
        if entry.fault == FOLDER:
            entry = replace(entry, fault=f"{FOLDER}; update(...) takes all of it")
        return entry if name is None else replace(entry, id=name)
    try:
        data, content = _bytes_of(picture)
    except PictureError as error:
        return Entry(name or f"a {type(picture).__name__} given", columns=columns, fault=str(error))
    return data_entry(f"sha256:{hashlib.sha256(content).hexdigest()[:32]}" if name is None else name, data, columns)


def _bytes_of(picture: Any) -> tuple[bytes, bytes]:
    """Give the bytes of an image file, and what says which picture it is."""
    if (data := file_bytes(picture)) is not None:
        return data, data
    image = as_picture(picture)
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    # Of the pixels: how they are compressed depends on the version of a library.
    return file.getvalue(), f"{image.width}x{image.height}".encode() + image.tobytes()
