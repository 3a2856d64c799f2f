"""What the benchmark readers share: JSON and list files, read strictly.

Every fault becomes one line that names the file and the place in it: `row 3` is an entry of a JSON list, counted
from 0, `line 3` a line of text, counted from 1. Does not know any benchmark, nor where
images are.
"""

import json
import posixpath
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeVar, final

from union_igrot.errors import ConfigError, DataError
from union_igrot.images.crop import Box

_Key = TypeVar("_Key")
_BETWEEN = re.compile(r"\s*,?\s*")  # some writers put commas between the values of a file


@final
@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object of an annotation file; its methods give checked fields.

    Attributes:
        where: The place that names it in errors.
        fields: Its content.
    """

    where: str
    fields: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Say whether a field is there."""
        return key in self.fields

    def get(self, key: str) -> Any:
        """Return a field as it stands."""
        if key not in self.fields:
            raise DataError(f"{self.where}: {key!r} is missing; the file is not in the official format")
        return self.fields[key]

    def text(self, key: str) -> str:
        """Return a text; it may be blank, as a few official captions are."""
        return as_text(self.get(key), key, self.where)

    def name(self, key: str) -> str:
        """Return an identity, a string or a whole number, as a string."""
        return as_name(self.get(key), key, self.where)

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of distinct identities, at least one."""
        return _distinct([as_name(value, key, self.where) for value in self._list(key)], key, self.where)

    def number(self, key: str) -> int:
        """Return a whole number from 0; digits in quotes count as one."""
        return as_number(self.get(key), key, self.where)

    def numbers(self, key: str) -> tuple[int, ...]:
        """Return a list of distinct whole numbers, at least one."""
        return _distinct([as_number(value, key, self.where) for value in self._list(key)], key, self.where)

    def record(self, key: str) -> "Record":
        """Return an object inside this one."""
        return as_record(self.get(key), f"{self.where}, {key}")

    def records(self, key: str) -> list["Record"]:
        """Return a list of objects inside this one, at least one."""
        return [as_record(value, f"{self.where}, {key}[{at}]") for at, value in enumerate(self._list(key))]

    def pair(self, key: str) -> tuple[int, str]:
        """Return a number and a path that stand in a list of two."""
        value = self._list(key)
        if len(value) != 2:
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}; it must be [id, path]")
        return as_number(value[0], key, self.where), as_path(value[1], key, self.where)

    def box(self, key: str) -> Box:
        """Return a box as left, top, width and height in pixels; width and height are above 0."""
        value = self._list(key)
        sound = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in value)
        if len(value) != 4 or not sound or not all(map(isfinite, value)) or min(value[2:]) <= 0:
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}; it must be [x, y, width, height] in pixels")
        return value[0], value[1], value[2], value[3]

    def _list(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}; it must be a list of one entry or more")
        return value


def as_record(value: object, where: str) -> Record:
    """Take a JSON value as an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {reprlib.repr(value)} is no JSON object; the file is not in the official format")
    return Record(where, value)


def as_name(value: object, what: str, where: str) -> str:
    """Take a JSON value as an identity."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(as_number(value, what, where))
    name = as_text(value, what, where)
    if not name.strip() or not (name.isprintable() or all(letter >= " " for letter in name)):
        raise DataError(f"{where}: {what} is {reprlib.repr(name)}; give a name without control characters")
    return name


def as_number(value: object, what: str, where: str) -> int:
    """Take a JSON value as a whole number from 0."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**18:
        raise DataError(f"{where}: {what} is {reprlib.repr(value)}; it must be a whole number from 0")
    return value


def as_path(value: object, what: str, where: str) -> str:
    """Take a JSON value as a path that stays inside the data's folder; a leading `./` is dropped."""
    path = posixpath.normpath(as_name(value, what, where))
    if path.startswith(("/", "../")) or path in (".", "..") or PureWindowsPath(path).is_absolute():
        raise DataError(f"{where}: {what} is {reprlib.repr(path)}; it must be a path inside the data's folder")
    return path


def read_json(file: Path, *, several: bool = False) -> Any:
    """Read a JSON file; one of several JSON values one after another becomes their list.

    Args:
        file: The file.
        several: Whether values may follow each other without a list around them.

    Raises:
        DataError: Where it is missing, no JSON, or an object has a key twice.
    """
    text = read_text(file)
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    try:
        if not several or text.lstrip().startswith("["):
            return decoder.decode(text)
        values, at = [], len(text) - len(text.lstrip())
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            between = _BETWEEN.match(text, at)
            at = between.end() if between else at
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}); fetch the file again") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not usable JSON ({' '.join(str(error).split())}); fetch the file again") from None
    return values


def read_list(file: Path, *, several: bool = False) -> list[Any]:
    """Read a JSON file that holds a list of one entry or more. `several` is as for `read_json`."""
    value = read_json(file, several=several)
    if not isinstance(value, list) or not value:
        raise DataError(f"{file}: holds {reprlib.repr(value)}; it must be a JSON list of one entry or more")
    return value


def read_records(file: Path, *, several: bool = False) -> list[Record]:
    """Read a JSON file that holds a list of objects. `several` is as for `read_json`."""
    return [as_record(value, f"{file}, row {row}") for row, value in enumerate(read_list(file, several=several))]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python would keep the last one and say nothing
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return found


class Labelled(NamedTuple):
    """A line of a list file: a path, a class number, and the place that names them."""

    where: str
    path: str
    label: int


def read_labelled(file: Path) -> list[Labelled]:
    """Read lines of a path, which may hold blanks, and a class number.

    Raises:
        DataError: Where the file is missing or empty, or a line is of another form or repeats a path.
    """
    rows: list[Labelled] = []
    seen: dict[str, str] = {}
    for where, line in read_lines(file):
        path, label = _path_and_number(line, where)
        path = as_path(path, "path", where)
        once(path, where, seen)
        rows.append(Labelled(where, path, label))
    return rows


def read_classes(file: Path) -> dict[int, str]:
    """Read lines of a class name, which may hold blanks, and its number."""
    names: dict[int, str] = {}
    places: dict[int, str] = {}
    for where, line in read_lines(file):
        name, label = _path_and_number(line, where)
        once(label, where, places)
        names[label] = as_name(name, "class", where)
    if len(set(names.values())) < len(names):
        raise DataError(f"{file}: a class stands there under two numbers; fetch the file again")
    return names


def _path_and_number(line: str, where: str) -> tuple[str, int]:
    parts = line.rsplit(None, 1)
    if len(parts) < 2 or not parts[1].isascii() or not parts[1].isdigit() or len(parts[1]) > 9:
        raise DataError(f"{where}: {reprlib.repr(line)} is not of the form 'name number'; fetch the file again")
    return parts[0], int(parts[1])


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Return each line that is not blank, without outer blanks, and its place; there is one at least."""
    empty = True
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line := line.strip():
            empty = False
            yield f"{file}, line {number}", line
    if empty:
        raise DataError(f"{file}: is empty; fetch the file again")


def read_text(file: Path) -> str:
    """Read a file as UTF-8."""
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8; fetch the file again") from None


def once(key: _Key, where: str, seen: dict[_Key, str]) -> None:
    """Refuse what was seen before, naming both places."""
    if key in seen:
        raise DataError(f"{where}: {reprlib.repr(key)} repeats {seen[key]}; fetch the file again")
    seen[key] = where


def choose(what: str, given: object, allowed: tuple[str, ...]) -> str:
    """Refuse a word that is not allowed."""
    if not isinstance(given, str) or given not in allowed:
        raise ConfigError(f"{what} is {given!r}; choose one of {', '.join(allowed)}")
    return given


def as_text(value: object, what: str, where: str) -> str:
    """Take a JSON value as a text, which may be blank."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {reprlib.repr(value)}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {what} is {ascii(value)[:80]}, which is not valid Unicode; mend the file") from None
    return value


def _distinct(values: list[_Key], what: str, where: str) -> tuple[_Key, ...]:
    if len(set(values)) < len(values):
        raise DataError(f"{where}: {what} names an entry twice, {reprlib.repr(values)}; fetch the file again")
    return tuple(values)
