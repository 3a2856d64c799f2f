"""The tables of a page, as words: metrics, differences between methods, groups of queries, seconds.

Knows the layout of a result row and metrics query by query. Does not know HTML or how a metric came about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from union_igrot.reporting.tables import Row, is_seen, method_name, percent
from union_igrot.types import Benchmark, Scores

MOST_GROUPS = 30
"""Lines of a table of edit types or classes; of more, the lowest and the highest are shown."""
Asked = tuple[Benchmark, Mapping[str, Scores]]
"""A benchmark and what each method answered."""


@dataclass(frozen=True)
class Cell:
    """A cell: its words, smaller words below, a class of its look, shares of a bar that adds up to 100."""

    text: str
    below: str = ""
    kind: str = ""
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A line of a table: its name, smaller words below; `shown` where it is the method that the page is about."""

    name: str
    cells: Sequence[Cell]
    shown: bool = False
    below: str = ""


@dataclass(frozen=True)
class Table:
    """A table; its first head cell stands over the lines' names."""

    caption: str
    head: Sequence[Cell]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Group:
    """A table of groups of queries, under a heading, after a sentence."""

    title: str
    said: str
    table: Table


def metrics_table(rows: Sequence[Row]) -> Table:
    """Return every metric of every method on one benchmark with its interval; the highest of a column is marked."""
    primary, names = rows[0]["protocol"]["primary"], list(rows[0]["metrics"])
    best = {name: max((_known(row["metrics"][name]) for row in rows), default=0.0) for name in names}
    lines = []
    for row in rows:
        cells = [
            Cell(
                percent(row["metrics"][name]),
                _span(row["ci95"][name]),
                "best" if len(rows) > 1 and _known(row["metrics"][name]) == best[name] else "",
            )
            for name in names
        ]
        lines.append(Line(method_name(row["method"]) + (" *" if is_seen(row) else ""), cells, row is rows[-1]))
    head = [Cell("method"), *(Cell(name, "primary" if name == primary else "") for name in names)]
    bold = "; bold: the highest of a column" if len(rows) > 1 else ""
    return Table(f"Percent; below each metric its 95 % bootstrap interval over queries{bold}", head, lines)


def at_a_glance(groups: Sequence[Sequence[Row]]) -> Table:
    """Return the primary metric of every method, a line a benchmark, and the gain over the best one without training.

    Args:
        groups: The rows of each benchmark.
    """
    # Backwards: what was trained comes first, so that a narrow screen shows it.
    methods = list(dict.fromkeys(row["method"] for rows in groups for row in reversed(rows)))
    gained = any("gain95" in row for rows in groups for row in rows)
    lines = []
    for rows in groups:
        primary, held = rows[0]["protocol"]["primary"], {row["method"]: row for row in rows}
        cells = [
            Cell(
                percent(row["metrics"][primary]) + (" *" if is_seen(row) else ""),
                _span(row["ci95"][primary]),
            )
            if (row := held.get(method))
            else Cell("-")
            for method in methods
        ]
        if gained:
            cells.insert(1, _gain_over_best(rows, primary))
        lines.append(Line(f"{rows[0]['benchmark']} · {rows[0]['split']}", cells, below=primary))
    head = [method_name(method) for method in methods]
    if gained:
        head.insert(1, "gain over the best untrained")
    caption = "The primary metric of each benchmark in percent, with its 95 % interval"
    if any(is_seen(row) for rows in groups for row in rows):
        caption += "; *: the heads were trained on some of what is asked for, see below"
    return Table(caption, [Cell("benchmark"), *map(Cell, head)], lines)


def _gain_over_best(rows: Sequence[Row], primary: str) -> Cell:
    gains = rows[-1].get("gain95", {})
    rivals = [row for row in rows if row["method"] in gains and row["method"] != "chance"]
    if not rivals:
        return Cell("-")
    rival = max(rivals, key=lambda row: _known(row["metrics"][primary]))
    said, verdict = _gain(gains[rival["method"]][primary])
    return Cell(said, f"{verdict} than {method_name(rival['method'])}" if verdict != _UNCLEAR else verdict)


def differences(row: Row, parts: Sequence[Asked]) -> Table:
    """Count on how many queries the trained model beats each other method, and give the paired difference.

    Args:
        row: Of the trained model, with `gain95`.
        parts: The benchmark, or its parts where the row is of their mean.
    """
    primary, lines = row["protocol"]["primary"], []
    for other, gains in row["gain95"].items():
        wins, ties, losses = _outcomes(parts, row["method"], other, primary)
        whole = max(1, wins + ties + losses)
        shares = [round(100 * count / whole, 2) for count in (wins, ties, losses)]
        said, verdict = _gain(gains[primary])
        cells = [Cell(f"{n:,}", f"{share:.1f} %") for n, share in zip((wins, ties, losses), shares, strict=True)]
        bar = Cell(f"{100 * (wins + losses) / whole:.1f} %", bar=(shares[0], shares[1], shares[2]))
        lines.append(Line(method_name(other), [*cells, bar, Cell(said), Cell(verdict, kind="words")]))
    head = ["against", "wins", "ties", "losses", "differ", f"difference in {primary}"]
    caption = "Queries; bars from left to right: wins (full), ties (pale), losses (hatched)"
    return Table(caption, [*map(Cell, head), Cell("verdict", kind="words")], lines)


def _outcomes(parts: Sequence[Asked], method: str, other: str, primary: str) -> tuple[int, int, int]:
    """Count wins, ties and losses of one method against another, over the queries where both have a value."""
    own, rival = (torch.cat([scores[name].values[primary] for _, scores in parts]) for name in (method, other))
    gaps = (own - rival)[~(own - rival).isnan()]
    return int((gaps > 0).sum()), int((gaps == 0).sum()), int((gaps < 0).sum())


def tag_groups(rows: Sequence[Row]) -> Group | None:
    """Return the primary metric by tag (edit type, aspect) under every method; None where there are no tags."""
    tags = rows[-1]["by_tag"]
    if not tags:
        return None
    primary = rows[-1]["protocol"]["primary"]
    last_first = rows[::-1]
    found = [
        (tag, part["n_queries"], [row["by_tag"][tag][primary] for row in last_first]) for tag, part in tags.items()
    ]
    return _group("By kind of query", "kind", primary, [method_name(row["method"]) for row in last_first], found, set())


def class_groups(asked: Asked, seen: Sequence[str]) -> Group | None:
    """Return the primary metric by the queries' class under every method; None where queries have no class.

    Args:
        asked: The benchmark and every method's metrics.
        seen: Classes that were trained on, which are marked.
    """
    benchmark, scores = asked
    places: dict[str, list[int]] = {}
    for place, query in enumerate(benchmark.queries):
        if query.label is not None:
            places.setdefault(query.label, []).append(place)
    primary = benchmark.protocol.primary
    if not places or any(primary not in part.values for part in scores.values()):
        return None
    found: list[tuple[str, int, list[float]]] = []
    for label, held in sorted(places.items()):
        rows = torch.tensor(held)
        values = [_mean(part.values[primary][rows]) for part in reversed(list(scores.values()))]
        found.append((label, len(held), values))
    names = [method_name(name) for name in reversed(list(scores))]
    return _group("By class", "class", primary, names, found, set(seen))


def _group(
    title: str,
    kind: str,
    primary: str,
    methods: Sequence[str],
    found: Sequence[tuple[str, int, Sequence[float | None]]],
    seen: set[str],
) -> Group:
    """Lay out groups from the lowest metric of the first method to the highest, the middle left out where many."""
    ordered = sorted(found, key=lambda one: (_known(one[2][0]), one[0]))
    said = f"From the lowest {primary} of “{methods[0]}” to the highest."
    if len(ordered) > MOST_GROUPS:
        said += f" The lowest and the highest {MOST_GROUPS // 2} of {len(ordered):,}."
        ordered = ordered[: MOST_GROUPS // 2] + ordered[-(MOST_GROUPS // 2) :]
    if seen:
        said += " With *: the heads were trained on this class; for it the metric is not zero-shot."
    lines = [
        Line(name + (" *" if name in seen else ""), [Cell(f"{count:,}"), *(Cell(percent(value)) for value in values)])
        for name, count, values in ordered
    ]
    head = [kind, "queries", *methods]
    return Group(title, said, Table(f"{primary} in percent by {kind}", list(map(Cell, head)), lines))


def seconds_table(groups: Sequence[Sequence[Row]]) -> Table | None:
    """Return the seconds spent on each method: encoding what was not stored, the heads, ranking."""
    kept = [row for rows in groups for row in rows if row["seconds"] and "parts" not in row]
    if not kept:
        return None
    steps = list(dict.fromkeys(step for row in kept for step in row["seconds"]))
    order = [step for step in ("encode", "embed", "rank") if step in steps]
    order += [step for step in steps if step not in order]
    lines = [
        Line(
            f"{row['benchmark']} · {row['split']}: {method_name(row['method'])}",
            [Cell(f"{row['seconds'][step]:.2f}" if step in row["seconds"] else "-") for step in order],
        )
        for row in kept
    ]
    caption = "Seconds of the evaluation; encoding is done once for all methods of a benchmark, and kept"
    return Table(caption, list(map(Cell, ["what", *order])), lines)


_UNCLEAR = "no clear difference"


def _gain(figures: Sequence[float]) -> tuple[str, str]:
    mean, low, high = figures
    verdict = "better" if low > 0 else "worse" if high < 0 else _UNCLEAR
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", verdict


def _known(value: Any) -> float:
    return float("-inf") if value is None or value != value else float(value)  # noqa: PLR0124 - nan


def _span(bounds: Sequence[float | None]) -> str:
    return f"[{', '.join(map(percent, bounds))}]"


def _mean(values: Tensor) -> float:
    return 100 * float(values.nanmean())
