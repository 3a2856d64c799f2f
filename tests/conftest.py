"""What all tests share: a cache of their own, settings of a run that ends in seconds, and one such run."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from union_igrot.cli.train import main as train

# Set before anything imports a hub: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
SMALL_DATA = ("data.val_queries=24", "data.queries=24", "progress=false")
SMALL = ("data.triplets=64", "data.pairs=64", "recipe.epochs=1", "strategy=cpu", *SMALL_DATA)


@dataclass(frozen=True)
class Run:
    """A finished training: the settings it was started with, and its folder."""

    settings: tuple[str, ...]
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.folder / "results.json").read_text())
        return rows


def figures(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Everything in result rows that two equal runs have in common: all but the times."""
    return [(row["benchmark"], row["method"], row["metrics"], row["ci95"], row["by_tag"]) for row in rows]


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
