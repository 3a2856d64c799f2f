"""Curves and histograms as points and ticks of an inline SVG; training curves are read from Lightning's logs."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from union_igrot.evaluation.results import ScoredBenchmark
from union_igrot.evaluation.tables import format_percent, method_name

Curve = list[tuple[float, float]]
"""(step, value) in the order of the steps."""

MAX_POINTS = 300
"""Points of a drawn curve; of a longer one, neighbors are averaged."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420.0, 230.0, 58.0, 408.0, 12.0, 202.0
_DOTTED, _BINS = 40, 24
_DRAWN_QUERIES = 5000  # queries of a recall curve
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its position in the drawing, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves or a histogram, laid out in a drawing of `width` by `height` units, y downwards.

    `line` holds the points of an SVG polyline, `dots` the points again if they are few, so that a single one is
    visible; `others` are further lines by name, `bars` left, top, width and height of the bars of a histogram; `rows`
    and `columns` are marks of the values and of `axis`.
    """

    name: str
    description: str
    line: str
    dots: tuple[tuple[float, float], ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    axis: str = "step"
    others: tuple[tuple[str, str], ...] = ()
    bars: tuple[tuple[float, float, float, float], ...] = ()
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _RIGHT


def read_curves(logs: Sequence[Path]) -> dict[str, Curve]:
    """Read Lightning's `metrics.csv` files, in the given order, as curves by column name."""
    curves: dict[str, dict[float, float]] = {}
    for log in logs:
        with log.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                for name, cell in row.items():
                    if name not in {"step", "epoch"} and cell:
                        curves.setdefault(name, {})[float(row["step"])] = float(cell)
    return {name: sorted(points.items()) for name, points in curves.items()}


def layout_chart(name: str, curve: Curve) -> Chart:
    """Lay out a curve; values that are not finite are counted and not drawn."""
    finite = [(x, y) for x, y in curve if math.isfinite(y)]
    lost = len(curve) - len(finite)
    notes = [f"{lost:,} of {len(curve):,} values are not finite"] if lost else []
    if not finite:
        return Chart(name, "; ".join(notes) or "no values", "", (), (), ())
    lowest, highest = (choose(finite, key=lambda point: point[1]) for choose in (min, max))
    ends = f"from {finite[0][1]:.4g} at step {finite[0][0]:.0f} to {finite[-1][1]:.4g} at step {finite[-1][0]:.0f}"
    bounds = f"lowest {lowest[1]:.4g} (step {lowest[0]:.0f}), highest {highest[1]:.4g} (step {highest[0]:.0f})"
    points = thin(finite)
    if len(points) < len(finite):
        notes.append(f"each point drawn is the mean of about {len(finite) / len(points):.0f} values")
    rows = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    columns = nice_ticks(points[0][0], points[-1][0], whole=True)
    return _chart(name, "; ".join([ends, bounds, *notes]), {name: points}, rows, columns)


def recall_chart(scored: ScoredBenchmark) -> Chart | None:
    """Lay out R@k over k for every method, the last one first; None if no curve rises."""
    queries = scored.benchmark.queries
    at = {item.id: position for position, item in enumerate(scored.benchmark.gallery)}
    asked = [row for row, query in enumerate(queries) if query.targets]
    asked = asked[:: max(1, math.ceil(len(asked) / _DRAWN_QUERIES))]
    targets = [torch.tensor([at[name] for name in queries[row].targets if name in at]) for row in asked]
    curves: dict[str, Curve] = {}
    for method, one in reversed(list(scored.scores.items())):
        ranked = one.ranking.positions.cpu()
        hits = torch.stack([torch.isin(ranked[row], wanted) for row, wanted in zip(asked, targets, strict=True)])
        recalls = (100 * hits.cummax(1).values.double().mean(0)).tolist()
        curves[method_name(method)] = [(float(k), recall) for k, recall in enumerate(recalls, 1)]
    if all(curve[0][1] == curve[-1][1] for curve in curves.values() if curve):
        return None
    last = max(map(len, curves.values()))
    ends = (f"{name} {format_percent(one[0][1])} to {format_percent(one[-1][1])}" for name, one in curves.items())
    words = (
        f"percent of the queries with a target among the first k; {', '.join(ends)}; full line: {next(iter(curves))}"
    )
    rows, columns = (list(map(float, marks)) for marks in (range(0, 101, 20), (1, *range(10, last, 10), last)))
    return _chart("R@k", words, curves, rows, columns, axis="k")


def weights_chart(weights: Sequence[float]) -> Chart:
    """Lay out a histogram of the weights of the image embedding in UNION's target head."""
    columns = nice_ticks(min(weights), max(weights))
    counts = torch.histc(torch.tensor(weights, dtype=torch.float64), _BINS, columns[0], columns[-1]).tolist()
    words = (
        f"{len(weights):,} images, from {min(weights):.3g} to {max(weights):.3g}, median "
        f"{torch.tensor(weights).median():.3g}; 1 is the image embedding alone, 0 the null text alone"
    )
    rows = nice_ticks(0.0, max(counts), whole=True)
    return _chart("gallery images", words, {}, rows, columns, "the weight of the image in UNION's target", counts)


def _chart(
    name: str,
    description: str,
    curves: Mapping[str, Curve],
    rows: Sequence[float],
    columns: Sequence[float],
    axis: str = "step",
    counts: Sequence[float] = (),
) -> Chart:
    """Place curves, the first as the full line, or bars side by side, between marks of the values and of the axis."""
    steps = [*columns, *(x for curve in curves.values() for x, _ in curve)]
    right = _RIGHT - 14
    across, upwards = _scale(min(steps), max(steps), _LEFT, right), _scale(rows[0], rows[-1], _BOTTOM, _TOP)
    placed = {one: tuple((round(across(x), 1), round(upwards(y), 1)) for x, y in curves[one]) for one in curves}
    lines = {one: " ".join(f"{x:g},{y:g}" for x, y in points) for one, points in placed.items()}
    first = next(iter(placed), "")
    width = (right - _LEFT) / _BINS
    return Chart(
        name,
        description,
        lines.pop(first, ""),
        placed[first] if axis == "step" and len(placed[first]) <= _DOTTED else (),
        tuple(Tick(round(upwards(value), 1), f"{value:.6g}") for value in rows),
        tuple(Tick(round(across(value), 1), f"{value:.6g}") for value in columns),
        axis,
        tuple(lines.items()),
        tuple(
            (round(_LEFT + number * width, 1), round(upwards(n), 1), round(width, 1), round(_BOTTOM - upwards(n), 1))
            for number, n in enumerate(counts)
        ),
    )


def thin(points: Curve, most: int = MAX_POINTS) -> Curve:
    """Return at most `most` points, by averaging neighbors if there are more."""
    if len(points) <= most:
        return points
    edges = [round(number * len(points) / most) for number in range(most + 1)]
    groups = [points[low:high] for low, high in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def nice_ticks(low: float, high: float, *, whole: bool = False, about: int = 4) -> list[float]:
    """Return round numbers that enclose a range, at least two, evenly apart by 1, 2 or 5 times a power of ten.

    `whole` is for steps: integers only. About `about` gaps are aimed at.
    """
    largest = max(abs(low), abs(high))
    # Differences below the precision of the numbers are drawn as flat.
    span = high - low if high - low > max(1e-6 * largest, _SMALLEST) else largest if largest > _SMALLEST else 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    gap = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about + 1e-9)
    if whole:
        gap = max(1.0, gap)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    last = max(last, first + 1)
    return [number * gap for number in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the linear map from `low`..`high` to `start`..`end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)
