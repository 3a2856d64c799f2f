"""What stands in a folder of the user's own images: its rows, the place of each, and their splits.

Three layouts are known; where several exist, the first of this list is taken:

1. `triplets.jsonl`, one object a line: `{"reference": path, "text": what to change or null, "targets": [path, ...]}`
   and optionally `"split"`; beside it optionally `gallery.txt`, one path a line.
2. `manifest.csv` with the header `domain,path,class` and optionally `split`; a domain is `photo` or `sketch`.
3. Class folders `photos/<class>/...` and `sketches/<class>/...`.

Paths are relative to the folder. Names that start with a dot and, in class folders, files that are no images are
ignored. A split is `train`, `val` or `test`, given in all rows or in none. Where none is given, references
(layout 1) or classes (2, 3) are dealt 70/10/20 into train/val/test by a hash of their names; from three names on,
each split gets one at least. Where only `val` is not given, a fifth of the train references or classes, chosen by
the same hash, is held out as `val`. Does not know whether an image exists, nor what a query is.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NoReturn, TypeVar, final

from union_igrot.errors import DataError
from union_igrot.storage.paths import expand_user

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
_HEADER = ("domain", "path", "class")
_KEYS = ("reference", "text", "targets")
_Key = TypeVar("_Key")


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """An image of a class, and the place that names it."""

    where: str
    sketch: bool
    path: str
    key: str  # its class, by which splits are dealt
    split: str | None


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A line of triplets.jsonl."""

    where: str
    id: str
    key: str  # its reference, by which splits are dealt
    text: str | None
    targets: tuple[str, ...]
    split: str | None


Entry = TypeVar("Entry", Sample, Row)


@final
@dataclass(frozen=True, slots=True)
class Samples:
    """Everything a manifest or the class folders name, by split."""

    root: Path
    splits: Mapping[str, list[Sample]]
    note: str


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Everything triplets.jsonl and gallery.txt name, by split."""

    root: Path
    splits: Mapping[str, list[Row]]
    note: str
    extra: Mapping[str, str]  # the paths of gallery.txt, and where each stands


def read_folder(folder: str | Path) -> Rows | Samples:
    """Read what a folder names, in the first layout that is there, and deal it into splits.

    Images are not looked at, so a missing one changes no split.

    Raises:
        DataError: Where there is no folder, no layout, or a row is wrong. Names the file and the line.
    """
    root = expand_user(folder).absolute()
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; give the folder that holds the images")
    if (root / "triplets.jsonl").exists():
        rows = _triplets(root / "triplets.jsonl")
        extra = _listing(root / "gallery.txt") if (root / "gallery.txt").exists() else {}
        return Rows(root, *_by_split(rows, {row.key for row in rows}, "references"), extra)
    if (root / "manifest.csv").exists():
        samples = _manifest(root / "manifest.csv")
    elif (root / "photos").is_dir() and (root / "sketches").is_dir():
        samples = [sample for top in ("photos", "sketches") for sample in _class_folders(root, top)]
    else:
        raise DataError(
            f"{root}: no known layout; give it a triplets.jsonl, a manifest.csv ({','.join(_HEADER)},split), "
            "or the folders photos/<class>/ and sketches/<class>/"
        )
    if not samples:
        raise DataError(f"{root}: names no image; known suffixes are {' '.join(SUFFIXES)}")
    return Samples(root, *_by_split(samples, {sample.key for sample in samples if sample.sketch}, "classes"))


def _by_split(entries: list[Entry], asking: set[str], what: str) -> tuple[dict[str, list[Entry]], str]:
    """Deal the entries into splits; `asking` are the keys that queries have."""
    given = entries[0].split is not None
    for entry in entries:
        if (entry.split is not None) != given:
            raise DataError(f"{entry.where}: split is {entry.split!r}, unlike before; give it in every row or in none")
    dealt: dict[str, str] = {}
    held: set[str] = set()
    note = "splits as given"
    listed = {entry.split for entry in entries}
    if not given:
        dealt = _deal(asking) | _deal({entry.key for entry in entries} - asking)
        note = f"{what} dealt 70/10/20 into train/val/test by a hash of their names"
    elif "train" in listed and "val" not in listed:
        trained = _by_hash(asking & {entry.key for entry in entries if entry.split == "train"})
        held = set(trained[: max(1, round(len(trained) / 5))]) if len(trained) > 1 else set()
        note = f"{len(held)} of {len(trained)} train {what} held out as val by a hash of their names"
    splits: dict[str, list[Entry]] = {name: [] for name in SPLITS}
    for entry in entries:
        split = entry.split or dealt[entry.key]
        splits["val" if split == "train" and entry.key in held else split].append(entry)
    return splits, note


def _deal(names: set[str]) -> dict[str, str]:
    test = max(1, round(len(names) / 5)) if len(names) > 1 else 0
    val = max(1, round(len(names) / 10)) if len(names) > 2 else 0
    order = ["test"] * test + ["val"] * val + ["train"] * (len(names) - test - val)
    return dict(zip(_by_hash(names), order, strict=True))


def _by_hash(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _triplets(file: Path) -> list[Row]:
    rows: list[Row] = []
    seen: dict[object, str] = {}
    for where, line in _lines(file):
        row = _row(line, where)
        _once((row.key, row.text, frozenset(row.targets)), where, seen)
        rows.append(row)
    if not rows:
        raise DataError(f"{file}: holds no row; write one object a line")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({getattr(error, 'msg', error)}); write one object a line") from None
    if not isinstance(value, dict) or not set(_KEYS) <= value.keys() <= {*_KEYS, "split"}:
        raise DataError(
            f"{where}: {reprlib.repr(value)} is no object with the keys {', '.join(_KEYS)} and, if wanted, split"
        )
    reference, text = _path(value["reference"], "reference", where), value["text"]
    if not isinstance(value["targets"], list) or not value["targets"]:
        raise DataError(f"{where}: targets is {reprlib.repr(value['targets'])}; give a list of one path or more")
    targets = tuple(_path(target, "a target", where) for target in value["targets"])
    if len({reference, *targets}) <= len(targets):
        raise DataError(f"{where}: a target stands twice or is the reference; name each other image once")
    if text is not None:
        text = _string(text, "text", where)
    number = where.rpartition(" ")[2]
    return Row(where, f"{reference}#{number}", reference, text, targets, _split(value.get("split"), where))


def _listing(file: Path) -> dict[str, str]:
    paths: dict[str, str] = {}
    for where, line in _lines(file):
        path = _path(line.rstrip("\r"), "path", where)
        _once(path, where, paths)
    return paths


def _manifest(file: Path) -> list[Sample]:
    rows = _csv(file)
    where, header = next(rows, (f"{file}, line 1", []))
    if sorted(header) not in (sorted(_HEADER), sorted([*_HEADER, "split"])):
        raise DataError(f"{where}: the header is {reprlib.repr(','.join(header))}; write {','.join(_HEADER)},split")
    samples: list[Sample] = []
    seen: dict[object, str] = {}
    for where, row in rows:
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} fields, but the header has {len(header)}; quote fields with commas")
        cells = dict(zip(header, row, strict=True))
        if cells["domain"] not in ("photo", "sketch"):
            raise DataError(f"{where}: domain is {reprlib.repr(cells['domain'])}; write photo or sketch")
        path, label = _path(cells["path"], "path", where), _name(cells["class"], "class", where)
        _once(path, where, seen)
        samples.append(Sample(where, cells["domain"] == "sketch", path, label, _split(cells.get("split"), where)))
    return samples


def _csv(file: Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield f"{file}, line {line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: not CSV ({error}); check the quotes") from None


def _class_folders(root: Path, top: str) -> Iterator[Sample]:
    def fail(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions") from None

    for folder, folders, files in os.walk(root / top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if any(os.path.realpath(parent) == real for parent in Path(folder).parents):
            raise DataError(f"{folder}: links back to a folder that it lies in; remove the link")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = Path(folder).relative_to(root / top).parts
        for name in sorted(files):
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = _path(Path(top, *parts, name).as_posix(), "path", folder)
            if not parts:
                raise DataError(f"{root / path}: lies in no class folder; move it to {top}/<class>/")
            yield Sample(folder, top == "sketches", path, parts[0], None)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_text(file).split("\n"), 1):  # JSON may hold the other ends that splitlines knows
        if line.strip():
            yield f"{file}, line {number}", line


def _text(file: Path) -> str:
    try:
        data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark that spreadsheets write first
        return data.decode()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from None


def _string(value: object, what: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {what} is {reprlib.repr(value)}; give a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {what} is {ascii(value)[:80]}, which is not valid Unicode; rename it") from None
    return value


def _name(value: object, what: str, where: str) -> str:
    name = _string(value, what, where)
    if any(letter < " " for letter in name):
        raise DataError(f"{where}: {what} is {reprlib.repr(name)}, with a control character; rename it")
    return name


def _path(value: object, what: str, where: str) -> str:
    path = posixpath.normpath(_name(value, what, where))
    if path.startswith(("/", "../")) or path == ".." or PureWindowsPath(path).is_absolute():
        raise DataError(f"{where}: {what} is {reprlib.repr(path)}; give a path inside the folder, relative to it")
    if not path.lower().endswith(SUFFIXES):
        raise DataError(f"{where}: {what} is {reprlib.repr(path)}; known suffixes are {' '.join(SUFFIXES)}")
    return path


def _split(value: object, where: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value not in SPLITS:
        raise DataError(f"{where}: split is {reprlib.repr(value)}; write one of {', '.join(SPLITS)}, or leave it out")
    return value


def _once(key: _Key, where: str, seen: dict[_Key, str]) -> None:
    if key in seen:
        raise DataError(f"{where}: repeats {seen[key]}; remove one of them")
    seen[key] = where
