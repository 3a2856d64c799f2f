"""Where the store lies, what it takes, and that pruning spares what is in use."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from union_igrot.errors import ConfigError
from union_igrot.features.store import FeatureStore
from union_igrot.storage.cache import default_root, prune, usage
from union_igrot.storage.locks import acquire_exclusive, is_locked
from union_igrot.types import Features


def fill(root: Path, fingerprint: str, rows: int, age: float = 0.0) -> None:
    """A closed store of some rows, last used `age` seconds ago."""
    with FeatureStore(root, fingerprint) as store:
        store.add([str(i) for i in range(rows)], Features(torch.zeros(rows, 256)))
    used = time.time() - age
    os.utime(root / "features" / f"{fingerprint}.lock", (used, used))


def test_usage_counts_bytes_and_entries_least_recently_used_first(tmp_path):
    assert usage(tmp_path) == []
    fill(tmp_path, "new", 3)
    fill(tmp_path, "old", 5, age=100)
    found = usage(tmp_path)
    assert [(entry.fingerprint, entry.entries) for entry in found] == [("old", 5), ("new", 3)]
    for entry in found:
        folder = tmp_path / "features" / entry.fingerprint
        assert entry.bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert entry.bytes > entry.entries * 1024
    assert abs(found[1].last_used - time.time()) < 60


def test_usage_survives_a_damaged_shard(tmp_path):
    fill(tmp_path, "f", 3)
    (tmp_path / "features/f/0.safetensors").write_bytes(b"torn")
    assert usage(tmp_path)[0].entries == 3


def test_prune_removes_the_least_recently_used_until_the_rest_fits(tmp_path):
    for fingerprint, age in (("a", 300), ("b", 100), ("c", 200)):
        fill(tmp_path, fingerprint, 10, age)
    size = usage(tmp_path)[0].bytes
    assert prune(tmp_path, 3 * size) == []
    assert [entry.fingerprint for entry in prune(tmp_path, size + 1)] == ["a", "c"]
    assert [entry.fingerprint for entry in usage(tmp_path)] == ["b"]
    assert FeatureStore(tmp_path, "a").missing(["1"]) == [0]


def test_prune_spares_an_open_store_and_takes_it_once_closed(tmp_path):
    fill(tmp_path, "f", 2)
    store = FeatureStore(tmp_path, "f")
    assert prune(tmp_path, 0) == []
    assert torch.equal(store.get(["0"]).pooled, torch.zeros(1, 256))
    store.close()
    assert [entry.fingerprint for entry in prune(tmp_path, 0)] == ["f"]
    assert not store.folder.exists()


def test_a_store_that_is_collected_lets_go(tmp_path):
    fill(tmp_path, "f", 2)
    store = FeatureStore(tmp_path, "f")
    del store
    assert len(prune(tmp_path, 0)) == 1


def test_who_asks_whether_it_is_in_use_keeps_nobody_from_working(tmp_path):
    lock, stop = tmp_path / "x.lock", threading.Event()
    lock.touch()

    def ask():
        while not stop.is_set():
            is_locked(lock)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            held = acquire_exclusive(lock)
            assert held is not None
            held.release()
    finally:
        stop.set()
        asking.join()


def test_two_prunes_at_once_remove_no_more_than_one(tmp_path, monkeypatch):
    for fingerprint, age in (("a", 300), ("b", 200), ("c", 100)):
        fill(tmp_path, fingerprint, 10, age)
    size, real = usage(tmp_path)[0].bytes, shutil.rmtree

    def helped(path, **options):
        monkeypatch.setattr(shutil, "rmtree", real)
        prune(tmp_path, 10**9)  # another one, which clears what it takes for the rest of a kill
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", helped)
    assert [entry.fingerprint for entry in prune(tmp_path, 2 * size)] == ["a"]
    assert [entry.fingerprint for entry in usage(tmp_path)] == ["b", "c"]


def test_prune_clears_what_a_killed_prune_left(tmp_path):
    (tmp_path / "features/f.0.pruned").mkdir(parents=True)
    (tmp_path / "features/f.0.pruned/x").touch()
    assert prune(tmp_path, 10**9) == []
    assert not (tmp_path / "features/f.0.pruned").exists()
    assert prune(tmp_path / "nothing", 0) == []
    with pytest.raises(ConfigError, match="max_bytes"):
        prune(tmp_path, -1)


def test_default_root(monkeypatch):
    monkeypatch.setenv("UNION_CACHE", "/some/where")
    assert default_root() == Path("/some/where")
    monkeypatch.setenv("UNION_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_root() == Path("/home/someone/.cache/union-igrot")
    monkeypatch.setenv("UNION_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ConfigError, match="UNION_CACHE"):
        default_root()


def test_a_root_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/features/f \(Not a directory\).*UNION_CACHE"):
        FeatureStore(tmp_path / "file", "f")


def test_temporary_files_of_living_writers_are_kept(tmp_path):
    with FeatureStore(tmp_path, "f") as store:
        for name in ("new.tmp", "old.tmp"):
            (store.folder / name).touch()
        os.utime(store.folder / "old.tmp", (0, time.time() - 3700))
        FeatureStore(tmp_path, "f").close()
        assert [path.name for path in store.folder.glob("*.tmp")] == ["new.tmp"]
    FeatureStore(tmp_path, "f").close()
    assert not list(store.folder.glob("*.tmp"))


def test_listing_and_pruning_need_no_torch():
    code = "import sys, union_igrot.storage.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
