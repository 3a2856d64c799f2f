"""A sweep's table as CSV, as Markdown and on the terminal, the published results beside ours.

Knows lines of a table and published results. Does not know how jobs are run or metrics come about.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from union_igrot.reporting.published import Published, published_for
from union_igrot.reporting.sweeps import (
    Column,
    Figure,
    Job,
    Line,
    Row,
    columns,
    headline_columns,
    lines,
    settings_that_differ,
)
from union_igrot.reporting.tables import columns_that_fit, describe_protocol, overlap_lines, percent
from union_igrot.storage.atomic import write_atomic

_HEAD = (
    *("run", "model", "checkpoint", "benchmark", "split", "method", "n_queries", "n_gallery", "metric"),
    *("percent", "low95", "high95", "protocol", "seen_classes", "seen_queries", "seen_gallery"),
    *("backbone_hash", "heads_hash", "settings", "seed", "versions", "source"),
)


def write_sweep(folder: Path, jobs: Sequence[Job], command: str) -> None:
    """Write `results.csv` (a line a metric, ours and published) and `results.md`, each replaced whole.

    Args:
        folder: The sweep's folder.
        jobs: The jobs so far.
        command: `train` or `eval`.
    """
    write_atomic(folder / "results.csv", _csv(jobs))
    write_atomic(folder / "results.md", _markdown(jobs, command))


def _csv(jobs: Sequence[Job]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, _HEAD, lineterminator="\n", restval="")
    writer.writeheader()
    for job in jobs:
        for row in job.rows:
            writer.writerows(_csv_lines(job, row))
    for column in columns(jobs):
        for one in published_for(*column):
            head = {"model": one.backbone, "benchmark": one.benchmark, "split": one.split, "method": one.method}
            note = {"protocol": one.note, "source": f"published: {one.source} ({one.mark})"}
            writer.writerows(head | note | {"metric": name, "percent": f"{x:g}"} for name, x in one.metrics.items())
    return table.getvalue()


def _csv_lines(job: Job, row: Row) -> Iterator[dict[str, Any]]:
    seen = row.get("seen_images") or {"queries": "", "gallery": ""}
    head = {
        "run": job.run,
        "model": row["model"].get("backbone") or "",
        "checkpoint": row["model"].get("checkpoint") or "",
        **{name: row[name] for name in ("benchmark", "split", "method", "n_queries", "n_gallery", "seed")},
        "protocol": describe_protocol(row["protocol"], parts="parts" in row),
        "seen_classes": len(row["seen_classes"]),
        "seen_queries": seen["queries"],
        "seen_gallery": seen["gallery"],
        "backbone_hash": row["model"].get("backbone_fingerprint") or "",
        "heads_hash": row["model"].get("heads") or "",
        "settings": " ".join(job.overrides),
        "versions": " ".join(f"{name}={value}" for name, value in row["versions"].items()),
        "source": "this sweep",
    }
    for name, value in row["metrics"].items():
        low, high = row["ci95"][name]
        yield head | {"metric": name, "percent": _exact(value), "low95": _exact(low), "high95": _exact(high)}
    primary = row["protocol"]["primary"]
    for tag, part in row["by_tag"].items():
        yield head | {"metric": f"{primary} [{tag}]", "percent": _exact(part[primary]), "n_queries": part["n_queries"]}


def _exact(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4f}"  # noqa: PLR0124 - nan


def _primary(jobs: Sequence[Job], column: Column) -> str:
    name: str = _rows(jobs, column)[0]["protocol"]["primary"]
    return name


def _rows(jobs: Sequence[Job], column: Column) -> list[Row]:
    return [row for job in jobs for row in job.rows if (row["benchmark"], row["split"]) == column]


def _cell(figure: Figure | None, *, interval: bool) -> str:
    if figure is None:
        return ""
    if figure.runs > 1:
        return f"{percent(figure.value)} ± {figure.deviation:.1f} ({figure.runs})"
    bounds = f" [{percent(figure.low)}, {percent(figure.high)}]" if interval else ""
    return percent(figure.value) + bounds


def _others(jobs: Sequence[Job]) -> list[tuple[str, str, dict[Column, str]]]:
    """Return published primary metrics by method and backbone; beside those of another split stands its name."""
    found: dict[tuple[str, str], dict[Column, str]] = {}
    for column in headline_columns(jobs):
        primary = _primary(jobs, column)
        for one in published_for(*column):
            if primary in one.metrics:
                split = "" if one.split == column[1] else f" ({one.split})"
                cells = found.setdefault((one.method, one.backbone), {})
                cells[column] = f"{one.metrics[primary]:.1f}{split}"
    return [(method, backbone, cells) for (method, backbone), cells in found.items()]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _markdown(jobs: Sequence[Job], command: str) -> str:
    gathered, heads = lines(jobs, command), headline_columns(jobs)
    out = [f"# Results of a sweep of `union-{command}`", "", *_headline(jobs, gathered, heads), ""]
    out += [
        "Primary metrics in percent. [low, high] is the 95 % bootstrap interval over queries; `50.0 ± 0.5 (3)` is the "
        "mean and the standard deviation over three runs that differ in their seed. `*`: the heads were trained on "
        "images or classes of the test, see below. A published result of another split bears its name.",
        "",
    ]
    for column in columns(jobs):
        out += [*_benchmark(jobs, gathered, column), ""]
    out += ["## Jobs", "", _line("job", "folder", "settings", "state"), _line(*["---"] * 4)]
    for job in jobs:
        state = f"failed: {job.error}" if job.error else "done" if job.rows else "done; no metrics"
        out.append(_line(str(job.number), job.run, f"`{' '.join(job.overrides)}`", state))
    versions = {json.dumps(row["versions"]): row["versions"] for job in jobs for row in job.rows}
    out += [""] + [", ".join(f"{name} {value}" for name, value in one.items()) for one in versions.values()]
    return "\n".join(out).rstrip() + "\n"


def _headline(jobs: Sequence[Job], gathered: Sequence[Line], heads: Sequence[Column]) -> Iterator[str]:
    primary = {column: _primary(jobs, column) for column in heads}
    yield _line("model", "method", *(f"{name} {split} {primary[name, split]}" for name, split in heads))
    yield _line("---", "---", *["---:"] * len(heads))
    for line in gathered:
        cells = [
            _cell(line.figure(column, primary[column]), interval=True) + (" *" if line.seen(column) else "")
            for column in heads
        ]
        yield _line(line.model, line.method, *cells)
    for method, backbone, figures in _others(jobs):
        yield _line(backbone, f"published: {method}", *(figures.get(column, "") for column in heads))


def _benchmark(jobs: Sequence[Job], gathered: Sequence[Line], column: Column) -> Iterator[str]:
    rows = _rows(jobs, column)
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    yield f"## {' · '.join(column)}"
    yield ""
    protocols = (describe_protocol(row["protocol"], parts="parts" in row) for row in rows)
    for said in dict.fromkeys(protocols):
        yield f"{rows[0]['n_queries']:,} queries x {rows[0]['n_gallery']:,} images; {said}."
        yield ""
    others = published_for(*column)
    ours = (column[1], "this sweep") if others else ()
    yield _line("model", "method", *metrics, *(("split", "source and protocol") if others else ()))
    yield _line("---", "---", *["---:"] * len(metrics), *["---"] * len(ours))
    primary = rows[0]["protocol"]["primary"]
    for line in gathered:
        if column in line.rows:
            figures = [_cell(line.figure(column, name), interval=name == primary) for name in metrics]
            yield _line(line.model, line.method + (" *" if line.seen(column) else ""), *figures, *ours)
    for one in others:
        yield _line(one.backbone, one.method, *_published_cells(one, metrics), one.split, _told(one))
    notes = {
        f"{line.method}: {said}"
        for line in gathered
        for row in line.rows.get(column, [])
        if row["method"] == "trained"
        for said in overlap_lines(row)
    }
    for note in sorted(notes):
        yield ""
        yield note.replace("* ", "\\* ", 1)
    yield from _tags(gathered, column, rows)


def _published_cells(one: Published, metrics: Sequence[str]) -> list[str]:
    return [f"{one.metrics[name]:.1f}" if name in one.metrics else "" for name in metrics]


def _told(one: Published) -> str:
    kind = "published" if one.mark == "V" else "published, at second hand"
    return "; ".join(filter(None, (f"{kind}: {one.source}", one.note)))


def _tags(gathered: Sequence[Line], column: Column, rows: Sequence[Row]) -> Iterator[str]:
    tags = {tag: part["n_queries"] for row in rows for tag, part in row["by_tag"].items()}
    if tags:
        yield ""
        yield f"{rows[0]['protocol']['primary']} over the queries of each tag:"
        yield ""
        yield _line("model", "method", *(f"{tag} ({count:,})" for tag, count in tags.items()))
        yield _line("---", "---", *["---:"] * len(tags))
        for line in gathered:
            if column in line.rows:
                yield _line(line.model, line.method, *(_cell(line.tag(column, tag), interval=False) for tag in tags))


def print_sweep(jobs: Sequence[Job], command: str, folder: Path, console: Console | None = None) -> None:
    """Print the primary metrics of a sweep, the published ones below, what failed, and where the files are."""
    console = console or Console()
    heads = headline_columns(jobs)
    if heads:
        build = partial(_terminal, jobs, lines(jobs, command))
        names = {f"{name}\n{split}\n{_primary(jobs, (name, split))}": (name, split) for name, split in heads}
        for group in columns_that_fit(console, list(names), lambda some: build({name: names[name] for name in some})):
            console.print(build({name: names[name] for name in group}))
            console.print()
    done = sum(not job.error for job in jobs)
    differ = tuple(f"{name}=" for name in settings_that_differ(jobs))
    for job in jobs:
        if job.error:
            told = " ".join(setting for setting in job.overrides if setting.startswith(differ))
            console.print(Text(f"job {job.number} ({told}) failed: {job.error}", style="red"))
    if heads:
        said = f"percent; {done} of {len(jobs)} jobs done; every metric, interval and protocol in "
        console.print(Text(f"{said}{folder / 'results.csv'} and results.md"), soft_wrap=True)


def _terminal(jobs: Sequence[Job], gathered: Sequence[Line], names: dict[str, Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    table.add_column("method", max_width=36, overflow="fold")  # a path may be long
    for name in names:
        table.add_column(Text(name, justify="right"), justify="right", no_wrap=True)
    for line in gathered:
        cells = []
        for column in names.values():
            figure = line.figure(column, _primary(jobs, column))
            spread = f" ± {figure.deviation:.1f}" if figure and figure.runs > 1 else ""
            cells.append((percent(figure.value) + spread if figure else "") + (" *" if line.seen(column) else ""))
        table.add_row(line.model, line.method, *cells)
    for method, backbone, figures in _others(jobs):
        if figures.keys() & set(names.values()):
            shown = [figures.get(column, "") for column in names.values()]
            table.add_row(backbone, f"published: {method}", *shown, style="dim")
    return table
