"""The tables of evaluation results and the words below them, as plain values and as text, HTML and Markdown.

This is part of evaluation, not of reporting, so that an `EvaluationResult` can print itself; reporting adds its own
tables as values of the same kind.
"""

import io
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from union_igrot.errors import DataError
from union_igrot.evaluation.calibration import WEIGHT
from union_igrot.evaluation.results import (
    FEW_CLASSES,
    BenchmarkResult,
    EvaluationResult,
    MethodResult,
    QueryValues,
)
from union_igrot.metrics.names import families_of, is_rank, scale_of
from union_igrot.metrics.statistics import (
    Difference,
    Interval,
    median_difference,
    paired_interval,
    randomization_test,
)
from union_igrot.terminal import TerminalConsole
from union_igrot.types import Protocol

_METHOD_NAMES = {"image": "image alone", "text": "text alone", "sum": "image + text"}
_METHOD_NAMES |= {"product": "image x text", "weicom": "WeiCom", "slerp": "slerp", "basic": "BASIC's projection"}
UNTRAINED = tuple(_METHOD_NAMES)
"""Methods that use no trained heads, without chance."""
_PARAGRAPH, _TEXT_WIDTH, _WORDS_WIDTH, _NAME_WIDTH, _HEAD_WIDTH = 80, 100, 36, 26, 16
LIMIT_MARK, FEW_MARK = "†", "‡"
"""Marks of metrics that cannot vary or cannot reach 100 %, and of intervals that rest on few classes."""
_NAMED_CLASSES = 24
_TIE_RULES = {
    "expected": "ties by expectation",
    "gallery order": "ties by gallery order",
    "pessimistic": "ties against the model",
}
NO_DIFFERENCE = "no clear difference"
"""Verdict on a paired difference whose interval contains 0."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: Its text.
        below: Smaller text below, such as an interval.
        kind: CSS class; in the header `primary` marks a column of primary metrics and `words` one of text, below it
            `best` marks the highest value of a column.
        bar: Shares of a bar, which add up to 100.
        span: Value of a bar in percent, and the bounds of its interval.
    """

    text: str
    below: str = ""
    kind: str = ""
    bar: tuple[float, float, float] | None = None
    span: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        name: Its name.
        cells: Its other cells.
        kind: CSS class; `shown` marks the main row, `primary` a primary metric, `published` a result of others.
        below: Smaller text below the name.
    """

    name: str
    cells: Sequence[Cell]
    kind: str = ""
    below: str = ""


@dataclass(frozen=True)
class ResultTable:
    """A table as plain values.

    Attributes:
        caption: What it shows.
        head: The header; its first cell is above the rows' names.
        rows: The rows.
    """

    caption: str
    head: Sequence[Cell]
    rows: Sequence[TableRow]

    def to_html(self) -> str:
        """Return an HTML figure, every text escaped."""
        head = "".join(_html_cell("th", cell, ' scope="col"') for cell in self.head)
        rows = "".join(
            (f'<tr class="{escape(row.kind)}">' if row.kind else "<tr>")
            + _html_cell("th", Cell(row.name, row.below), ' scope="row"')
            + "".join(_html_cell("td", cell) for cell in row.cells)
            + "</tr>\n"
            for row in self.rows
        )
        caption = escape(self.caption)
        return (
            f"\n<figure>\n<figcaption>{caption}</figcaption>\n"
            f'<div class="scroll" role="group" aria-label="{caption}" tabindex="0">\n'
            f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n</figure>"
        )

    def to_markdown(self) -> list[str]:
        """Return the lines of a Markdown table; primary metrics with their interval."""
        primary = [cell.kind == "primary" for cell in self.head[1:]]
        names = [f"**{cell.text}**" if cell.kind == "primary" else cell.text for cell in self.head]
        rows = [
            [row.name, *(f"{x.text} {x.below * shown}".rstrip() for x, shown in zip(row.cells, primary, strict=True))]
            for row in self.rows
        ]
        rule = "| --- |" + "".join(" --- |" if cell.kind == "words" else " ---: |" for cell in self.head[1:])
        return [markdown_row(*names), rule, *(markdown_row(*row) for row in rows)]

    def to_rich(self, columns: Sequence[int], *, intervals: bool = True) -> Table:
        """Return some columns, and those of text, as a table for the terminal; primary metrics with their interval."""
        # Narrow, so that eight metrics fit into 80 columns.
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        table.add_column(self.head[0].text, max_width=_NAME_WIDTH, overflow="fold")
        chosen = [(at, head) for at, head in enumerate(self.head[1:]) if at in columns or head.kind == "words"]
        for _, head in chosen:
            if head.kind == "words":
                table.add_column(head.text, max_width=_WORDS_WIDTH, overflow="fold")
                continue
            title = head.text.replace(" + ", " +\n").replace(")/", ")\n/ ")
            if max(map(len, title.split("\n"))) > _HEAD_WIDTH:  # the name of a folder
                title = "\n".join(textwrap.wrap(title, _HEAD_WIDTH))
            name = Text(title, justify="right")
            primary = head.kind == "primary"
            table.add_column(name, justify="right", no_wrap=True, style="bold" if primary else None)
            if primary and intervals:
                table.add_column(Text("[low, high]"), no_wrap=True)
        for row in self.rows:
            cells: list[str] = []
            style = {"published": "dim", "primary": "bold"}.get(row.kind)
            for at, head in chosen:
                cell = row.cells[at]
                cells += [cell.text, cell.below] if head.kind == "primary" and intervals else [cell.text]
                style = "green" if head.kind == "primary" and cell.kind == "best" else style
            table.add_row(Text(row.name), *map(Text, cells), style=style)
        return table


def _html_cell(tag: str, cell: Cell, attributes: str = "") -> str:
    below = f'<span class="span">{escape(cell.below)}</span>' if cell.below else ""
    shapes = ""
    if cell.bar is not None:
        wins, ties, losses = cell.bar
        shapes = (
            f'<rect class="win" width="{wins}" height="8"/><rect class="tie" x="{wins}" width="{ties}" height="8"/>'
            f'<rect class="loss" x="{wins + ties}" width="{losses}" height="8"/>'
        )
    elif cell.span is not None and all(map(math.isfinite, cell.span)):
        value, low, high = (round(one, 1) for one in cell.span)
        shapes = (
            f'<rect class="tie" width="100" height="8"/><rect class="win" width="{value}" height="8"/>'
            f'<rect class="range" x="{low}" y="3" width="{max(0.6, high - low):.1f}" height="2"/>'
        )
    kind = "bar" if cell.span is None else "bar value"
    bar = f'<svg class="{kind}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>'
    bar = bar if shapes else ""
    attributes += f' class="{escape(cell.kind)}"' if cell.kind else ""
    return f"<{tag}{attributes}>{escape(cell.text)}{below}{bar}</{tag}>"


def markdown_row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def print_table(table: ResultTable, console: Console, *, intervals: bool = True) -> None:
    """Print a table, divided into several if it is wider than the console."""
    boundless = console.options.update(max_width=sys.maxsize)

    def fits(columns: Sequence[int]) -> bool:
        shown = table.to_rich(columns, intervals=intervals)
        return Measurement.get(console, boundless, shown).maximum <= console.width

    for columns in _columns_that_fit(table, fits):
        console.print(table.to_rich(columns, intervals=intervals))
        console.print()


def _columns_that_fit(table: ResultTable, fits: Callable[[Sequence[int]], bool]) -> list[list[int]]:
    """Divide the columns into groups that fit; columns of one kind (`R@1`, `R@5`) stay together if possible."""
    everything = [at for at, head in enumerate(table.head[1:]) if head.kind != "words"]
    if fits(everything):
        return [everything]
    groups: list[list[int]] = []
    kinds = [list(kind) for _, kind in groupby(everything, key=lambda at: table.head[at + 1].text.partition("@")[0])]
    # From the end, so that a whole kind moves to the next table and not one last column.
    for kind in reversed(kinds):
        if groups and fits([*kind, *groups[0]]):
            groups[0] = [*kind, *groups[0]]
            continue
        parts: list[list[int]] = [[]]
        for at in kind:
            if parts[-1] and not fits([*parts[-1], at]):
                parts.append([])
            parts[-1].append(at)
        groups = parts + groups
    return groups


def metrics_table(result: BenchmarkResult) -> ResultTable:
    """Return every metric of every method on one benchmark, with intervals; the highest of a column is marked."""
    methods, names = result.methods, list(result.methods[0].metrics)
    sign = {name: -1 if is_rank(name) else 1 for name in names}
    best = {name: max((comparable(sign[name] * one.metrics[name]) for one in methods), default=0.0) for name in names}
    limits, few = result.main.limits, FEW_MARK if result.main.has_few_classes else ""

    def cell(one: MethodResult, name: str) -> Cell:
        value = one.metrics[name]
        is_best = len(methods) > 1 and comparable(sign[name] * value) == best[name] and name not in limits
        bounds = format_interval(one.intervals[name], name) + few
        return Cell(format_value(value, name), bounds, "best" if is_best else "")

    rows = [
        TableRow(
            method_title(one) + (" *" if one.is_seen else ""),
            [cell(one, name) for name in names],
            "shown" if one is result.main else "",
        )
        for one in methods
    ]
    primary = result.protocol.primary
    marked = {name: name + (LIMIT_MARK if name in limits else "") for name in names}
    head = [Cell("method"), *(Cell(marked[name], kind="primary" if name == primary else "") for name in names)]
    ranks = any(map(is_rank, names))
    bold = f"; bold: the {'best' if ranks else 'highest'} of a column" if len(methods) > 1 else ""
    over = resampled_words(result.main)
    return ResultTable(
        f"{_units(names).capitalize()}; below each metric its 95 % bootstrap interval over {over}{bold}", head, rows
    )


def _units(metrics: Iterable[str]) -> str:
    return "percent, or ranks (lower is better)" if any(map(is_rank, metrics)) else "percent"


def resampled_words(result: MethodResult) -> str:
    """Return what the intervals resample."""
    return "classes and their queries" if result.n_classes else "queries"


def mark_lines(result: MethodResult) -> list[str]:
    """Explain the marks of metrics that are limited and of intervals that rest on few classes."""
    lines = []
    if result.limits:
        limits = ", ".join(f"{name} {limit}" for name, limit in result.limits.items())
        lines.append(f"{LIMIT_MARK} with so few candidates or relevant images {limits}")
    if result.has_few_classes:
        lines.append(f"{FEW_MARK} of only {result.n_classes} classes: intervals and verdicts are rough")
    return lines


def method_name(method: str) -> str:
    """Return the display name of a method."""
    return _METHOD_NAMES.get(method, method)


def method_title(result: MethodResult) -> str:
    """Return the display name of a result's method, which says how its scores are corrected."""
    marks = {"calibration": "calibrated", "query_expansion": "expanded"}
    return ", ".join([method_name(result.method), *(mark for key, mark in marks.items() if result.model.get(key))])


def correction_lines(described: Mapping[str, Any]) -> Iterator[str]:
    """Explain the calibration and the query expansion of a described model."""
    if used := described.get("calibration"):
        yield (
            f"calibrated: score minus {used['weight']:g} times the mean of the gallery image's {used['neighbors']} "
            f"greatest cosines to {used['queries']:,} training queries"
        )
    if count := described.get("query_expansion"):
        mean = f"{WEIGHT:g} times the unit mean of its first {count} results"
        yield f"expanded: each query plus {mean}, searched again"


def format_percent(value: float | None) -> str:
    """Format a metric with one decimal; a dash if there is no value."""
    if value is None or value != value:  # noqa: PLR0124 - nan
        return "-"
    return "100" if value > 99.95 else f"{value:.1f}"


def format_value(value: float | None, name: str) -> str:
    """Format the value of a metric: a percentage, or a rank."""
    unknown = value is None or value != value  # noqa: PLR0124 - nan
    return format_percent(value) if unknown or not is_rank(name) else f"{value:,.1f}"


def format_interval(bounds: Interval, name: str = "") -> str:
    """Format an interval of a metric."""
    return f"[{format_value(bounds.low, name)}, {format_value(bounds.high, name)}]"


def comparable(value: float) -> float:
    """Return a value, or minus infinity for nan, so that values can be ordered."""
    return float("-inf") if value != value else value  # noqa: PLR0124 - nan


def format_difference(values: Difference, name: str = "") -> tuple[str, str]:
    """Return a paired difference of a metric with its interval, and the verdict."""
    mean, low, high = values
    words = ("worse", "better") if is_rank(name) else ("better", "worse")
    verdict = words[0] if low > 0 else words[1] if high < 0 else NO_DIFFERENCE
    bounds = "" if low != low else f" [{low:+.1f}, {high:+.1f}]"  # noqa: PLR0124 - nan
    return f"{mean:+.1f}{bounds}", verdict


def describe_protocol(protocol: Protocol, *, parts: bool = False) -> str:
    """Describe a protocol in one line: preset, prompt, conventions of its metrics, exclusion, ties.

    Args:
        protocol: The protocol.
        parts: Whether the result is the mean over parts of a benchmark.
    """
    tags = " over tags" if (protocol.average, protocol.groups) == ("macro", "tag") else ""
    clauses = [
        f"protocol {protocol.name}",
        f"prompt {protocol.prompt!r}" if protocol.prompt else "",
        *(family.describe(protocol) for family in families_of(protocol.metrics) if family.describe),
        "mean of the parts' means" if parts else f"{protocol.average} average{tags}",
        "reference left out" if protocol.exclude_reference else "reference kept",
        _TIE_RULES[protocol.ties],
        protocol.note,
    ]
    return "; ".join(clause for clause in clauses if clause)


def overlap_lines(result: MethodResult) -> list[str]:
    """Describe how the benchmark relates to the training data of the heads; `*` marks images and classes in both."""
    images, classes = result.seen_images, result.seen_classes
    if images is None:
        lines = ["which images the heads were trained on is not recorded with this model"]
    elif images.queries or images.gallery:
        lines = [
            f"* the heads were trained on the images of {images.queries:,} of {result.n_queries:,} queries and on "
            f"{images.gallery:,} of {result.n_gallery:,} gallery images"
        ]
    else:
        lines = ["the heads were trained on none of these images"]
    if classes:
        more = ", ..." if len(classes) > _NAMED_CLASSES else ""
        named = ", ".join(classes[:_NAMED_CLASSES]) + more
        lines.append(f"* the heads were trained on {len(classes)} of the classes: these are not zero-shot ({named})")
    return [*lines, result.validation_note] if result.validation_note else lines


def difference_lines(result: MethodResult) -> list[str]:
    """Describe by how much trained heads are better than each other method in the primary metric."""
    lines = []
    for other, values in result.differences.items():
        amount, verdict = format_difference(values[result.primary])
        few = FEW_MARK if result.has_few_classes else ""
        lines.append(f"{method_title(result)} - {method_name(other)}: {amount}{few} {result.primary}, {verdict}")
    return lines


def compare_queries(
    first: QueryValues, second: QueryValues, names: tuple[str, str], method: str, rounds: int, seed: int
) -> tuple[ResultTable, str]:
    """Compare a method of two runs, query by query.

    Args:
        first: The values of one run.
        second: The values of another, of the same queries.
        names: Names of the runs.
        method: The method.
        rounds: Number of draws of the randomization test.
        seed: Seed of the bootstrap and the draws.

    Returns:
        A table of both means, their paired difference and its p-value by metric, and a line on the primary metric.

    Raises:
        DataError: If a run has no values of the method.
    """
    metrics = [name for name in first.metrics if f"{method}/{name}" in first.values.keys() & second.values.keys()]
    if not metrics:
        known = sorted(
            {key.partition("/")[0] for key in first.values} & {key.partition("/")[0] for key in second.values}
        )
        raise DataError(f"the runs have no values of method={method} in common (expected one of {', '.join(known)})")
    primary, rows, verdict = first.primary or metrics[0], [], ""
    for name in metrics:
        one, other = (side.values[f"{method}/{name}"] for side in (first, second))
        scale, median = scale_of(name), name.startswith("Median")
        paired = median_difference if median else paired_interval
        gap = Difference(*(scale * x for x in paired(one, other, seed=seed, classes=first.classes)))
        chance = randomization_test(one, other, rounds, seed, first.classes)
        shown = "< 0.001" if chance < 0.001 else f"{chance:.3f}"
        amount, judged = format_difference(gap, name)
        means = [
            format_value(scale * float(side.nanquantile(0.5) if median else side.nanmean()), name)
            for side in (one, other)
        ]
        rows.append(TableRow(name, list(map(Cell, [*means, amount, shown])), "primary" if name == primary else ""))
        if name == primary:
            relation = (
                f"{names[0]} is {judged} than {names[1]}" if judged != NO_DIFFERENCE else f"{judged} between them"
            )
            verdict = f"{relation}: {amount} {name}, p {shown if chance < 0.001 else '= ' + shown}"
    few = 0 if first.classes is None else len(first.classes.unique())
    if 0 < few < FEW_CLASSES:
        verdict += f"; of only {few} classes, so that it is rough"
    head = list(map(Cell, ["metric", *names, "difference [95 %]", "p"]))
    return ResultTable(f"{names[0]} - {names[1]}", head, rows), verdict


def notes(result: BenchmarkResult) -> Iterator[str]:
    """Yield the lines below the table of a benchmark: protocol, overlap with the training."""
    main = result.main
    caption = [
        _units(main.metrics),
        describe_protocol(result.protocol, parts=bool(result.parts)),
        f"[low, high]: 95 % bootstrap interval of {main.primary} over {resampled_words(main)}",
    ]
    if untrained := [method_name(one.method) for one in result.methods if one.method in UNTRAINED]:
        tuned = any(one.model.get("tuned") for one in result.methods)
        kind = "without heads, of the tuned encoders" if tuned else "without training"
        caption.append(f"{kind}: {', '.join(untrained)}")
    if main.n_skipped:
        caption.append(f"{main.n_skipped:,} items left out")
    if main.n_truncated:
        caption.append(f"{main.n_truncated:,} query texts cut at the backbone's token limit")
    yield "; ".join(caption)
    yield from mark_lines(main)
    yield from correction_lines(main.model)
    if main.method == "trained":
        yield from overlap_lines(main)


def detailed_notes(result: BenchmarkResult) -> list[str]:
    """Return `notes`, the primary metric over the queries of each tag, and the paired differences."""
    main = result.main
    tags = ", ".join(f"{tag} {format_percent(one.value)} ({one.n_queries:,})" for tag, one in main.by_tag.items())
    by_tag = [f"{main.primary} of {method_name(main.method)} by tag (queries): {tags}"] if tags else []
    return [*notes(result), *by_tag, *difference_lines(main)]


def print_results(result: EvaluationResult, console: Console | None = None) -> None:
    """Print a table per benchmark; below it the protocol, the overlap with the training and the paired differences.

    The lines below are printed once for the parts of a benchmark, under their mean.
    """
    console = console or TerminalConsole()
    width = min(console.width, _PARAGRAPH)
    for one in result.benchmarks:
        console.print(Text(f"{one.title} · {one.size}", style="bold"))
        for warning in one.main.warnings:
            console.print(Text(f"warning: {warning}", style="bold red"), width=width)
        console.print()
        print_table(metrics_table(one), console)
        if one.key[0] in result.part_names:
            continue
        for line in detailed_notes(one):
            console.print(Text(line), width=width)
        console.print()


def as_text(result: EvaluationResult) -> str:
    """Return what `print_results` prints, without colors."""
    text = io.StringIO()
    print_results(result, Console(file=text, width=_TEXT_WIDTH, color_system=None))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip()


def as_html(result: EvaluationResult) -> str:
    """Return the tables as HTML, with the lines below them."""
    parts = []
    for one in result.benchmarks:
        lines = [] if one.key[0] in result.part_names else detailed_notes(one)
        listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
        warned = "".join(f"<p><strong>warning: {escape(warning)}</strong></p>" for warning in one.main.warnings)
        table = metrics_table(one).to_html()
        parts.append(f"<h4>{escape(one.title)} · {one.size}</h4>{warned}{table}<ul>{listed}</ul>")
    return "\n".join(parts)
