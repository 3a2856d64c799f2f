"""Locks: exclusive, shared, and gone with their process."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from union_igrot.storage import locks
from union_igrot.storage.locks import acquire_exclusive, acquire_shared, is_locked, lock_path

HOLD = """
import sys
from pathlib import Path
from union_igrot.storage import locks
held = getattr(locks, sys.argv[1])(Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path):
    return lock_path(tmp_path / "store[1]")


@pytest.fixture
def other(lock):
    """Start a process that holds the lock."""
    started = []

    def start(kind: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, kind, str(lock)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_an_exclusive_lock_excludes_and_can_be_acquired_again(lock):
    with acquire_exclusive(lock):
        assert acquire_exclusive(lock) is None
        assert is_locked(lock)
    assert not is_locked(lock)
    held = acquire_exclusive(lock)
    held.release()
    held.release()
    assert acquire_exclusive(lock) is not None  # not assigned: collected at once
    assert not is_locked(lock)


def test_a_shared_lock_is_shared_and_excludes_an_exclusive_one(lock):
    one, alone = acquire_shared(lock)
    assert alone
    two, alone = acquire_shared(lock)
    assert not alone
    one.release()
    assert is_locked(lock)
    assert acquire_exclusive(lock) is None
    two.release()
    assert not is_locked(lock)
    assert acquire_exclusive(lock) is not None
    assert list(lock.parent.iterdir()) == [lock]


@pytest.mark.parametrize("kind", ["acquire_exclusive", "acquire_shared"])
def test_a_killed_process_leaves_no_lock(lock, other, kind):
    process = other(kind)
    assert is_locked(lock)
    assert acquire_exclusive(lock) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_locked(lock)
    held, alone = acquire_shared(lock)
    assert alone
    held.release()
    assert list(lock.parent.iterdir()) == [lock]  # also the file of the killed one


def test_a_shared_lock_waits_for_an_exclusive_one(lock, other, monkeypatch):
    monkeypatch.setattr(locks, "_WAIT_FOR_SHARED", 0.05)
    process = other("acquire_exclusive")
    with pytest.raises(OSError, match="locked by another process"):
        acquire_shared(lock)
    process.communicate()
    acquire_shared(lock)[0].release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_holds_none_of_its_parents_locks(lock, tmp_path):
    exclusive, (shared, _) = acquire_exclusive(tmp_path / "one.lock"), acquire_shared(lock)
    (wait, go), (started, start) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        own = acquire_exclusive(tmp_path / "own.lock")  # perhaps with the descriptor of a lock of the parent
        exclusive.release()
        shared.release()
        fine = own is not None and is_locked(tmp_path / "own.lock") and is_locked(lock)
        os.write(start, b"x")
        os.read(wait, 1)
        os._exit(0 if fine else 1)
    os.read(started, 1)
    assert is_locked(lock)
    exclusive.release()
    shared.release()
    assert not is_locked(lock)
    assert not is_locked(tmp_path / "one.lock")
    os.close(go)
    assert os.waitpid(child, 0)[1] == 0


def test_a_file_system_without_locks(lock, monkeypatch, caplog):
    def unsupported(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "lock_descriptor", unsupported)
    assert acquire_exclusive(lock, required=True) is None
    assert acquire_exclusive(lock) is not None
    assert acquire_shared(lock)[1]
    assert not is_locked(lock)
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_lock_that_cannot_be_opened_counts_as_locked(lock, monkeypatch):
    lock.touch()

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locks.os, "open", refused)
    assert is_locked(lock)
