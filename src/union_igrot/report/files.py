"""Result rows as JSON and CSV, and files that are never left half-written.

Knows the layout of a result row. Does not know how a figure came about.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json` (whole rows) and `results.csv` (a line a figure).

    Args:
        folder: An existing folder.
        rows: Result rows of any benchmarks and methods.
    """
    write_text(folder / "results.json", json.dumps(list(rows), indent=2) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(
        ["benchmark", "split", "method", "n_queries", "n_gallery", "metric", "percent", "low95", "high95", "seed"]
    )
    for row in rows:
        head = [row[name] for name in ("benchmark", "split", "method", "n_queries", "n_gallery")]
        for name, value in row["metrics"].items():
            low, high = row["ci95"][name]
            writer.writerow([*head, name, f"{value:.4f}", f"{low:.4f}", f"{high:.4f}", row["seed"]])
    write_text(folder / "results.csv", table.getvalue())
