"""Files of results: `results.json`, `results.csv` and the metrics of every query."""

import csv
import io
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.evaluation.results import EvaluationResult, ScoredBenchmark
from union_igrot.storage.atomic import write_atomic


def write_results(folder: Path, result: EvaluationResult) -> None:
    """Write `results.json` (everything) and `results.csv` (a line per metric) into an existing folder."""
    write_atomic(folder / "results.json", result.to_json())
    table = io.StringIO()
    head = ["benchmark", "split", "method", "n_queries", "n_gallery", "metric", "percent", "low95", "high95", "seed"]
    writer = csv.DictWriter(table, head, lineterminator="\n")
    writer.writeheader()
    for record in result.records():
        writer.writerow(record | {name: f"{record[name]:.4f}" for name in ("percent", "low95", "high95")})
    write_atomic(folder / "results.csv", table.getvalue())


def write_query_values(folder: Path, scored: ScoredBenchmark) -> None:
    """Write every query's metrics under every method, so that `union-compare` can compare two runs.

    A hash of the queries is written too, so that only equal ones are compared.
    """
    benchmark = scored.benchmark
    flat = {
        f"{method}/{metric}": values.contiguous()
        for method, one in scored.scores.items()
        for metric, values in one.values.items()
    }
    path = folder / f"queries-{benchmark.name}-{benchmark.split}.safetensors"
    metadata = {"queries": benchmark.queries_hash()}
    write_atomic(path, lambda temporary: save_file(flat, temporary, metadata=metadata))


def read_query_values(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the hash of the queries and the values by `method/metric` that `write_query_values` wrote.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as held:
            identity = (held.metadata() or {}).get("queries", "")
            return identity, {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path} ({error}); evaluate the run again") from None
