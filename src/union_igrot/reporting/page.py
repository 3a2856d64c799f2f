"""`report.html`: the results of a run in one file that needs no network, no script and no other file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from union_igrot.evaluation.results import BenchmarkResult, EvaluationResult, MethodResult, ScoredBenchmark
from union_igrot.evaluation.tables import (
    NO_DIFFERENCE,
    UNTRAINED,
    Cell,
    ResultTable,
    TableRow,
    comparable,
    describe_protocol,
    format_difference,
    format_interval,
    format_percent,
    mark_lines,
    method_name,
    metrics_table,
    overlap_lines,
    untrained_words,
)
from union_igrot.reporting.charts import Curve, layout_chart
from union_igrot.reporting.contact_sheets import Opener
from union_igrot.reporting.examples import ExampleGroup, ExampleRenderer, example_groups
from union_igrot.reporting.model_card import model_facts, training_facts
from union_igrot.storage.atomic import write_atomic
from union_igrot.types import Benchmark

MAX_BYTES = 5_000_000
"""Bound on a page's size; fewer examples are shown to stay within it."""
MAX_GROUPS = 30
"""Rows of a table of tags or classes; of more, the lowest and the highest are shown."""
_LIST_BYTES = 80  # of the list around the first example


@dataclass(frozen=True)
class Provenance:
    """How the results of a run were made.

    `folder` is where the `command`, which repeats the run, was started; `card` is what the model records of its
    training, empty without trained heads; `seed` is that of chance and of the bootstrap.
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
class _Examples:
    """A group of examples, and those of them that fit into the page."""

    group: ExampleGroup
    renderer: ExampleRenderer
    limit: int
    drawn: list[Markup] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.group.title

    @property
    def description(self) -> str:
        return self.group.description

    @property
    def left_out(self) -> str:
        missing = len(self.group.rows) - len(self.drawn)
        return f"{missing} more do not fit into a page of {self.limit:,} bytes." if missing else ""


@dataclass(frozen=True)
class _ExampleBuilder:
    template: jinja2.Template
    open_image: Opener
    limit: int

    def build(self, scored: ScoredBenchmark, method: str) -> list[_Examples]:
        renderer = ExampleRenderer(scored, method, self.template, self.open_image)
        return [_Examples(group, renderer, self.limit) for group in example_groups(scored, method)]


@dataclass(frozen=True)
class QueryGroups:
    """A table of groups of queries, below a heading and a sentence."""

    title: str
    description: str
    table: ResultTable


@dataclass(frozen=True)
class _Section:
    """One benchmark on the page."""

    id: str
    title: str
    size: str
    table: ResultTable | None
    notes: Sequence[str]
    warnings: Sequence[str] = ()
    differences: ResultTable | None = None
    differences_note: str = ""
    groups: Sequence[QueryGroups] = ()
    examples: Sequence[_Examples] = ()


def write_page(
    path: Path, result: EvaluationResult, curves: Mapping[str, Curve], provenance: Provenance, open_image: Opener
) -> None:
    """Write the page; `curves` are (step, value) of the training by name."""
    write_atomic(path, render_page(result, curves, provenance, open_image))


def render_page(
    result: EvaluationResult,
    curves: Mapping[str, Curve],
    provenance: Provenance,
    open_image: Opener,
    limit: int = MAX_BYTES,
) -> str:
    """Return the page as HTML, with as many examples as fit into `limit` bytes; see `write_page`."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("union_igrot.reporting"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    scored = {(one.benchmark.name, one.benchmark.split): one for one in result.scored}
    builder = _ExampleBuilder(templates.get_template("example.html"), open_image, limit)
    measured = {one.key for one in result.benchmarks}
    hidden = [one for key, one in scored.items() if key not in measured]
    sections = [_section(number, one, scored, builder) for number, one in enumerate(result.benchmarks, 1)]
    sections += [_hidden_section(number, one, builder) for number, one in enumerate(hidden, len(sections) + 1)]
    page = templates.get_template("page.html")
    values = _values(result, curves, provenance) | {
        "sections": sections,
        "contents": [
            *([("glance", "At a glance")] if measured else []),
            *((section.id, section.title) for section in sections),
            *(("training", "Training"), ("reproduce", "How to reproduce it")),
        ],
    }
    _fit(sections, limit - len(page.render(values).encode()))
    html: str = page.render(values)
    return html


def _fit(sections: Sequence[_Section], free: int) -> None:
    """Render examples until the page is full: the first of every group, then the second of every group, ..."""
    queues = [[(one, row) for row in one.group.rows] for section in sections for one in section.examples]
    for turn in zip_longest(*queues):
        for pair in turn:
            if pair is None:
                continue
            examples, row = pair
            html = examples.renderer.render(row)
            free -= len(html.encode()) + _LIST_BYTES
            if free < 0:
                return
            examples.drawn.append(html)


def _section(
    number: int,
    result: BenchmarkResult,
    scored: Mapping[tuple[str, str], ScoredBenchmark],
    builder: _ExampleBuilder,
) -> _Section:
    """Lay out a benchmark, or the mean over a benchmark's parts, which has no examples of its own."""
    main = result.main
    names = main.parts or (main.benchmark,)
    parts = [scored[name, main.split] for name in names if (name, main.split) in scored]
    alone = bool(parts) and not main.parts
    complete = bool(main.differences) and len(parts) == len(names)
    groups = [tag_groups(result), class_groups(parts[0], main.seen_classes) if alone else None]
    return _Section(
        id=f"benchmark-{number}",
        title=result.title,
        size=result.size,
        table=metrics_table(result),
        notes=list(_notes(result)),
        warnings=main.warnings,
        differences=differences_table(main, parts) if complete else None,
        differences_note=f"On how many queries {main.primary}, the primary metric, of the trained model is higher, "
        "equal or lower. The difference is paired, with its 95 % bootstrap interval.",
        groups=[group for group in groups if group is not None],
        examples=builder.build(parts[0], main.method) if alone else [],
    )


def _hidden_section(number: int, scored: ScoredBenchmark, builder: _ExampleBuilder) -> _Section:
    """Lay out a benchmark whose targets are not published."""
    benchmark = scored.benchmark
    return _Section(
        id=f"benchmark-{number}",
        title=f"{benchmark.name} · {benchmark.split}",
        size=f"{len(benchmark.queries):,} queries x {len(benchmark.gallery):,} images",
        table=None,
        notes=["The targets of this split are not published: there are no metrics, but a submission file."],
        examples=builder.build(scored, list(scored.scores)[-1]),
    )


def _notes(result: BenchmarkResult) -> Iterator[str]:
    yield describe_protocol(result.protocol, parts=bool(result.parts))
    yield from mark_lines(result.main)
    untrained = [method_name(one.method) for one in result.methods if one.method in UNTRAINED]
    if untrained:
        yield f"{', '.join(untrained)}: {untrained_words(result)}; chance: random rankings"
    if result.main.n_skipped:
        yield f"{result.main.n_skipped:,} items left out"
    if result.main.method == "trained":
        yield from overlap_lines(result.main)


def overview_table(results: Sequence[BenchmarkResult]) -> ResultTable:
    """Return the primary metric of every method, a row per benchmark, and the gain over the best untrained method."""
    # In reverse, so that the trained model comes first and a narrow screen shows it.
    methods = list(dict.fromkeys(one.method for result in results for one in reversed(result.methods)))
    gained = any(result.main.differences for result in results)
    rows = []
    for result in results:
        primary, held = result.protocol.primary, {one.method: one for one in result.methods}
        cells = [
            Cell(
                format_percent(one.metrics[primary]) + (" *" if one.is_seen else ""),
                format_interval(one.intervals[primary]),
            )
            if (one := held.get(method))
            else Cell("-")
            for method in methods
        ]
        if gained:
            cells.insert(1, _gain_over_best(result))
        rows.append(TableRow(result.title, cells, below=primary))
    head = [method_name(method) for method in methods]
    if gained:
        head.insert(1, "gain over the best untrained")
    caption = "The primary metric of each benchmark in percent, with its 95 % interval"
    if any(one.is_seen for result in results for one in result.methods):
        caption += "; *: the heads were trained on some of its images or classes, see below"
    return ResultTable(caption, [Cell("benchmark"), *map(Cell, head)], rows)


def _gain_over_best(result: BenchmarkResult) -> Cell:
    main = result.main
    rivals = [one for one in result.methods if one.method in main.differences and one.method != "chance"]
    if not rivals:
        return Cell("-")
    rival = max(rivals, key=lambda one: comparable(one.metrics[main.primary]))
    amount, verdict = format_difference(main.differences[rival.method][main.primary])
    return Cell(amount, f"{verdict} than {method_name(rival.method)}" if verdict != NO_DIFFERENCE else verdict)


def differences_table(main: MethodResult, parts: Sequence[ScoredBenchmark]) -> ResultTable:
    """Count on how many queries the trained model is better than each other method, beside the paired difference.

    `parts` are the benchmark, or the parts that the result is the mean of.
    """
    primary, rows = main.primary, []
    for other, differences in main.differences.items():
        counts = _outcomes(parts, main.method, other, primary)
        total = max(1, sum(counts))
        shares = [round(100 * count / total, 2) for count in counts]
        cells = [Cell(f"{count:,}", f"{share:.1f} %") for count, share in zip(counts, shares, strict=True)]
        differ = f"{100 * (counts[0] + counts[2]) / total:.1f} %"
        amount, verdict = format_difference(differences[primary])
        bar = Cell(differ, bar=(shares[0], shares[1], shares[2]))
        rows.append(TableRow(method_name(other), [*cells, bar, Cell(amount), Cell(verdict, kind="words")]))
    head = ["against", "wins", "ties", "losses", "differ", f"difference in {primary}"]
    caption = "Queries; bars from left to right: wins (full), ties (pale), losses (hatched)"
    return ResultTable(caption, [*map(Cell, head), Cell("verdict", kind="words")], rows)


def _outcomes(parts: Sequence[ScoredBenchmark], method: str, other: str, primary: str) -> tuple[int, int, int]:
    """Count wins, ties and losses of a method against another, over the queries for which both have a value."""
    own, rival = (torch.cat([one.scores[name].values[primary] for one in parts]) for name in (method, other))
    gaps = (own - rival)[~(own - rival).isnan()]
    return int((gaps > 0).sum()), int((gaps == 0).sum()), int((gaps < 0).sum())


def tag_groups(result: BenchmarkResult) -> QueryGroups | None:
    """Return the primary metric by tag (edit type, aspect) under every method; None without tags."""
    primary = result.protocol.primary
    methods = result.methods[::-1]
    found = [
        (tag, one.n_queries, [method.by_tag[tag].value for method in methods])
        for tag, one in result.main.by_tag.items()
    ]
    names = [method_name(one.method) for one in methods]
    return _group("By kind of query", "kind", primary, names, found, set()) if found else None


def class_groups(scored: ScoredBenchmark, seen: Sequence[str]) -> QueryGroups | None:
    """Return the primary metric by class of the query under every method; None without classes. `seen` are marked."""
    benchmark, scores = scored.benchmark, scored.scores
    members: dict[str, list[int]] = {}
    for row, query in enumerate(benchmark.queries):
        if query.label is not None:
            members.setdefault(query.label, []).append(row)
    primary = benchmark.protocol.primary
    if not members or any(primary not in one.values for one in scores.values()):
        return None
    found: list[tuple[str, int, list[float]]] = []
    for label, rows in sorted(members.items()):
        columns = [one.values[primary][torch.tensor(rows)] for one in reversed(list(scores.values()))]
        found.append((label, len(rows), [100 * float(column.nanmean()) for column in columns]))
    names = [method_name(name) for name in reversed(list(scores))]
    return _group("By class", "class", primary, names, found, set(seen))


def _group(
    title: str,
    kind: str,
    primary: str,
    methods: Sequence[str],
    found: Sequence[tuple[str, int, Sequence[float]]],
    seen: set[str],
) -> QueryGroups:
    """Lay out groups from the lowest value of the first method to the highest, without the middle ones of many."""
    ordered = sorted(found, key=lambda one: (comparable(one[2][0]), one[0]))
    description = f"From the lowest {primary} of “{methods[0]}” to the highest."
    if len(ordered) > MAX_GROUPS:
        description += f" The lowest and the highest {MAX_GROUPS // 2} of {len(ordered):,}."
        ordered = ordered[: MAX_GROUPS // 2] + ordered[-(MAX_GROUPS // 2) :]
    if seen:
        description += " With *: the heads were trained on this class, so it is not zero-shot."
    rows = [
        TableRow(
            name + (" *" if name in seen else ""), [Cell(f"{count:,}"), *(Cell(format_percent(x)) for x in values)]
        )
        for name, count, values in ordered
    ]
    table = ResultTable(f"{primary} in percent by {kind}", list(map(Cell, [kind, "queries", *methods])), rows)
    return QueryGroups(title, description, table)


def seconds_table(methods: Sequence[MethodResult]) -> ResultTable | None:
    """Return the seconds spent on each method: encoding what was not cached, embedding with the heads, ranking."""
    timed = [one for one in methods if one.seconds and not one.parts]
    if not timed:
        return None
    steps = list(dict.fromkeys(["encode", "embed", "rank", *(step for one in timed for step in one.seconds)]))
    steps = [step for step in steps if any(step in one.seconds for one in timed)]
    rows = [
        TableRow(
            f"{one.benchmark} · {one.split}: {method_name(one.method)}",
            [Cell(f"{one.seconds[step]:.2f}" if step in one.seconds else "-") for step in steps],
        )
        for one in timed
    ]
    caption = "Seconds of the evaluation; encoding is done once for all methods of a benchmark and cached"
    return ResultTable(caption, list(map(Cell, ["method", *steps])), rows)


def _values(result: EvaluationResult, curves: Mapping[str, Curve], provenance: Provenance) -> dict[str, Any]:
    """Return what the template needs beside the sections."""
    model = result.benchmarks[-1].main.model if result.benchmarks else {}
    facts = _training_facts(provenance.card, model)
    notes = [] if facts else ["No trained heads were evaluated, or their training is not recorded."]
    if not curves:
        notes.append("There is no training log in this folder, so no curve.")
    return {
        "title": provenance.title,
        "subtitle": f"union-igrot {provenance.versions['union-igrot']}; written {provenance.written}; "
        "metrics in percent",
        "glance": overview_table(result.benchmarks) if result.benchmarks else None,
        "training_facts": facts,
        "training_notes": notes,
        "charts": [layout_chart(name, curve) for name, curve in curves.items()],
        **{name: getattr(provenance, name) for name in ("command", "folder", "config")},
        "hashes": _hashes([one.benchmark for one in result.scored], model, provenance.seed),
        "versions": list(provenance.versions.items()),
        "seconds": seconds_table(result.methods),
    }


def _hashes(benchmarks: Sequence[Benchmark], model: Mapping[str, Any], seed: int) -> list[tuple[str, str]]:
    found = [(f"queries of {one.name} · {one.split}", one.queries_hash()) for one in benchmarks]
    names = {"backbone_fingerprint": "backbone", "heads": "heads", "file": "file", "sha256": "the file's sha256"}
    found += [(name, str(model[key])) for key, name in names.items() if model.get(key)]
    return [*found, ("seed", str(seed))]


def _training_facts(card: Mapping[str, Any], model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describe what was trained, on what and for how long."""
    if not card:
        return []
    facts = training_facts(card) | {"whole configuration": None}
    if "fusion" in model:
        facts |= model_facts(model)
    facts["heads from"] = model.get("checkpoint")
    return [(name, str(value).replace("`", "")) for name, value in facts.items() if value not in (None, "")]
