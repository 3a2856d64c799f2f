"""Expand `images=` into entries: folders, patterns, list files and WebDataset tar shards. No image is opened."""

import fnmatch
import itertools
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, final

from union_igrot.errors import ConfigError, DataError, first_line, require_packages
from union_igrot.gallery.ingest.entries import (
    FILE_MISSING,
    RESERVED_COLUMNS,
    WEB_ADDRESS,
    Entry,
    Listing,
    UserValue,
    add_found_columns,
    check_column_names,
    column_value,
    file_entry,
    first_repeated,
    is_file_name,
    path_as_text,
    unify_column_types,
    unique_entries,
)
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.images.formats import describe_name, is_ignored, is_raw
from union_igrot.storage.files import absolute_path, find_path, is_folder, is_web_address
from union_igrot.storage.text import read_csv, read_json_lines, read_lines

SOURCE_FORMS: Final = (
    'a folder, an image, a pattern ("photos/**/*.jpg"), a list file (.txt, .csv, .tsv, .jsonl, .parquet) '
    'or tar shards ("shards-{0000..0009}.tar")'
)
"""The forms of `images=`, for messages."""

_REPORT_EVERY: Final = 1000
_MAX_EXPANSIONS: Final = 1_000_000  # maximum number of names that braces may expand to
_MAX_METADATA: Final = 2**24  # maximum size in bytes of a shard member that holds columns
_METADATA_SUFFIXES: Final = (".json", ".txt", ".cls")
_INTEGER: Final = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")

_ListedImage = tuple[str, dict[str, Any]]  # a path as written in a list, and the other columns of its line


@final
class _Exclusions:
    """Decides which files and folders are left out, and counts them by name."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.counts: Counter[str] = Counter()
        patterns = [pattern.rstrip("/").removesuffix("/**") for pattern in patterns]
        patterns += [pattern[3:] for pattern in patterns if pattern.startswith("**/")]
        self._names = re.compile("|".join(fnmatch.translate(one) for one in patterns if "/" not in one) or r"(?!)")
        self._paths = re.compile("|".join(fnmatch.translate(one) for one in patterns if "/" in one) or r"(?!)")

    def leaves_out(self, name: str, path: str, *, hidden_allowed: bool = False) -> bool:
        """Return whether a file or folder is left out, given its name and its path relative to the folder."""
        found = bool(self._names.match(name) or self._paths.match(path))
        found = found or (is_ignored(name) and not (hidden_allowed and name.startswith(".")))
        self.counts[path_as_text(name)] += found
        return found


def list_images(
    images: str,
    on_progress: Callable[[int], None] | None = None,
    exclude: Sequence[str] = (),
    *,
    file_columns: bool = True,
) -> Listing:
    """List the images of a source.

    Hidden files and folders, and those of storage devices such as `@eaDir` and `#recycle`, are left out. Links are
    followed, but no folder is entered twice, nor one that contains the folder to be listed.

    Args:
        images: See `SOURCE_FORMS`.
        on_progress: Called now and then with the number of images found so far.
        exclude: Patterns of files and folders to leave out of a folder or pattern. One without `/` is compared with
            each name; any other with the path within the folder, in which `*` also stands for `/`.
        file_columns: Whether images of a folder or pattern get the columns of `entries.add_found_columns`.

    Raises:
        ConfigError: If nothing matches.
        DataError: If a list is malformed, or none of its images exists.
    """
    if not images:
        raise ConfigError(f"images is empty; give {SOURCE_FORMS}")
    if is_web_address(images):
        raise ConfigError(f"images={images} is a web address; download the images and give {SOURCE_FORMS}")
    path = find_path(absolute_path(images))
    unreadable: list[Entry] = []
    exclusions = _Exclusions(exclude)
    walked = is_folder(path)
    if walked:
        found = _walk(path, unreadable, exclusions)
    else:
        files = _expand(path, images, exclusions)
        found = _read_files(files, unreadable)
        file_columns = file_columns and not all(map(is_list, files))
    entries = []
    for entry in itertools.chain(found, unreadable):
        entries.append(entry)
        if on_progress is not None and len(entries) % _REPORT_EVERY == 0:
            on_progress(len(entries))
    unify_column_types([entry.columns for entry in entries if entry.columns])
    excluded = {name: count for name, count in exclusions.counts.items() if count}
    entries = unique_entries(entries, images)
    if file_columns:
        listed = {entry.path for entry in entries if entry.fault is None}
        exists = listed.__contains__ if walked else os.path.isfile
        entries = add_found_columns(entries, exists, path if walked else None)
    return Listing(path_as_text(path), entries, [entry.id for entry in unreadable], excluded)


def list_source(images: str, options: IngestOptions, on_progress: Callable[[int], None] | None = None) -> Listing:
    """List the images of a source as the options say; see `list_images`."""
    return list_images(images, on_progress, options.exclude, file_columns=options.file_columns != "none")


def _read_files(files: Sequence[str], unreadable: list[Entry]) -> Iterator[Entry]:
    """List the contents of files: shards, lists (if all files are lists), or the images themselves."""
    if all(map(is_list, files)):
        listed = [entry for file in files for entry in _read_list(file)]
        if listed and all(entry.fault in (FILE_MISSING, WEB_ADDRESS) for entry in listed):
            raise DataError(
                f"{path_as_text(files[0])}: none of the {len(listed):,} listed images exists (first: {listed[0].id}: "
                f"{listed[0].fault}); give absolute paths, or paths relative to the folder of the list"
            )
        yield from listed
        return
    for file in files:
        if file.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
            raise ConfigError(f"{path_as_text(file)}: compressed tar files cannot be read by member; decompress it")
        if file.lower().endswith(".tar"):
            entries, fault = _read_shard(file)
            if fault:
                unreadable.append(Entry(path_as_text(file), file, fault=fault))
            yield from entries
        else:
            yield file_entry(file)


# Folders and patterns


def _walk(root: str, unreadable: list[Entry], exclusions: _Exclusions) -> Iterator[Entry]:
    """List a folder recursively, its own subfolders before those that links lead to."""
    real_root = os.path.realpath(root)
    seen: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:
        if start is not root and f"{real_root}/".startswith(f"{os.path.realpath(start).rstrip('/')}/"):
            continue  # a link to a folder that contains the root
        pending = [start]
        while pending:
            folder = pending.pop()
            try:
                about = os.stat(folder)  # noqa: PTH116
                if (about.st_dev, about.st_ino) in seen:
                    continue
                seen.add((about.st_dev, about.st_ino))
                files, folders, links = _list_folder(folder, root, exclusions)
            except OSError as error:
                reason = f"the folder cannot be read ({error.strerror})"
                unreadable.append(Entry(path_as_text(folder), folder, fault=reason))
                continue
            yield from files
            pending += reversed(folders)
            starts += links


def _list_folder(folder: str, root: str, exclusions: _Exclusions) -> tuple[list[Entry], list[str], list[str]]:
    """Return the files of a folder, its subfolders, and the links to folders in it."""
    files, folders, links = [], [], []
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        if exclusions.leaves_out(item.name, item.path[len(root) :].lstrip("/")):
            continue
        if item.is_dir(follow_symlinks=False):
            folders.append(item.path)
        elif item.is_symlink() and is_folder(item.path):
            links.append(item.path)
        else:
            try:
                files.append(file_entry(item.path, found=item.stat()))
            except OSError:
                files.append(file_entry(item.path))  # finds the reason
    return files, folders, links


def _expand(path: str, images: str, exclusions: _Exclusions) -> list[str]:
    """Return the files that a path or pattern matches."""
    if os.path.lexists(path):
        return [path]
    found: dict[str, None] = {}
    missing: dict[str, None] = {}
    for pattern in _expand_braces(path, images):
        plain = os.path.lexists(pattern) or not re.search(r"[*?\[]", pattern)
        matches = [pattern] if plain else _glob(pattern, images, exclusions)
        found |= dict.fromkeys(matches)
        missing |= dict.fromkeys(match for match in matches if plain and not os.path.lexists(match))
    if len(found) == len(missing):
        raise ConfigError(f"images={path_as_text(images)} matches nothing; give {SOURCE_FORMS}")
    return list(found)  # a written-out name that does not exist is listed as missing


def _glob(pattern: str, images: str, exclusions: _Exclusions) -> list[str]:
    """Return the files that match a pattern, in order; `**` does not follow links, which avoids loops."""
    parts = pattern.split("/")
    wild = next(at for at, part in enumerate(parts) if re.search(r"[*?\[]", part))
    root, rest = find_path("/".join(parts[:wild]) or "/"), "/".join(parts[wild:])
    if parts[-1] == "**":  # matches folders only, before Python 3.13
        rest += "/*"
    hidden_allowed = any(part.startswith(".") for part in parts[wild:])
    try:
        found = sorted(str(path) for path in Path(root).glob(rest))
    except (ValueError, NotImplementedError, IndexError, re.error) as error:
        raise ConfigError(f"images={path_as_text(images)}: invalid pattern ({error}); give {SOURCE_FORMS}") from None
    prefix = len(root.rstrip("/")) + 1

    def left_out(path: str) -> bool:
        names = path[prefix:].split("/")
        within = itertools.accumulate(names, "{}/{}".format)
        return any(map(partial(exclusions.leaves_out, hidden_allowed=hidden_allowed), names, within))

    return [path for path in found if not is_folder(path) and not left_out(path)]


def _expand_braces(pattern: str, images: str) -> Iterator[str]:
    """Expand `{0000..0009}` and `{a,b}` like a shell."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = []
    for at, piece in enumerate(pieces):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if at % 2 == 0:
            choices.append([piece])
        elif ends is not None:
            first, last = int(ends[1]), int(ends[2])
            width = max(len(end) for end in ends.groups()) if ends[1][0] == "0" or ends[2][0] == "0" else 0
            step = 1 if last >= first else -1
            numbers = range(first, last + step, step)[: _MAX_EXPANSIONS + 1]
            choices.append([str(number).zfill(width) for number in numbers])
        else:
            choices.append(piece.split(",") if "," in piece else [f"{{{piece}}}"])
    if math.prod(map(len, choices)) > _MAX_EXPANSIONS:
        raise ConfigError(
            f"images={path_as_text(images)}: braces expand to more than {_MAX_EXPANSIONS:,} names; give a pattern"
        )
    return ("".join(chosen) for chosen in itertools.product(*choices))


# List files: text (`.txt`, one path per line, `#` comments), or a table with a column `path`. Paths are absolute or
# relative to the folder of the list.


def _read_list(file: str) -> list[Entry]:
    reader = _LIST_READERS[Path(file).suffix.lower()]
    folder = os.path.dirname(os.path.abspath(file))  # noqa: PTH100, PTH120 - undecodable bytes
    try:
        rows = list(reader(file))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file} ({getattr(error, 'strerror', None) or first_line(error)})") from None
    entries = []
    for name, values in rows:
        check_column_names(values, file)
        try:
            columns = {column: column_value(value) for column, value in values.items()}
        except DataError as error:
            raise DataError(f"{file}: a column {error}; remove it from the list") from None
        if is_web_address(name):
            entries.append(Entry(path_as_text(name), columns=columns, fault=WEB_ADDRESS))
        else:
            path = find_path(os.path.join(folder, name))  # noqa: PTH118
            if not os.path.lexists(path):  # in quotes, as Windows copies a path, or with blanks around it
                path = find_path(os.path.join(folder, name.strip(' "')))  # noqa: PTH118
            entries.append(file_entry(os.path.abspath(path), columns))  # noqa: PTH100
    return entries


def _read_text(path: str) -> Iterator[_ListedImage]:
    return ((line, {}) for _, line in read_lines(path, "surrogateescape") if not line.startswith("#"))


def _read_jsonl(path: str) -> Iterator[_ListedImage]:
    for place, values in read_json_lines(path, "surrogateescape"):
        name = values.pop("path", None) if isinstance(values, dict) else None
        if not isinstance(name, str) or not name or not is_file_name(name):
            raise DataError(f'{place}: expected an object with a path, {{"path": "a.jpg", ...}}')
        yield name, values


def _read_csv(path: str) -> Iterator[_ListedImage]:
    cells = read_csv(path, "surrogateescape")
    _, header = next(cells, ("", []))
    if (repeated := first_repeated(header)) is not None:
        raise DataError(f"{path}: the header has the column {repeated!r} twice; rename one")
    if "path" not in header:
        raise DataError(
            f"{path}: the header has no column path (found {', '.join(header) or 'nothing'}); rename that of the files"
        )
    rows: list[dict[str, str | None]] = []
    for place, row in cells:
        values = dict(itertools.zip_longest(header, row[: len(header)]))
        if len(row) > len(header) or not values["path"]:
            raise DataError(f"{place}: more cells than the header, or no path")
        rows.append(values)
    parsers = {name: _cell_parser([values[name] for values in rows]) for name in header if name != "path"}
    for values in rows:
        columns = {name: parse(cell) if (cell := values[name]) else None for name, parse in parsers.items()}
        yield str(values["path"]), columns


def _cell_parser(cells: list[str | None]) -> Callable[[str], UserValue]:
    """Return the type of all cells of a column; a number with leading zeros is text."""
    given = [cell for cell in cells if cell]
    if all(_INTEGER.fullmatch(cell) for cell in given):
        return int
    if all(_NUMBER.fullmatch(cell) for cell in given):
        return float
    if all(cell.lower() in ("true", "false") for cell in given):
        return lambda cell: cell.lower() == "true"
    return str


def _read_parquet(path: str) -> Iterator[_ListedImage]:
    require_packages(path, "gallery", "pyarrow")
    import pyarrow.parquet  # noqa: PLC0415 - an extra

    with pyarrow.parquet.ParquetFile(path) as file:
        if "path" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path} has no column path (found {names}); rename that of the files")
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                name = values.pop("path")
                if not isinstance(name, str) or not name:
                    raise DataError(f"{path}: invalid path in a row: {name!r}")
                yield name, values


_LIST_READERS: Final[Mapping[str, Callable[[str], Iterator[_ListedImage]]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def is_list(path: str) -> bool:
    """Return whether a file is a list of images, by its suffix."""
    return Path(path).suffix.lower() in _LIST_READERS


# WebDataset shards: members whose names agree up to the first dot are one sample. Its `.json` (an object), `.txt` and
# `.cls` become columns of its images; every other member should be an image. Only headers and columns are read.


def _read_shard(path: str) -> tuple[list[Entry], str | None]:
    """Return the members that should be images, and why the shard could not be read to its end, or None."""
    entries: dict[str, Entry] = {}  # of several members with one name, the last counts
    samples: dict[str, dict[str, UserValue]] = {}
    fault = None
    try:
        changed = os.stat(path).st_mtime_ns  # noqa: PTH116 - undecodable bytes
        with tarfile.open(path, "r:") as shard:
            for member in _visible_members(shard):
                folder, _, name = member.name.rpartition("/")
                stem, _, rest = name.partition(".")
                suffix = f".{rest.lower()}"
                columns = samples.setdefault(f"{folder}/{stem}", {})
                is_metadata = suffix in _METADATA_SUFFIXES
                reason = _add_columns(shard, member, suffix, columns) if is_metadata else _member_fault(member)
                if not is_metadata or reason:
                    row_id = path_as_text(f"{path}/{member.name.removeprefix('./')}")
                    entry = Entry(row_id, path, member.size, changed, member.offset_data, columns, reason)
                    entries[row_id] = entry
    except FileNotFoundError:
        fault = "the shard is missing"
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        fault = f"the shard cannot be read to its end ({getattr(error, 'strerror', None) or error})"
    return list(entries.values()), fault


def _visible_members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in shard:
        shard.members = []  # type: ignore[attr-defined] # it would keep every member in memory
        hidden = any(map(is_ignored, member.name.removeprefix("./").split("/")))
        if not member.isdir() and not hidden:
            yield member


def _member_fault(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.sparse is not None:
        return "is not a regular member of its shard"
    if not member.size:
        return "is empty (0 bytes)"
    return describe_name(member.name) if is_raw(member.name) else None


def _add_columns(
    shard: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, columns: dict[str, UserValue]
) -> str | None:
    """Add the columns of a member; return the reason if it cannot be read."""
    if not member.isreg() or member.size > _MAX_METADATA:
        return f"is not a regular member, or larger than {_MAX_METADATA:,} bytes"
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
        return f"is not a JSON object ({error})"
    for key, value in values.items():
        # Users rarely can rename the keys of a shard: an invalid column name is made valid, or left out.
        name = "".join(letter if letter.isprintable() and letter not in '."`\\' else "_" for letter in key).lstrip("_")
        if name and name not in RESERVED_COLUMNS:
            columns[name] = column_value(value)
    return None
