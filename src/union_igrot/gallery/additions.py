"""Images in any form, as entries that indexing takes.

Files stay files; what is in memory is handed on as the bytes of an image file, PNG where it was none. Knows the
forms. Does not know models or indexes.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from union_igrot.errors import DataError, ImageError
from union_igrot.gallery.ingest.entries import (
    ADDED_SOURCE,
    IS_FOLDER,
    Entry,
    Listing,
    check_column_names,
    column_value,
    data_entry,
    file_entry,
    first_repeated,
    unify_column_types,
    unique_entries,
)
from union_igrot.images.decode import as_image, file_bytes
from union_igrot.storage.paths import absolute_path


def listing_of(
    images: Sequence[Any], ids: Iterable[str] | None = None, columns: Mapping[str, Iterable[Any]] | None = None
) -> Listing:
    """List images that are given one by one.

    Args:
        images: In any form that `as_image` takes.
        ids: What they are called; their paths, or the hashes of their content, where None.
        columns: Values by column name, one an image, in the images' order.

    Returns:
        The images; what is none has its fault noted.

    Raises:
        DataError: Where ids repeat or are no texts, or ids or columns are not as many as images, or a column cannot
            have its name.
    """
    # By place, whatever labels the rows of a table have.
    names = None if ids is None else [ids] if isinstance(ids, str) else _several(ids, "ids")
    given = {
        name: values if isinstance(values, str) else _several(values, name) for name, values in (columns or {}).items()
    }
    for name, values in [("ids", names), *given.items()]:
        if values is not None and (isinstance(values, str) or len(values) != len(images)):
            count = "one text" if isinstance(values, str) else f"{len(values)} values"
            raise DataError(f"{name}: {count} for {len(images)} images; give one each")
    for what, texts in (("an id", names or ()), ("a column's name", list(given))):
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise DataError(f"{wrong[0]!r} ({type(wrong[0]).__name__}) is {what}; give a text")
    if half := [name for name in names or () if not _whole(name)]:
        raise DataError(f"the id {half[0]!r} holds half a letter; give another")
    check_column_names(given, "the columns given")
    if names is not None and (twice := first_repeated(names)) is not None:
        raise DataError(f"the id {twice!r} stands twice among {len(names)}; give each image its own")
    rows = [{name: column_value(values[place]) for name, values in given.items()} for place in range(len(images))]
    unify_column_types(rows)
    entries = [
        _entry(image, None if names is None else names[place], rows[place], place) for place, image in enumerate(images)
    ]
    return Listing(ADDED_SOURCE, unique_entries(entries, "the images given"))


def _several(values: Any, what: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise DataError(f"{what}: {values!r} is no list; give one value each, [{values!r}, ...]") from None


def _whole(text: str) -> bool:
    """Whether a text is made of whole letters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _can_name_a_file(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _entry(image: Any, name: str | None, columns: dict[str, Any], place: int) -> Entry:
    if isinstance(image, str) and not _can_name_a_file(image):
        return Entry(name or ascii(image), columns=columns, fault="half a letter is no part of a file's name")
    if isinstance(image, str | Path):
        entry = file_entry(absolute_path(image), columns)
        if entry.fault == IS_FOLDER:
            entry = replace(entry, fault=f"{IS_FOLDER}; update(...) takes all of it")
        return entry if name is None else replace(entry, id=name)
    try:
        data, content = _bytes_of(image)
    except ImageError as error:
        called = name or f"number {place + 1} of what was given ({type(image).__name__})"
        return Entry(called, columns=columns, fault=str(error))
    return data_entry(f"sha256:{hashlib.sha256(content).hexdigest()[:32]}" if name is None else name, data, columns)


def _bytes_of(picture: Any) -> tuple[bytes, bytes]:
    """Return the bytes of an image file, and what says which image it is."""
    if (data := file_bytes(picture)) is not None:
        return data, data
    image = as_image(picture)
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    # Of the pixels: how they are compressed depends on the version of a library.
    return file.getvalue(), f"{image.width}x{image.height}".encode() + image.tobytes()
