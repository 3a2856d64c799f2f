"""The cache's limit: room is made before it is exceeded, and never at the cost of what is in use."""

import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from union_igrot.errors import ConfigError, DataError
from union_igrot.features.store import FeatureStore
from union_igrot.storage import cache as space
from union_igrot.storage.cache import chosen_limit, make_room, prune, usage
from union_igrot.types import Features


def fill(root: Path, fingerprint: str, rows: int = 10, age: float = 0.0, **options) -> None:
    with FeatureStore(root, fingerprint, **options) as store:
        store.add([str(i) for i in range(rows)], Features(torch.zeros(rows, 256)))
    used = time.time() - age
    os.utime(root / "features" / f"{fingerprint}.lock", (used, used))


def there(root: Path) -> list[str]:
    return sorted(entry.fingerprint for entry in usage(root))


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


def test_what_is_in_use_stays_and_the_log_says_so_once(tmp_path, caplog):
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


def test_a_folder_of_somebody_else_ends_nobody_elses_work(tmp_path, caplog, monkeypatch):
    """As where two users share one cache; root reads everything, so that the refusal is made here."""
    fill(tmp_path, "closed", age=100)
    fill(tmp_path, "mine", age=50)
    measure = space._measure

    def refused(folder, part):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return measure(folder, part)

    monkeypatch.setattr(space, "_measure", refused)
    assert there(tmp_path) == ["mine"]
    assert "belongs to another user" in caplog.text

    def kept(*_):
        raise DataError("cannot remove")

    monkeypatch.setattr(space, "prune", kept)
    assert make_room(tmp_path, 10, 5) > 10
    assert "cannot remove" in caplog.text


def test_below_the_limit_nothing_is_removed(tmp_path, caplog):
    fill(tmp_path, "old", age=1000)
    fill(tmp_path, "mine", limit=10**9)
    assert there(tmp_path) == ["mine", "old"]
    assert not caplog.records
    assert make_room(tmp_path / "nothing", 5, 4) == 5


def test_a_pickled_store_keeps_its_limit_and_name(tmp_path):
    store = pickle.loads(pickle.dumps(FeatureStore(tmp_path, "f", backbone="tiny", limit=77)))
    assert (store.limit, store.backbone, store.dtype) == (77, "tiny", "float32")


def test_the_name_of_the_backbone_is_listed_and_a_store_without_one_still_opens(tmp_path):
    fill(tmp_path, "named", backbone="base", dtype="float16")
    fill(tmp_path, "nameless")
    found = {entry.fingerprint: entry for entry in usage(tmp_path)}
    assert (found["named"].backbone, found["named"].dtype) == ("base", "float16")
    assert (found["nameless"].backbone, found["nameless"].dtype) == ("", "float32")
    fill(tmp_path, "nameless", backbone="base")
    (tmp_path / "features/named/manifest.json").write_text("torn")
    assert {entry.backbone for entry in usage(tmp_path)} == {""}


def test_usage_says_what_is_in_use_and_changes_nothing(tmp_path):
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


def test_where_the_limit_comes_from(monkeypatch):
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
