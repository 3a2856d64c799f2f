"""What all benchmark readers share: the folder of a dataset and strictly checked annotation files.

An error names the file and the row: `row 3` is an entry of a JSON list, counted from 0, `line 3` a line of text,
counted from 1.
"""

import ntpath
import os
import posixpath
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from union_igrot.errors import DataError, ImageError
from union_igrot.images.decode import check_image
from union_igrot.images.identity import Box
from union_igrot.storage.files import expand_user, is_folder
from union_igrot.storage.text import read_json, read_lines, refuse_repeated

_Value = TypeVar("_Value")
_Key = TypeVar("_Key")
_PLAIN_NAME = re.compile(r"\w[\w.-]*")
GENOME = ("VG_100K", "VG_100K_2", "VG_100K_all", "images/VG_100K", "images/VG_100K_2")
"""Folders in which images of Visual Genome are found."""


@final
class DatasetFolder:
    """The folder of one benchmark, with its annotation files and its images.

    Without `check_images`, the first path that an image may have is taken.

    Raises:
        DataError: If there is no such folder.
    """

    def __init__(self, root: str | Path, check_images: bool) -> None:
        self.root = expand_user(root).absolute()
        self.check_images = check_images
        self._found: dict[str, Path] = {}
        self._missing: list[str] = []
        if not is_folder(self.root):
            raise DataError(f"{self.root}: no such folder; pass the folder that holds the dataset")

    def annotation(self, *names: str) -> Path:
        """Return the first of an annotation file's known paths that exists.

        Raises:
            DataError: If none exists.
        """
        for name in names:
            if os.path.isfile(self.root / name):  # noqa: PTH113 - unlike Path's, it never raises
                return self.root / name
        raise DataError(f"{self.root}: contains no {' or '.join(names)}; download it or pass another folder")

    def image(self, place: str, *names: str) -> Path:
        """Return the first of an image's known paths that exists, and record it if it is missing."""
        if names[0] in self._found:
            return self._found[names[0]]
        path = self.root / names[0]
        if self.check_images:
            reason = ""
            for name in names:
                try:
                    check_image(self.root / name)
                except ImageError as error:
                    reason = reason or str(error)
                else:
                    path = self.root / name
                    break
            else:
                others = f" (also tried {', '.join(names[1:])})" if len(names) > 1 else ""
                self._missing.append(f"{place}: {reason}{others}")
        self._found[names[0]] = path
        return path

    def listed_image(self, place: str, path: str) -> Path:
        """Find an image of a list, whose paths may begin with the name of the dataset's own folder."""
        return self.image(place, path, path.partition("/")[2] or path)

    def refuse_missing(self) -> None:
        """Check that no image was missing.

        Raises:
            ImageError: If any was; names the first and says how many there are.
        """
        if self._missing:
            raise ImageError(
                f"{self._missing[0]}; {len(self._missing)} of {len(self._found)} images are missing: complete the "
                "download, or read only the annotations with check_images=False"
            )


@final
@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object of an annotation file and its place, file and row; its methods return checked fields."""

    place: str
    fields: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return a field unchecked."""
        if key not in self.fields:
            raise DataError(f"{self.place}: {key!r} is missing; the file is not in the official format")
        return self.fields[key]

    def text(self, key: str) -> str:
        """Return a text; it may be blank, as a few official captions are."""
        return check_text(self.get(key), key, self.place)

    def name(self, key: str) -> str:
        """Return an id, a string or an integer, as a string."""
        return check_name(self.get(key), key, self.place)

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of distinct ids, at least one."""
        return _distinct([check_name(value, key, self.place) for value in self._list(key)], key, self.place)

    def integer(self, key: str) -> int:
        """Return an integer >= 0; it may be written as a string."""
        return check_integer(self.get(key), key, self.place)

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of distinct integers >= 0, at least one."""
        return _distinct([check_integer(value, key, self.place) for value in self._list(key)], key, self.place)

    def record(self, key: str) -> "Record":
        """Return a nested object."""
        return check_record(self.get(key), f"{self.place}, {key}")

    def records(self, key: str) -> list["Record"]:
        """Return a list of nested objects, at least one."""
        return [check_record(value, f"{self.place}, {key}[{row}]") for row, value in enumerate(self._list(key))]

    def id_and_path(self, key: str) -> tuple[int, str]:
        """Return an integer and a path, written as a list of two."""
        value = self._list(key)
        if len(value) != 2:
            raise DataError(f"{self.place}: {key} is {reprlib.repr(value)}; expected [id, path]")
        return check_integer(value[0], key, self.place), check_path(value[1], key, self.place)

    def box(self, key: str) -> Box:
        """Return a box as left, top, width and height in pixels; width and height are above 0."""
        value = self._list(key)
        valid = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in value)
        if len(value) != 4 or not valid or not all(map(isfinite, value)) or min(value[2:]) <= 0:
            raise DataError(f"{self.place}: {key} is {reprlib.repr(value)}; expected [x, y, width, height] in pixels")
        return value[0], value[1], value[2], value[3]

    def _list(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.place}: {key} is {reprlib.repr(value)}; expected a list that is not empty")
        return value


def check_record(value: object, place: str) -> Record:
    """Return a JSON value as an object."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: {reprlib.repr(value)} is not a JSON object; the file is not in the official format")
    return Record(place, value)


def check_text(value: object, name: str, place: str) -> str:
    """Return a JSON value as a text, which may be blank."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is {reprlib.repr(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: {name} is {ascii(value)[:80]}, which is not valid Unicode; correct it") from None
    return value


def check_name(value: object, name: str, place: str) -> str:
    """Return a JSON value, a string or an integer, as a text that is neither blank nor has control characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(check_integer(value, name, place))
    if isinstance(value, str) and value.isprintable() and value.strip():  # the usual case, of millions of rows
        return value
    text = check_text(value, name, place)
    if not text.strip() or any(letter < " " or "\x7f" <= letter < "\xa0" for letter in text):
        raise DataError(f"{place}: {name} is {reprlib.repr(text)}; expected a text without control characters")
    return text


def check_integer(value: object, name: str, place: str) -> int:
    """Return a JSON value as an integer >= 0."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**18:
        raise DataError(f"{place}: {name} is {reprlib.repr(value)}; expected an integer >= 0")
    return value


def check_path(value: object, name: str, place: str) -> str:
    """Return a JSON value as a normalized path that stays inside the dataset's folder."""
    given = check_name(value, name, place)
    if _PLAIN_NAME.fullmatch(given):
        return given
    path = posixpath.normpath(given)
    drive, rest = ntpath.splitdrive(path)
    if path.startswith(("/", "../")) or path in (".", "..") or (drive and rest.startswith(("/", "\\"))):
        raise DataError(f"{place}: {name} is {reprlib.repr(path)}; expected a relative path inside the folder")
    return path


def refuse_unknown(names: Iterable[str], known: Container[str], place: str, where: str) -> None:
    """Check that names which a row refers to are known."""
    for name in names:
        if name not in known:
            raise DataError(f"{place}: {name!r} is not in {where}; download both files again")


def group_by(rows: Iterable[_Value], key: Callable[[_Value], _Key]) -> dict[_Key, list[_Value]]:
    """Return rows by a key of theirs, in their order."""
    groups: defaultdict[_Key, list[_Value]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def read_list(file: Path, *, concatenated: bool = False) -> list[Any]:
    """Read a JSON file that holds a list of at least one entry. `concatenated` is as for `read_json`."""
    value = read_json(file, concatenated=concatenated)
    if not isinstance(value, list) or not value:
        raise DataError(f"{file}: contains {reprlib.repr(value)}; expected a JSON list that is not empty")
    return value


def read_records(file: Path, *, concatenated: bool = False) -> list[Record]:
    """Read a JSON file that holds a list of objects. `concatenated` is as for `read_json`."""
    rows = enumerate(read_list(file, concatenated=concatenated))
    return [check_record(value, f"{file}, row {row}") for row, value in rows]


class LabeledPath(NamedTuple):
    """A line of a list file: its place, a path and a class number."""

    place: str
    path: str
    label: int


def read_labeled_paths(file: Path) -> list[LabeledPath]:
    """Read lines of a path, which may contain blanks, and a class number.

    Raises:
        DataError: If the file is missing or empty, or a line has another form or repeats a path.
    """
    rows: list[LabeledPath] = []
    seen: dict[str, str] = {}
    for place, name, label in _named_numbers(file):
        path = check_path(name, "path", place)
        refuse_repeated(path, place, seen)
        rows.append(LabeledPath(place, path, label))
    return rows


def read_columns(
    file: Path, *names: str, separator: str = ",", more: bool = False
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the place and the fields of each line of a list without header and quotes.

    Args:
        file: The file.
        names: What the fields are.
        separator: What is between the fields, which do not contain it.
        more: Whether further fields may follow, which are left out.
    """
    empty = True
    for place, line in read_lines(file):
        fields = tuple(map(str.strip, line.strip().split(separator)))
        if len(fields) < len(names) or (len(fields) > len(names) and not more):
            expected = separator.join(names)
            raise DataError(
                f"{place}: {len(fields)} fields; expected '{expected}', where no field contains {separator!r}"
            )
        yield place, tuple(check_name(value, name, place) for name, value in zip(names, fields, strict=False))
        empty = False
    if empty:
        raise DataError(f"{file}: is empty; download the file again")


def read_classes(file: Path) -> dict[int, str]:
    """Read lines of a class name, which may contain blanks, and its number."""
    names: dict[int, str] = {}
    seen: dict[int, str] = {}
    for place, name, label in _named_numbers(file):
        refuse_repeated(label, place, seen)
        names[label] = check_name(name, "class", place)
    if len(set(names.values())) < len(names):
        raise DataError(f"{file}: a class has two numbers; download the file again")
    return names


def _named_numbers(file: Path) -> list[tuple[str, str, int]]:
    rows = []
    for place, line in read_lines(file):
        parts = line.rsplit(None, 1)
        if len(parts) < 2 or not parts[1].isascii() or not parts[1].isdigit() or len(parts[1]) > 9:
            raise DataError(f"{place}: {reprlib.repr(line)} is not of the form 'name number'; download the file again")
        rows.append((place, parts[0].strip(), int(parts[1])))
    if not rows:
        raise DataError(f"{file}: is empty; download the file again")
    return rows


def _distinct(values: list[_Value], name: str, place: str) -> tuple[_Value, ...]:
    if len(set(values)) < len(values):
        raise DataError(f"{place}: {name} names an entry twice, {reprlib.repr(values)}; download the file again")
    return tuple(values)
