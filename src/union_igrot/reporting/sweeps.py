"""The results of a sweep's jobs in one table: a line a model and method, a column a benchmark.

Knows the layout of a result row and which settings differ between jobs. Does not know how a
table is shown or how a metric came about.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from union_igrot.reporting.tables import is_seen, method_name

Row = Mapping[str, Any]
Column = tuple[str, str]
"""A benchmark and its split."""
_TRAINED = ("trained", "predictions")
_Key = tuple[str, str, tuple[tuple[str, str], ...]]  # backbone, method, settings that tell it apart
_ORDER = ("image", "text", "sum", *_TRAINED, "chance")


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: Its number in the sweep.
        run: The folder of its results, as it is shown.
        overrides: The settings it was started with, `key=value`.
        rows: Its result rows; none where it failed or wrote submission files alone.
        error: Why it failed; empty where it did not.
    """

    number: int
    run: str
    overrides: tuple[str, ...]
    rows: Sequence[Row] = ()
    error: str = ""


@final
@dataclass(frozen=True, slots=True)
class Figure:
    """A metric in percent, of one run or the mean over several that differ in their seed.

    Attributes:
        value: The metric.
        low: Lower bound of its 95 % interval; nan where it is a mean over runs.
        high: Upper bound.
        deviation: Standard deviation over runs; nan where it is of one run.
        runs: How many runs.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    deviation: float = math.nan
    runs: int = 1


@final
@dataclass
class Line:
    """One model and method over all benchmarks.

    Attributes:
        model: The backbone's name; empty for chance.
        method: The method's name, with the settings that tell it from others.
        rows: For each benchmark the result rows that the line stands for; several where runs differ in their seed.
    """

    model: str
    method: str
    rows: dict[Column, list[Row]] = field(default_factory=dict)

    def figure(self, column: Column, metric: str) -> Figure | None:
        """Return a metric; None where there is none."""
        rows = [row for row in self.rows.get(column, []) if row["metrics"].get(metric) is not None]
        if not rows:
            return None
        low, high = rows[0]["ci95"][metric]
        return _figure({row["seed"]: row["metrics"][metric] for row in rows}, low, high)

    def tag(self, column: Column, name: str) -> Figure | None:
        """Return the primary metric over the queries of a tag; None where there is none."""
        values: dict[int, float] = {}
        for row in self.rows.get(column, []):
            value = row["by_tag"].get(name, {}).get(row["protocol"]["primary"])
            values |= {} if value is None else {row["seed"]: value}
        return _figure(values, math.nan, math.nan) if values else None

    def seen(self, column: Column) -> bool:
        """Tell whether its models were trained on images or classes of the test."""
        return any(is_seen(row) for row in self.rows.get(column, []))


def _figure(by_seed: Mapping[int, float], low: float, high: float) -> Figure:
    values = list(by_seed.values())
    if max(values) - min(values) < 1e-9:  # measured once, or by several jobs and the same
        return Figure(values[0], low, high)
    return Figure(statistics.fmean(values), deviation=statistics.stdev(values), runs=len(values))


def settings_that_differ(jobs: Sequence[Job]) -> list[str]:
    """Name the settings that are not the same in all jobs, in the order given."""
    given = [dict(_pair(override) for override in job.overrides) for job in jobs]
    names = dict.fromkeys(name for settings in given for name in settings)
    return [name for name in names if len({settings.get(name) for settings in given}) > 1]


def _pair(override: str) -> tuple[str, str]:
    name, _, value = override.lstrip("+~").partition("=")
    return name, value


def columns(jobs: Sequence[Job]) -> list[Column]:
    """Return all benchmarks, in the order in which the jobs hold them."""
    return list(dict.fromkeys((row["benchmark"], row["split"]) for job in jobs for row in job.rows))


def headline_columns(jobs: Sequence[Job]) -> list[Column]:
    """Return the benchmarks without the parts of those whose mean is there."""
    inner = {part for job in jobs for row in job.rows for part in row.get("parts", ())}
    return [column for column in columns(jobs) if column[0] not in inner]


def lines(jobs: Sequence[Job], command: str) -> list[Line]:
    """Gather the jobs' rows.

    Args:
        jobs: The jobs so far.
        command: `train`, where each job has a model of its own; or `eval`, where jobs may share one.

    Returns:
        A line a model and method: trained ones apart by the settings that differ between jobs, but for
        the seed, over which they are averaged; untrained ones together wherever their metrics are equal.
        Chance comes last.
    """
    differ = [name for name in settings_that_differ(jobs) if name not in _shared(command)]
    found: dict[_Key, Line] = {}
    for job in jobs:
        given = dict(_pair(override) for override in job.overrides)
        told = tuple((name, given[name]) for name in differ if name in given)
        for row in job.rows:
            model = row["model"].get("backbone") or ""
            line = found.setdefault((model, row["method"], told), Line(model, _label(row["method"], told)))
            line.rows.setdefault((row["benchmark"], row["split"]), []).append(row)
    return _merged(found)


def _shared(command: str) -> set[str]:
    """Name the settings that do not tell one line from another: what is a column, or averaged over."""
    places = {"seed", "output_dir", "cache_dir", "cache_limit", "progress", "data.check_images", "model"}
    return places | ({"data"} if command == "eval" else set())


def _label(method: str, told: Sequence[tuple[str, str]]) -> str:
    said = [value if name == "checkpoint" else f"{name}={value}" for name, value in told]
    return ": ".join(filter(None, (method_name(method), " ".join(said))))


def _merged(found: Mapping[_Key, Line]) -> list[Line]:
    """Put untrained lines together that settings tell apart but metrics do not; order by model and method."""
    kept: dict[_Key, Line] = {}
    for key, line in found.items():
        alike = [one for other, one in kept.items() if other[:2] == key[:2] and _agree(one, line)]
        if key[1] in _TRAINED or not alike:
            kept[key] = line
            continue
        for column, rows in line.rows.items():
            alike[0].rows.setdefault(column, []).extend(rows)
    apart = [key[:2] for key in kept]
    for (model, method, _), line in kept.items():
        if method not in _TRAINED and apart.count((model, method)) == 1:
            line.method = method_name(method)
    models = list(dict.fromkeys(model for model, _ in apart))
    order = sorted(kept, key=lambda key: (key[1] == "chance", models.index(key[0]), _ORDER.index(key[1])))
    return [kept[key] for key in order]


def _agree(one: Line, other: Line) -> bool:
    """Tell whether two lines hold the same metrics wherever both hold any; chance does up to its own spread."""
    for column in one.rows.keys() & other.rows.keys():
        first, second = one.rows[column][0], other.rows[column][0]
        if first["protocol"] != second["protocol"] or first["n_queries"] != second["n_queries"]:
            return False
        if first["method"] != "chance" and not all(
            _same(value, second["metrics"].get(name)) for name, value in first["metrics"].items()
        ):
            return False
    return True


def _same(one: float | None, other: float | None) -> bool:
    return one is other or (one is not None and other is not None and math.isclose(one, other, abs_tol=1e-6))
