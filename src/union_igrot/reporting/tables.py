"""Result rows as rich tables on the terminal.

Knows the layout of a result row. Does not know how a metric came about.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

METHOD_NAMES = {
    "chance": "chance",
    "image": "image alone",
    "text": "text alone",
    "sum": "image + text",
    "trained": "trained",
}
"""What the methods of result rows are called."""
_UNTRAINED = ("image", "text", "sum")
_PARAGRAPH = 80
_NAMED_CLASSES = 24
Row = Mapping[str, Any]


def method_name(method: str) -> str:
    """Say what a method of a result row is called."""
    return METHOD_NAMES.get(method, method)


def describe_protocol(protocol: Mapping[str, Any], *, parts: bool = False) -> str:
    """Say a protocol in one line: preset, prompt, conventions, exclusion, ties.

    What none of its metrics uses is left out.

    Args:
        protocol: As a result row holds it.
        parts: Whether the row is the mean over parts of a benchmark.
    """
    kinds = {name.partition("@")[0] for name in protocol["metrics"]}
    norm = {"min": "min(k, R)", "hits": "hits in the top k", "all": "R"}[protocol["ap_norm"]]
    cut = {"k": "", "relevant": "P@k over the first min(k, R)", "attainable": "P@k divided by min(k, R)"}
    said = [
        f"protocol {protocol['name']}",
        f"prompt {protocol['prompt']!r}" if protocol["prompt"] else "",
        f"AP divided by {norm}, {protocol['ap_rule']} rule" if "mAP" in kinds else "",
        "R@k is the share of the targets found" if "R" in kinds and protocol["recall"] == "fraction" else "",
        cut[protocol["precision_cut"]] if "P" in kinds else "",
        "mean of the parts' means" if parts else f"{protocol['average']} average",
        "reference left out" if protocol["exclude_reference"] else "reference kept",
        "ties by gallery order" if protocol["ties"] == "gallery order" else "ties against the model",
        protocol["note"],
    ]
    return "; ".join(part for part in said if part)


def overlap_lines(row: Row) -> list[str]:
    """Say which images and classes of a test a model was trained on; lines that touch a metric begin with `*`."""
    images, classes = row.get("seen_images"), row.get("seen_classes", ())
    lines = []
    if images is None:
        lines.append("which images the heads were trained on is not recorded with this model")
    elif any(images.values()):
        lines.append(
            f"* the heads were trained on the images of {images['queries']:,} of {row['n_queries']:,} queries and on "
            f"{images['gallery']:,} of {row['n_gallery']:,} gallery images"
        )
    else:
        lines.append("the heads were trained on none of these images")
    if classes:
        more = ", ..." if len(classes) > _NAMED_CLASSES else ""
        named = ", ".join(classes[:_NAMED_CLASSES]) + more
        lines.append(f"* {len(classes)} of the classes were trained on: for them this is not zero-shot ({named})")
    return lines


def is_seen(row: Row) -> bool:
    """Tell whether a model was trained on images or classes of the test."""
    return bool(row.get("seen_classes")) or any((row.get("seen_images") or {}).values())


def result_tables(rows: Sequence[Row], console: Console) -> list[Table]:
    """Lay out all methods on one benchmark.

    Args:
        rows: Result rows of one benchmark, in the order to show.
        console: Where they will be shown.

    Returns:
        Tables with a line a method, as few as fit the console's width; metrics in percent, beside the primary one
        its 95 % interval.
    """
    return [_table(rows, names) for names in columns_that_fit(console, list(rows[0]["metrics"]), partial(_table, rows))]


def columns_that_fit(
    console: Console, names: Sequence[str], build: Callable[[Sequence[str]], Table]
) -> list[list[str]]:
    """Divide the columns of a table that would be wider than the console.

    Args:
        console: Where the tables will be shown.
        names: The columns.
        build: Builds a table of some of them.

    Returns:
        Groups of columns that fit, in order. Columns of one kind (`R@1`, `R@5`) stay together where they can; one that
        alone is too wide has a group of its own.
    """
    boundless = console.options.update(max_width=sys.maxsize)

    def fits(some: Sequence[str]) -> bool:
        return Measurement.get(console, boundless, build(some)).maximum <= console.width

    if fits(names):
        return [list(names)]
    groups: list[list[str]] = []
    # From the end, so that what spills over is a whole kind and not one last column.
    for kind in reversed([list(kind) for _, kind in groupby(names, key=lambda name: name.partition("@")[0])]):
        if groups and fits([*kind, *groups[0]]):
            groups[0] = [*kind, *groups[0]]
            continue
        parts: list[list[str]] = [[]]
        for name in kind:
            if parts[-1] and not fits([*parts[-1], name]):
                parts.append([])
            parts[-1].append(name)
        groups = parts + groups
    return groups


def _table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    primary = rows[0]["protocol"]["primary"]
    # So that eight metrics fit into 80 columns.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for name in names:
        header = name.replace(" + ", " +\n").replace(")/", ")\n/ ")
        table.add_column(header, justify="right", style="bold" if name == primary else None, no_wrap=True)
        if name == primary:
            table.add_column(Text("[low, high]"), no_wrap=True)
    best = max(_number(row["metrics"][primary]) for row in rows)
    for row in rows:
        cells = []
        for name in names:
            cells.append(percent(row["metrics"][name]))
            if name == primary:
                cells.append("[" + ", ".join(map(percent, row["ci95"][name])) + "]")
        method = method_name(row["method"]) + (" *" if is_seen(row) else "")
        table.add_row(method, *map(Text, cells), style="green" if row["metrics"][primary] == best else None)
    return table


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value


def percent(value: float | None) -> str:
    """Write a metric with one place after the point; a dash where there is none."""
    if value is None or value != value:  # noqa: PLR0124 - nan
        return "-"
    return "100" if value > 99.95 else f"{value:.1f}"


def gain_lines(row: Row) -> list[str]:
    """Say by how much a trained model beats each other method in the primary metric, interval included."""
    primary = row["protocol"]["primary"]
    lines = []
    for other, figures in row.get("gain95", {}).items():
        mean, low, high = figures[primary]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        lines.append(f"trained - {method_name(other)}: {mean:+.1f} [{low:+.1f}, {high:+.1f}] {primary}, {verdict}")
    return lines


def tag_line(row: Row) -> str:
    """Say the primary metric over the queries of each tag; empty where there are no tags."""
    primary = row["protocol"]["primary"]
    parts = [f"{tag} {percent(part[primary])} ({part['n_queries']:,})" for tag, part in row["by_tag"].items()]
    return f"{primary} of {method_name(row['method'])} by tag (queries): {', '.join(parts)}" if parts else ""


def _size(row: Row) -> str:
    return f"{row['n_queries']:,} queries x {row['n_gallery']:,} images"


def untrained_words(rows: Sequence[Row]) -> str:
    """Say what the methods without heads owe to a training: nothing, unless the encoders themselves were tuned."""
    tuned = any(row.get("model", {}).get("tuned") for row in rows)
    return "without heads, of the tuned encoders" if tuned else "without training"


def _caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    said = [
        "percent",
        describe_protocol(first["protocol"], parts="parts" in first),
        f"[low, high]: 95 % bootstrap interval of {first['protocol']['primary']} over queries",
    ]
    if any(row["method"] in _UNTRAINED for row in rows):
        said.append(f"image alone, text alone and image + text are {untrained_words(rows)}")
    if first["n_skipped"]:
        said.append(f"{first['n_skipped']} items left out")
    return "; ".join(said)


def print_results(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print one table a benchmark; under it the protocol, what was trained on and the paired differences.

    Under the parts of a benchmark stands nothing: what holds for them stands under their mean.
    """
    console = console or Console()
    inner = {part for row in rows for part in row.get("parts", ())}
    width = min(console.width, _PARAGRAPH)
    for key in dict.fromkeys((row["benchmark"], row["split"]) for row in rows):
        group = [row for row in rows if (row["benchmark"], row["split"]) == key]
        console.print(Text(f"{' · '.join(key)} · {_size(group[0])}", style="bold"))
        console.print()
        for table in result_tables(group, console):
            console.print(table)
            console.print()
        if key[0] in inner:
            continue
        lines = [_caption(group), tag_line(group[-1])]
        lines += overlap_lines(group[-1]) if group[-1]["method"] == "trained" else []
        for line in filter(None, lines):
            console.print(Text(line), width=width)
        for line in gain_lines(group[-1]):
            console.print(f"  {line}", highlight=False, markup=False)
        console.print()
