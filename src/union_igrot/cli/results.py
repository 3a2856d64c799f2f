"""The end of a training and the whole of an evaluation: figures, tables, pictures, files.

Knows the names of the files in a run's folder. Does not know how figures are computed.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from union_igrot.data.transforms import open_picture
from union_igrot.encode import Encoder
from union_igrot.evaluate import evaluate
from union_igrot.model import IGROTModel
from union_igrot.report.files import write_query_values, write_results
from union_igrot.report.pictures import contact_sheet, curve_picture, read_curves
from union_igrot.report.tables import print_results
from union_igrot.types import Benchmark


def evaluate_and_report(
    model: IGROTModel, benchmarks: Sequence[Benchmark], encoder: Encoder, folder: Path, seed: int
) -> None:
    """Evaluate on each benchmark, write what was found after each, print the tables.

    Writes `results.json`, `results.csv`, `queries-<benchmark>-<split>.safetensors` (every
    query's figures), `contact-<benchmark>.png`, and `curve.png` where the folder holds a
    training's log.
    """
    rows = []
    for benchmark in benchmarks:
        found = evaluate(model, benchmark, encoder, seed)
        rows += found.rows
        write_results(folder, rows)
        values = {method: scores.values for method, scores in found.scores.items()}
        write_query_values(folder, benchmark.name, benchmark.split, values, benchmark.queries_hash())
        contact_sheet(
            folder / f"contact-{benchmark.name}.png", benchmark, found.scores["trained"].ranking, open_picture
        )
    logs = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda log: int(log.parent.name.split("_")[1]))
    curves = read_curves(logs)
    shown = {name: curve for name, curve in curves.items() if name in {"train/loss", "val/score"} or "/mAP" in name}
    if shown:
        curve_picture(folder / "curve.png", shown)
    print_results(rows)
    Console().print(f"written to {folder}", highlight=False, markup=False, soft_wrap=True)
