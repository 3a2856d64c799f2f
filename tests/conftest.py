"""What all tests share: a cache of their own, and one small training."""

import os
from pathlib import Path

import pytest

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
    """One small training through the command, shared by all tests that only look at what it wrote."""
    place = tmp_path_factory.mktemp("small")
    settings = (*SMALL, f"cache_dir={place / 'cache'}", f"output_dir={place / 'run'}")
    train(list(settings))
    return Run(settings, place / "run")
