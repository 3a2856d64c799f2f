"""A file appears complete or not at all."""

import errno
from pathlib import Path

import pytest

from union_igrot.errors import DataError
from union_igrot.storage import files
from union_igrot.storage.files import move_aside, remove_temporary, write_atomic


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("ä\n", "ä\n".encode()),
        (b"bytes", b"bytes"),
        ([b"two", memoryview(b"parts")], b"twoparts"),
        (lambda path: path.write_bytes(b"callable"), b"callable"),
    ],
)
def test_contents(tmp_path, content, written):
    path = tmp_path / "a.txt"
    path.write_text("old and longer than the new content")
    write_atomic(path, content)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


def fail(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("content", "error"), [(fail, KeyboardInterrupt), ([b"half", "text"], TypeError), ("\ud800", UnicodeEncodeError)]
)
def test_an_interrupted_write_changes_nothing(tmp_path, content, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_atomic(path, content)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_disk_that_fails_is_an_os_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_remove_temporary_and_move_aside(tmp_path):
    ours, foreign = tmp_path / f"a.{'0f' * 16}.tmp", tmp_path / "a.tmp"
    ours.touch()
    foreign.touch()
    remove_temporary(tmp_path, all_of_them=False)
    assert ours.exists()
    remove_temporary(tmp_path, all_of_them=True)
    assert list(tmp_path.iterdir()) == [foreign]
    foreign.unlink()
    move_aside(tmp_path / "gone", ValueError("x"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").touch()
    (tmp_path / "a.broken").mkdir()
    with pytest.raises(DataError, match="delete it"):
        move_aside(tmp_path / "a", ValueError("x"))
