"""Settings of a run that ends in seconds, and what such a run leaves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_DATA = ("data.val_queries=24", "data.queries=24", "features.workers=0", "progress=false")
SMALL = ("data.triplets=64", "data.pairs=64", "recipe.epochs=1", "strategy=cpu", *SMALL_DATA)


@dataclass(frozen=True)
class Run:
    """A finished training: the settings it was started with, and its folder."""

    settings: tuple[str, ...]
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.folder)

    def settings_for(self, folder: Path) -> list[str]:
        """The same settings for another folder."""
        return [*(s for s in self.settings if not s.startswith("output_dir=")), f"output_dir={folder}"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Everything in result rows that two equal runs have in common: all but the times."""
    return [(row["benchmark"], row["method"], row["metrics"], row["ci95"], row["by_tag"]) for row in rows]
