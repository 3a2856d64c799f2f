"""Pictures in any form, as entries that indexing takes.

Files stay files; what is in memory is handed on as the bytes of an image file, PNG where it was none. Knows the
forms. Does not know models or indexes.
"""

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from union_igrot.data.entries import Entry, Listing, data_entry, distinct, file_entry, plain_value, refuse_taken
from union_igrot.data.pictures import as_picture
from union_igrot.errors import DataError

SOURCE = "added"
"""What the rows' column `source` says of pictures that were added one by one."""


def listing_of(
    pictures: Sequence[Any], ids: Sequence[str] | None = None, columns: Mapping[str, Sequence[Any]] | None = None
) -> Listing:
    """List pictures that are given one by one.

    Args:
        pictures: In any form that `as_picture` takes.
        ids: What they are called; their paths, or the hashes of their content, where None.
        columns: Values by column name, one a picture.

    Raises:
        DataError: Where ids repeat, or ids or columns are not as many as pictures, or a column's name is taken.
        PictureError: Where something is no picture; a file is not opened yet.
    """
    if isinstance(ids, str):
        ids = [ids]
    columns = columns or {}
    for name, values in [("ids", ids), *columns.items()]:
        if values is not None and (isinstance(values, str) or len(values) != len(pictures)):
            count = "one text" if isinstance(values, str) else f"{len(values)} values"
            raise DataError(f"{name}: {count} for {len(pictures)} pictures; give one each")
    refuse_taken(columns, "the columns given")
    if ids is not None and len(set(ids)) != len(ids):
        twice = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise DataError(f"the id {twice!r} stands twice among {len(ids)}; give each picture its own")
    entries = []
    for place, picture in enumerate(pictures):
        own = {name: plain_value(values[place]) for name, values in columns.items()}
        entries.append(_entry(picture, None if ids is None else ids[place], own))
    return Listing(SOURCE, distinct(entries, "the pictures given"))


def _entry(picture: Any, name: str | None, columns: dict[str, Any]) -> Entry:
    if isinstance(picture, str | Path):
        entry = file_entry(os.path.abspath(picture), columns)  # noqa: PTH100 - Path.absolute keeps ".."
        return entry if name is None else replace(entry, id=name)
    data, content = _bytes_of(picture)
    return data_entry(f"sha256:{hashlib.sha256(content).hexdigest()[:32]}" if name is None else name, data, columns)


def _bytes_of(picture: Any) -> tuple[bytes, bytes]:
    """Give the bytes of an image file, and what says which picture it is."""
    if hasattr(picture, "read") and not isinstance(picture, Image.Image):
        picture = picture.read()
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture), bytes(picture)
    image = as_picture(picture)
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    # Of the pixels: how they are compressed depends on the version of a library.
    return file.getvalue(), f"{image.width}x{image.height}".encode() + image.tobytes()
