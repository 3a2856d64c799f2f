"""A benchmark under its protocol: embeddings to rankings to figures with intervals.

Applies exclusions, subsets and conventions as the protocol states them, and sets the
training-free baselines and chance beside a model. Does not know how a model was trained,
how figures are shown or where benchmarks come from.
"""

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
from union_igrot.backbones.base import Backbone
from union_igrot.encode import Encoder
from union_igrot.heads.build import build_fusion, build_target
from union_igrot.metrics.functional import average
from union_igrot.metrics.intervals import bootstrap_intervals, paired_interval
from union_igrot.model import IGROTModel
from union_igrot.scoring import Relevance, score
from union_igrot.types import Benchmark, Scores

BASELINES = ("image", "text", "sum")


def means(benchmark: Benchmark, scores: Scores) -> dict[str, float]:
    """Average each figure as the protocol says, in percent; nan where no query has a value."""
    labels, how = _labels(benchmark), benchmark.protocol.average
    return {name: 100 * average(values, labels, how).item() for name, values in scores.values.items()}


def embed(
    model: IGROTModel, benchmark: Benchmark, encoder: Encoder, *, keep_tokens: bool = False
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Embed a benchmark's queries and gallery, each picture and text encoded at most once.

    Args:
        model: The model.
        benchmark: Whose queries and gallery.
        encoder: Of the model's backbone.
        keep_tokens: Whether the queries' tokens are kept even if this model does not read them,
            because another one will.

    Returns:
        Query embeddings, gallery embeddings, and the seconds spent on encoding (0 where
        everything was in the store) and on the heads.
    """
    start = time.perf_counter()
    fusion_tokens, target_tokens = model.fusion.needs_tokens, model.target.needs_tokens
    name = benchmark.name
    kept = fusion_tokens or keep_tokens
    images = encoder.fill_pictures([q.image for q in benchmark.queries], tokens=kept, what=f"{name} queries")
    texts = encoder.fill_texts([q.text for q in benchmark.queries], what=f"{name} texts")
    items = encoder.fill_pictures(
        [item.image for item in benchmark.gallery], tokens=target_tokens, what=f"{name} gallery"
    )
    encoded = time.perf_counter()
    step = encoder.batch_size
    with torch.inference_mode():
        queries = torch.cat(
            [
                model.embed_queries(
                    encoder.lookup(images[at : at + step], tokens=fusion_tokens),
                    encoder.lookup(texts[at : at + step], tokens=fusion_tokens),
                )
                for at in range(0, len(images), step)
            ]
        )
        gallery = torch.cat(
            [
                model.embed_gallery(encoder.lookup(items[at : at + step], tokens=target_tokens))
                for at in range(0, len(items), step)
            ]
        )
    return queries, gallery, {"encode": encoded - start, "embed": time.perf_counter() - encoded}


def baseline(backbone: Backbone, kind: str) -> IGROTModel:
    """Give a method without training: the image, the text or their sum against plain image embeddings."""
    return IGROTModel(backbone, build_fusion(kind, backbone.dim), build_target("frozen", backbone.dim)).eval()


@dataclass(frozen=True)
class Evaluation:
    """All methods on one benchmark.

    Attributes:
        benchmark: What was asked.
        scores: Figures of each method, `chance` first, `trained` last.
        rows: What `results.json` holds of it.
    """

    benchmark: Benchmark
    scores: Mapping[str, Scores]
    rows: list[dict[str, Any]]


def evaluate(model: IGROTModel, benchmark: Benchmark, encoder: Encoder, seed: int = 0) -> Evaluation:
    """Evaluate a model beside chance and the training-free baselines.

    Args:
        model: The model with trained heads.
        benchmark: What to ask.
        encoder: Of the model's backbone.
        seed: Seed of chance and of the bootstrap.

    Returns:
        Per-query figures and result rows; figures in percent, 95 % bootstrap intervals
        over queries. The row of `trained` also holds its paired differences to every
        other method.
    """
    model.eval()
    scores: dict[str, Scores] = {}
    spent: dict[str, dict[str, float]] = {}
    models = {kind: baseline(model.backbone, kind) for kind in BASELINES} | {"trained": model}
    noise = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    # Rankings by random vectors are uniform: chance goes through the same scoring.
    dice = [torch.randn(len(side), 64, generator=noise) for side in (benchmark.queries, benchmark.gallery)]
    scores["chance"] = score(benchmark, *dice)
    spent["chance"] = {"rank": time.perf_counter() - start}
    for name, method in models.items():
        queries, gallery, spent[name] = embed(method, benchmark, encoder, keep_tokens=model.fusion.needs_tokens)
        start = time.perf_counter()
        scores[name] = score(benchmark, queries, gallery)
        spent[name]["rank"] = time.perf_counter() - start
    described = {name: method.describe() for name, method in models.items()} | {"chance": {"backbone": None}}
    rows = [result_row(benchmark, name, scores[name], described[name], spent[name], seed) for name in scores]
    rows[-1]["gain95"] = _gains(benchmark, scores, seed)
    rows[-1]["seen_classes"] = seen_classes(model, benchmark)
    return Evaluation(benchmark, scores, rows)


def _labels(benchmark: Benchmark) -> Tensor | None:
    return Relevance.of(benchmark).labels if benchmark.protocol.average == "macro" else None


def _gains(benchmark: Benchmark, scores: Mapping[str, Scores], seed: int) -> dict[str, dict[str, list[float]]]:
    """Give the paired differences trained - other in percent points: mean, low, high."""
    labels = _labels(benchmark)
    gains: dict[str, dict[str, list[float]]] = {}
    for other in scores:
        if other == "trained":
            continue
        pairs = {
            name: paired_interval(values, scores[other].values[name], seed=seed, labels=labels)
            for name, values in scores["trained"].values.items()
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
    """Give one row of `results.json`.

    Returns:
        Benchmark, split, method, counts, protocol, figures and 95 % intervals in percent,
        the primary figure by tag, the model's description, seconds, versions and seed.
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
        "model": model,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": versions(),
        "seed": seed,
    }


def seen_classes(model: IGROTModel, benchmark: Benchmark) -> list[str]:
    """Name the classes of a benchmark that the model's card says it was trained on.

    A zero-shot figure is one only where this is empty. Names are compared in lower case,
    blanks, hyphens and underscores alike.
    """

    def plainly(name: str) -> str:
        return name.lower().replace(" ", "_").replace("-", "_")

    trained = {plainly(name) for name in model.card.get("classes", [])}
    asked = {query.label for query in benchmark.queries if query.label is not None}
    return sorted(name for name in asked if plainly(name) in trained)


def combine(evaluations: Sequence[Evaluation], name: str, seed: int = 0) -> list[dict[str, Any]]:
    """Average the parts of a benchmark (FashionIQ's categories), each part counting the same.

    Args:
        evaluations: The parts, of one protocol.
        name: What the whole is called.
        seed: Seed of the bootstrap, which draws queries within each part.

    Returns:
        A row a method; intervals are of the mean over parts.
    """
    first = evaluations[0]
    sizes = [len(one.benchmark.queries) for one in evaluations]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = []
    for place, method in enumerate(first.scores):
        values = {
            metric: torch.cat([one.scores[method].values[metric] for one in evaluations])
            for metric in first.scores[method].values
        }
        intervals = bootstrap_intervals(values, seed=seed, labels=labels)
        parts = ", ".join(one.benchmark.name for one in evaluations)
        protocol = {**first.rows[place]["protocol"], "note": f"unweighted mean over {parts}"}
        rows.append(
            {
                **first.rows[place],
                "benchmark": name,
                "n_queries": sum(sizes),
                "n_gallery": sum(len(one.benchmark.gallery) for one in evaluations),
                "n_skipped": sum(one.benchmark.skipped for one in evaluations),
                "protocol": protocol,
                "metrics": {metric: 100 * average(x, labels, "macro").item() for metric, x in values.items()},
                "ci95": {metric: [100 * span.low, 100 * span.high] for metric, span in intervals.items()},
                "by_tag": {},
                "seen_classes": sorted({seen for one in evaluations for seen in one.rows[place]["seen_classes"]}),
            }
        )
        rows[-1].pop("gain95", None)
    return rows


def _by_tag(benchmark: Benchmark, scores: Scores) -> dict[str, dict[str, int | float]]:
    """Give count and mean of the primary figure over the queries of each tag, in percent."""
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
    """Give the versions a figure depends on."""
    packages = ("torch", "transformers", "lightning", "numpy", "pillow")
    found = {package: version(package) for package in packages}
    return {"union-igrot": union_igrot.__version__, "python": python_version(), **found}
