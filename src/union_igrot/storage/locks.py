"""File locks that end with their process, exclusive or shared.

An exclusive lock is a lock on a file. A shared lock is a file of its own beside it, `<name>.<random>.user`, which its
process keeps locked: the lock is in use as long as one of these is. Users are added and counted under the exclusive
lock. All are locks of the operating system (`filelock`), so a killed process leaves none behind.
"""

import errno
import glob
import itertools
import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from filelock import lock_descriptor

log: Final = logging.getLogger("union_igrot.storage")

_POLL_SECONDS: Final = 0.01
_WAIT_FOR_EXCLUSIVE: Final = 0.1  # the lock is also taken for a moment to look at it
_WAIT_FOR_SHARED: Final = 60.0  # a prune that removes a large folder
_numbers: Final = itertools.count()
_held: Final[dict[int, int]] = {}  # descriptors of this process by number; a descriptor alone may be used again


def _close_in_child() -> None:
    """Close the parent's locks in a forked child: a decoding worker outlives a killed run by seconds."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@final
class HeldLock:
    """A lock of this process, until it is released or collected, or the process ends. A forked child has none."""

    def __init__(self, descriptor: int, lock: Path | None = None, user: Path | None = None) -> None:
        number = next(_numbers)
        _held[number] = descriptor
        self._release = weakref.finalize(self, _release, number, lock, user)

    def release(self) -> None:
        """Let other processes have it; a second call does nothing."""
        self._release()

    def __enter__(self) -> "HeldLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _release(number: int, lock: Path | None, user: Path | None) -> None:
    descriptor = _held.pop(number, None)
    if descriptor is None:  # in a forked child
        return
    if lock is not None:
        note_use(lock)
    os.close(descriptor)
    if user is not None:
        with suppress(OSError):
            user.unlink()


def lock_path(folder: Path) -> Path:
    """Return a folder's lock file: beside the folder, so that it remains if the folder is removed."""
    return folder.with_name(folder.name + ".lock")


def acquire_exclusive(
    lock: Path, *, wait: float | int = _WAIT_FOR_EXCLUSIVE, required: bool = False
) -> HeldLock | None:
    """Acquire a lock for this process alone; None if another process holds or shares it.

    Args:
        lock: The lock file; made if absent.
        wait: Seconds to wait for it.
        required: Whether a file system without locks counts as locked by another process. Otherwise a warning is
            logged and the lock counts as acquired.
    """
    held = _acquire(lock, wait, required=required)
    if held is not None and _users(lock, remove_dead=True):
        held.release()
        return None
    return held


def acquire_shared(lock: Path, if_alone: Callable[[], None] | None = None) -> tuple[HeldLock, bool]:
    """Acquire a lock together with any number of other processes, and note the time of use.

    Args:
        lock: The lock file; made if absent.
        if_alone: Called if no other process shares the lock, and before any other can.

    Returns:
        The lock, and whether no other process shared it.

    Raises:
        OSError: If the lock file cannot be made, or another process holds the lock for a minute.
    """
    exclusive = _acquire(lock, _WAIT_FOR_SHARED)
    if exclusive is None:
        raise OSError(errno.EAGAIN, f"{lock} is locked by another process")
    with exclusive:
        alone = not _users(lock, remove_dead=True)
        if alone and if_alone is not None:
            if_alone()
        user = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}.user")
        descriptor = os.open(user, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # a file system without locks; `_acquire` has warned
            lock_descriptor(descriptor, poll_interval=_POLL_SECONDS)
        note_use(lock)
        return HeldLock(descriptor, lock, user), alone


def is_locked(lock: Path) -> bool:
    """Return whether a living process holds or shares a lock; False if it cannot be told."""
    return bool(_users(lock)) or (lock.exists() and _is_held(lock))


def note_use(lock: Path) -> None:
    """Set the time of use. A lock file that somebody deleted is not worth a failed run."""
    with suppress(OSError):
        os.utime(lock)


def _acquire(lock: Path, wait: float | int, *, required: bool = False) -> HeldLock | None:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + wait
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() > end:
                os.close(descriptor)
                return None
            time.sleep(_POLL_SECONDS)
    except OSError as error:  # some network file systems have no locks
        if required:
            os.close(descriptor)
            return None
        log.warning("%s cannot be locked (%s); make sure that no other process works there", lock, error.strerror)
    return HeldLock(descriptor)


def _users(lock: Path, *, remove_dead: bool = False) -> list[Path]:
    living = []
    for user in lock.parent.glob(f"{glob.escape(lock.name)}.*.user"):
        if _is_held(user):
            living.append(user)
        elif remove_dead:
            with suppress(OSError):
                user.unlink()
    return living


def _is_held(path: Path) -> bool:
    """Return whether a living process has a file locked."""
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        return not lock_descriptor(descriptor, blocking=False)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)
