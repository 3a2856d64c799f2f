"""What all tests share: a cache of their own, and one small training."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from small_runs import SMALL, Run
from union_igrot.cli.train import main as train

# Set before anything imports a hub: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the features of whoever runs it."""
    monkeypatch.setenv("UNION_CACHE", str(tmp_path / "own-cache"))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One small training through the command, shared by all tests of all workers that only look at what it wrote."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    settings = (*SMALL, f"cache_dir={place / 'small-cache'}", f"output_dir={place / 'small-run'}")
    finished = place / "small-run-finished"
    with FileLock(place / "small-run.lock"):
        if not finished.exists():
            train(list(settings))
            finished.touch()
    return Run(settings, place / "small-run")
