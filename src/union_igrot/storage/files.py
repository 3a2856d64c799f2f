"""Files that appear whole or not at all, locks that end with their process, and what a killed writer left behind.

Knows the file system. Does not know what the files hold.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from union_igrot.errors import ConfigError, DataError

ADVICE: Final = "set cache_dir or UNION_CACHE to a folder on another disk"
"""What to do about a cache folder that cannot be written."""

log: Final = logging.getLogger("union_igrot.store")

_WRITER: Final = re.compile(r".*\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,9})-[0-9a-f]{32}\.tmp", re.DOTALL)
_STALE_SECONDS: Final = 3600.0
BUSY: Final = (errno.EWOULDBLOCK, errno.EACCES)
"""How the system says that somebody else has a lock."""
_ASKED: Final = 4
_MOMENT: Final = 0.02
"""Seconds between two tries to have a lock alone; asking whether it is in use takes far less."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file that gets its name only when it is whole and on disk.

    Args:
        path: Where; a file that already stands there is replaced.
        pieces: The bytes, in order.

    Raises:
        DataError: Where the disk is full or cannot be written. Nothing is left behind, nothing else is touched.
    """
    temporary = path.with_name(f"{path.name}.{_realm()}-{os.getpid()}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        if error.errno not in _NO_ROOM:
            raise DataError(f"cannot write to {path.parent} ({error.strerror}); {ADVICE}") from error
        needed = sum(len(piece) for piece in pieces)
        raise DataError(
            f"no room in {path.parent} for a file of {needed:,} bytes ({error.strerror}; {_free(path.parent)} "
            f"bytes are free); {ADVICE}, or prune the cache; what was stored before is unharmed"
        ) from error
    except BaseException:
        _discard(temporary)
        raise


def set_aside(path: Path, reason: Exception) -> None:
    """Rename a damaged file to `*.broken`, out of the readers' way, and say so in the log.

    Raises:
        DataError: Where it cannot be renamed.
    """
    aside = path.with_name(path.name + ".broken")
    try:
        with suppress(FileNotFoundError):  # another process was faster
            path.rename(aside)
    except OSError as error:
        raise DataError(f"{path} is damaged ({reason}) and cannot be moved ({error.strerror}); delete it") from error
    log.error("%s is damaged (%s): moved aside to %s; what it held will be made anew", path, reason, aside.name)


def agree(path: Path, wanted: Mapping[str, str | int], also: Mapping[str, str] | None = None) -> None:
    """Compare a folder's manifest with what is wanted; write it where there is none or it is damaged.

    Args:
        path: The manifest.
        wanted: What it has to say.
        also: What it says besides, for people; not compared.

    Raises:
        ConfigError: Where it says something else.
        DataError: Where it cannot be read or written.
    """
    try:
        kept = json.loads(path.read_bytes())
        if not isinstance(kept, dict) or not kept.keys() >= wanted.keys():
            raise ValueError(f"an object with {sorted(wanted)} expected")
    except FileNotFoundError:
        kept = None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the disk and the permissions") from error
    except ValueError as error:
        set_aside(path, error)
        kept = None
    if kept is None:
        write_whole(path, [json.dumps({**wanted, **(also or {})}).encode()])
    elif any(kept[name] != value for name, value in wanted.items()):
        given = {name: kept[name] for name in wanted}
        raise ConfigError(
            f"{path.parent} keeps {given}, not {dict(wanted)}; ask for what it keeps, or choose another fingerprint"
        )


def sweep(folder: Path) -> None:
    """Delete temporary files whose writer is dead, or that nobody has written to for an hour."""
    for path in folder.glob("*.tmp"):
        with suppress(FileNotFoundError):  # its writer has just given it its name
            if time.time() - path.stat().st_mtime > _STALE_SECONDS or _writer_died(path):
                path.unlink()


def lock_of(folder: Path) -> Path:
    """Name a folder's lock file: beside the folder, so that removing the folder never removes the lock."""
    return folder.with_name(folder.name + ".lock")


def hold(lock: Path) -> int:
    """Take a share of a lock; the kernel gives it back however the process ends.

    Returns:
        What `let_go` needs.

    Raises:
        OSError: Where the lock file cannot be made.
    """
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s); its folder will never be pruned", lock, error.strerror)
    touch(lock)
    return held


def hold_alone(lock: Path, *, or_none: bool = True) -> int | None:
    """Take a lock for oneself, or give None at once where a living process shares it.

    Args:
        lock: The lock.
        or_none: What to do where locks do not work, as on some network file systems. True: None, as if another had
            it. False: go on without it, and warn.

    Raises:
        OSError: Where the lock file cannot be made.
    """
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    for left in reversed(range(_ASKED)):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in BUSY and left:  # maybe by somebody who only asks whether it is in use
                time.sleep(_MOMENT)
                continue
            if or_none or error.errno in BUSY:
                os.close(held)
                return None
            log.warning("%s cannot be locked (%s); see that nobody else works there meanwhile", lock, error.strerror)
            break
    return held


def in_use(lock: Path) -> bool:
    """Say whether a living process shares a lock; False where there is none or locks do not work."""
    try:
        held = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in BUSY
    finally:
        os.close(held)
    return False


def let_go(held: int, lock: Path) -> None:
    """Return a lock back and note the time."""
    touch(lock)
    os.close(held)


def touch(lock: Path) -> None:
    """Note the time of use. A lock file that somebody deleted is not worth a failed run."""
    with suppress(OSError):
        os.utime(lock)


def _discard(path: Path) -> None:
    with suppress(OSError):  # what stays is swept when the folder is next opened
        path.unlink()


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, so that it also survives a power cut."""
    held = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _realm() -> str:
    """Name the realm in which a process id means one process: the machine, and the container on it."""
    realm = platform.node()
    with suppress(OSError):  # only Linux has it
        realm += str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(realm.encode()).hexdigest()[:8]


def _writer_died(path: Path) -> bool:
    writer = _WRITER.fullmatch(path.name)
    if writer is None or writer["host"] != _realm():
        return False
    try:
        os.kill(int(writer["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, as another user
        return False
    return False
