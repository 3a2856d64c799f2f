"""A benchmark under its protocol: embeddings to rankings to metrics with intervals.

Applies exclusions, subsets and conventions as the protocol states them, and sets the
training-free baselines and chance beside a model. Does not know how a model was trained,
how metrics are shown or where benchmarks come from.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from platform import python_version
from typing import Any

import torch
from torch import Tensor

import union_igrot
from union_igrot.evaluation.scoring import Relevance, score
from union_igrot.features.embedding import embed_each
from union_igrot.features.extractor import Encoder
from union_igrot.images.identity import image_identity
from union_igrot.metrics.functional import average
from union_igrot.metrics.statistics import bootstrap_intervals, paired_interval
from union_igrot.models.devices import device_name
from union_igrot.models.model import IGROTModel, baseline
from union_igrot.types import Benchmark, Scores

BASELINES = ("image", "text", "sum")


def means(benchmark: Benchmark, scores: Scores) -> dict[str, float]:
    """Average each metric as the protocol says, in percent; nan where no query has a value."""
    labels, how = _labels(benchmark), benchmark.protocol.average
    return {name: 100 * average(values, labels, how).item() for name, values in scores.values.items()}


@dataclass(frozen=True)
class Evaluation:
    """All methods on one benchmark.

    Attributes:
        benchmark: What was asked.
        scores: Metrics of each method, `chance` first, `trained` (where there is one) last.
        rows: What `results.json` holds of it.
    """

    benchmark: Benchmark
    scores: Mapping[str, Scores]
    rows: list[dict[str, Any]]


def evaluate(
    model: IGROTModel, benchmark: Benchmark, encoder: Encoder, seed: int = 0, *, trained: bool = True
) -> Evaluation:
    """Evaluate a model beside chance and the training-free baselines.

    Args:
        model: The model with trained heads.
        benchmark: What to ask.
        encoder: Of the model's backbone.
        seed: Seed of chance and of the bootstrap.
        trained: Whether the model's own heads are asked; else its backbone's baselines alone.

    Returns:
        Per-query metrics and result rows; metrics in percent, 95 % bootstrap intervals
        over queries. The row of `trained` also holds its paired differences to every
        other method, and what of the test its heads were trained on.
    """
    model.eval()
    scores: dict[str, Scores] = {}
    spent: dict[str, dict[str, float]] = {}
    null = model.null_text()
    models = {kind: baseline(model.backbone, kind, null) for kind in BASELINES} | (
        {"trained": model} if trained else {}
    )
    noise = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    # Rankings by random vectors are uniform: chance goes through the same scoring.
    sides = (benchmark.queries, benchmark.gallery)
    dice = [torch.randn(len(side), 64, generator=noise).to(model.device) for side in sides]
    scores["chance"] = score(benchmark, *dice)
    spent["chance"] = {"rank": time.perf_counter() - start}
    for name, embedded in embed_each(models, benchmark, encoder):
        start = time.perf_counter()
        scores[name] = score(benchmark, embedded.queries, embedded.gallery)
        spent[name] = {**embedded.seconds, "rank": time.perf_counter() - start}
    described = {name: method.describe() for name, method in models.items()} | {"chance": {"backbone": None}}
    rows = [result_row(benchmark, name, scores[name], described[name], spent[name], seed) for name in scores]
    for row in rows:
        row["arithmetic"] = {"device": device_name(model.device), **encoder.arithmetic}
    if trained:
        rows[-1]["gain95"] = _gains({name: part.values for name, part in scores.items()}, _labels(benchmark), seed)
        rows[-1]["seen_classes"] = seen_classes(model, benchmark)
        rows[-1]["seen_images"] = seen_images(model, benchmark)
    return Evaluation(benchmark, scores, rows)


def _labels(benchmark: Benchmark) -> Tensor | None:
    return Relevance.of(benchmark).labels if benchmark.protocol.average == "macro" else None


def _gains(
    values: Mapping[str, Mapping[str, Tensor]], labels: Tensor | None, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Return the paired differences trained - other in percent points: mean, low, high."""
    gains: dict[str, dict[str, list[float]]] = {}
    for other in values:
        if other == "trained":
            continue
        pairs = {
            name: paired_interval(column, values[other][name], seed=seed, labels=labels)
            for name, column in values["trained"].items()
        }
        gains[other] = {name: [100 * pair.mean, 100 * pair.low, 100 * pair.high] for name, pair in pairs.items()}
    return gains


def result_row(
    benchmark: Benchmark,
    method: str,
    scores: Scores,
    model: dict[str, Any],
    seconds: dict[str, float],
    seed: int,
) -> dict[str, Any]:
    """Return one row of `results.json`; `evaluate` adds on what device and in which arithmetic it was computed.

    Returns:
        Benchmark, split, method, counts, protocol, metrics and 95 % intervals in percent,
        the primary metric by tag, the model's description, seconds, versions and seed;
        `seen_classes` is empty and `seen_images` None, as of a method without training.
    """
    labels = _labels(benchmark)
    intervals = bootstrap_intervals(scores.values, seed=seed, labels=labels)
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "method": method,
        "n_queries": len(benchmark.queries),
        "n_gallery": len(benchmark.gallery),
        "n_skipped": benchmark.skipped,
        "protocol": asdict(benchmark.protocol),
        "metrics": means(benchmark, scores),
        "ci95": {name: [100 * span.low, 100 * span.high] for name, span in intervals.items()},
        "by_tag": _by_tag(benchmark, scores),
        "seen_classes": [],
        "seen_images": None,
        "model": model,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": versions(),
        "seed": seed,
    }


def seen_classes(model: IGROTModel, benchmark: Benchmark) -> list[str]:
    """Name the classes of a benchmark that the model's card says it was trained on.

    A zero-shot metric is one only where this is empty. Names are compared in lower case,
    blanks, hyphens and underscores alike.
    """

    def plainly(name: str) -> str:
        return name.lower().replace(" ", "_").replace("-", "_")

    trained = {plainly(name) for name in model.metadata.get("classes", [])}
    asked = {query.label for query in benchmark.queries if query.label is not None}
    return sorted(name for name in asked if plainly(name) in trained)


def seen_images(model: IGROTModel, benchmark: Benchmark) -> dict[str, int] | None:
    """Count the images of a benchmark that the model's heads were trained on.

    What counts as the same image, and what is not found, is told in `data.identity`. What the
    backbone saw before is not known.

    Returns:
        How many `queries` have such an image and how many images of the `gallery` are such;
        None where the model does not say what it was trained on.
    """
    known = model.training_images
    if known is None:
        return None
    return {
        "queries": sum(image_identity(query.image) in known for query in benchmark.queries),
        "gallery": sum(image_identity(item.image) in known for item in benchmark.gallery),
    }


def combine(evaluations: Sequence[Evaluation], name: str, seed: int = 0) -> list[dict[str, Any]]:
    """Average the parts of a benchmark (FashionIQ's categories), each part counting the same.

    Args:
        evaluations: The parts, of one protocol.
        name: What the whole is called.
        seed: Seed of the bootstrap, which draws queries within each part.

    Returns:
        A row a method; intervals are of the mean over parts, whose names stand in `parts`.
    """
    first = evaluations[0]
    sizes = [len(one.benchmark.queries) for one in evaluations]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    names = [one.benchmark.name for one in evaluations]
    galleries = [tuple(item.id for item in one.benchmark.gallery) for one in evaluations]
    # DTIN's domains share one gallery; FashionIQ's categories have one each.
    distinct = [galleries.index(gallery) == place for place, gallery in enumerate(galleries)]
    values = {
        method: {
            metric: torch.cat([one.scores[method].values[metric] for one in evaluations])
            for metric in first.scores[method].values
        }
        for method in first.scores
    }
    rows = []
    for place, columns in enumerate(values.values()):
        intervals = bootstrap_intervals(columns, seed=seed, labels=labels)
        inner = [one.rows[place] for one in evaluations]
        counted = [row["seen_images"] for row in inner]
        clauses = [row["protocol"]["note"].split("; ") for row in inner]
        common = [clause for clause in clauses[0] if all(clause in others for others in clauses)]
        note = "; ".join([f"unweighted mean over {', '.join(names)}", *common])
        rows.append(
            {
                **inner[0],
                "benchmark": name,
                "parts": names,
                "n_queries": sum(sizes),
                "n_gallery": sum(len(gallery) for gallery, new in zip(galleries, distinct, strict=True) if new),
                "n_skipped": sum(one.benchmark.skipped for one in evaluations),
                "protocol": {**inner[0]["protocol"], "note": note},
                "metrics": {metric: 100 * average(x, labels, "macro").item() for metric, x in columns.items()},
                "ci95": {metric: [100 * span.low, 100 * span.high] for metric, span in intervals.items()},
                "by_tag": {},
                "seen_classes": sorted({seen for row in inner for seen in row["seen_classes"]}),
                "seen_images": None
                if None in counted
                else {
                    "queries": sum(count["queries"] for count in counted),
                    "gallery": sum(count["gallery"] for count, new in zip(counted, distinct, strict=True) if new),
                },
            }
        )
    if "trained" in values:
        rows[-1]["gain95"] = _gains(values, labels, seed)
    return rows


def _by_tag(benchmark: Benchmark, scores: Scores) -> dict[str, dict[str, int | float]]:
    """Return count and mean of the primary metric over the queries of each tag, in percent."""
    rows: dict[str, list[int]] = defaultdict(list)
    for place, query in enumerate(benchmark.queries):
        for tag in query.tags:
            rows[tag].append(place)
    values = scores.values[benchmark.protocol.primary]
    name = benchmark.protocol.primary
    return {
        tag: {"n_queries": len(places), name: 100 * average(values[torch.tensor(places)]).item()}
        for tag, places in sorted(rows.items())
    }


def versions() -> dict[str, str]:
    """Return the versions a metric depends on."""
    packages = ("torch", "transformers", "lightning", "numpy", "pillow")
    found = {package: _version(package) for package in packages}
    return {"union-igrot": union_igrot.__version__, "python": python_version(), **found}


@functools.cache
def _version(package: str) -> str:
    return version(package)  # reads and parses files, for every row of metrics
