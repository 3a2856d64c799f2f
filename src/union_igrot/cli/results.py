"""The end of a training and the whole of an evaluation: metrics, tables, contact sheets, files."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from union_igrot.cli.page import write_run_page
from union_igrot.datasets.submission import check_submission, read_predictions, write_circo, write_cirr
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.evaluate import average_parts, evaluate_benchmark, method_result
from union_igrot.evaluation.results import EvaluationResult, ScoredBenchmark, write_query_values, write_results
from union_igrot.evaluation.scoring import score, score_predictions
from union_igrot.evaluation.tables import print_results
from union_igrot.features.embedding import embed_benchmark
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.images.decode import open_image
from union_igrot.models.model import IGROTModel
from union_igrot.reporting.charts import read_curves
from union_igrot.reporting.contact_sheets import TILE_SIDE, benchmark_sheet
from union_igrot.types import Benchmark

_SUBMITTED = ("circo", "cirr")
"""Benchmarks with a server that scores submission files."""


def evaluate_and_report(
    model: IGROTModel,
    benchmarks: Sequence[Benchmark],
    extractor: FeatureExtractor,
    folder: Path,
    seed: int,
    whole: str = "",
    *,
    checkpoint: str | None,
) -> EvaluationResult:
    """Evaluate on each benchmark, write the results after each, print the tables.

    Writes `results.json`, `results.csv`, `queries-<benchmark>-<split>.safetensors` (the metrics of every query),
    `contact-<benchmark>.png` and `report.html`. A split without published targets gets submission files instead of
    metrics.

    Args:
        model: The model.
        benchmarks: What to evaluate on.
        extractor: Extractor with the model's backbone.
        folder: Where to write.
        seed: Seed of chance and bootstrap.
        whole: Name of the mean over the benchmarks, if they are parts of one.
        checkpoint: Where the trained heads were loaded from; None evaluates the baselines of the backbone alone.
    """
    result, parts = EvaluationResult(), []
    opener = partial(open_image, at_least=TILE_SIDE)
    for benchmark in benchmarks:
        if not any(query.targets for query in benchmark.queries):
            result += EvaluationResult(scored=(submit(model, benchmark, extractor, folder),))
            continue
        found = evaluate_benchmark(
            model, benchmark, extractor, seed, trained=checkpoint is not None, checkpoint=checkpoint
        )
        parts.append(found)
        result += found
        write_results(folder, result)
        (scored,), (one,) = found.scored, found.benchmarks
        write_query_values(folder, scored)
        benchmark_sheet(folder / f"contact-{benchmark.name}.png", scored, one.main.method, opener)
    if whole and len(parts) > 1:
        result += average_parts(parts, whole, seed)
        write_results(folder, result)
    curves = read_curves(sorted(folder.glob("logs/version_*/metrics.csv")))
    shown = {name: curve for name, curve in curves.items() if name in {"train/loss", "val/score"} or "/mAP" in name}
    _show(result, folder, write_run_page(folder, result, shown, model.metadata, seed))
    return result


def report_predictions(path: Path, benchmarks: Sequence[Benchmark], folder: Path, seed: int) -> None:
    """Score a file of rankings, made by any method, and print and write its metrics.

    Raises:
        ConfigError: If there is more than one benchmark, or it has no such files.
        DataError: If the file does not fit the benchmark, or the benchmark's targets are not published.
    """
    if len(benchmarks) != 1:
        raise ConfigError(f"predictions are of one benchmark, not {len(benchmarks)}; choose data=cirr or data=circo")
    rankings = read_predictions(path, benchmarks[0])
    if not any(query.targets for query in benchmarks[0].queries):
        problems = check_submission(path, benchmarks[0])
        raise DataError(
            f"{path}: this split's targets are not published; " + ("; ".join(problems[:5]) or "the file is valid")
        )
    benchmark, scores = score_predictions(benchmarks[0], rankings)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    method = method_result(benchmark, "predictions", scores, {"file": path.name, "sha256": digest}, {}, seed)
    result = EvaluationResult((method,), (ScoredBenchmark(benchmark, {"predictions": scores}),))
    write_results(folder, result)
    _show(result, folder, write_run_page(folder, result, {}, {}, seed))


def _show(result: EvaluationResult, folder: Path, page: Path) -> None:
    print_results(result)
    Console().print(f"written to {folder}; open {page}", highlight=False, markup=False, soft_wrap=True)


def submit(model: IGROTModel, benchmark: Benchmark, extractor: FeatureExtractor, folder: Path) -> ScoredBenchmark:
    """Write the submission files of a split whose targets are not published (CIRR, CIRCO).

    Raises:
        ConfigError: Before anything is encoded, if no server accepts such files.
    """
    if benchmark.name not in _SUBMITTED:
        raise ConfigError(
            f"the targets of {benchmark.name} {benchmark.split} are not published, and no server scores it; choose a "
            f"split with targets, or one of {', '.join(_SUBMITTED)}"
        )
    queries, gallery, _ = embed_benchmark(model, benchmark, extractor)
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
    return ScoredBenchmark(benchmark, {"submitted": scores})
