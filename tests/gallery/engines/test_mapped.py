"""A Lance table's vectors as mapped files: written once, kept while they are used, and what goes wrong with them."""

import os
import time
from pathlib import Path

import pytest
import torch

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.factory import open_index
from union_igrot.storage.cache import PARTS, prune, usage

pytest.importorskip("lance", reason='the extra "gallery" is not installed')
from lance_tables import made, some
from union_igrot.gallery.engines import lance as engine, mapped


def mapped_files(uri):
    return {path.name: path.stat().st_ino for path in mapped.folder_of(uri).glob("*.rows")}


def test_after_a_full_disk_the_same_index_searches_again(uri, monkeypatch):
    index = made(uri)
    for step in range(3):
        index.upsert(some([f"a{step}"], seed=step))
    real, failed = mapped._write, []

    def once(*given):
        if len(failed) == 1:
            failed.append(1)
            raise OSError(28, "No space left on device")
        failed.append(0)
        return real(*given)

    monkeypatch.setattr(mapped, "_write", once)
    with pytest.raises(DataError, match="has no room"):
        index.search(torch.ones(1, 4), 3)
    assert len(index.search(torch.ones(1, 4), 3)[0].ids) == 3


def test_vectors_are_mapped_once_and_by_whoever_asks(uri):
    index = made(uri)
    index.upsert(some([f"a{i}" for i in range(20)]))
    index.search(torch.ones(1, 4), 1)
    first = mapped_files(uri)
    assert len(first) == 1
    open_index(uri).search(torch.ones(1, 4), 1)
    assert mapped_files(uri) == first
    index.upsert(some(["b", "a3"], seed=1))
    index.delete(["a4"])
    index.search(torch.ones(1, 4), 1)
    both = mapped_files(uri)
    assert len(both) == 2  # only what is new was written
    assert first.items() <= both.items()
    index.optimize()
    (hits,) = index.search(torch.ones(1, 4), 30)
    assert len(hits.ids) == 20
    after = mapped_files(uri)
    assert len(after) == 1  # of the one file that the table now has
    assert not after.keys() & both.keys()


def test_a_reader_of_an_older_version_has_all_of_it(uri):
    index = made(uri)
    index.upsert(some("abcdef"))
    with engine.LanceIndex(uri, dim=None, metadata=None, create=False) as old:
        table, layout = old._laid_out()
        index.delete(list("bcd"))
        index.search(torch.ones(1, 4), 1)  # writes the mapped file, from the newer version
        (part,) = layout.parts()
        assert torch.equal(part[layout.places], some("abcdef").vectors)
        assert table.count_rows() == 6


def test_mapped_files_that_are_broken_left_over_or_foreign_do_no_harm(uri):
    index = made(uri)
    index.upsert(some("abc"))
    expected = index.search(torch.ones(1, 4), 3)
    folder = mapped.folder_of(uri)
    (path,) = folder.glob("*.rows")
    path.write_bytes(b"short")
    old, young = folder / "x.rows.0123.tmp", folder / "y.rows.4567.tmp"
    for left in (old, young, folder / "stale.rows"):
        left.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    found = open_index(uri).search(torch.ones(1, 4), 3)
    assert found[0].ids == expected[0].ids
    assert torch.equal(found[0].scores, expected[0].scores)
    assert {one.name for one in folder.iterdir()} == {path.name, young.name, "manifest.json"}


def test_mapped_files_give_way_to_whoever_makes_room(uri, monkeypatch):
    root = mapped.folder_of(uri).parent.parent
    index = made(uri)
    index.upsert(some("abc"))
    expected = index.search(torch.ones(1, 4), 3)[0].ids
    (kept,) = usage(root, PARTS)
    assert (kept.part, kept.dtype, kept.backbone) == ("vectors", "float32", uri)
    assert kept.bytes > 48
    assert kept.in_use
    assert prune(root, 0, parts=PARTS) == []
    index.close()
    assert [one.part for one in prune(root, 0, parts=PARTS)] == ["vectors"]
    assert index.search(torch.ones(1, 4), 3)[0].ids == expected  # written again
    real, lost = torch.from_file, []

    def lose_it_first(path, **options):
        if not lost:
            lost.append(path)
            Path(path).unlink()
        return real(path, **options)

    monkeypatch.setattr(torch, "from_file", lose_it_first)
    assert open_index(uri).search(torch.ones(1, 4), 3)[0].ids == expected  # written again, and again
    assert lost


def test_a_cache_that_cannot_be_written_is_one_line(uri, tmp_path, monkeypatch):
    index = made(uri)
    index.upsert(some("abc"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNION_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="UNION_CACHE"):
        open_index(uri).search(torch.ones(1, 4), 1)
    monkeypatch.setenv("UNION_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(ConfigError, match="needs a home folder"):
        open_index(uri)


def test_a_full_disk_is_said_and_leaves_nothing(uri, monkeypatch):
    index = made(uri)
    index.upsert(some("abc"))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"keeps 48 bytes of vectors in .*, which has no room; set UNION_CACHE"):
        index.search(torch.ones(1, 4), 1)
    assert mapped_files(uri) == {}
    monkeypatch.undo()
