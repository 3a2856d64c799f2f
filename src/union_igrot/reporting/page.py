"""`report.html`: everything a run found, in one file that needs no network, no script and no other file.

Puts result rows, curves, example queries and the way they were made into a page, and fits the images into a bound.
Knows the layout of a result row. Does not know how a metric came about or how images are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from union_igrot.reporting.charts import lay_out
from union_igrot.reporting.contact_sheets import Curve, Opener
from union_igrot.reporting.examples import Drawer, Sheet, sheets
from union_igrot.reporting.page_tables import (
    Asked,
    Group,
    Table,
    at_a_glance,
    class_groups,
    differences,
    metrics_table,
    seconds_table,
    tag_groups,
)
from union_igrot.reporting.tables import Row, describe_protocol, method_name, overlap_lines, untrained_words
from union_igrot.storage.atomic import write_atomic
from union_igrot.types import Benchmark

MAX_BYTES = 5_000_000
"""Bound on a page's size; where it would be passed, fewer examples are shown."""
_NAMED_CLASSES = 40
_AROUND = 80  # bytes that a first example brings along: its list


@dataclass(frozen=True)
class Making:
    """How a run's metrics were made.

    Attributes:
        title: The page's title.
        written: When, as people read it.
        command: The command that makes the run again.
        folder: Where it was started, which its relative paths are meant from.
        config: The whole configuration.
        card: What the model says of its training; empty where no trained heads were asked.
        versions: Of the packages that the metrics depend on.
        seed: Seed of chance and of the bootstrap.
    """

    title: str
    written: str
    command: str
    folder: str
    config: str
    card: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int


@dataclass
class _Drawn:
    """A sheet, and those of its examples that there was room for."""

    sheet: Sheet
    drawer: Drawer
    limit: int
    drawn: list[Markup] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.sheet.title

    @property
    def said(self) -> str:
        return self.sheet.said

    @property
    def left_out(self) -> str:
        missing = len(self.sheet.places) - len(self.drawn)
        return f"{missing} more would not fit into a page of {self.limit:,} bytes." if missing else ""


@dataclass(frozen=True)
class _Pictures:
    """What examples are drawn with."""

    template: jinja2.Template
    open_image: Opener
    limit: int

    def sheets(self, asked: Asked, method: str) -> list[_Drawn]:
        drawer = Drawer(*asked, method, self.template, self.open_image)
        return [_Drawn(sheet, drawer, self.limit) for sheet in sheets(*asked, method)]


@dataclass(frozen=True)
class _Section:
    """One benchmark on the page."""

    id: str
    title: str
    size: str
    table: Table | None
    notes: Sequence[str]
    differences: Table | None = None
    differences_said: str = ""
    groups: Sequence[Group] = ()
    sheets: Sequence[_Drawn] = ()


def write_page(
    path: Path,
    rows: Sequence[Row],
    asked: Sequence[Asked],
    curves: Mapping[str, Curve],
    making: Making,
    open_image: Opener,
) -> None:
    """Write the page, under a temporary name first.

    Args:
        path: The file.
        rows: Result rows of all benchmarks and methods; the method that the page is about is each one's last.
        asked: The benchmarks, and each method's answers in the order of the rows. One whose targets are not published
            has no rows.
        curves: (step, value) of the training by name.
        making: How the metrics were made.
        open_image: Opens a source as an RGB image.
    """
    write_atomic(path, render_page(rows, asked, curves, making, open_image))


def render_page(
    rows: Sequence[Row],
    asked: Sequence[Asked],
    curves: Mapping[str, Curve],
    making: Making,
    open_image: Opener,
    limit: int = MAX_BYTES,
) -> str:
    """Return the page as HTML, with as many examples as fit into `limit` bytes; see `write_page`."""
    room = jinja2.Environment(
        loader=jinja2.PackageLoader("union_igrot.reporting"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    groups = _by_benchmark(rows)
    held = {(benchmark.name, benchmark.split): (benchmark, scores) for benchmark, scores in asked}
    images = _Pictures(room.get_template("example.html"), open_image, limit)
    hidden = [one for key, one in held.items() if key not in groups]
    sections = [_measured(number, group, held, images) for number, group in enumerate(groups.values(), 1)]
    sections += [_unmeasured(number, one, images) for number, one in enumerate(hidden, len(groups) + 1)]
    page = room.get_template("page.html")
    values = _values(groups, [one[0] for one in asked], curves, making) | {
        "sections": sections,
        "contents": _contents(sections, bool(groups)),
    }
    _fit(sections, limit - len(page.render(values).encode()))
    done: str = page.render(values)
    return done


def _by_benchmark(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["benchmark"], row["split"]), []).append(row)
    return groups


def _fit(sections: Sequence[_Section], room: int) -> None:
    """Draw examples until the room is used up: of every sheet the first, then of every sheet the second, ..."""
    queues = [[(sheet, place) for place in sheet.sheet.places] for section in sections for sheet in section.sheets]
    for turn in zip_longest(*queues):
        for one in turn:
            if one is None:
                continue
            sheet, place = one
            example = sheet.drawer.draw(place)
            room -= len(example.encode()) + _AROUND
            if room < 0:
                return
            sheet.drawn.append(example)


def _measured(number: int, rows: Sequence[Row], held: Mapping[tuple[str, str], Asked], images: _Pictures) -> _Section:
    """Lay out a benchmark, or the mean over a benchmark's parts, which has no images of its own."""
    first, last = rows[0], rows[-1]
    names = last.get("parts", [last["benchmark"]])
    parts = [held[name, last["split"]] for name in names if (name, last["split"]) in held]
    alone = parts and "parts" not in last
    trained = "gain95" in last and len(parts) == len(names)
    grouped = [tag_groups(rows), class_groups(parts[0], last["seen_classes"]) if alone else None]
    primary = last["protocol"]["primary"]
    return _Section(
        id=f"benchmark-{number}",
        title=f"{first['benchmark']} · {first['split']}",
        size=f"{first['n_queries']:,} queries x {first['n_gallery']:,} images",
        table=metrics_table(rows),
        notes=_notes(rows),
        differences=differences(last, parts) if trained else None,
        differences_said=f"Query by query by {primary}, the primary metric: how often the trained model is above, "
        "equal, below. The difference is paired, with its 95 % bootstrap interval.",
        groups=[group for group in grouped if group is not None],
        sheets=images.sheets(parts[0], last["method"]) if alone else [],
    )


def _unmeasured(number: int, asked: Asked, images: _Pictures) -> _Section:
    """Lay out a benchmark whose targets are not published."""
    benchmark, scores = asked
    return _Section(
        id=f"benchmark-{number}",
        title=f"{benchmark.name} · {benchmark.split}",
        size=f"{len(benchmark.queries):,} queries x {len(benchmark.gallery):,} images",
        table=None,
        notes=["The targets of this split are not published: no metrics here, the submission file holds the answers."],
        sheets=images.sheets(asked, list(scores)[-1]),
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    first, last = rows[0], rows[-1]
    notes = [describe_protocol(first["protocol"], parts="parts" in first)]
    plain = [method_name(row["method"]) for row in rows if row["method"] in ("image", "text", "sum")]
    if plain:
        notes.append(f"{', '.join(plain)}: {untrained_words(rows)}; chance: random rankings")
    if first["n_skipped"]:
        notes.append(f"{first['n_skipped']:,} items left out")
    return notes + (overlap_lines(last) if last["method"] == "trained" else [])


def _contents(sections: Sequence[_Section], measured: bool) -> list[tuple[str, str]]:
    named = [(section.id, section.title) for section in sections]
    first = [("glance", "At a glance")] if measured else []
    return [*first, *named, ("training", "What was trained"), ("again", "Making it again")]


def _values(
    groups: Mapping[tuple[str, str], Sequence[Row]],
    benchmarks: Sequence[Benchmark],
    curves: Mapping[str, Curve],
    making: Making,
) -> dict[str, Any]:
    """Return what the template needs beside the sections."""
    measured = list(groups.values())
    last = measured[-1][-1] if measured else None
    facts = _training_facts(making.card, last)
    notes = [] if facts else ["No trained heads were asked, or they do not say what they were trained on."]
    if not curves:
        notes.append("There is no log of a training in this folder, so no curve.")
    return {
        "title": making.title,
        "subtitle": f"union-igrot {making.versions['union-igrot']}; written {making.written}; metrics in percent",
        "glance": at_a_glance(measured) if measured else None,
        "training_facts": facts,
        "training_notes": notes,
        "charts": [lay_out(name, curve) for name, curve in curves.items()],
        "command": making.command,
        "folder": making.folder,
        "config": making.config,
        "hashes": _hashes(benchmarks, last, making.seed),
        "versions": list(making.versions.items()),
        "seconds": seconds_table(measured),
    }


def _hashes(benchmarks: Sequence[Benchmark], last: Row | None, seed: int) -> list[tuple[str, str]]:
    found = [(f"queries of {one.name} · {one.split}", one.queries_hash()) for one in benchmarks]
    model = {} if last is None else last["model"]
    known = {"backbone_fingerprint": "backbone", "heads": "heads", "file": "file", "sha256": "the file's sha256"}
    found += [(name, str(model[key])) for key, name in known.items() if model.get(key)]
    return [*found, ("seed", str(seed))]


def _training_facts(card: Mapping[str, Any], last: Row | None) -> list[tuple[str, str]]:
    """Say what was trained, on what and how far."""
    if not card:
        return []
    facts = [("data", str(card.get("data", "not recorded")))]
    if "samples" in card:
        facts.append(("samples", f"{card['samples']:,}"))
    if card.get("skipped"):
        facts.append(("left out", f"{card['skipped']:,} items"))
    classes = list(card.get("classes", []))
    if classes:
        more = ", ..." if len(classes) > _NAMED_CLASSES else ""
        facts.append((f"{len(classes)} classes", ", ".join(classes[:_NAMED_CLASSES]) + more))
    best, settings = dict(card.get("best", {})), card.get("config", {})
    if "epoch" in best:
        of_all = f" of {settings['recipe']['epochs']}" if "recipe" in settings else ""
        figures = ", ".join(f"{name} {value:.2f}" for name, value in best.items() if name != "epoch")
        facts.append(("best epoch", f"{best['epoch'] + 1:.0f}{of_all} ({figures})"))
    model = {} if last is None else last["model"]
    for key, name in (("fusion", "query head"), ("target", "target head"), ("projector", "vision projector")):
        if model.get(key):
            facts.append(
                (name, ", ".join(f"{value}" if k == "kind" else f"{k} {value}" for k, value in model[key].items()))
            )
    if model.get("backbone"):
        tuned = settings.get("model", {}).get("finetune", "none")
        facts.append(("backbone", f"{model['backbone']}, {'frozen' if tuned == 'none' else f'tuned: {tuned}'}"))
    if model.get("checkpoint"):
        facts.append(("heads from", str(model["checkpoint"])))
    return facts
