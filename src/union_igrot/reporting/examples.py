"""Example queries of a report: which ones to show, and their first results as HTML with embedded thumbnails."""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import jinja2
import torch
from markupsafe import Markup
from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.evaluation.results import ScoredBenchmark
from union_igrot.evaluation.tables import format_percent, method_name
from union_igrot.reporting.contact_sheets import Opener, query_text
from union_igrot.types import Benchmark, ImageSource

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
class ExampleGroup:
    """A choice of queries: a heading, how they were chosen, and their positions in the benchmark."""

    title: str
    description: str
    rows: Sequence[int]


def example_groups(scored: ScoredBenchmark, method: str, count: int = SHOWN) -> list[ExampleGroup]:
    """Choose `count` queries each: some from all over the benchmark, the worst failures of a method, and the best.

    If the benchmark's targets are not published, there is the first group alone.
    """
    benchmark, scores, name = scored.benchmark, scored.scores, method_name(method)
    total = len(benchmark.queries)
    # Steps of the golden ratio spread evenly and never coincide with the period of alternating classes.
    spread = sorted({int(total * (i * _GOLDEN % 1)) for i in range(min(count, total))})
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
    return [
        some,
        ExampleGroup(
            "The worst failures",
            f"The queries with the lowest {primary} of “{name}”.{ties.format('best')}{per_class}"
            if failed
            else f"None: every query has a perfect {primary}.",
            _few_per_class(benchmark, failed, count),
        ),
        ExampleGroup(
            "The best",
            f"The queries with the highest {primary} of “{name}”.{ties.format('worst')}{per_class}"
            if solved
            else f"None: every query has {primary} 0.",
            _few_per_class(benchmark, solved, count),
        ),
    ]


def _few_per_class(benchmark: Benchmark, rows: Sequence[int], count: int) -> list[int]:
    """Take the first queries, a few per class, so that no class fills the group."""
    taken: list[int] = []
    per_class: Counter[str] = Counter()
    for row in rows:
        label = benchmark.queries[row].label
        if label is not None and per_class[label] >= _PER_CLASS:
            continue
        if label is not None:
            per_class[label] += 1
        taken.append(row)
        if len(taken) == count:
            break
    return taken


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@final
class ExampleRenderer:
    """Renders examples of one benchmark as HTML by a template that gets `text`, `values` and `tiles`."""

    def __init__(self, scored: ScoredBenchmark, method: str, template: jinja2.Template, open_image: Opener) -> None:
        self._benchmark, self._scores = scored.benchmark, scored.scores
        self._method, self._template, self._open = method, template, open_image
        self._ranking = scored.scores[method].ranking.positions
        self._at = {item.id: position for position, item in enumerate(scored.benchmark.gallery)}
        self._thumbnails: dict[int, Thumbnail | None] = {}

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
            if not targets:
                yield self._tile(at, "", str(rank), f"result {rank}")
            elif relevant:
                yield self._tile(at, "right", f"{rank} ✓ right", f"result {rank}, right")
            else:
                yield self._tile(at, "wrong", f"{rank} ✗ wrong", f"result {rank}, wrong")
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


def thumbnail(source: ImageSource, open_image: Opener) -> Thumbnail | None:
    """Return an image at most `SIDE` pixels wide and high, as WebP in a data URI.

    None if it cannot be opened: rankings of other methods are scored without images.
    """
    try:
        image = open_image(source).convert("RGB")
    except ImageError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=_QUALITY, method=4)
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/webp;base64,{encoded}", image.width, image.height)
