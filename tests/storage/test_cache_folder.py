"""The cache folder: usage, pruning that spares what is in use, and the limit."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from union_igrot.errors import ConfigError, DataError
from union_igrot.features.store import FeatureStore
from union_igrot.storage import cache
from union_igrot.storage.cache import chosen_limit, default_root, make_room, prune, usage
from union_igrot.storage.locks import acquire_exclusive, is_locked
from union_igrot.types import Features


def fill(root: Path, fingerprint: str, rows: int = 10, age: float | int = 0, **options) -> None:
    """Make a closed store, last used `age` seconds ago."""
    with FeatureStore(root, fingerprint, **options) as store:
        store.add([str(i) for i in range(rows)], Features(torch.zeros(rows, 256)))
    used = time.time() - age
    os.utime(root / "features" / f"{fingerprint}.lock", (used, used))


def there(root: Path) -> list[str]:
    return sorted(entry.fingerprint for entry in usage(root))


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


def test_checking_a_lock_keeps_nobody_from_acquiring_it(tmp_path):
    lock, stop = tmp_path / "x.lock", threading.Event()
    lock.touch()

    def check():
        while not stop.is_set():
            is_locked(lock)

    checking = threading.Thread(target=check)
    checking.start()
    try:
        for _ in range(50):
            held = acquire_exclusive(lock)
            assert held is not None
            held.release()
    finally:
        stop.set()
        checking.join()


def test_two_prunes_at_once_remove_no_more_than_one(tmp_path, monkeypatch):
    for fingerprint, age in (("a", 300), ("b", 200), ("c", 100)):
        fill(tmp_path, fingerprint, 10, age)
    size, real = usage(tmp_path)[0].bytes, shutil.rmtree

    def interrupted(path, **options):
        monkeypatch.setattr(shutil, "rmtree", real)
        prune(tmp_path, 10**9)  # another one, which removes what a killed prune would leave
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
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
        new, old = (f"{name}.{'0f' * 16}.tmp" for name in ("new", "old"))
        for name in (new, old):
            (store.folder / name).touch()
        os.utime(store.folder / old, (0, time.time() - 3700))
        FeatureStore(tmp_path, "f").close()
        assert [path.name for path in store.folder.glob("*.tmp")] == [new]
    FeatureStore(tmp_path, "f").close()
    assert not list(store.folder.glob("*.tmp"))


def test_listing_and_pruning_need_no_torch():
    code = "import sys, union_igrot.storage.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_addition_that_would_exceed_the_limit_removes_the_least_recently_used(tmp_path, caplog):
    for name, age in (("old", 300), ("older", 400), ("new", 100)):
        fill(tmp_path, name, age=age, backbone=f"the {name} one")
    size = usage(tmp_path)[0].bytes
    with FeatureStore(tmp_path, "mine", limit=3 * size + 500) as store:
        assert there(tmp_path) == ["mine", "new", "old", "older"]  # opening removes nothing
        store.add([str(i) for i in range(10)], Features(torch.zeros(10, 256)))
        assert there(tmp_path) == ["mine", "new", "old"]
        assert "removed the features of the older one" in caplog.text
        store.add([str(i) for i in range(10, 20)], Features(torch.zeros(10, 256)))
        assert there(tmp_path) == ["mine", "new"]
        assert sum(entry.bytes for entry in usage(tmp_path)) <= 3 * size + 500
        assert len(store.missing([str(i) for i in range(20)])) == 0


def test_what_is_in_use_is_kept_and_logged_once(tmp_path, caplog):
    with FeatureStore(tmp_path, "theirs") as theirs, FeatureStore(tmp_path, "mine", limit=3000) as mine:
        theirs.add(["a"], Features(torch.zeros(1, 256)))
        for number in range(4):
            mine.add([str(number)], Features(torch.zeros(1, 256)))
        assert there(tmp_path) == ["mine", "theirs"]
        assert mine.missing([str(number) for number in range(4)]) == []
    said = [record for record in caplog.records if "all of it is in use" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
    assert "limit of 3.0 KB" in said[0].getMessage()


def test_a_folder_of_another_user_is_not_counted(tmp_path, caplog, monkeypatch):
    """Two users may share one cache; root reads everything, so the refusal is made here."""
    fill(tmp_path, "closed", age=100)
    fill(tmp_path, "mine", age=50)
    measure = cache._measure

    def refused(folder, part):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return measure(folder, part)

    monkeypatch.setattr(cache, "_measure", refused)
    assert there(tmp_path) == ["mine"]
    assert "belongs to another user" in caplog.text

    def kept(*_):
        raise DataError("cannot remove")

    monkeypatch.setattr(cache, "prune", kept)
    assert make_room(tmp_path, 10, 5) > 10
    assert "cannot remove" in caplog.text


def test_the_name_of_the_backbone_is_listed_and_a_store_without_one_still_opens(tmp_path):
    fill(tmp_path, "named", backbone="base", dtype="float16")
    fill(tmp_path, "nameless")
    found = {entry.fingerprint: entry for entry in usage(tmp_path)}
    assert (found["named"].backbone, found["named"].dtype) == ("base", "float16")
    assert (found["nameless"].backbone, found["nameless"].dtype) == ("", "float32")
    fill(tmp_path, "nameless", backbone="base")
    (tmp_path / "features/named/manifest.json").write_text("torn")
    assert {entry.backbone for entry in usage(tmp_path)} == {""}


def test_usage_shows_what_is_in_use_and_changes_nothing(tmp_path):
    fill(tmp_path, "closed", age=500)
    with FeatureStore(tmp_path, "open"):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
        assert {entry.fingerprint: entry.in_use for entry in usage(tmp_path)} == {"closed": False, "open": True}
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()} == before
    (tmp_path / "features" / "closed.lock").unlink()
    assert not any(entry.in_use for entry in usage(tmp_path))
    assert not (tmp_path / "features" / "closed.lock").exists()


def test_prune_spares_what_was_used_lately(tmp_path):
    for name, age in (("a", 5000), ("b", 3000), ("c", 1000)):
        fill(tmp_path, name, age=age)
    assert [entry.fingerprint for entry in prune(tmp_path, 0, older_than=4000)] == ["a"]
    assert prune(tmp_path, 10**9, older_than=0) == []
    assert [entry.fingerprint for entry in prune(tmp_path, 0, older_than=900)] == ["b", "c"]


def test_chosen_limit(monkeypatch):
    monkeypatch.delenv("UNION_CACHE_LIMIT", raising=False)
    assert chosen_limit() is None
    assert chosen_limit("1GB") == 10**9
    monkeypatch.setenv("UNION_CACHE_LIMIT", "2GB")
    assert (chosen_limit(), chosen_limit("1GB")) == (2 * 10**9, 10**9)
    monkeypatch.setenv("UNION_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match=r"UNION_CACHE_LIMIT: invalid size: 'much'"):
        chosen_limit()


SMALL_DISK = """
import sys
from pathlib import Path
import torch
from union_igrot.errors import UnionError
from union_igrot.features.store import FeatureStore
from union_igrot.types import Features

root = Path(sys.argv[1])
with FeatureStore(root, "f") as store:
    store.add(["kept"], Features(torch.ones(1, 64)))
    refused = 0
    for number in range(40):
        before = sorted(path.name for path in store.folder.iterdir())
        try:
            store.add([f"a {number}"], Features(torch.full((1, 16_000), float(number))[:, :64].repeat(200, 1)[:1]))
            store.add([f"b {number} {row}" for row in range(500)], Features(torch.full((500, 64), float(number))))
        except UnionError as error:
            refused += 1
            said = str(error)
            left = {path.name for path in store.folder.iterdir()} - set(before)
            assert not [name for name in left if not name.endswith(".safetensors")], left
    assert refused > 20
    print(said)
with FeatureStore(root, "f") as store:
    assert store.get(["kept"]).pooled.eq(1).all()
    for number in range(40):
        keys = [f"b {number} {row}" for row in range(500)]
        absent = len(store.missing(keys))
        assert absent in (0, 500)
        assert absent or store.get(keys).pooled.eq(number).all()
    assert not list(store.folder.glob("*.tmp")) + list(store.folder.glob("*.broken"))
try:
    FeatureStore(root, "another")
except UnionError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_clear_error_and_does_no_damage(tmp_path):
    """On a file system of 1 MB of its own, in a user namespace where this user may mount one."""
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    if subprocess.run([*own, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    done = subprocess.run(
        [*own, "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", SMALL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    full, unmade = (*done.stdout.splitlines(), "")[:2]
    for part in ("no room in", "bytes are free", "prune the cache", "unharmed"):
        assert part in full
    assert not unmade or "No space left on device" in unmade or "no room in" in unmade
