"""Columns that the files of a folder have by their surroundings: class folders, and captions in files beside images."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from union_igrot.errors import DataError
from union_igrot.gallery.ingest.entries import Entry
from union_igrot.images.formats import is_image_name
from union_igrot.storage.text import read_text

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
