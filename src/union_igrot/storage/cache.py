"""The cache folder: where it is, what it holds, and how it is kept below its limit.

Under the root are `features/<fingerprint>`, the feature stores, and `onnx/<fingerprint>`, exported models. Earlier
versions also wrote folders in `indexing` and `vectors`; they are listed and can be pruned.
"""

import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from safetensors import SafetensorError, safe_open

from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.files import log, move_aside, write_atomic
from union_igrot.storage.locks import acquire_exclusive, is_locked, lock_path
from union_igrot.storage.sizes import format_size, parse_size

Part = Literal["features", "indexing", "vectors", "onnx"]
PARTS: Final[tuple[Part, ...]] = ("features", "indexing", "vectors", "onnx")
ADVICE: Final = "set cache_dir or UNION_CACHE to a folder on another disk"

_FINGERPRINT: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_DISK_FULL: Final = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk usage of one folder of the cache.

    Attributes:
        fingerprint: Name of the folder.
        bytes: Size of all its files.
        entries: Rows in its shards; a key stored twice counts twice.
        last_used: When it was last opened, added to or closed, in seconds since 1970.
        backbone: Name of the backbone or of the index; empty if not recorded.
        dtype: Type of the stored numbers; empty if it cannot be read.
        in_use: Whether a living process has it open.
        part: `features` or `onnx`, or `indexing` or `vectors` of an earlier version.
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
    """Return the cache folder: `$UNION_CACHE`, else `~/.cache/union-igrot`."""
    chosen = Path(os.environ.get("UNION_CACHE") or "~/.cache/union-igrot")
    try:
        return chosen.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"cannot find the home folder of the cache folder {chosen}; {ADVICE}") from error


def chosen_limit(setting: str | int | None = None) -> int | None:
    """Return the limit of the cached features in bytes: the setting, else `$UNION_CACHE_LIMIT`, else None."""
    if setting is not None:
        return parse_size(setting)
    text = os.environ.get("UNION_CACHE_LIMIT")
    try:
        return parse_size(text) if text else None
    except ConfigError as error:
        raise ConfigError(f"UNION_CACHE_LIMIT: {error}") from None


def feature_folder(root: Path, fingerprint: str) -> Path:
    """Return the folder of a fingerprint's features; a ConfigError if it cannot name a folder."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise ConfigError(f"invalid fingerprint: {fingerprint!r} (expected 1 to 128 letters, digits, '_' and '-')")
    return root / "features" / fingerprint


def write_cached(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file of the cache atomically; a DataError if the disk is full or cannot be written."""
    try:
        write_atomic(path, pieces)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise DataError(f"cannot write to {path.parent} ({error.strerror}); {ADVICE}") from error
        needed, free = sum(map(len, pieces)), "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free:,}"
        raise DataError(
            f"no room in {path.parent} for a file of {needed:,} bytes ({error.strerror}; {free} bytes are free); "
            f"{ADVICE}, or prune the cache; files written before are unharmed"
        ) from error


def check_manifest(path: Path, expected: Mapping[str, str | int], notes: Mapping[str, str] | None = None) -> None:
    """Compare a folder's manifest with the expected values; write it, with notes, if it is missing or damaged.

    Raises:
        ConfigError: If a value differs.
        DataError: If it cannot be read or written.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not found.keys() >= expected.keys():
            raise ValueError(f"an object with {sorted(expected)} expected")
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the disk and the permissions") from error
    except ValueError as error:
        move_aside(path, error)
        found = None
    if found is None:
        write_cached(path, [json.dumps({**expected, **(notes or {})}).encode()])
    elif any(found[name] != value for name, value in expected.items()):
        values = {name: found[name] for name in expected}
        raise ConfigError(f"{path.parent} has {values}, not {dict(expected)}; use these values or another fingerprint")


def usage(root: Path, parts: Sequence[Part] = ("features",)) -> list[Usage]:
    """List the folders of the cache, the least recently used first."""
    found = []
    for part in parts:
        inside = (root / part).iterdir() if (root / part).is_dir() else ()
        for folder in [path for path in inside if path.is_dir() and _FINGERPRINT.fullmatch(path.name)]:
            try:
                found.append(_measure(folder, part))
            except FileNotFoundError:  # removed by another process in the meantime
                continue
            except PermissionError:
                log.warning("%s is not counted: it belongs to another user and cannot be read", folder)
    return sorted(found, key=lambda entry: (entry.last_used, entry.fingerprint))


def prune(
    root: Path, max_bytes: int, older_than: float | int = 0, parts: Sequence[Part] = ("features",)
) -> list[Usage]:
    """Remove the least recently used folders until the rest fits.

    A folder that a living process has open is never removed, so more than `max_bytes` may remain.

    Args:
        root: The cache folder.
        max_bytes: What may remain, in bytes. 0 removes everything that is not in use.
        older_than: Remove only what was not used for this many seconds.
        parts: What is counted and removed.

    Returns:
        The removed folders.

    Raises:
        ConfigError: If `max_bytes` is negative.
        DataError: If a folder cannot be removed.
    """
    if max_bytes < 0:
        raise ConfigError(f"invalid value for max_bytes: {max_bytes} (expected 0, which keeps nothing, or more)")
    for part in PARTS:
        for leftover in (root / part).glob("*.pruned"):  # of a prune that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    entries = usage(root, parts)
    total = sum(entry.bytes for entry in entries)
    removed = []
    latest = time.time() - older_than
    for entry in entries:
        if total <= max_bytes or entry.last_used > latest:
            break
        if _remove(root / entry.part / entry.fingerprint):
            removed.append(entry)
            total -= entry.bytes
    return removed


def make_room(root: Path, needed: int, limit: int) -> int:
    """Remove the least recently used features that are not in use, to write `needed` bytes below a limit.

    Returns:
        The size after the write; above the limit if the rest is in use.
    """
    size = _feature_bytes(root) + needed
    if size <= limit:
        return size
    try:
        removed = prune(root, max(0, limit - needed))
    except DataError as error:  # not a reason to fail
        log.warning("the cache has reached its limit of %s: %s", format_size(limit), error)
        removed = []
    for entry in removed:
        log.warning(
            "the cache has reached its limit of %s: removed the features of %s, the least recently used (%s)",
            format_size(limit),
            entry.backbone or entry.fingerprint,
            format_size(entry.bytes),
        )
    return _feature_bytes(root) + needed


def _feature_bytes(root: Path) -> int:
    """Return the size of all features, without opening a file."""
    total = 0
    with suppress(FileNotFoundError):
        for folder in (path for path in (root / "features").iterdir() if path.is_dir()):
            with suppress(FileNotFoundError, PermissionError), os.scandir(folder) as files:
                for file in files:
                    with suppress(FileNotFoundError):  # renamed or removed by another process
                        total += file.stat().st_size
    return total


def _measure(folder: Path, part: Part) -> Usage:
    size = entries = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # renamed or removed by another process
            size += path.stat().st_size
            if path.suffix == ".safetensors":
                entries += _rows(path)
    lock = lock_path(folder)
    used = (lock if lock.exists() else folder).stat().st_mtime
    notes = _manifest(folder)
    name = notes.get("backbone" if part == "features" else "index", "")
    return Usage(folder.name, size, entries, used, name, notes.get("dtype", ""), is_locked(lock), part)


def _manifest(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / "manifest.json").read_bytes())
        return {name: str(value) for name, value in dict(found).items()}
    except (OSError, ValueError, TypeError):  # damaged: written again when the store is next opened
        return {}


def _rows(path: Path) -> int:
    try:
        with safe_open(path, framework="np") as file:
            return int(file.get_slice("digests").get_shape()[0])
    except SafetensorError:  # damaged: reported and moved aside when the store is next opened
        return 0


def _remove(folder: Path) -> bool:
    """Remove a folder unless a living process has it open."""
    try:
        held = acquire_exclusive(lock_path(folder), required=True)
        if held is None:
            return False
        with held:
            doomed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.pruned")
            try:
                folder.rename(doomed)  # at once: a killed prune leaves no half of a folder
            except FileNotFoundError:  # another prune was faster
                return False
            with suppress(FileNotFoundError):  # another prune removes it, too
                shutil.rmtree(doomed)
    except OSError as error:
        raise DataError(f"cannot remove {folder} ({error.strerror}); check the permissions") from error
    return True
