"""Where the store lies on disk, what it takes there, and how to make room.

The cache folder also holds what an interrupted indexing has done, `indexing/<index>-<model and source>`, locked as
`indexing/<index>.lock`, and the vectors of Lance indexes as exact search maps them, `vectors/<index>`.
Knows folders, sizes and times of use. Does not know features, and needs no torch.
"""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from safetensors import SafetensorError, safe_open

from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.files import ADVICE, hold_alone, in_use, lock_of, log
from union_igrot.storage.sizes import parse_size, show_size

Part = Literal["features", "indexing", "vectors"]
PARTS: Final[tuple[Part, ...]] = ("features", "indexing", "vectors")

_FINGERPRINT: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one folder takes.

    Attributes:
        fingerprint: Name of the folder.
        bytes: Size of all its files.
        entries: Rows in its shards; a key stored twice counts twice.
        last_used: When it was last opened, added to or closed, in seconds since 1970.
        backbone: Name of the backbone whose features these are, or of the index; empty where it was not noted.
        dtype: How numbers are kept; empty where that cannot be read.
        in_use: Whether a living process has it open.
        part: `features`; `indexing`, the work of an interrupted indexing; or `vectors`, an index's for exact search,
            which is written again when it is needed.
    """

    fingerprint: str
    bytes: int
    entries: int
    last_used: float
    backbone: str = ""
    dtype: str = ""
    in_use: bool = False
    part: Part = "features"


def default_root() -> Path:
    """Return the cache folder: `$UNION_CACHE`, else `~/.cache/union-igrot`.

    Raises:
        ConfigError: Where it lies under a home folder that cannot be found.
    """
    chosen = Path(os.environ.get("UNION_CACHE") or "~/.cache/union-igrot")
    try:
        return chosen.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"the cache folder {chosen} needs a home folder, and there is none; {ADVICE}") from error


def chosen_limit(setting: str | int | None = None) -> int | None:
    """Return the most that the cache's features may take, in bytes: the setting, else `$UNION_CACHE_LIMIT`, else None.

    Raises:
        ConfigError: Where it is no size.
    """
    if setting is not None:
        return parse_size(setting)
    told = os.environ.get("UNION_CACHE_LIMIT")
    try:
        return parse_size(told) if told else None
    except ConfigError as error:
        raise ConfigError(f"UNION_CACHE_LIMIT: {error}") from None


def folder_of(root: Path, fingerprint: str) -> Path:
    """Return the folder of a fingerprint under a root.

    Raises:
        ConfigError: Where the fingerprint cannot name a folder.
    """
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise ConfigError(
            f"the fingerprint {fingerprint!r} cannot name a folder; use 1 to 128 letters, digits, '_' and '-'"
        )
    return root / "features" / fingerprint


def usage(root: Path, parts: Sequence[Part] = ("features",)) -> list[Usage]:
    """List the folders kept under a root, the least recently used first."""
    found = []
    for part in parts:
        house = root / part
        inside = house.iterdir() if house.is_dir() else ()
        for folder in [path for path in inside if path.is_dir() and _FINGERPRINT.fullmatch(path.name)]:
            try:
                found.append(_measure(folder, part))
            except FileNotFoundError:  # removed by another process just now
                continue
            except PermissionError:
                log.warning("%s is not counted: it belongs to somebody else and cannot be read", folder)
    return sorted(found, key=lambda entry: (entry.last_used, entry.fingerprint))


def prune(
    root: Path, max_bytes: int, older_than: float | int = 0, parts: Sequence[Part] = ("features",)
) -> list[Usage]:
    """Remove the least recently used folders until the rest fits.

    One that a living process has open is never removed, so that more than `max_bytes` may remain.

    Args:
        root: The cache folder.
        max_bytes: What may remain, in bytes. 0 removes everything that is not in use.
        older_than: Only what was not used for this many seconds is removed.
        parts: What is counted and removed.

    Returns:
        What was removed.

    Raises:
        ConfigError: Where `max_bytes` is negative.
        DataError: Where a folder cannot be removed.
    """
    if max_bytes < 0:
        raise ConfigError(f"max_bytes is {max_bytes}; give 0 (keep nothing) or more")
    for part in PARTS:
        for leftover in (root / part).glob("*.pruned"):  # of a prune that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    kept = usage(root, parts)
    total = sum(entry.bytes for entry in kept)
    removed = []
    latest = time.time() - older_than
    for entry in kept:
        if total <= max_bytes or entry.last_used > latest:
            break
        if _remove(root / entry.part / entry.fingerprint, entry.part):
            removed.append(entry)
            total -= entry.bytes
    return removed


def make_room(root: Path, needed: int, limit: int) -> int:
    """Keep a cache below its limit before something is written: remove the least recently used that nobody has open.

    Args:
        root: The cache folder.
        needed: Bytes about to be written.
        limit: What the cache may take, in bytes.

    Returns:
        How many bytes the cache will take; more than the limit where all that is left is in use.
    """
    taken = _taken(root) + needed
    if taken <= limit:
        return taken
    try:
        removed = prune(root, max(0, limit - needed))
    except DataError as error:  # no reason to end what needs the room
        log.warning("the cache has reached its limit of %s: %s", show_size(limit), error)
        removed = []
    for gone in removed:
        log.warning(
            "the cache has reached its limit of %s: removed the features of %s, the least recently used (%s)",
            show_size(limit),
            gone.backbone or gone.fingerprint,
            show_size(gone.bytes),
        )
    return _taken(root) + needed


def _taken(root: Path) -> int:
    """Count the bytes of all fingerprints, without opening a file."""
    total = 0
    with suppress(FileNotFoundError):
        for folder in (path for path in (root / "features").iterdir() if path.is_dir()):
            with suppress(FileNotFoundError, PermissionError), os.scandir(folder) as files:
                for file in files:
                    with suppress(FileNotFoundError):  # named or removed by another process just now
                        total += file.stat().st_size
    return total


def _lock(folder: Path, part: Part) -> Path:
    """Name the lock of a folder; one index has one, whatever is put into it."""
    return lock_of(folder.with_name(folder.name.rpartition("-")[0]) if part == "indexing" else folder)


def _measure(folder: Path, part: Part) -> Usage:
    size = entries = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # named or removed by another process just now
            size += path.stat().st_size
            if path.suffix == ".safetensors":
                entries += _rows(path)
    lock = _lock(folder, part)
    # Work on an index has its times in the folder: the lock is shared by all that goes into it.
    used = (lock if lock.exists() and part == "features" else folder).stat().st_mtime
    said = _manifest(folder)
    name = said.get("backbone" if part == "features" else "index", "")
    return Usage(folder.name, size, entries, used, name, said.get("dtype", ""), in_use(lock), part)


def _manifest(folder: Path) -> dict[str, str]:
    try:
        said = json.loads((folder / "manifest.json").read_bytes())
        return {name: str(value) for name, value in dict(said).items()}
    except (OSError, ValueError, TypeError):  # damaged: written anew when the store is next opened
        return {}


def _rows(path: Path) -> int:
    try:
        with safe_open(path, framework="np") as file:
            return int(file.get_slice("digests").get_shape()[0])
    except SafetensorError:  # damaged: reported and moved aside when the store is next opened
        return 0


def _remove(folder: Path, part: Part) -> bool:
    """Remove a folder unless a living process has it open."""
    lock = _lock(folder, part)
    held = None
    try:
        held = hold_alone(lock)
        if held is None:
            return False
        doomed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.pruned")
        try:
            folder.rename(doomed)  # out of sight at once: a killed prune leaves no half of a folder
        except FileNotFoundError:  # another prune was faster
            return False
        with suppress(FileNotFoundError):  # another prune helps along
            shutil.rmtree(doomed)
    except OSError as error:
        raise DataError(f"cannot remove {folder} ({error.strerror}); check the permissions") from error
    finally:
        if held is not None:
            os.close(held)
    return True
