"""Where the store lies on disk, what it takes there, and how to make room.

Knows folders, sizes and times of use. Does not know features, and needs no torch.
"""

import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from union_igrot.errors import ConfigError, DataError
from union_igrot.store.files import ADVICE, hold_alone, lock_of

_FINGERPRINT: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one fingerprint's folder takes.

    Attributes:
        fingerprint: Name of the folder.
        bytes: Size of all its files.
        entries: Rows in its shards; a key stored twice counts twice.
        last_used: When it was last opened, added to or closed, in seconds since 1970.
    """

    fingerprint: str
    bytes: int
    entries: int
    last_used: float


def default_root() -> Path:
    """Give the cache folder: `$UNION_CACHE`, else `~/.cache/union-igrot`.

    Raises:
        ConfigError: Where it lies under a home folder that cannot be found.
    """
    chosen = Path(os.environ.get("UNION_CACHE") or "~/.cache/union-igrot")
    try:
        return chosen.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"the cache folder {chosen} needs a home folder, and there is none; {ADVICE}") from error


def folder_of(root: Path, fingerprint: str) -> Path:
    """Give the folder of a fingerprint under a root.

    Raises:
        ConfigError: Where the fingerprint cannot name a folder.
    """
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise ConfigError(
            f"the fingerprint {fingerprint!r} cannot name a folder; use 1 to 128 letters, digits, '_' and '-'"
        )
    return root / "features" / fingerprint


def usage(root: Path) -> list[Usage]:
    """List the fingerprints kept under a root, the least recently used first."""
    house = root / "features"
    if not house.is_dir():
        return []
    folders = [path for path in house.iterdir() if path.is_dir() and _FINGERPRINT.fullmatch(path.name)]
    found = []
    for folder in folders:
        with suppress(FileNotFoundError):  # removed by another process just now
            found.append(_measure(folder))
    return sorted(found, key=lambda entry: (entry.last_used, entry.fingerprint))


def prune(root: Path, max_bytes: int) -> list[Usage]:
    """Remove the least recently used fingerprints until the rest fits.

    A fingerprint that a living process has open is never removed, so that more than `max_bytes` may remain.

    Args:
        root: The cache folder.
        max_bytes: What may remain, in bytes. 0 removes everything that is not in use.

    Returns:
        What was removed.

    Raises:
        ConfigError: Where `max_bytes` is negative.
        DataError: Where a folder cannot be removed.
    """
    if max_bytes < 0:
        raise ConfigError(f"max_bytes is {max_bytes}; give 0 (keep nothing) or more")
    for leftover in (root / "features").glob("*.pruned"):  # of a prune that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    kept = usage(root)
    total = sum(entry.bytes for entry in kept)
    removed = []
    for entry in kept:
        if total <= max_bytes:
            break
        if _remove(folder_of(root, entry.fingerprint)):
            removed.append(entry)
            total -= entry.bytes
    return removed


def _measure(folder: Path) -> Usage:
    size = entries = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # named or removed by another process just now
            size += path.stat().st_size
            if path.suffix == ".safetensors":
                entries += _rows(path)
    lock = lock_of(folder)
    return Usage(folder.name, size, entries, (lock if lock.exists() else folder).stat().st_mtime)


def _rows(path: Path) -> int:
    try:
        with safe_open(path, framework="np") as file:
            return int(file.get_slice("digests").get_shape()[0])
    except SafetensorError:  # damaged: reported and moved aside when the store is next opened
        return 0


def _remove(folder: Path) -> bool:
    """Remove a fingerprint's folder unless a living process has it open."""
    lock = lock_of(folder)
    held = None
    try:
        held = hold_alone(lock)
        if held is None:
            return False
        doomed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.pruned")
        folder.rename(doomed)  # out of sight at once: a killed prune leaves no half of a folder
        shutil.rmtree(doomed)
    except FileNotFoundError:  # another prune was faster
        return False
    except OSError as error:
        raise DataError(f"cannot remove {folder} ({error.strerror}); check the permissions") from error
    finally:
        if held is not None:
            os.close(held)
    return True
