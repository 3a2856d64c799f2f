"""The end of a training and the whole of an evaluation: metrics, tables, images, files.

Knows the names of the files in a run's folder. Does not know how metrics are computed.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from union_igrot.cli.page import write_run_page
from union_igrot.datasets.submission import check_submission, read_predictions, write_circo, write_cirr
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.evaluate import combine, evaluate, result_row
from union_igrot.evaluation.predictions import score_predictions
from union_igrot.evaluation.scoring import score
from union_igrot.features.embedding import embed
from union_igrot.features.extractor import Encoder
from union_igrot.images.decode import open_image
from union_igrot.models.model import IGROTModel
from union_igrot.reporting.contact_sheets import SIDE, contact_sheet, curve_picture, read_curves
from union_igrot.reporting.files import write_query_values, write_results
from union_igrot.reporting.page_tables import Asked
from union_igrot.reporting.tables import print_results
from union_igrot.types import Benchmark, Scores

_SUBMITTED = ("circo", "cirr")
"""Benchmarks whose servers score a file of answers."""


def evaluate_and_report(
    model: IGROTModel,
    benchmarks: Sequence[Benchmark],
    encoder: Encoder,
    folder: Path,
    seed: int,
    whole: str = "",
    *,
    checkpoint: str | None,
) -> None:
    """Evaluate on each benchmark, write what was found after each, print the tables.

    Writes `results.json`, `results.csv`, `queries-<benchmark>-<split>.safetensors` (every
    query's metrics), `contact-<benchmark>.png`, `curve.png` where the folder holds a
    training's log, and `report.html` at the end. A split without published targets gives
    submission files instead of metrics.

    Args:
        model: The model.
        benchmarks: What to ask.
        encoder: Of the model's backbone.
        folder: Where to write.
        seed: Seed of chance and bootstrap.
        whole: Name of the mean over the benchmarks, where they are parts of one; empty for none.
        checkpoint: Where the model's trained heads are from; None where it has none, and its backbone's
            baselines are all there is to ask.
    """
    found, rows = [], []
    asked: list[Asked] = []
    for benchmark in benchmarks:
        if not any(query.targets for query in benchmark.queries):
            asked.append((benchmark, submit(model, benchmark, encoder, folder)))
            continue
        found.append(evaluate(model, benchmark, encoder, seed, trained=checkpoint is not None))
        if checkpoint is not None:
            found[-1].rows[-1]["model"]["checkpoint"] = checkpoint
        rows += found[-1].rows
        write_results(folder, rows)
        scores = found[-1].scores
        asked.append((benchmark, scores))
        values = {method: part.values for method, part in scores.items()}
        write_query_values(folder, benchmark.name, benchmark.split, values, benchmark.queries_hash())
        last = found[-1].rows[-1]["method"]
        opener = partial(open_image, at_least=SIDE)
        contact_sheet(folder / f"contact-{benchmark.name}.png", benchmark, scores[last].ranking, opener)
    if whole and len(found) > 1:
        rows += combine(found, whole, seed)
        write_results(folder, rows)
    curves = read_curves(sorted(folder.glob("logs/version_*/metrics.csv")))
    shown = {name: curve for name, curve in curves.items() if name in {"train/loss", "val/score"} or "/mAP" in name}
    if shown:
        curve_picture(folder / "curve.png", shown)
    page = write_run_page(folder, rows, asked, shown, model.metadata, seed)
    print_results(rows)
    Console().print(f"written to {folder}; to look at: {page}", highlight=False, markup=False, soft_wrap=True)


def report_predictions(path: Path, benchmarks: Sequence[Benchmark], folder: Path, seed: int) -> None:
    """Score a file of rankings, made by any method, and print and write its metrics.

    Raises:
        ConfigError: Where the data are more than one benchmark, or have no such files.
        DataError: Where the file is not one of the benchmark's, or its targets are not published.
    """
    if len(benchmarks) != 1:
        raise ConfigError(f"one file answers one benchmark, not {len(benchmarks)}; choose data=cirr or data=circo")
    rankings = read_predictions(path, benchmarks[0])
    if not any(query.targets for query in benchmarks[0].queries):
        problems = check_submission(path, benchmarks[0])
        raise DataError(
            f"{path}: this split's targets are not published; " + ("; ".join(problems[:5]) or "it is valid")
        )
    benchmark, scores = score_predictions(benchmarks[0], rankings)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    row = result_row(benchmark, "predictions", scores, {"file": path.name, "sha256": digest}, {}, seed)
    write_results(folder, [row])
    page = write_run_page(folder, [row], [(benchmark, {"predictions": scores})], {}, {}, seed)
    print_results([row])
    Console().print(f"written to {folder}; to look at: {page}", highlight=False, markup=False, soft_wrap=True)


def submit(model: IGROTModel, benchmark: Benchmark, encoder: Encoder, folder: Path) -> dict[str, Scores]:
    """Write the submission files of a split whose targets are not published (CIRR, CIRCO).

    Returns:
        The answers, under the name of their method.

    Raises:
        ConfigError: Before anything is encoded, where nobody takes such files.
    """
    if benchmark.name not in _SUBMITTED:
        raise ConfigError(
            f"the targets of {benchmark.name} {benchmark.split} are not published, and no server takes answers to it; "
            f"choose a split with targets, or one of {', '.join(_SUBMITTED)}"
        )
    queries, gallery, _ = embed(model, benchmark, encoder)
    scores = score(benchmark, queries, gallery)
    names = [item.id for item in benchmark.gallery]
    rankings = [[names[at] for at in row] for row in scores.ranking.positions.tolist()]
    if benchmark.name == "circo":
        written: tuple[Path, ...] = (write_circo(folder / "submission_circo.json", benchmark, rankings),)
    else:
        subsets = [] if scores.subsets is None else scores.subsets.tolist()
        written = write_cirr(folder, benchmark, rankings, [[names[at] for at in row if at >= 0] for row in subsets])
    for path in written:
        Console().print(f"submission file {path}", highlight=False, markup=False, soft_wrap=True)
    return {"submitted": scores}
