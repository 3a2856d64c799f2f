"""Result rows as a rich table on the terminal.

Knows the layout of a result row. Does not know how a figure came about.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_METHOD_NAMES = {
    "chance": "chance",
    "image": "image alone",
    "text": "text alone",
    "sum": "image + text",
    "trained": "trained",
}
Row = Mapping[str, Any]


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """Say a protocol in one line: preset, convention of average precision, exclusion, ties."""
    reference = "reference left out" if protocol["exclude_reference"] else "reference kept"
    norm = {"min": "min(k, R)", "hits": "hits in the top k", "all": "R"}[protocol["ap_norm"]]
    parts = [
        f"protocol {protocol['name']}",
        f"AP divided by {norm}, {protocol['ap_rule']} rule",
        f"{protocol['average']} average",
        reference,
        f"ties by {protocol['ties']}",
    ]
    return "; ".join([*parts, protocol["note"]] if protocol["note"] else parts)


def result_table(rows: Sequence[Row]) -> Table:
    """Lay out all methods on one benchmark.

    Args:
        rows: Result rows of one benchmark, in the order to show.

    Returns:
        A table with a line a method; figures in percent, beside the primary one its 95 % interval.
        It is at most 80 columns wide for eight figures.
    """
    first = rows[0]
    primary = first["protocol"]["primary"]
    title = (
        f"{first['benchmark']} · {first['split']} · {first['n_queries']:,} queries x {first['n_gallery']:,} pictures"
    )
    skipped = f"; {first['n_skipped']} items left out" if first["n_skipped"] else ""
    seen = {name for row in rows for name in row["seen_classes"]}
    if seen:
        skipped += f"; {len(seen)} of the classes were trained on: for them this is not zero-shot"
    table = Table(
        title=Text(title),
        caption=Text(
            f"percent; {describe_protocol(first['protocol'])}; [low, high]: 95 % bootstrap interval of {primary} "
            f"over queries; image alone, text alone and image + text are without training{skipped}"
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # eight figures and the interval have to fit into 80 columns
    )
    table.add_column("method", no_wrap=True)
    for name in first["metrics"]:
        table.add_column(name, justify="right", style="bold" if name == primary else None, no_wrap=True)
        if name == primary:
            table.add_column(Text("[low, high]"), no_wrap=True)
    best = max(row["metrics"][primary] for row in rows)
    for row in rows:
        cells = []
        for name, value in row["metrics"].items():
            cells.append(_percent(value))
            if name == primary:
                low, high = row["ci95"][name]
                cells.append(f"[{_percent(low)}, {_percent(high)}]")
        style = "green" if row["metrics"][primary] == best else None
        table.add_row(_METHOD_NAMES.get(row["method"], row["method"]), *cells, style=style)
    return table


def _percent(value: float) -> str:
    return "100" if value > 99.95 else f"{value:.1f}"


def gain_lines(row: Row) -> list[str]:
    """Say by how much a trained model beats each other method in the primary figure, interval included."""
    primary = row["protocol"]["primary"]
    lines = []
    for other, figures in row.get("gain95", {}).items():
        mean, low, high = figures[primary]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        lines.append(
            f"trained - {_METHOD_NAMES.get(other, other)}: {mean:+.1f} [{low:+.1f}, {high:+.1f}] {primary}, {verdict}"
        )
    return lines


def print_results(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print one table a benchmark, and the paired differences under it."""
    console = console or Console()
    for name in dict.fromkeys((row["benchmark"], row["split"]) for row in rows):
        group = [row for row in rows if (row["benchmark"], row["split"]) == name]
        console.print(result_table(group))
        for line in gain_lines(group[-1]):
            console.print(f"  {line}", highlight=False, markup=False)
        console.print()
