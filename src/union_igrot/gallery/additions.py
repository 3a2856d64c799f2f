"""Images that are added one by one, in any form, as entries for ingestion; images in memory become PNG files."""

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
        try:
            os.fsencode(image)
        except UnicodeEncodeError:
            return Entry(name or ascii(image), columns=columns, fault="not a valid file name")
        entry = file_entry(absolute_path(image), columns)
        if entry.fault == IS_FOLDER:
            entry = replace(entry, fault=f"{IS_FOLDER}; add it alone: add(folder)")
        return entry if name is None else replace(entry, id=name)
    try:
        data, content = _file_content(image)
    except ImageError as error:
        return Entry(name or f"image {position + 1} ({type(image).__name__})", columns=columns, fault=str(error))
    return data_entry(f"sha256:{hashlib.sha256(content).hexdigest()[:32]}" if name is None else name, data, columns)


def _file_content(image: Any) -> tuple[bytes, bytes]:
    """Return an image as the bytes of a file, and the bytes that identify it."""
    if (data := file_bytes(image)) is not None:
        return data, data
    decoded = as_image(image)
    file = io.BytesIO()
    decoded.save(file, format="PNG", compress_level=1)
    # Pixels identify it: how they are compressed depends on the version of a library.
    return file.getvalue(), f"{decoded.width}x{decoded.height}".encode() + decoded.tobytes()
