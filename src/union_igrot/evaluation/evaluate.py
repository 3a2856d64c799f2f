"""A benchmark under its protocol: a model beside chance and the training-free baselines, with intervals."""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import union_igrot
from union_igrot.datasets.loading import benchmark_warning
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.calibration import calibrate, expand_queries
from union_igrot.evaluation.fusion import embed_corpora, fuse
from union_igrot.evaluation.results import (
    EvaluationResult,
    MethodResult,
    ScoredBenchmark,
    SeenImages,
    TagMetric,
    query_classes,
    query_groups,
)
from union_igrot.evaluation.scoring import metric_limits, score
from union_igrot.features.embedding import EmbeddedBenchmark, embed_models
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.images.identity import image_identity
from union_igrot.metrics.functional import average, group_values
from union_igrot.metrics.names import family_of, scale_of
from union_igrot.metrics.statistics import (
    Difference,
    Interval,
    median_difference,
    paired_interval,
)
from union_igrot.models.devices import device_name
from union_igrot.models.heads.target import UnionTarget
from union_igrot.models.model import IGROTModel, baseline
from union_igrot.terminal import progress_bar
from union_igrot.types import Benchmark, Scores

_WEIGHED = 500
"""Most gallery images whose weights in UNION's target head are reported."""
BASELINES = ("image", "text", "sum")


def means(benchmark: Benchmark, scores: Scores) -> dict[str, float]:
    """Average each metric as the protocol says, in percent or as a rank; nan if no query has a value."""
    averaging = _Averaging.of(benchmark)
    return {name: averaging.mean(name, values) for name, values in scores.values.items()}


def evaluate_benchmark(
    model: IGROTModel,
    benchmark: Benchmark,
    extractor: FeatureExtractor,
    seed: int = 0,
    *,
    trained: bool = True,
    checkpoint: str | None = None,
    calibration: float = 0.0,
    query_expansion: int = 0,
    fusions: Sequence[str] = ("product",),
    corpora: Sequence[str | Path] = (),
) -> EvaluationResult:
    """Evaluate a model beside chance and the training-free baselines.

    Args:
        model: The model with trained heads.
        benchmark: What to evaluate on.
        extractor: Extractor with the model's backbone.
        seed: Seed of chance and of the bootstrap.
        trained: Whether to evaluate the model's own heads, or the baselines of its backbone alone.
        checkpoint: Where the trained heads were loaded from, for the description of the model.
        calibration: Weight of the calibration of the trained heads' scores; 0 for none, as zero-shot protocols ask.
        query_expansion: Number of first results that each query of the trained heads is moved towards; 0 for none.
        fusions: Further baselines without training, of `fusion.FUSIONS`.
        corpora: Files of texts about subjects and about styles, for the fusion `basic`.

    Returns:
        Metrics in percent with 95 % bootstrap intervals over queries and their classes, `chance` first; the values and
        rankings of every query. `trained` comes last, with its paired differences to every other method and its
        overlap with the benchmark.
    """
    model.eval()
    null = model.null_text()
    models = {kind: baseline(model.backbone, kind, null) for kind in BASELINES}
    models |= {"trained": model} if trained else {}
    noise = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    # Rankings by random vectors are uniform, so chance goes through the same scoring.
    sides = (benchmark.queries, benchmark.gallery)
    random_vectors = [torch.randn(len(side), 64, generator=noise).to(model.device) for side in sides]
    scores = {"chance": score(benchmark, *random_vectors)}
    seconds: dict[str, dict[str, float]] = {"chance": {"rank": time.perf_counter() - start}}
    described: dict[str, dict[str, Any]] = {"chance": {"backbone": None}}
    methods, sides_of = list[MethodResult](), dict[str, Tensor]()
    with _progress(benchmark, 2 * len(models) + 1 + 2 * len(fusions), shown=extractor.progress) as advance:
        for name, embedded in embed_models(models, benchmark, extractor):
            start = time.perf_counter()
            queries, gallery, described[name] = embedded.queries, embedded.gallery, models[name].describe()
            if name == "trained":
                queries, gallery, used = correct_embeddings(model, benchmark, embedded, calibration, query_expansion)
                described[name] |= used if checkpoint is None else {**used, "checkpoint": checkpoint}
            scores[name] = score(benchmark, queries, gallery)
            seconds[name] = {**embedded.seconds, "rank": time.perf_counter() - start}
            advance()
            sides_of[name] = queries
            for fusion in fusions if name == BASELINES[-1] else ():  # the other methods' embeddings are known then
                texts = embed_corpora(model, corpora if fusion == "basic" else ())
                scores[fusion] = score(benchmark, *fuse(fusion, sides_of["image"], sides_of["text"], gallery, texts))
                seconds[fusion] = {"rank": time.perf_counter() - start}
                described[fusion] = described["image"] | {"fusion": {"kind": fusion}}
                advance()
        arithmetic = {"device": device_name(model.device), **extractor.describe()}
        words = [text for query in benchmark.queries for text in query.wordings if text]
        truncated, limits = model.backbone.count_truncated(words), metric_limits(benchmark)
        for name, one in scores.items():
            result = method_result(benchmark, name, one, described[name], seconds[name], seed, limits)
            methods.append(replace(result, arithmetic=arithmetic, n_truncated=0 if name == "chance" else truncated))
            advance()
    if trained:
        methods[-1] = replace(
            methods[-1],
            differences=_Averaging.of(benchmark).differences({name: x.values for name, x in scores.items()}, seed),
            seen_classes=tuple(seen_classes(model, benchmark)),
            seen_images=seen_images(model, benchmark),
            validation_note=_validation_note(model, benchmark),
        )
    weights = _target_weights(model, benchmark, extractor) if trained else ()
    return EvaluationResult(tuple(methods), (ScoredBenchmark(benchmark, scores, weights),))


def correct_embeddings(
    model: IGROTModel, benchmark: Benchmark, embedded: EmbeddedBenchmark, calibration: float, query_expansion: int
) -> tuple[Float[Tensor, "queries wide"], Float[Tensor, "gallery wide"], dict[str, Any]]:
    """Expand queries and calibrate scores as chosen, see `evaluate_benchmark`; also return what results say of it."""
    queries, gallery, _ = embedded
    used: dict[str, Any] = {}
    if query_expansion:
        queries = expand_queries(benchmark, queries, gallery, query_expansion)
        used["query_expansion"] = query_expansion
    if calibration:
        queries, gallery, used["calibration"] = calibrate(model, benchmark.task, queries, gallery, calibration)
    return queries, gallery, used


@dataclass(frozen=True)
class _Averaging:
    """How the queries' values become a metric, its interval and its difference to another method, in percent or ranks.

    Attributes:
        labels: What a macro mean is over; None for a mean over queries.
        classes: What the bootstrap resamples before queries, or None.
        groups: What metrics over groups reduce; None if a query has no group.
    """

    labels: Int[Tensor, " queries"] | None
    classes: Int[Tensor, " queries"] | None
    groups: Int[Tensor, " queries"] | None

    @classmethod
    def of(cls, benchmark: Benchmark) -> "_Averaging":
        groups = query_groups(benchmark)
        macro = benchmark.protocol.average == "macro"
        if macro and groups is None:
            kind = "labels" if benchmark.protocol.groups == "class" else "tags"
            raise ConfigError(
                f"a macro average needs the {kind} of all queries; set Query.{kind.rstrip('s')}, or use micro"
            )
        classes = query_classes(benchmark) if benchmark.protocol.classes == "sampled" else None
        return cls(groups if macro else None, classes, groups)

    def mean(self, name: str, values: Float[Tensor, " queries"]) -> float:
        family, (values, labels, _) = family_of(name), self._reduced(name, values)
        if family is not None and family.average == "median":
            return float(values.nanquantile(0.5))
        return scale_of(name) * average(values, labels, "micro" if labels is None else "macro").item()

    def intervals(self, values: Mapping[str, Tensor], seed: int) -> dict[str, Interval]:
        return {name: Interval(*self._difference(name, x, None, seed)[1:]) for name, x in values.items()}

    def differences(self, values: Mapping[str, Mapping[str, Tensor]], seed: int) -> dict[str, dict[str, Difference]]:
        """Return the paired differences trained - other."""
        return {
            other: {name: self._difference(name, x, columns[name], seed) for name, x in values["trained"].items()}
            for other, columns in values.items()
            if other != "trained"
        }

    def _difference(self, name: str, first: Tensor, second: Tensor | None, seed: int) -> Difference:
        """Return the metric of `first`, less that of `second` if there is one, with its bounds."""
        family = family_of(name)
        if family is not None and family.average == "median":
            return median_difference(first, second, seed=seed, classes=self.classes)
        one, labels, classes = self._reduced(name, first)
        other = torch.zeros_like(one) if second is None else self._reduced(name, second)[0]
        gap = paired_interval(one, other, seed=seed, labels=labels, classes=classes)
        return Difference(*(scale_of(name) * x for x in gap))

    def _reduced(self, name: str, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the values of queries or groups, and the labels and classes that belong to them."""
        family = family_of(name)
        if family is None or family.reduction is None:
            return values, self.labels, self.classes
        if self.groups is None:
            raise DataError(f"{name} needs the group of every query; set Query.label, or leave it out")
        labels = self.labels
        if labels is not None:
            labels = group_values(labels.double(), self.groups.masked_fill(values.isnan(), -1), "maximum").long()
            labels = labels[int(values.isnan().any()) :]
        return group_values(values, self.groups, family.reduction), labels, None


@contextmanager
def _progress(benchmark: Benchmark, steps: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a bar, which appears at the first step: encoding shows a bar of its own."""
    bar = progress_bar(shown=shown)
    task = bar.add_task(f"evaluating {benchmark.name}", total=steps)

    def advance() -> None:
        bar.start()
        bar.advance(task)

    try:
        yield advance
    finally:
        bar.stop()


@torch.inference_mode()
def _target_weights(model: IGROTModel, benchmark: Benchmark, extractor: FeatureExtractor) -> tuple[float, ...]:
    """Return the weights of UNION's target head for gallery images from all over the gallery."""
    if not isinstance(model.target, UnionTarget):
        return ()
    some = benchmark.gallery[:: math.ceil(len(benchmark.gallery) / _WEIGHED)]
    images = extractor.lookup(extractor.extract_images([item.image for item in some], tokens=False), tokens=False)
    if model.projector is not None:
        images = model.projector(images)
    weights = model.target.weight(images.pooled, model.null_text().expand(len(images)).pooled)
    return tuple(weights.flatten().tolist())


def method_result(
    benchmark: Benchmark,
    method: str,
    scores: Scores,
    model: Mapping[str, Any],
    seconds: Mapping[str, float],
    seed: int,
    limits: Mapping[str, str] | None = None,
) -> MethodResult:
    """Return the result of a method without training, from its scores; `limits` are the benchmark's if None."""
    averaging, warning = _Averaging.of(benchmark), benchmark_warning(benchmark)
    return MethodResult(
        benchmark=benchmark.name,
        split=benchmark.split,
        method=method,
        n_queries=len(benchmark.queries),
        n_gallery=len(benchmark.gallery),
        n_skipped=benchmark.skipped,
        protocol=benchmark.protocol,
        metrics={name: averaging.mean(name, values) for name, values in scores.values.items()},
        intervals=averaging.intervals(scores.values, seed),
        by_tag=_by_tag(benchmark, scores, averaging.groups),
        model=model,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        versions=versions(),
        seed=seed,
        n_classes=0 if averaging.classes is None else len(averaging.classes.unique()),
        limits=metric_limits(benchmark) if limits is None else limits,
        warnings=(warning,) if warning else (),
    )


def seen_classes(model: IGROTModel, benchmark: Benchmark) -> list[str]:
    """Return the classes of a benchmark that the model was trained on according to its metadata.

    A metric is zero-shot only if there are none. Names are compared in lower case; blanks, hyphens and underscores are
    equivalent.
    """

    def normalized(name: str) -> str:
        return name.lower().replace(" ", "_").replace("-", "_")

    trained = {normalized(name) for name in model.metadata.get("classes", [])}
    labels = {query.label for query in benchmark.queries if query.label is not None}
    return sorted(name for name in labels if normalized(name) in trained)


def seen_images(model: IGROTModel, benchmark: Benchmark) -> SeenImages | None:
    """Count the images of a benchmark that the model's heads were trained on; None if that is not recorded.

    `images.identity` defines which images count as the same. What the backbone was trained on is not known.
    """
    trained = model.training_images
    if trained is None:
        return None
    return SeenImages(
        queries=sum(image_identity(query.image) in trained for query in benchmark.queries),
        gallery=sum(image_identity(item.image) in trained for item in benchmark.gallery),
    )


def describe_validation(benchmarks: Sequence[Benchmark]) -> dict[str, dict[str, Any]]:
    """Return what decides whether the metrics of validation and of another split are comparable, by benchmark."""
    return {
        one.name: {
            "gallery": len(one.gallery),
            "classes": sorted({query.label for query in one.queries if query.label}),
        }
        for one in benchmarks
    }


def _validation_note(model: IGROTModel, benchmark: Benchmark) -> str:
    """Say how the validation of the training differs; empty if it does not, or is not recorded."""
    validated = model.metadata.get("validation", {}).get(benchmark.name)
    own = describe_validation([benchmark])[benchmark.name]
    if validated is None or validated == own:
        return ""
    size = f"{validated['gallery']:,} gallery images instead of {own['gallery']:,}"
    kinds = f"{len(validated['classes'])} classes instead of {len(own['classes'])}"
    same = "the same number of other classes" if len(validated["classes"]) == len(own["classes"]) else kinds
    differences = [size] * (validated["gallery"] != own["gallery"]) + [same] * (validated["classes"] != own["classes"])
    return f"not comparable with the metrics of validation in training, which has {' and '.join(differences)}"


def average_parts(results: Sequence[EvaluationResult], name: str, seed: int = 0) -> EvaluationResult:
    """Average the parts of a benchmark (FashionIQ's categories), each part with the same weight.

    Args:
        results: One evaluation per part, all with the same protocol and methods.
        name: Name of the whole.
        seed: Seed of the bootstrap, which resamples the queries within each part.

    Returns:
        The mean of each method, with intervals of the mean over parts.
    """
    scored = [one.scored[0] for one in results]
    sizes = [len(one.benchmark.queries) for one in scored]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    of_parts = [_Averaging.of(one.benchmark) for one in scored]
    known = [one.classes for one in of_parts if one.classes is not None]
    classes = torch.cat(known) if len(known) == len(of_parts) else None
    parted = [one.groups + at * 2**32 for at, one in enumerate(of_parts) if one.groups is not None]
    averaging = _Averaging(labels, classes, torch.cat(parted) if len(parted) == len(of_parts) else None)
    galleries = [tuple(item.id for item in one.benchmark.gallery) for one in scored]
    # DTIN's domains share one gallery; FashionIQ's categories have one each.
    distinct = [galleries.index(gallery) == index for index, gallery in enumerate(galleries)]
    values = {
        method: {
            metric: torch.cat([one.scores[method].values[metric] for one in scored])
            for metric in scored[0].scores[method].values
        }
        for method in scored[0].scores
    }
    methods = []
    for index, columns in enumerate(values.values()):
        inner = [one.methods[index] for one in results]
        methods.append(
            replace(
                inner[0],
                benchmark=name,
                parts=tuple(one.benchmark for one in inner),
                n_queries=sum(sizes),
                n_gallery=sum(len(gallery) for gallery, new in zip(galleries, distinct, strict=True) if new),
                n_skipped=sum(one.n_skipped for one in inner),
                n_truncated=sum(one.n_truncated for one in inner),
                protocol=replace(inner[0].protocol, note=_note_of_parts(inner)),
                metrics={metric: averaging.mean(metric, x) for metric, x in columns.items()},
                intervals=averaging.intervals(columns, seed),
                by_tag={},
                seen_classes=tuple(sorted({name for one in inner for name in one.seen_classes})),
                seen_images=_seen_in_parts([one.seen_images for one in inner], distinct),
                n_classes=0 if classes is None else min(one.n_classes for one in inner),
                limits={
                    name: limit
                    for name, limit in inner[0].limits.items()
                    if all(one.limits.get(name) == limit for one in inner)
                },
                warnings=tuple(dict.fromkeys(warning for one in inner for warning in one.warnings)),
            )
        )
    if "trained" in values:
        methods[-1] = replace(methods[-1], differences=averaging.differences(values, seed))
    return EvaluationResult(tuple(methods))


def _note_of_parts(parts: Sequence[MethodResult]) -> str:
    clauses = [one.protocol.note.split("; ") for one in parts]
    common = [clause for clause in clauses[0] if all(clause in others for others in clauses)]
    return "; ".join([f"unweighted mean over {', '.join(one.benchmark for one in parts)}", *common])


def _seen_in_parts(counts: Sequence[SeenImages | None], distinct: Sequence[bool]) -> SeenImages | None:
    known = [one for one in counts if one is not None]
    if len(known) < len(counts):
        return None
    gallery = sum(one.gallery for one, new in zip(known, distinct, strict=True) if new)
    return SeenImages(sum(one.queries for one in known), gallery)


def _by_tag(benchmark: Benchmark, scores: Scores, groups: Int[Tensor, " queries"] | None) -> dict[str, TagMetric]:
    """Return the primary metric over the queries of each tag, in percent."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, query in enumerate(benchmark.queries):
        for tag in query.tags:
            rows[tag].append(row)
    primary, found = benchmark.protocol.primary, {}
    for tag, tagged in sorted(rows.items()):
        some = torch.tensor(tagged)
        averaging = _Averaging(None, None, None if groups is None else groups[some])
        found[tag] = TagMetric(len(tagged), averaging.mean(primary, scores.values[primary][some]))
    return found


@functools.cache  # reads and parses files
def versions() -> Mapping[str, str]:
    """Return the versions of the packages that metrics depend on."""
    found = {package: version(package) for package in ("torch", "transformers", "lightning", "numpy", "pillow")}
    return {"union-igrot": union_igrot.__version__, "python": python_version(), **found}
