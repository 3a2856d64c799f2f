"""What `images=` means: a folder, a pattern, a list or tar shards, as the images it names.

Hidden files (a dot in front) are left out. Links are followed, but no folder is entered twice, nor
one that holds the folder asked for. Knows file systems. Does not open images.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from union_igrot.errors import ConfigError
from union_igrot.gallery.ingest.entries import Entry, Listing, as_text, distinct, file_entry, settle_kinds
from union_igrot.gallery.ingest.lists import READERS, listed
from union_igrot.gallery.ingest.tars import members
from union_igrot.storage.paths import absolute_path

FORMS: Final = (
    'a folder, an image, a pattern ("photos/**/*.jpg"), a list file (.txt, .csv, .jsonl, .parquet) '
    'or tar shards ("shards-{0000..0009}.tar")'
)
"""What `images=` can be."""

_TELL: Final = 1000
_MOST: Final = 1_000_000
"""Names that braces may stand for."""


def list_images(images: str, tell: Callable[[int], None] | None = None) -> Listing:
    """List the images that `images=` names.

    Args:
        images: See `FORMS`.
        tell: Called now and then with the number found so far.

    Raises:
        ConfigError: Where nothing is named by it.
        DataError: Where a list is not what its format says.
    """
    if not images:
        raise ConfigError(f"images= is empty; give {FORMS}")
    path = absolute_path(images)
    unseen: list[Entry] = []
    found = _walk(path, unseen) if os.path.isdir(path) else _named(_files(path, images), unseen)  # noqa: PTH112
    entries = []
    for entry in itertools.chain(found, unseen):
        entries.append(entry)
        if tell is not None and len(entries) % _TELL == 0:
            tell(len(entries))
    settle_kinds([entry.columns for entry in entries if entry.columns])
    return Listing(as_text(path), distinct(entries, images), [entry.id for entry in unseen])


def _files(path: str, images: str) -> list[str]:
    """Return the files that a path or pattern names."""
    if os.path.lexists(path):
        return [path]
    found: dict[str, None] = {}
    missing: dict[str, None] = {}
    for pattern in _braces(path, images):
        plain = os.path.lexists(pattern) or not re.search(r"[*?\[]", pattern)
        matches = [pattern] if plain else _matches(pattern, images)
        found |= dict.fromkeys(matches)
        missing |= dict.fromkeys(match for match in matches if plain and not os.path.lexists(match))
    if len(found) == len(missing):
        raise ConfigError(f"images={as_text(images)} names nothing that exists; give {FORMS}")
    return list(found)  # one of several names that does not exist is listed as missing


def _named(files: Sequence[str], unseen: list[Entry]) -> Iterator[Entry]:
    """List what files hold: shards, lists (where all files are lists), else images."""
    suffixes = [Path(file).suffix.lower() for file in files]
    lists = all(suffix in READERS for suffix in suffixes)
    for file, suffix in zip(files, suffixes, strict=True):
        if file.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
            raise ConfigError(f"{as_text(file)} is a compressed tar, where no member can be found alone; unpack it")
        if lists:
            yield from listed(file)
        elif suffix == ".tar":
            entries, fault = members(file)
            if fault:
                unseen.append(Entry(as_text(file), file, fault=fault))
            yield from entries
        else:
            yield file_entry(file)


def _walk(root: str, unseen: list[Entry]) -> Iterator[Entry]:
    """List a folder, what is really in it before what links lead to."""
    above = os.path.realpath(root)
    seen: set[tuple[int, int]] = set()
    linked = [root]
    for start in linked:
        inside = [start]
        if start is not root and f"{above}/".startswith(f"{os.path.realpath(start).rstrip('/')}/"):
            continue  # a link to a folder that holds the one asked for
        while inside:
            folder = inside.pop()
            try:
                about = os.stat(folder)  # noqa: PTH116
                if (about.st_dev, about.st_ino) in seen:
                    continue
                seen.add((about.st_dev, about.st_ino))
                files, folders, links = _contents(folder)
            except OSError as error:
                reason = f"the folder cannot be read ({error.strerror})"
                unseen.append(Entry(as_text(folder), folder, fault=reason))
                continue
            yield from files
            inside += reversed(folders)
            linked += links


def _contents(folder: str) -> tuple[list[Entry], list[str], list[str]]:
    """Return the files of a folder, its folders, and the links to folders in it."""
    files, folders, links = [], [], []
    with os.scandir(folder) as found:
        there = sorted((one for one in found if not one.name.startswith(".")), key=lambda one: one.name)
    for one in there:
        if one.is_dir(follow_symlinks=False):
            folders.append(one.path)
        elif one.is_symlink() and os.path.isdir(one.path):  # noqa: PTH112
            links.append(one.path)
        else:
            try:
                files.append(file_entry(one.path, found=one.stat()))
            except OSError:
                files.append(file_entry(one.path))  # says why
    return files, folders, links


def _matches(pattern: str, images: str) -> list[str]:
    """Return the files that match a pattern, in order; `**` follows no links, so that loops end."""
    parts = pattern.split("/")
    wild = next(at for at, part in enumerate(parts) if re.search(r"[*?\[]", part))
    root, rest = "/".join(parts[:wild]) or "/", "/".join(parts[wild:])
    if parts[-1] == "**":  # folders alone, before Python 3.13
        rest += "/*"
    allowed = any(part.startswith(".") for part in parts[wild:])
    try:
        found = sorted(str(path) for path in Path(root).glob(rest))
    except (ValueError, NotImplementedError, IndexError, re.error) as error:
        raise ConfigError(f"images={as_text(images)} is no pattern ({error}); give {FORMS}") from None
    shown = len(root.rstrip("/")) + 1
    return [
        path
        for path in found
        if not os.path.isdir(path)  # noqa: PTH112
        and (allowed or not any(part.startswith(".") for part in path[shown:].split("/")))
    ]


def _braces(pattern: str, images: str) -> Iterator[str]:
    """Write out `{0000..0009}` and `{a,b}`, as a shell does."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = []
    for at, piece in enumerate(pieces):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if at % 2 == 0:
            choices.append([piece])
        elif ends is not None:
            first, last = int(ends[1]), int(ends[2])
            wide = max(len(end) for end in ends.groups()) if ends[1][0] == "0" or ends[2][0] == "0" else 0
            step = 1 if last >= first else -1
            numbers = range(first, last + step, step)[: _MOST + 1]
            choices.append([str(number).zfill(wide) for number in numbers])
        else:
            choices.append(piece.split(",") if "," in piece else [f"{{{piece}}}"])
    if math.prod(map(len, choices)) > _MOST:
        raise ConfigError(f"images={as_text(images)}: its braces stand for more than {_MOST:,} names; give a pattern")
    return ("".join(chosen) for chosen in itertools.product(*choices))
