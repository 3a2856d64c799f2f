"""Queries worth looking at, and their first answers as small images inside a page.

Chooses queries from all over a benchmark, those answered worst and best, and gives each as a piece of HTML. Knows
benchmarks, rankings and metrics query by query. Does not know how images are read from disk (an opener is given).
"""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jinja2
import torch
from markupsafe import Markup
from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.reporting.contact_sheets import Opener
from union_igrot.reporting.tables import method_name, percent
from union_igrot.types import Benchmark, ImageSource, Query, Scores

SHOWN = 6
"""Queries of a sheet, where the page has room for them."""
ANSWERS = 8
"""First answers shown of a query."""
SIDE = 128
"""Longest side of a small image, in pixels."""
_OF_A_CLASS = 2
_GOLDEN = (5**0.5 - 1) / 2
_QUALITY = 75
_WORDS = 200
_NAME = 90


@dataclass(frozen=True)
class Sheet:
    """A choice of queries.

    Attributes:
        title: Its heading.
        said: What was chosen, in a sentence.
        places: The queries' places in the benchmark.
    """

    title: str
    said: str
    places: Sequence[int]


def sheets(benchmark: Benchmark, scores: Mapping[str, Scores], method: str, count: int = SHOWN) -> list[Sheet]:
    """Choose queries: some from all over it, the worst failures and the best.

    Args:
        benchmark: Whose queries were answered.
        scores: Metrics of each method.
        method: Whose answers are shown.
        count: How many queries a sheet holds.

    Returns:
        Three sheets; the first alone where the benchmark's targets are not published.
    """
    name, all_of_them = method_name(method), len(benchmark.queries)
    # Steps of the golden ratio: even, and never in time with classes that take turns.
    spread = sorted({int(all_of_them * (i * _GOLDEN % 1)) for i in range(min(count, all_of_them))})
    some = Sheet(
        "First answers to some queries",
        f"Queries from all over the benchmark, with the first answers of “{name}”.",
        spread,
    )
    primary = benchmark.protocol.primary
    if primary not in scores[method].values or not any(query.targets for query in benchmark.queries):
        return [some]
    own = scores[method].values[primary]
    others = [part.values[primary] for key, part in scores.items() if key not in (method, "chance")]
    rest = torch.stack(others).nan_to_num(0.0).amax(0) if others else torch.zeros_like(own)
    known = [place for place in range(all_of_them) if own[place].isfinite()]
    failed = sorted((p for p in known if own[p] < 1), key=lambda p: (float(own[p]), -float(rest[p]), p))
    solved = sorted((p for p in known if own[p] > 0), key=lambda p: (-float(own[p]), float(rest[p]), p))
    bounded = f" At most {_OF_A_CLASS} of a class." if any(query.label for query in benchmark.queries) else ""
    among = " Among equals first those that another method answered {} by this metric." if others else ""
    return [
        some,
        Sheet(
            "The worst failures",
            f"The queries with the lowest {primary} of “{name}”.{among.format('best')}{bounded}"
            if failed
            else f"None: “{name}” answered every query perfectly by {primary}.",
            _of_many_classes(benchmark, failed, count),
        ),
        Sheet(
            "The best",
            f"The queries with the highest {primary} of “{name}”.{among.format('worst')}{bounded}"
            if solved
            else f"None: “{name}” has {primary} 0 for every query.",
            _of_many_classes(benchmark, solved, count),
        ),
    ]


def _of_many_classes(benchmark: Benchmark, places: Sequence[int], count: int) -> list[int]:
    """Take the first, of each class a few, so that one class does not fill the sheet."""
    taken: list[int] = []
    of_class: Counter[str] = Counter()
    for place in places:
        label = benchmark.queries[place].label
        if label is not None and of_class[label] >= _OF_A_CLASS:
            continue
        if label is not None:
            of_class[label] += 1
        taken.append(place)
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
class Drawer:
    """Draws the examples of one benchmark.

    Args:
        benchmark: Whose queries were answered.
        scores: Metrics of each method.
        method: Whose answers are shown.
        template: Of one example; gets `asked`, `measured` and `tiles`.
        open_image: Opens a source as an RGB image.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        scores: Mapping[str, Scores],
        method: str,
        template: jinja2.Template,
        open_image: Opener,
    ) -> None:
        self._benchmark, self._scores, self._method = benchmark, scores, method
        self._template, self._open = template, open_image
        self._at = {item.id: place for place, item in enumerate(benchmark.gallery)}
        self._drawn: dict[int, Thumbnail | None] = {}

    def draw(self, place: int) -> Markup:
        """Return a query with its first answers as HTML, every word escaped."""
        query = self._benchmark.queries[place]
        tiles = [
            {
                "kind": "query",
                "mark": "query",
                "name": cut(query.label or "", _NAME),
                "alt": f"query: {cut(self._asked(query), _WORDS)}",
                "picture": thumbnail(query.image, self._open),
            },
            *self._answers(place),
        ]
        asked, measured = self._asked(query), self._measured(place)
        return Markup(self._template.render(asked=cut(asked, _WORDS), measured=measured, tiles=tiles))

    def _asked(self, query: Query) -> str:
        return " / ".join(filter(None, query.wordings)) or query.label or query.id

    def _measured(self, place: int) -> str:
        """Say the primary metric of every method for one query, and where the first right answer stands."""
        query, primary = self._benchmark.queries[place], self._benchmark.protocol.primary
        if not query.targets:
            return f"{cut(query.id, _NAME)}; right answers are not known"
        figures = {
            method_name(name): 100 * float(part.values[primary][place])
            for name, part in self._scores.items()
            if name != "chance" and primary in part.values
        }
        said = ", ".join(f"{name} {percent(figure)}" for name, figure in reversed(figures.items()))
        rank = self._rank_of(place, set(query.targets))
        depth = self._scores[self._method].ranking.positions.shape[1]
        first = f"first right answer at rank {rank}" if rank else f"no right answer among the first {depth}"
        return f"{cut(query.id, _NAME)}; {first}; {primary}: {said}"

    def _ranked(self, place: int) -> list[int]:
        # A subset that is smaller than others is filled up with -1.
        return [at for at in self._scores[self._method].ranking.positions[place].tolist() if at >= 0]

    def _rank_of(self, place: int, names: set[str]) -> int | None:
        gallery = self._benchmark.gallery
        ranked = enumerate(self._ranked(place), 1)
        return next((rank for rank, at in ranked if gallery[at].id in names), None)

    def _answers(self, place: int) -> Iterator[dict[str, Any]]:
        query, right = self._benchmark.queries[place], set(self._benchmark.queries[place].targets)
        first = self._ranked(place)[:ANSWERS]
        found = False
        for rank, at in enumerate(first, 1):
            item = self._benchmark.gallery[at]
            found = found or item.id in right
            if not right:
                yield self._tile(at, "", str(rank), f"answer {rank}")
            elif item.id in right:
                yield self._tile(at, "right", f"{rank} ✓ right", f"answer {rank}, right")
            else:
                yield self._tile(at, "wrong", f"{rank} ✗ wrong", f"answer {rank}, wrong")
        if right and not found:
            missed = self._rank_of(place, {query.targets[0]})
            where = f"rank {missed}" if missed else f"after {self._scores[self._method].ranking.positions.shape[1]}"
            yield self._tile(self._at[query.targets[0]], "missed", f"missed ({where})", "a right answer that is missed")

    def _tile(self, at: int, kind: str, mark: str, said: str) -> dict[str, Any]:
        item = self._benchmark.gallery[at]
        name = item.caption or item.label or item.id
        if at not in self._drawn:
            self._drawn[at] = thumbnail(item.image, self._open)
        alt = f"{said}: {cut(name, _WORDS)}"
        return {"kind": kind, "mark": mark, "name": cut(name, _NAME), "alt": alt, "picture": self._drawn[at]}


def cut(text: str, most: int) -> str:
    """Shorten a text, an ellipsis in the place of what is left out."""
    plain = " ".join(text.split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def thumbnail(source: ImageSource, open_image: Opener) -> Thumbnail | None:
    """Return an image at most `SIDE` pixels wide and high, as WebP in a data URI; a smaller one keeps its size.

    None where it cannot be opened: rankings that another method wrote are scored without any image.
    """
    try:
        image = open_image(source).convert("RGB")
    except ImageError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=_QUALITY, method=4)
    coded = base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/webp;base64,{coded}", image.width, image.height)
