"""Training curves: read from Lightning's logs, and laid out as points and ticks of an inline SVG."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

Curve = list[tuple[float, float]]
"""(step, value) in the order of the steps."""

MAX_POINTS = 300
"""Points of a drawn curve; of a longer one, neighbors are averaged."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420.0, 230.0, 58.0, 408.0, 12.0, 202.0
_DOTTED = 40
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its position in the drawing, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One curve, laid out in a drawing of `width` by `height` units, y downwards.

    `line` holds the points of an SVG polyline, `dots` the points again if they are few, so that a single one is
    visible; `rows` and `columns` are marks of the values and steps.
    """

    name: str
    description: str
    line: str
    dots: tuple[tuple[float, float], ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
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
    across = _scale(min(points[0][0], columns[0]), max(points[-1][0], columns[-1]), _LEFT, _RIGHT - 14)
    upwards = _scale(rows[0], rows[-1], _BOTTOM, _TOP)
    placed = [(round(across(x), 1), round(upwards(y), 1)) for x, y in points]
    return Chart(
        name,
        "; ".join([ends, bounds, *notes]),
        " ".join(f"{x:g},{y:g}" for x, y in placed),
        tuple(placed) if len(placed) <= _DOTTED else (),
        tuple(Tick(round(upwards(value), 1), f"{value:.6g}") for value in rows),
        tuple(Tick(round(across(value), 1), f"{value:.6g}") for value in columns),
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
