"""`report.html`: the results of a run in one file that needs no network, no script and no other file."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, final

import jinja2
import torch
from markupsafe import Markup
from PIL import Image

from union_igrot.evaluation.results import BenchmarkResult, EvaluationResult, MethodResult, ScoredBenchmark
from union_igrot.evaluation.tables import (
    NO_DIFFERENCE,
    Cell,
    ResultTable,
    TableRow,
    comparable,
    format_difference,
    format_interval,
    format_percent,
    method_name,
    method_title,
    metrics_table,
    notes,
)
from union_igrot.metrics.names import scale_of
from union_igrot.reporting.charts import Chart, Curve, layout_chart, recall_chart, weights_chart
from union_igrot.reporting.contact_sheets import Opener, opened, query_text
from union_igrot.reporting.model_card import model_facts, training_facts
from union_igrot.storage.files import write_atomic
from union_igrot.types import Benchmark, ImageSource

MAX_BYTES = 5_000_000
"""Bound on a page's size; fewer examples are shown to stay within it."""
MAX_GROUPS = 30
"""Rows of a table of tags or classes; of more, the lowest and the highest are shown."""
_LIST_BYTES = 80  # of the list around the first example
SHOWN = 6
"""Queries per group of examples, if the page has room for them."""
RESULTS = 8
"""Results shown per query."""
SIDE = 128
"""Longest side of a thumbnail, in pixels."""
_PER_CLASS = 2
_GOLDEN = (5**0.5 - 1) / 2
_QUALITY = 75
_TEXT_LENGTH, _NAME_LENGTH = 200, 90


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
    groups: Sequence[tuple[str, ResultTable]] = ()
    charts: Sequence[Chart] = ()
    examples: "ExampleRenderer | None" = None


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
    render = partial(ExampleRenderer, templates.get_template("example.html"), open_image)
    measured = {one.key for one in result.benchmarks}
    hidden = [one for key, one in scored.items() if key not in measured]
    sections = [_section(number, one, scored, render) for number, one in enumerate(result.benchmarks, 1)]
    sections += [_hidden_section(number, one, render) for number, one in enumerate(hidden, len(sections) + 1)]
    page = templates.get_template("page.html")
    values = _values(result, curves, provenance) | {
        "sections": sections,
        "limit": f"{limit:,}",
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
    renderers = [section.examples for section in sections if section.examples]
    queues = [[(one, group, row) for row in group.rows] for one in renderers for group in one.groups]
    for turn in zip_longest(*queues):
        for pair in turn:
            if pair is None:
                continue
            renderer, group, row = pair
            html = renderer.render(row)
            free -= len(html.encode()) + _LIST_BYTES
            if free < 0:
                return
            group.drawn.append(html)


def _section(
    number: int,
    result: BenchmarkResult,
    scored: Mapping[tuple[str, str], ScoredBenchmark],
    render: "Callable[[ScoredBenchmark, str], ExampleRenderer]",
) -> _Section:
    """Lay out a benchmark, or the mean over a benchmark's parts, which has no examples of its own."""
    main = result.main
    names = main.parts or (main.benchmark,)
    parts = [scored[name, main.split] for name in names if (name, main.split) in scored]
    alone = bool(parts) and not main.parts
    complete = bool(main.differences) and len(parts) == len(names)
    groups = [tag_groups(result), class_groups(parts[0], main.seen_classes) if alone else None]
    charts = [recall_chart(parts[0])] if alone else []
    charts += [weights_chart(parts[0].target_weights)] if alone and parts[0].target_weights else []
    return _Section(
        id=f"benchmark-{number}",
        title=result.title,
        size=result.size,
        table=metrics_table(result),
        notes=list(notes(result)),
        warnings=main.warnings,
        differences=differences_table(main, parts) if complete else None,
        differences_note=f"On how many queries {main.primary}, the primary metric, of the trained model is higher, "
        "equal or lower. The difference is paired, with its 95 % bootstrap interval.",
        groups=[group for group in groups if group is not None],
        charts=[chart for chart in charts if chart is not None],
        examples=render(parts[0], main.method) if alone else None,
    )


def _hidden_section(
    number: int, scored: ScoredBenchmark, render: "Callable[[ScoredBenchmark, str], ExampleRenderer]"
) -> _Section:
    """Lay out a benchmark whose targets are not published."""
    benchmark = scored.benchmark
    return _Section(
        id=f"benchmark-{number}",
        title=f"{benchmark.name} · {benchmark.split}",
        size=f"{len(benchmark.queries):,} queries x {len(benchmark.gallery):,} images",
        table=None,
        notes=["The targets of this split are not published: there are no metrics, but a submission file."],
        examples=render(scored, list(scored.scores)[-1]),
    )


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
                span=(one.metrics[primary], *one.intervals[primary]) if scale_of(primary) == 100 else None,
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
    caption = "The primary metric of each benchmark in percent, with its 95 % interval; bars from 0 to 100"
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
        own, rival = (torch.cat([one.scores[name].values[primary] for one in parts]) for name in (main.method, other))
        gaps = own - rival  # nan if one of them has no value
        counts = [int(one.sum()) for one in (gaps > 0, gaps == 0, gaps < 0)]
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


def tag_groups(result: BenchmarkResult) -> tuple[str, ResultTable] | None:
    """Return the primary metric by tag (edit type, aspect) under every method; None without tags."""
    methods = result.methods[::-1]
    found = [
        (tag, one.n_queries, [method.by_tag[tag].value for method in methods])
        for tag, one in result.main.by_tag.items()
    ]
    return _group("kind of query", result.main.primary, [method_title(one) for one in methods], found, set())


def class_groups(scored: ScoredBenchmark, seen: Sequence[str]) -> tuple[str, ResultTable] | None:
    """Return the primary metric by class of the query under every method; None without classes. `seen` are marked."""
    scores, primary = scored.scores, scored.benchmark.protocol.primary
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, query in enumerate(scored.benchmark.queries):
        if query.label is not None:
            members[query.label].append(row)
    if any(primary not in one.values for one in scores.values()):
        return None
    columns = [one.values[primary] for one in reversed(list(scores.values()))]
    found = [
        (label, len(rows), [100 * float(column[rows].nanmean()) for column in columns])
        for label, rows in members.items()
    ]
    return _group("class", primary, [method_name(name) for name in reversed(list(scores))], found, set(seen))


def _group(
    kind: str,
    primary: str,
    methods: Sequence[str],
    found: Sequence[tuple[str, int, Sequence[float]]],
    seen: set[str],
) -> tuple[str, ResultTable] | None:
    """Lay out groups from the lowest value of the first method to the highest, without the middle ones of many."""
    ordered = sorted(found, key=lambda one: (comparable(one[2][0]), one[0]))
    caption = f"{primary} in percent by {kind}, from the lowest of “{methods[0]}” to the highest"
    if len(ordered) > MAX_GROUPS:
        caption += f"; the lowest and the highest {MAX_GROUPS // 2} of {len(ordered):,}"
        ordered = ordered[: MAX_GROUPS // 2] + ordered[-(MAX_GROUPS // 2) :]
    if seen:
        caption += "; with *: the heads were trained on this class, so it is not zero-shot"
    rows = [
        TableRow(
            name + (" *" if name in seen else ""), [Cell(f"{count:,}"), *(Cell(format_percent(x)) for x in values)]
        )
        for name, count, values in ordered
    ]
    head = list(map(Cell, [kind, "queries", *methods]))
    return (f"By {kind}", ResultTable(caption, head, rows)) if rows else None


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


# --- examples


@dataclass
class ExampleGroup:
    """A choice of queries: a heading, how they were chosen, their positions in the benchmark, and what fits."""

    title: str
    description: str
    rows: Sequence[int]
    drawn: list[Markup] = field(default_factory=list)


def example_groups(scored: ScoredBenchmark, method: str, count: int = SHOWN) -> list[ExampleGroup]:
    """Choose `count` queries each: some from all over the benchmark, the worst failures of a method, and the best.

    If the benchmark's targets are not published, there is the first group alone.
    """
    benchmark, scores, name = scored.benchmark, scored.scores, method_name(method)
    total = len(benchmark.queries)
    # Steps of the golden ratio spread evenly and never coincide with the period of alternating classes.
    places = dict.fromkeys(int(total * (i * _GOLDEN % 1)) for i in range(min(4 * count, total)))
    spread = sorted(_few_per_class(benchmark, list(places), count))
    some = ExampleGroup(
        "Some queries", f"Queries from all over the benchmark, with the first results of “{name}”.", spread
    )
    primary = benchmark.protocol.primary
    if primary not in scores[method].values or not any(query.targets for query in benchmark.queries):
        return [some]
    own = scores[method].values[primary]
    others = [one.values[primary] for key, one in scores.items() if key not in (method, "chance")]
    rest = torch.stack(others).nan_to_num(0.0).amax(0) if others else torch.zeros_like(own)
    known = [row for row in range(total) if own[row].isfinite()]
    failed = sorted((p for p in known if own[p] < 1), key=lambda p: (float(own[p]), -float(rest[p]), p))
    solved = sorted((p for p in known if own[p] > 0), key=lambda p: (-float(own[p]), float(rest[p]), p))
    per_class = f" At most {_PER_CLASS} per class." if any(query.label for query in benchmark.queries) else ""
    ties = " Among equal values, first those on which another method is {}." if others else ""
    groups = [some]
    for title, which, other, rows, none in (
        ("The worst failures", "lowest", "best", failed, f"every query has a perfect {primary}"),
        ("The best", "highest", "worst", solved, f"every query has {primary} 0"),
    ):
        words = f"The queries with the {which} {primary} of “{name}”.{ties.format(other)}{per_class}"
        chosen = _few_per_class(benchmark, rows, count)
        groups.append(ExampleGroup(title, words if rows else f"None: {none}.", chosen))
    return groups


def _few_per_class(benchmark: Benchmark, rows: Sequence[int], count: int) -> list[int]:
    """Take the first queries, a few per class, so that no class fills the group."""
    taken: list[int] = []
    per_class: Counter[str | None] = Counter()
    for row in rows:
        label = benchmark.queries[row].label
        per_class[label] += 1
        if label is None or per_class[label] <= _PER_CLASS:
            taken.append(row)
    return taken[:count]


@final
class ExampleRenderer:
    """Renders examples of one benchmark as HTML by a template that gets `text`, `values` and `tiles`."""

    def __init__(self, template: jinja2.Template, open_image: Opener, scored: ScoredBenchmark, method: str) -> None:
        self.groups = example_groups(scored, method)
        self._benchmark, self._scores = scored.benchmark, scored.scores
        self._template, self._open = template, open_image
        self._ranking = scored.scores[method].ranking.positions
        self._at = {item.id: position for position, item in enumerate(scored.benchmark.gallery)}
        self._thumbnails: dict[int, dict[str, Any] | None] = {}

    def render(self, row: int) -> Markup:
        """Return a query with its first results as HTML, every text escaped."""
        query = self._benchmark.queries[row]
        text = shorten(query_text(query) or query.id, _TEXT_LENGTH)
        tile = {
            "kind": "query",
            "mark": "query",
            "name": shorten(query.label or "", _NAME_LENGTH),
            "alt": f"query: {text}",
            "image": thumbnail(query.image, self._open),
        }
        tiles = [tile, *self._results(row)]
        return Markup(self._template.render(text=text, values=self._values(row), tiles=tiles))

    def _values(self, row: int) -> str:
        """Describe the primary metric of every method for one query, and the rank of its first relevant result."""
        query, primary = self._benchmark.queries[row], self._benchmark.protocol.primary
        name = shorten(query.id, _NAME_LENGTH)
        if not query.targets:
            return f"{name}; targets not published"
        values = [
            f"{method_name(method)} {format_percent(100 * float(one.values[primary][row]))}"
            for method, one in reversed(list(self._scores.items()))
            if method != "chance" and primary in one.values
        ]
        rank = self._rank_of(row, set(query.targets))
        first = f"first target at rank {rank}" if rank else f"no target among the first {self._ranking.shape[1]}"
        return f"{name}; {first}; {primary}: {', '.join(values)}"

    def _ranked(self, row: int) -> list[int]:
        return [at for at in self._ranking[row].tolist() if at >= 0]  # a subset may be padded with -1

    def _rank_of(self, row: int, names: set[str]) -> int | None:
        gallery = self._benchmark.gallery
        return next((rank for rank, at in enumerate(self._ranked(row), 1) if gallery[at].id in names), None)

    def _results(self, row: int) -> Iterator[dict[str, Any]]:
        query, targets = self._benchmark.queries[row], set(self._benchmark.queries[row].targets)
        found = False
        for rank, at in enumerate(self._ranked(row)[:RESULTS], 1):
            relevant = self._benchmark.gallery[at].id in targets
            found = found or relevant
            kind, sign = ("right", " ✓ right") if relevant else ("wrong", " ✗ wrong") if targets else ("", "")
            yield self._tile(at, kind, f"{rank}{sign}", f"result {rank}" + f", {kind}" * bool(kind))
        if targets and not found:
            missed = self._rank_of(row, {query.targets[0]})
            where = f"rank {missed}" if missed else f"after {self._ranking.shape[1]}"
            yield self._tile(self._at[query.targets[0]], "missed", f"missed ({where})", "a target that was missed")

    def _tile(self, at: int, kind: str, mark: str, role: str) -> dict[str, Any]:
        item = self._benchmark.gallery[at]
        name = item.caption or item.label or item.id
        if at not in self._thumbnails:
            self._thumbnails[at] = thumbnail(item.image, self._open)
        return {
            **{"kind": kind, "mark": mark, "name": shorten(name, _NAME_LENGTH)},
            **{"alt": f"{role}: {shorten(name, _TEXT_LENGTH)}", "image": self._thumbnails[at]},
        }


def shorten(text: str, length: int) -> str:
    """Shorten a text to a length, ending with an ellipsis."""
    plain = " ".join(text.split())
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def thumbnail(source: ImageSource, open_image: Opener) -> dict[str, Any] | None:
    """Return an image at most `SIDE` pixels wide and high, as WebP in a data URI, and its size.

    None if it cannot be opened: rankings of other methods are scored without images.
    """
    if (found := opened(open_image, source)) is None:
        return None
    image = found.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=_QUALITY, method=4)
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return {"uri": f"data:image/webp;base64,{encoded}", "width": image.width, "height": image.height}
