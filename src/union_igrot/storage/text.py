"""Reading of text files: text, lines, JSON, JSON lines and CSV, with errors that name file and line.

A place is the text by which an error names a row, such as `queries.csv, line 3`; lines are counted from 1. Files are
UTF-8, or UTF-16 with a byte order mark, as programs of Windows write them. `errors` is as for `bytes.decode`: paths in
a list may hold bytes that are not UTF-8, which `surrogateescape` keeps.
"""

import codecs
import csv
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from union_igrot.errors import DataError

_Value = TypeVar("_Value")
_BLOCK = 1 << 20
_MARK = re.compile(r"\s*([\[\],])\s*")  # before, between and after the values of a list
_SEPARATOR = re.compile(r"\s*,?\s*")  # some writers put commas between concatenated values


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Read a file."""
    with _readable(path):
        data = Path(path).read_bytes()
    try:
        return data.decode(_encoding(data), errors)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{_place(path, line)}: not UTF-8; save the file as UTF-8") from None


def read_lines(path: str | Path, errors: str = "strict") -> Iterator[tuple[str, str]]:
    r"""Yield the place and the text of each line that is not blank, without its `\n` or `\r\n`."""
    with _opened(path, errors, "\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _place(path, number), line.removesuffix("\n").removesuffix("\r")


def read_json(path: str | Path, *, concatenated: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        concatenated: Whether several values may follow each other without a list around them; their list is returned.
    """
    text = read_text(path)
    if not concatenated or text.lstrip().startswith("["):
        with _parsed(path):
            return _DECODER.decode(text)
    values, position = [], len(text) - len(text.lstrip())
    with _parsed(path):
        while position < len(text):
            value, position = _DECODER.raw_decode(text, position)
            values.append(value)
            separator = _SEPARATOR.match(text, position)
            position = separator.end() if separator else position
    return values


def read_json_items(path: str | Path) -> Iterator[Any]:
    """Yield the values of a JSON list one by one; of a file of millions of rows only a part is held at once."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, at, number, ended = "", 0, -1, False
    with _readable(path), Path(path).open("rb") as file:
        while True:
            while not ended and len(text) - at < _BLOCK:  # no value may be longer
                data = file.read(_BLOCK)
                ended = not data
                try:
                    text, at = text[at:] + decoder.decode(data, final=ended), 0
                except UnicodeDecodeError:
                    raise DataError(f"{path}, row {max(number, 0)}: not UTF-8; save the file as UTF-8") from None
            mark = _MARK.match(text, at)
            sign, end = (mark[1], mark.end()) if mark else ("", at)
            if number > 0 and sign == "]" and not text[end:].strip() and not file.read(1):
                return
            if sign != ("[" if number < 0 else ","):
                raise DataError(f"{path}, row {max(number, 0)}: not JSON (no list of rows); download the file again")
            number, at = max(number, 0), end
            try:
                value, at = _DECODER.raw_decode(text, at)
            except (ValueError, RecursionError):
                with _parsed(f"{path}, row {number}", lines=False):  # not always, as it is slow
                    raise
            yield value
            number += 1


def read_json_lines(path: str | Path, errors: str = "strict") -> Iterator[tuple[str, Any]]:
    """Yield the place and the JSON value of each line that is not blank."""
    for place, line in read_lines(path, errors):
        with _parsed(place, lines=False):
            value = _DECODER.decode(line)
        yield place, value


def read_csv(path: str | Path, errors: str = "strict") -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the cells of each CSV row that is not empty; a row may span several lines.

    Cells are separated by what the first line has most of: commas, semicolons or tabs.
    """
    number = 1
    with _opened(path, errors, "") as file:
        separator = max(",;\t", key=file.readline(_BLOCK).count)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            for row in reader:
                if row:
                    yield _place(path, number), row
                number = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{_place(path, number)}: not CSV ({error}); check the quotes") from None


def refuse_repeated(value: _Value, place: str, seen: dict[_Value, str]) -> None:
    """Add a value to those seen, with its place.

    Raises:
        DataError: If it was seen before; names both places.
    """
    if value in seen:
        raise DataError(f"{place}: {reprlib.repr(value)} repeats {seen[value]}; remove one of the two")
    seen[value] = place


def _place(path: str | Path, number: int) -> str:
    return f"{path}, line {number}"


def _encoding(start: bytes) -> str:
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


@contextmanager
def _opened(path: str | Path, errors: str, newline: str) -> Iterator[TextIO]:
    """Open a text file; bytes that cannot be decoded are an error that names their line."""
    with _readable(path):
        with Path(path).open("rb") as start:
            encoding = _encoding(start.read(2))
        with Path(path).open(encoding=encoding, errors=errors, newline=newline) as file:
            try:
                yield file
            except UnicodeDecodeError:
                read_text(path, errors)  # names the line
                raise


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path's does not take text
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe waits, and a device has no end
            raise OSError(0, "not a regular file")
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python would silently keep the last one
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r} in an object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


@contextmanager
def _parsed(place: str | Path, *, lines: bool = True) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if lines else ""
        raise DataError(f"{place}{line}: not JSON ({error.msg}); correct the file or download it again") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place}: not usable JSON ({reason}); correct the file or download it again") from None
