"""Result rows as JSON and CSV, metrics query by query, and files that are never left half-written.

Knows the layout of a result row. Does not know how a metric came about.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.storage.atomic import write_atomic


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json` (whole rows) and `results.csv` (a line a metric).

    Args:
        folder: An existing folder.
        rows: Result rows of any benchmarks and methods.
    """
    write_atomic(folder / "results.json", json.dumps(_without_nan(list(rows)), indent=2, allow_nan=False) + "\n")
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
    write_atomic(folder / "results.csv", table.getvalue())


def _without_nan(value: Any) -> Any:
    """Put None for what has no value: JSON knows no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def _scores_path(folder: Path, benchmark: str, split: str) -> Path:
    return folder / f"queries-{benchmark}-{split}.safetensors"


def write_query_values(
    folder: Path, benchmark: str, split: str, values: Mapping[str, Mapping[str, Tensor]], identity: str
) -> None:
    """Write every query's metrics under every method, so that two runs can be compared query by query.

    Args:
        folder: An existing folder.
        benchmark: Name of the benchmark.
        split: Name of the split.
        values: By method and metric, one value a query.
        identity: Hash of the queries, so that only the same ones are ever compared.
    """
    flat = {f"{method}/{metric}": x.contiguous() for method, part in values.items() for metric, x in part.items()}
    path = _scores_path(folder, benchmark, split)
    write_atomic(path, lambda temporary: save_file(flat, temporary, metadata={"queries": identity}))


def read_query_values(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read what `write_query_values` wrote.

    Returns:
        The hash of the queries, and values by `method/metric`.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as held:
            identity = (held.metadata() or {}).get("queries", "")
            return identity, {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); evaluate the run again") from None
