"""`union-cache` on small caches."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from small_world import LinearBackbone
from union_igrot.cli import cache as command
from union_igrot.cli.cache import main as cache
from union_igrot.cli.config import compose, plain
from union_igrot.errors import ConfigError
from union_igrot.experiment import open_extractor
from union_igrot.features.store import FeatureStore
from union_igrot.storage.cache import usage
from union_igrot.types import Features


def fill(root: Path, fingerprint: str, rows: int, age: float, **options) -> None:
    with FeatureStore(root, fingerprint, **options) as store:
        store.add([str(i) for i in range(rows)], Features(torch.zeros(rows, 2500)))
    used = time.time() - age
    os.utime(root / "features" / f"{fingerprint}.lock", (used, used))


@pytest.fixture
def root(tmp_path):
    """Three stores of 0.1, 0.2 and 0.3 MB, last used 40, 20 and 2 days ago."""
    for number, days in ((1, 40), (2, 20), (3, 2)):
        fill(tmp_path, f"print-{number}", 10 * number, days * 86_400 + 60, backbone=f"model-{number}")
    return tmp_path


def run(*arguments: str, code: int = 0) -> None:
    """Call the command without the time that Hydra takes."""
    config = compose("cache", list(arguments))
    if code == 0:
        command.cache(config, Path())
        return
    with pytest.raises(SystemExit) as stopped:
        command.cache(config, Path())
    assert stopped.value.code == code


def left(root: Path) -> list[str]:
    return sorted(entry.backbone for entry in usage(root))


def test_the_table_shows_kind_size_and_last_use(root, capsys):
    cache([f"cache_dir={root}"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "model-" in line]
    assert [next(w for w in row.split() if w.startswith("model")) for row in rows] == ["model-3", "model-2", "model-1"]
    assert "30" in rows[0]
    assert "2 days ago" in rows[0]
    assert re.search(r"100\.\d KB", rows[2])
    assert "40 days ago" in rows[2]
    assert "features float32" in rows[1]
    assert "in 3 folders" in lines[-1]
    assert "free on the disk" in lines[-1]
    assert left(root) == ["model-1", "model-2", "model-3"]


def test_an_empty_cache(tmp_path, capsys):
    run(f"cache_dir={tmp_path / 'none'}")
    assert capsys.readouterr().out.strip().endswith("0 B in 0 folders")
    assert not (tmp_path / "none").exists()


def test_cache_and_limit_from_the_environment(root, monkeypatch, capsys):
    monkeypatch.setenv("UNION_CACHE", str(root))
    monkeypatch.setenv("UNION_CACHE_LIMIT", "5GB")
    run()
    assert "limit 5.0 GB" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "remaining"),
    [
        (["prune=all"], []),
        (["prune=0"], []),
        (["prune=350KB"], ["model-3"]),
        (["prune=0.55 MB"], ["model-2", "model-3"]),
        (["prune=1GB"], ["model-1", "model-2", "model-3"]),
        (["older_than=30d"], ["model-2", "model-3"]),
        (["older_than=1w"], ["model-3"]),
        (["prune=0", "older_than=30d"], ["model-2", "model-3"]),
        (["prune=350KB", "older_than=30d"], ["model-2", "model-3"]),
    ],
)
def test_pruning(root, capsys, arguments, remaining):
    run(f"cache_dir={root}", *arguments)
    assert f"removed {3 - len(remaining)} folder" in capsys.readouterr().out
    assert left(root) == remaining


def test_an_invalid_limit_removes_nothing(root, monkeypatch, capsys):
    monkeypatch.setenv("UNION_CACHE_LIMIT", "plenty")
    before = left(root)
    with pytest.raises(SystemExit):
        cache([f"cache_dir={root}", "prune=all"])
    assert "UNION_CACHE_LIMIT: invalid size: 'plenty'" in capsys.readouterr().err
    assert left(root) == before


def test_folders_in_use_are_kept_and_reported(root, capsys):
    code = (
        "import sys; from pathlib import Path; from union_igrot.storage.locks import acquire_shared, lock_path\n"
        "held = acquire_shared(lock_path(Path(sys.argv[1], 'features', 'print-1')))\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "open\n"
        run(f"cache_dir={root}", "prune=all", code=1)
        printed = capsys.readouterr().out
        assert left(root) == ["model-1"]
        assert "in use" in printed
        assert "1 folder in use and kept" in printed
    finally:
        other.communicate()
    run(f"cache_dir={root}", "prune=all")
    assert left(root) == []


@pytest.mark.parametrize("part", ["indexing", "vectors"])
def test_folders_of_earlier_versions_are_listed_and_pruned(root, capsys, part):
    folder = root / part / "0123456789abcdef-fedcba9876543210"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"index": "photos.lance", "model": "m", "source": "s"}')
    (folder / "chunk").write_bytes(bytes(5000))
    run(f"cache_dir={root}")
    listed = capsys.readouterr().out
    for text in (part, "photos.lance", "5.1 KB"):
        assert text in listed
    run(f"cache_dir={root}", "prune=all")
    assert not folder.exists()


@pytest.mark.slow
def test_commands_pass_limit_and_backbone_to_the_store(tmp_path):
    settings = ["cache_limit=1MB", f"cache_dir={tmp_path}", "progress=false"]
    store = open_extractor(plain(compose("eval", settings)), LinearBackbone()).store
    assert (store.limit, store.backbone, store.root) == (10**6, "linear", tmp_path)
    with pytest.raises(ConfigError, match="cache_limit: much"):
        compose("train", ["cache_limit=much"])
