"""Evaluation results as typed values: what `results.json` holds, and what every table and page is made from."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from union_igrot.errors import ConfigError, DataError, first_line
from union_igrot.metrics.names import unit_of
from union_igrot.metrics.statistics import Difference, Interval
from union_igrot.storage.files import write_atomic
from union_igrot.types import Benchmark, Protocol, Scores

OWN_METHODS = ("trained", "predictions")
"""Methods that a result is about; all others are baselines."""

_CLASSES = "classes"
FEW_CLASSES = 10
"""Intervals of fewer classes are marked."""

# What `results.json` holds, in its order; the second only if there is any.
_ALWAYS = (
    *("benchmark", "split", "method", "n_queries", "n_gallery", "n_skipped", "protocol", "metrics", "intervals"),
    *("by_tag", "seen_classes", "seen_images", "model", "seconds", "versions", "seed"),
)
_IF_ANY = (
    *("arithmetic", "differences", "parts", "n_classes", "n_truncated", "limits", "warnings", "validation_note"),
)
_KEYS = {"intervals": "ci95", "differences": "gain95"}


class TagMetric(NamedTuple):
    """The primary metric over the queries of one tag.

    Attributes:
        n_queries: Number of queries.
        value: Percent; nan if no query has a value.
    """

    n_queries: int
    value: float


@final
@dataclass(frozen=True)
class SeenImages:
    """Images of a benchmark that the heads were trained on.

    Attributes:
        queries: Number of queries with such an image.
        gallery: Number of such gallery images.
    """

    queries: int
    gallery: int


@final
@dataclass(frozen=True, repr=False)
class MethodResult:
    """One method on one benchmark; metrics, intervals and differences in percent, nan if there is no value.

    `MeanRank` and `MedianRank` are ranks instead, of which lower is better.

    Attributes:
        benchmark: Name of the benchmark, or of the mean over its parts.
        split: Name of the split.
        method: `chance`, `image`, `text`, `sum`, `trained` or `predictions`.
        n_queries: Number of queries.
        n_gallery: Number of gallery images.
        n_skipped: Number of items left out on request.
        n_truncated: Number of query texts that the backbone cuts at its token limit.
        protocol: How the metrics were computed.
        metrics: Metrics by name.
        intervals: 95 % bootstrap intervals over queries and their classes, by metric.
        by_tag: The primary metric by tag of the queries.
        seen_classes: Classes of the benchmark that the heads were trained on.
        seen_images: Images of the benchmark that the heads were trained on; None if that is not recorded.
        model: Description of the model: backbone, heads, hashes, checkpoint.
        seconds: Time by step.
        versions: Versions of the packages that the metrics depend on.
        seed: Seed of chance and of the bootstrap.
        arithmetic: Device and precision; None if nothing was computed from embeddings.
        differences: Paired differences to each other method, by metric; for trained heads only.
        parts: The benchmarks that this is the mean of, if any.
        n_classes: Number of classes of the queries, if the intervals resample these too; else 0.
        limits: Metrics that cannot vary or cannot reach 100 % here, with a phrase on each.
        warnings: Reasons why the metrics have no meaning.
        validation_note: How the validation of the training differs, if its metrics are not comparable with these.
    """

    benchmark: str
    split: str
    method: str
    n_queries: int
    n_gallery: int
    protocol: Protocol
    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval]
    n_skipped: int = 0
    n_truncated: int = 0
    by_tag: Mapping[str, TagMetric] = field(default_factory=dict)
    seen_classes: tuple[str, ...] = ()
    seen_images: SeenImages | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    arithmetic: Mapping[str, str] | None = None
    differences: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    n_classes: int = 0
    limits: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    validation_note: str = ""

    def __repr__(self) -> str:
        return f"MethodResult({self.label})"

    @property
    def label(self) -> str:
        """Benchmark, method and primary metric in a few words."""
        value = f"{self.metrics.get(self.primary, math.nan):.1f}"
        return f"{self.benchmark} {self.split}, {self.method}: {self.primary} {value}"

    @property
    def primary(self) -> str:
        """Name of the primary metric."""
        return self.protocol.primary

    @property
    def has_few_classes(self) -> bool:
        """Whether the intervals rest on so few classes that they are rough."""
        return 0 < self.n_classes < FEW_CLASSES

    @property
    def is_seen(self) -> bool:
        """Whether the heads were trained on images or classes of the benchmark."""
        images = self.seen_images
        return bool(self.seen_classes) or (images is not None and bool(images.queries or images.gallery))

    @property
    def checkpoint(self) -> str:
        """Where the trained heads were loaded from; empty without trained heads."""
        return self.model.get("checkpoint") or ""

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values that `results.json` holds."""
        special = {
            "protocol": asdict(self.protocol),
            "by_tag": {tag: {"n_queries": n, self.primary: value} for tag, (n, value) in self.by_tag.items()},
            "seen_images": None if self.seen_images is None else asdict(self.seen_images),
        }
        values = {name: special[name] if name in special else getattr(self, name) for name in (*_ALWAYS, *_IF_ANY)}
        plain: dict[str, Any] = _plain(
            {_KEYS.get(name, name): value for name, value in values.items() if name in _ALWAYS or value}
        )
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MethodResult":
        """Invert `to_dict`."""
        given = {name: values[key] for name in (*_ALWAYS, *_IF_ANY) if (key := _KEYS.get(name, name)) in values}
        known = {one.name for one in fields(Protocol)}
        protocol = Protocol(**{name: _tuples(value) for name, value in given["protocol"].items() if name in known})
        images, gains = given.get("seen_images"), given.get("differences", {}).items()
        return cls(
            **given
            | {name: tuple(given.get(name, ())) for name in ("seen_classes", "parts", "warnings")}
            | {
                "protocol": protocol,
                "metrics": {name: _from_json(value) for name, value in given["metrics"].items()},
                "intervals": {name: Interval(*map(_from_json, bounds)) for name, bounds in given["intervals"].items()},
                "by_tag": {
                    tag: TagMetric(one["n_queries"], _from_json(one[protocol.primary]))
                    for tag, one in given.get("by_tag", {}).items()
                },
                "seen_images": None if images is None else SeenImages(**images),
                "differences": {
                    other: {name: Difference(*map(_from_json, value)) for name, value in metrics.items()}
                    for other, metrics in gains
                },
            }
        )


@final
@dataclass(frozen=True)
class BenchmarkResult:
    """All methods on one benchmark.

    Attributes:
        methods: The methods; at least one.
    """

    methods: tuple[MethodResult, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Name and split of the benchmark."""
        return self.methods[0].benchmark, self.methods[0].split

    @property
    def title(self) -> str:
        """Name and split, for people."""
        return " · ".join(self.key)

    @property
    def size(self) -> str:
        """Numbers of queries and images, for people."""
        return f"{self.methods[0].n_queries:,} queries x {self.methods[0].n_gallery:,} images"

    @property
    def protocol(self) -> Protocol:
        """How the metrics were computed."""
        return self.methods[0].protocol

    @property
    def main(self) -> MethodResult:
        """The method that the result is about, the trained model, else the sum of image and text."""
        chosen = (one for name in (*OWN_METHODS, "sum") for one in self.methods if one.method == name)
        return next(chosen, self.methods[-1])

    @property
    def parts(self) -> tuple[str, ...]:
        """The benchmarks that this is the mean of, if any."""
        return self.methods[0].parts


@final
@dataclass(frozen=True, repr=False)
class ScoredBenchmark:
    """A benchmark with every method's values and rankings, query by query.

    Attributes:
        benchmark: The benchmark.
        scores: By method.
        target_weights: Weights of the image embedding in UNION's target head, of some gallery images; empty for
            other heads.
    """

    benchmark: Benchmark
    scores: Mapping[str, Scores]
    target_weights: tuple[float, ...] = ()

    def __repr__(self) -> str:
        name, split, methods = self.benchmark.name, self.benchmark.split, ", ".join(self.scores)
        return f"ScoredBenchmark({name}, {split}, {len(self.benchmark.queries)} queries: {methods})"


@final
@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """The metrics of any number of methods on any number of benchmarks.

    Attributes:
        methods: One entry per benchmark and method.
        scored: Values and rankings of every query; empty if the result was read from a file. A benchmark whose
            targets are not published is found here alone.
    """

    methods: tuple[MethodResult, ...] = ()
    scored: tuple[ScoredBenchmark, ...] = field(default=(), compare=False)

    def __add__(self, other: "EvaluationResult") -> "EvaluationResult":
        return EvaluationResult(self.methods + other.methods, self.scored + other.scored)

    def __repr__(self) -> str:
        return f"EvaluationResult({'; '.join(one.main.label for one in self.benchmarks)})"

    def __str__(self) -> str:
        from union_igrot.evaluation.tables import as_text  # noqa: PLC0415 - it imports this module

        return as_text(self)

    def _repr_html_(self) -> str:
        from union_igrot.evaluation.tables import as_html  # noqa: PLC0415 - it imports this module

        return as_html(self)

    @cached_property
    def benchmarks(self) -> tuple[BenchmarkResult, ...]:
        """The methods, grouped by benchmark and split."""
        groups: dict[tuple[str, str], list[MethodResult]] = {}
        for one in self.methods:
            groups.setdefault((one.benchmark, one.split), []).append(one)
        return tuple(BenchmarkResult(tuple(group)) for group in groups.values())

    @property
    def part_names(self) -> frozenset[str]:
        """Names of the benchmarks that are parts of another one in this result."""
        return frozenset(part for one in self.methods for part in one.parts)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield one flat record per benchmark, method and metric.

        `value` is in the `unit` percent or rank; `percent` is the former name of `value`.
        """
        for one in self.methods:
            for name, value in one.metrics.items():
                low, high = one.intervals[name]
                yield {
                    **{key: getattr(one, key) for key in ("benchmark", "split", "method", "n_queries", "n_gallery")},
                    **{"metric": name, "percent": value, "low95": low, "high95": high, "seed": one.seed},
                    **{"value": value, "unit": unit_of(name)},
                }

    def to_pandas(self) -> Any:
        """Return `records` as a `pandas.DataFrame`.

        Raises:
            ConfigError: If pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise ConfigError("to_pandas needs pandas, which is not installed; pip install pandas") from None
        return pandas.DataFrame(list(self.records()))

    def to_json(self) -> str:
        """Return the content of `results.json`."""
        return json.dumps([one.to_dict() for one in self.methods], indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationResult":
        """Read the content of a `results.json`.

        Raises:
            DataError: If it is not one.
        """
        try:
            return cls(tuple(MethodResult.from_dict(one) for one in json.loads(text)))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"not a results.json ({type(error).__name__}: {first_line(error)}); pass one of union-train"
            ) from None

    @classmethod
    def load(cls, path: Path) -> "EvaluationResult":
        """Read a `results.json` file.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, DataError) as error:
            raise DataError(f"cannot read {path}: {error}") from None


def write_results(folder: Path, result: EvaluationResult) -> None:
    """Write `results.json` (everything) and `results.csv` (a line per metric) into an existing folder."""
    write_atomic(folder / "results.json", result.to_json())
    table = io.StringIO()
    numbers = ("percent", "low95", "high95", "value")
    names = ("benchmark", "split", "method", "n_queries", "n_gallery", "metric", *numbers[:3], "seed", "value", "unit")
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    for record in result.records():
        writer.writerow(record | {name: f"{record[name]:.4f}" for name in numbers})
    write_atomic(folder / "results.csv", table.getvalue())


@dataclass(frozen=True)
class QueryValues:
    """The metrics of every query of one benchmark, as `write_query_values` wrote them.

    Attributes:
        identity: Hash of the queries.
        values: Values by `method/metric`.
        metrics: Names of the metrics, in the order of the protocol.
        primary: The primary metric.
        classes: The class index of each query, if the intervals resample classes.
    """

    identity: str
    values: Mapping[str, Tensor]
    metrics: tuple[str, ...]
    primary: str
    classes: Tensor | None = None


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
    if benchmark.protocol.classes == "sampled" and (classes := query_classes(benchmark)) is not None:
        flat[_CLASSES] = classes
    path = folder / f"queries-{benchmark.name}-{benchmark.split}.safetensors"
    metrics = list(dict.fromkeys(metric for one in scored.scores.values() for metric in one.values))
    metadata = {"queries": benchmark.queries_hash(), "metrics": json.dumps(metrics)}
    metadata["primary"] = benchmark.protocol.primary
    write_atomic(path, lambda temporary: save_file(flat, temporary, metadata=metadata))


def read_query_values(path: Path) -> QueryValues:
    """Read what `write_query_values` wrote; older files name no order of the metrics.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as held:
            metadata = held.metadata() or {}
            values = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path} ({error}); evaluate the run again") from None
    classes = values.pop(_CLASSES, None)
    metrics = (
        json.loads(metadata["metrics"])
        if "metrics" in metadata
        else dict.fromkeys(sorted({name.partition("/")[2] for name in values}, key=lambda name: (len(name), name)))
    )
    primary = metadata.get("primary", "")
    return QueryValues(metadata.get("queries", ""), values, tuple(metrics), primary, classes)


def query_classes(benchmark: Benchmark) -> Tensor | None:
    """Return the class index of each query; None if a query has no class."""
    labels = [query.label for query in benchmark.queries]
    number = {label: index for index, label in enumerate(sorted({label for label in labels if label is not None}))}
    return None if None in labels else torch.tensor([number[label] for label in labels if label is not None])


def query_groups(benchmark: Benchmark) -> Tensor | None:
    """Return the index of each query's group, its class or first tag as the protocol says; None if one has none."""
    if benchmark.protocol.groups == "class":
        return query_classes(benchmark)
    tags = [query.tags[0] if query.tags else "" for query in benchmark.queries]
    number = {tag: index for index, tag in enumerate(dict.fromkeys(tags))}
    return None if "" in number else torch.tensor([number[tag] for tag in tags])


def _from_json(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Return a value with lists for sequences and None for nan, as JSON needs it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
