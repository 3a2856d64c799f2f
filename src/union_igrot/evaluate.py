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
from jaxtyping import Bool, Float, Int
from torch import Tensor

import union_igrot
from union_igrot.backbones.base import Backbone
from union_igrot.encode import Encoder
from union_igrot.heads.build import build_fusion, build_target
from union_igrot.index.exact import RankedChunk, exact_topk, rank_chunks
from union_igrot.metrics.functional import average
from union_igrot.metrics.intervals import bootstrap_intervals, paired_interval
from union_igrot.metrics.retrieval import RetrievalFigures
from union_igrot.model import IGROTModel
from union_igrot.types import Benchmark, Ranking, Scores

BASELINES = ("image", "text", "sum")
KEPT = 50
"""Answers of each query that are kept for pictures and submission files."""


@dataclass(frozen=True)
class Relevance:
    """A benchmark's ids as gallery positions.

    Attributes:
        targets: For each query the positions that answer it.
        exclude: For each query the positions that are not ranked.
        subset: For each query its subset without excluded ones, filled up with -1; or None
            where no query has one.
        labels: A number for each query's class, or None where a query has none.
    """

    targets: list[Int[Tensor, " _"]]
    exclude: list[list[int]]
    subset: Int[Tensor, "queries subset"] | None
    labels: Int[Tensor, " queries"] | None

    @classmethod
    def of(cls, benchmark: Benchmark) -> "Relevance":
        """Look up every id of a benchmark once; ids that queries share are looked up once."""
        at = {item.id: position for position, item in enumerate(benchmark.gallery)}
        # The ids stand beside their positions so that they live on: no other tuple gets their `id`.
        known: dict[int, tuple[Sequence[str], Tensor]] = {}
        targets, exclude, subsets = [], [], []
        for query in benchmark.queries:
            if id(query.targets) not in known:
                places = torch.tensor([at[name] for name in query.targets], dtype=torch.long)
                known[id(query.targets)] = (query.targets, places)
            targets.append(known[id(query.targets)][1])
            gone = {at[name] for name in query.exclude} if benchmark.protocol.exclude_reference else set()
            exclude.append(sorted(gone))
            subsets.append([at[name] for name in query.subset or () if at[name] not in gone])
        widest = max(map(len, subsets))
        subset = torch.tensor([row + [-1] * (widest - len(row)) for row in subsets]) if widest else None
        classes = sorted({query.label for query in benchmark.queries if query.label is not None})
        number = {label: place for place, label in enumerate(classes)}
        numbers = [number.get(query.label, -1) if query.label is not None else -1 for query in benchmark.queries]
        return cls(targets, exclude, subset, None if -1 in numbers else torch.tensor(numbers))


def score(
    benchmark: Benchmark,
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    positions: Int[Tensor, " queries"] | None = None,
) -> Scores:
    """Rank the gallery for each query and compute the protocol's figures.

    Scores are dot products in float32, computed in chunks; ties are broken by gallery order.

    Args:
        benchmark: Whose queries and gallery were embedded.
        queries: Query embeddings.
        gallery: Gallery embeddings, in the gallery's order.
        positions: Which queries of the benchmark the rows are; all, in order, where None.
            Under distributed training each process gives its own, and figures of all come back.

    Returns:
        One value a query and figure, in the order of the queries, and the first answers of
        the given rows: `KEPT`, or as many as every query has candidates.

    Raises:
        DataError: Where an embedding is not finite, or the protocol asks for subsets or classes
            that the benchmark does not have.
    """
    relevance = Relevance.of(benchmark)
    rows = torch.arange(len(queries)) if positions is None else positions.cpu()
    protocol = benchmark.protocol
    figures = RetrievalFigures(protocol.metrics, protocol.ap_norm, protocol.ap_rule, sync_on_compute=True)
    figures = figures.to(queries.device)
    exclude = [relevance.exclude[row] for row in rows.tolist()]
    for chunk in rank_chunks(queries, gallery, exclude):
        part = rows[chunk.queries]
        hits, relevant = _hits(chunk, [relevance.targets[row] for row in part.tolist()], len(gallery))
        subset_hits = None if relevance.subset is None else _subset_hits(chunk, relevant, relevance.subset[part])
        labels = None if relevance.labels is None else relevance.labels[part].to(hits.device)
        figures.update(hits, hits.sum(1), part.to(hits.device), subset_hits, labels)
    values = {name: column.double().cpu() for name, column in figures.values().items()}
    # Of all queries, so that every process keeps equally many.
    fewest = len(gallery) - max(map(len, relevance.exclude))
    first = exact_topk(queries, gallery, min(KEPT, fewest), exclude)
    return Scores(values, Ranking(first.positions.cpu(), first.scores.cpu()))


def means(benchmark: Benchmark, scores: Scores) -> dict[str, float]:
    """Average each figure as the protocol says, in percent; nan where no query has a value."""
    labels, how = _labels(benchmark), benchmark.protocol.average
    return {name: 100 * average(values, labels, how).item() for name, values in scores.values.items()}


def _hits(
    chunk: RankedChunk, targets: Sequence[Tensor], gallery: int
) -> tuple[Bool[Tensor, "chunk gallery"], Bool[Tensor, "chunk gallery"]]:
    """Give relevance down each ranking (excluded answers never count), and in gallery order."""
    device = chunk.positions.device
    relevant = torch.zeros(len(targets), gallery, dtype=torch.bool)
    for row, answers in enumerate(targets):
        relevant[row, answers] = True
    relevant = relevant.to(device)
    hits = relevant.gather(1, chunk.positions)
    hits &= torch.arange(gallery, device=device) < chunk.candidates[:, None]
    return hits, relevant


def _subset_hits(
    chunk: RankedChunk, relevant: Bool[Tensor, "chunk gallery"], subset: Int[Tensor, "chunk subset"]
) -> Bool[Tensor, "chunk subset"]:
    """Rank each query's subset as the whole gallery is ranked."""
    subset = subset.to(chunk.positions.device)
    ranks = torch.empty_like(chunk.positions)
    places = torch.arange(chunk.positions.shape[1], device=ranks.device).expand_as(chunk.positions)
    ranks.scatter_(1, chunk.positions, places)
    real = subset >= 0
    inside = subset.clamp(min=0)
    rank = ranks.gather(1, inside).masked_fill(~real, chunk.positions.shape[1])
    return (relevant.gather(1, inside) & real).gather(1, rank.argsort(dim=1))


def embed(model: IGROTModel, benchmark: Benchmark, encoder: Encoder) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Embed a benchmark's queries and gallery, each picture and text encoded at most once.

    Returns:
        Query embeddings, gallery embeddings, and the seconds spent on encoding (0 where
        everything was in the store) and on the heads.
    """
    start = time.perf_counter()
    fusion_tokens, target_tokens = model.fusion.needs_tokens, model.target.needs_tokens
    name = benchmark.name
    images = encoder.fill_pictures([q.image for q in benchmark.queries], tokens=True, what=f"{name} queries")
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
        queries, gallery, spent[name] = embed(method, benchmark, encoder)
        start = time.perf_counter()
        scores[name] = score(benchmark, queries, gallery)
        spent[name]["rank"] = time.perf_counter() - start
    described = {name: method.describe() for name, method in models.items()} | {"chance": {"backbone": None}}
    rows = [result_row(benchmark, name, scores[name], described[name], spent[name], seed) for name in scores]
    rows[-1]["gain95"] = _gains(benchmark, scores, seed)
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
        "model": model,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": versions(),
        "seed": seed,
    }


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
