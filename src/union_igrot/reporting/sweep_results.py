"""The results of a sweep's jobs in one table: a row per model and method, a column per benchmark, published below.

Each entry of `published.csv` states where it was read and what is known of its protocol. Two metrics are comparable
only if split, gallery, text and convention agree. Results that nobody could look up again are not included.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.text import Text

from union_igrot.evaluation.results import OWN_METHODS, BenchmarkResult, EvaluationResult, MethodResult
from union_igrot.evaluation.tables import (
    UNTRAINED,
    Cell,
    ResultTable,
    TableRow,
    describe_protocol,
    format_interval,
    format_value,
    markdown_row,
    method_name,
    overlap_lines,
    print_table,
)
from union_igrot.metrics.names import unit_of
from union_igrot.metrics.statistics import Interval
from union_igrot.storage.files import write_atomic
from union_igrot.terminal import TerminalConsole

_Key = tuple[str, str]  # name and split of a benchmark
_ORDER = (*UNTRAINED, *OWN_METHODS, "chance")
_CSV_COLUMNS = (
    *("run", "model", "checkpoint", "benchmark", "split", "method", "n_queries", "n_gallery", "metric"),
    *("percent", "low95", "high95", "protocol", "seen_classes", "seen_queries", "seen_gallery"),
    *("backbone_hash", "heads_hash", "settings", "seed", "versions", "source"),
    *("value", "unit"),  # `percent` is the former name of `value`
)
_READ = {"V": "published", "S": "published, at second hand"}
_TEXT_COLUMNS = ("model", "method", "split", "source and protocol")
HIDDEN_SPLITS = ("cirr", "circo")
"""Benchmarks whose published results are of a split without public targets, so they are shown beside ours of `val`."""


@final
@dataclass(frozen=True, slots=True)
class Published:
    """What a method is published to reach on a benchmark, named as in our results, in percent.

    `mark` is `V` if it was read where the authors published it, `S` if in another paper's table; `note` is what is
    known of the protocol, `split` is `not stated` if the source does not say.
    """

    method: str
    backbone: str
    benchmark: str
    split: str
    metrics: Mapping[str, float]
    mark: str
    source: str
    note: str = ""


@cache
def published_results() -> tuple[Published, ...]:
    """Return all published results, by benchmark."""
    found = []
    with (files("union_igrot.reporting") / "published.csv").open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            pairs = (pair.split("=") for pair in line.pop("metrics").split())
            found.append(Published(**line, metrics={name: float(value) for name, value in pairs}))
    return tuple(found)


def published_for(benchmark: str, split: str) -> list[Published]:
    """Return the published results of a split; for CIRR and CIRCO of all splits, which are to be shown with them."""
    return [
        one
        for one in published_results()
        if one.benchmark == benchmark and (one.split == split or benchmark in HIDDEN_SPLITS)
    ]


@final
@dataclass(frozen=True, slots=True)
class SweepJob:
    """One job of a sweep: the folder of its results, and the settings `key=value` it was started with.

    The result is empty if the job failed, as `error` says, or wrote submission files alone.
    """

    number: int
    run: str
    overrides: tuple[str, ...]
    result: EvaluationResult = field(default_factory=EvaluationResult)
    error: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """The overrides by name."""
        pairs = (override.lstrip("+~").partition("=") for override in self.overrides)
        return {name: value for name, _, value in pairs}


@final
@dataclass(frozen=True, slots=True)
class SweepMetric:
    """A metric in percent: of one run with its interval, or the mean over several that differ in their seed."""

    value: float
    interval: Interval | None = None
    deviation: float = math.nan
    runs: int = 1

    @classmethod
    def over_seeds(cls, by_seed: Mapping[int, float], interval: Interval | None = None) -> "SweepMetric | None":
        """Average values, unless they all stem from the same evaluation; None if all are nan."""
        values = [value for value in by_seed.values() if not math.isnan(value)]
        if not values or max(values) - min(values) < 1e-9:
            return cls(values[0], interval) if values else None
        return cls(statistics.fmean(values), None, statistics.stdev(values), len(values))


def _cell(metric: SweepMetric | None, name: str = "", *, seen: bool = False) -> Cell:
    """Return a metric as a cell of a table; an empty one if there is none."""
    if metric is None:
        return Cell("")
    spread = f" ± {metric.deviation:.1f} ({metric.runs})" if metric.runs > 1 else ""
    bounds = "" if metric.interval is None else format_interval(metric.interval, name)
    return Cell(format_value(metric.value, name) + spread + (" *" if seen else ""), bounds)


@final
@dataclass
class SweepRow:
    """One model and method, with the settings that distinguish it from others, over all benchmarks.

    The model is empty for chance; a benchmark has several results if runs differ in their seed.
    """

    model: str
    method: str
    results: dict[_Key, list[MethodResult]] = field(default_factory=dict)

    def metric(self, key: _Key, name: str) -> SweepMetric | None:
        """Return a metric; None if there is none."""
        found = [one for one in self.results.get(key, []) if not math.isnan(one.metrics.get(name, math.nan))]
        by_seed = {one.seed: one.metrics[name] for one in found}
        return SweepMetric.over_seeds(by_seed, found[0].intervals[name] if found else None)

    def tag(self, key: _Key, tag: str) -> SweepMetric | None:
        """Return the primary metric over the queries of a tag; None if there is none."""
        found = [one for one in self.results.get(key, []) if tag in one.by_tag]
        return SweepMetric.over_seeds({one.seed: one.by_tag[tag].value for one in found})

    def is_seen(self, key: _Key) -> bool:
        """Return whether the heads were trained on images or classes of a benchmark."""
        return any(one.is_seen for one in self.results.get(key, []))


def varying_settings(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the names of the settings that differ between jobs, in the given order."""
    names = dict.fromkeys(name for job in jobs for name in job.settings)
    return [name for name in names if len({job.settings.get(name) for job in jobs}) > 1]


def sweep_rows(jobs: Sequence[SweepJob], command: str) -> list[SweepRow]:
    """Collect the results of the jobs of `train`, which have a model each, or of `eval`, which may share one.

    There is a row per model and method. Trained models are distinguished by the settings that differ between jobs,
    except for the seed, over which they are averaged; baselines share a row if their metrics are equal. Chance is last.
    """
    shared = {"seed", "output_dir", "cache_dir", "cache_limit", "progress", "data.check_images", "model"}
    shared |= {"data"} if command == "eval" else set()
    varying = [name for name in varying_settings(jobs) if name not in shared]
    rows: dict[tuple[str, str, tuple[str, ...]], SweepRow] = {}
    for job in jobs:
        pairs = [(name, job.settings[name]) for name in varying if name in job.settings]
        settings = tuple(value if name == "checkpoint" else f"{name}={value}" for name, value in pairs)
        for one in job.result.methods:
            model = one.model.get("backbone") or ""
            label = ": ".join(filter(None, (method_name(one.method), " ".join(settings))))
            row = rows.setdefault((model, one.method, settings), SweepRow(model, label))
            row.results.setdefault((one.benchmark, one.split), []).append(one)
    return _merged(rows)


def _merged(rows: Mapping[tuple[str, str, tuple[str, ...]], SweepRow]) -> list[SweepRow]:
    """Join rows of baselines that differ in settings but not in metrics; sort by model and method."""
    kept: dict[tuple[str, str, tuple[str, ...]], SweepRow] = {}
    for key, row in rows.items():
        equal = [one for other, one in kept.items() if other[:2] == key[:2] and _agree(one, row)]
        if key[1] in OWN_METHODS or not equal:
            kept[key] = row
            continue
        for benchmark, results in row.results.items():
            equal[0].results.setdefault(benchmark, []).extend(results)
    names = [key[:2] for key in kept]
    for (model, method, _), row in kept.items():
        if method not in OWN_METHODS and names.count((model, method)) == 1:
            row.method = method_name(method)
    models = list(dict.fromkeys(model for model, _ in names))
    order = sorted(kept, key=lambda key: (key[1] == "chance", models.index(key[0]), _ORDER.index(key[1])))
    return [kept[key] for key in order]


def _agree(one: SweepRow, other: SweepRow) -> bool:
    """Return whether two rows have the same metrics on their common benchmarks; chance may differ by its seed."""
    for key in one.results.keys() & other.results.keys():
        first, second = one.results[key][0], other.results[key][0]
        if first.protocol != second.protocol or first.n_queries != second.n_queries:
            return False
        pairs = [(value, second.metrics.get(name, math.nan)) for name, value in first.metrics.items()]
        if first.method != "chance" and not all(
            math.isclose(a, b, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b)) for a, b in pairs
        ):
            return False
    return True


def _whole(jobs: Sequence[SweepJob]) -> EvaluationResult:
    return EvaluationResult(tuple(one for job in jobs for one in job.result.methods))


def sweep_table(jobs: Sequence[SweepJob], command: str) -> ResultTable:
    """Return the primary metrics of all models and methods, published ones below; parts only as their mean."""
    whole = _whole(jobs)
    shown = [one for one in whole.benchmarks if one.key[0] not in whole.part_names]
    names = {one.key: one.protocol.primary for one in shown}
    rows = [
        TableRow(
            row.model,
            [Cell(row.method), *(_cell(row.metric(key, name), seen=row.is_seen(key)) for key, name in names.items())],
        )
        for row in sweep_rows(jobs, command)
    ]
    published: dict[tuple[str, str], dict[_Key, str]] = {}
    for key, primary in names.items():
        for one in published_for(*key):
            if primary in one.metrics:
                split = "" if one.split == key[1] else f" ({one.split})"
                published.setdefault((one.method, one.backbone), {})[key] = f"{one.metrics[primary]:.1f}{split}"
    rows += [
        TableRow(backbone, [Cell(f"published: {method}"), *(Cell(cells.get(key, "")) for key in names)], "published")
        for (method, backbone), cells in published.items()
    ]
    heads = [Cell(f"{name}\n{split}\n{primary}", kind="primary") for (name, split), primary in names.items()]
    return ResultTable("Primary metrics in percent", [Cell("model"), Cell("method", kind="words"), *heads], rows)


def _benchmark_table(result: BenchmarkResult, rows: Sequence[SweepRow]) -> ResultTable:
    """Return all metrics of all models and methods on one benchmark, published ones below."""
    key, published = result.key, published_for(*result.key)
    metrics = list(dict.fromkeys(name for one in result.methods for name in one.metrics))
    ours = [Cell(key[1]), Cell("this sweep")] if published else []
    table = [
        TableRow(
            row.model,
            [
                Cell(row.method + (" *" if row.is_seen(key) else "")),
                *(_cell(row.metric(key, name), name) for name in metrics),
                *ours,
            ],
        )
        for row in rows
        if key in row.results
    ]
    table += [
        TableRow(
            one.backbone,
            [
                Cell(one.method),
                *(Cell(f"{one.metrics[name]:.1f}" if name in one.metrics else "") for name in metrics),
                *(Cell(one.split), Cell("; ".join(filter(None, (f"{_READ[one.mark]}: {one.source}", one.note))))),
            ],
        )
        for one in published
    ]
    heads = ["model", "method", *metrics, *(("split", "source and protocol") if published else ())]
    kinds = {result.protocol.primary: "primary"} | dict.fromkeys(_TEXT_COLUMNS, "words")
    return ResultTable(result.title, [Cell(name, kind=kinds.get(name, "")) for name in heads], table)


def _tag_table(result: BenchmarkResult, rows: Sequence[SweepRow]) -> ResultTable | None:
    tags = {tag: metric.n_queries for one in result.methods for tag, metric in one.by_tag.items()}
    if not tags:
        return None
    heads = [Cell("model"), Cell("method", kind="words"), *(Cell(f"{tag} ({count:,})") for tag, count in tags.items())]
    table = [
        TableRow(row.model, [Cell(row.method), *(_cell(row.tag(result.key, tag)) for tag in tags)])
        for row in rows
        if result.key in row.results
    ]
    return ResultTable(f"{result.protocol.primary} over the queries of each tag", heads, table)


def write_sweep(folder: Path, jobs: Sequence[SweepJob], command: str) -> None:
    """Write `results.csv` (a line per metric, ours and published) and `results.md` into the sweep's folder."""
    table = io.StringIO()
    writer = csv.DictWriter(table, _CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    lines = [line for job in jobs for one in job.result.methods for line in _csv_lines(job, one)]
    for result in _whole(jobs).benchmarks:
        for published in published_for(*result.key):
            head = {name: getattr(published, name) for name in ("benchmark", "split", "method")}
            head |= {"model": published.backbone, "protocol": published.note}
            head |= {"source": f"published: {published.source} ({published.mark})"}
            lines += [head | {"metric": name, "percent": f"{x:g}"} for name, x in published.metrics.items()]
    writer.writerows(line | {"value": line["percent"], "unit": unit_of(line["metric"])} for line in lines)
    write_atomic(folder / "results.csv", table.getvalue())
    write_atomic(folder / "results.md", "\n".join(_markdown(jobs, command)).rstrip() + "\n")


def _csv_lines(job: SweepJob, one: MethodResult) -> Iterator[dict[str, Any]]:
    seen = one.seen_images
    head = {
        "run": job.run,
        "model": one.model.get("backbone") or "",
        "checkpoint": one.checkpoint,
        **{name: getattr(one, name) for name in ("benchmark", "split", "method", "n_queries", "n_gallery", "seed")},
        "protocol": describe_protocol(one.protocol, parts=bool(one.parts)),
        "seen_classes": len(one.seen_classes),
        "seen_queries": "" if seen is None else seen.queries,
        "seen_gallery": "" if seen is None else seen.gallery,
        "backbone_hash": one.model.get("backbone_fingerprint") or "",
        "heads_hash": one.model.get("heads") or "",
        "settings": " ".join(job.overrides),
        "versions": " ".join(f"{name}={value}" for name, value in one.versions.items()),
        "source": "this sweep",
    }
    for name, value in one.metrics.items():
        low, high = one.intervals[name]
        yield head | {"metric": name, "percent": _exact(value), "low95": _exact(low), "high95": _exact(high)}
    for tag, metric in one.by_tag.items():
        name = f"{one.primary} [{tag}]"
        yield head | {"metric": name, "percent": _exact(metric.value), "n_queries": metric.n_queries}


def _exact(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _markdown(jobs: Sequence[SweepJob], command: str) -> Iterator[str]:
    rows = sweep_rows(jobs, command)
    yield from (f"# Results of a sweep of `union-{command}`", "", *sweep_table(jobs, command).to_markdown(), "")
    yield (
        "Primary metrics in percent. [low, high] is the 95 % bootstrap interval over queries; `50.0 ± 0.5 (3)` is the "
        "mean and the standard deviation over three runs that differ in their seed. `*`: the heads were trained on "
        "images or classes of the benchmark, see below. A published result of another split is marked with its name."
    )
    for result in _whole(jobs).benchmarks:
        yield from ("", f"## {result.title}", "")
        yield from (f"**Warning: {warning}**\n" for warning in result.main.warnings)
        for protocol in dict.fromkeys(describe_protocol(one.protocol, parts=bool(one.parts)) for one in result.methods):
            yield from (f"{result.size}; {protocol}.", "")
        yield from _benchmark_table(result, rows).to_markdown()
        notes = {
            f"{row.method}: {line}".replace("* ", "\\* ", 1)
            for row in rows
            for one in row.results.get(result.key, [])
            if one.method == "trained"
            for line in overlap_lines(one)
        }
        for note in sorted(notes):
            yield from ("", note)
        if table := _tag_table(result, rows):
            yield from ("", f"{table.caption}:", "", *table.to_markdown())
    yield from ("", "## Jobs", "", markdown_row("job", "folder", "settings", "state"), markdown_row(*["---"] * 4))
    for job in jobs:
        state = f"failed: {job.error}" if job.error else "done" if job.result.methods else "done; no metrics"
        yield markdown_row(str(job.number), job.run, f"`{' '.join(job.overrides)}`", state)
    versions = {json.dumps(one.versions): one.versions for one in _whole(jobs).methods}
    yield from ("", *(", ".join(f"{name} {value}" for name, value in one.items()) for one in versions.values()))


def print_sweep(jobs: Sequence[SweepJob], command: str, folder: Path, console: Console | None = None) -> None:
    """Print the primary metrics of a sweep, the published ones below, what failed, and where the files are."""
    console = console or TerminalConsole()
    measured = any(job.result.methods for job in jobs)
    if measured:
        print_table(sweep_table(jobs, command), console, intervals=False)
    varying = tuple(f"{name}=" for name in varying_settings(jobs))
    for job in jobs:
        if job.error:
            settings = " ".join(setting for setting in job.overrides if setting.startswith(varying))
            console.print(Text(f"job {job.number} ({settings}) failed: {job.error}", style="red"))
    if measured:
        done = f"percent; {sum(not job.error for job in jobs)} of {len(jobs)} jobs done"
        files = f"every metric, interval and protocol is in {folder / 'results.csv'} and results.md"
        console.print(Text(f"{done}; {files}"), soft_wrap=True)
