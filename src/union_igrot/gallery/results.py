"""Search results, and how they are shown: as a table, as thumbnails of half blocks, and as HTML in notebooks."""

import base64
import html
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final, final, overload

from PIL import Image
from rich import box
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from union_igrot.gallery.engines.base import ColumnBatch, ColumnValue, IndexHits

THUMBNAIL: Final = "thumbnail"
"""The column with a small JPEG."""

DUPLICATE: Final = "duplicate"
"""Column of the hits in a group of near duplicates, which says why an image duplicates the first."""

_CELLS: Final = 16
_HTML_SIZE: Final = 112


@dataclass(frozen=True, slots=True)
class Hit:
    """One image of a search result.

    Attributes:
        id: Its id: a path, or the id it was added with.
        score: Cosine similarity to the query, -1..1.
        columns: Its other columns: `hash`, `size`, `mtime`, `width`, `height`, `source` and the user's own.
        jpeg: A thumbnail as a JPEG file, or None.
    """

    id: str
    score: float
    columns: Mapping[str, ColumnValue] = field(default_factory=dict, hash=False)  # so that hits can be in sets
    jpeg: bytes | None = field(default=None, repr=False)

    @property
    def path(self) -> Path | None:
        """The file, or None if there is none, as for bytes in memory and members of tar files."""
        return file_of(self.id)

    @property
    def thumbnail(self) -> Image.Image | None:
        """The thumbnail of at most 160 pixels, or None."""
        return None if self.jpeg is None else Image.open(io.BytesIO(self.jpeg), formats=("JPEG",))


@final
class SearchResult(Sequence[Hit]):
    """The hits of one query, best first; notebooks show their thumbnails.

    Attributes:
        min_score: The lowest score of a hit that was searched with, or None.
        best_score: The score of the best image whether it is a hit or not; None if no image passed the filter.
    """

    def __init__(self, hits: Sequence[Hit], min_score: float | None = None, best_score: float | None = None) -> None:
        self._hits, self.min_score, self.best_score = tuple(hits), min_score, best_score

    @property
    def nothing_near(self) -> bool:
        """Whether there are images, but all of them score below `min_score`."""
        return self.min_score is not None and self.best_score is not None and self.best_score < self.min_score

    @property
    def ids(self) -> list[str]:
        """The ids, best first."""
        return [hit.id for hit in self._hits]

    @property
    def scores(self) -> list[float]:
        """The cosine similarities, in decreasing order."""
        return [hit.score for hit in self._hits]

    def __len__(self) -> int:
        return len(self._hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._hits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> "SearchResult": ...
    def __getitem__(self, index: int | slice) -> "Hit | SearchResult":
        if isinstance(index, slice):
            return SearchResult(self._hits[index], self.min_score, self.best_score)
        return self._hits[index]

    def __repr__(self) -> str:
        if self.nothing_near:
            return f"SearchResult(nothing near: best score {self.best_score:.4f}, min_score {self.min_score:.4f})"
        best = f", best {self._hits[0].score:.4f} {self._hits[0].id}" if self._hits else ""
        return f"SearchResult({len(self)} hits{best})"

    def __str__(self) -> str:
        lines = [f"{rank:>4}  {hit.score:7.4f}  {hit.id}" for rank, hit in enumerate(self._hits, 1)]
        return "\n".join([f"{len(lines)} hits", *lines])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>" if self.nothing_near else hits_html(self._hits)


def make_result(
    found: IndexHits, k: int, excluded: Sequence[str], min_score: float | None = None, offset: int = 0
) -> SearchResult:
    """Return k rows after the first `offset`, of those that are not excluded and have the score."""
    left_out = set(excluded)
    hits = [hit for hit in as_hits(found.ids, found.scores.tolist(), found.columns) if hit.id not in left_out]
    near = [hit for hit in hits if min_score is None or hit.score >= min_score]
    return SearchResult(near[offset : offset + k], min_score, max((hit.score for hit in hits), default=None))


def as_hits(ids: Sequence[str], scores: Sequence[float], columns: ColumnBatch) -> list[Hit]:
    """Return rows as hits, their thumbnails apart from the other columns."""
    others = {name: values for name, values in columns.items() if name != THUMBNAIL}
    rows = zip(ids, scores, columns.get(THUMBNAIL, [None] * len(ids)), strict=True)
    return [
        Hit(
            name,
            score,
            {column: values[i] for column, values in others.items()},
            jpeg if isinstance(jpeg, bytes) else None,
        )
        for i, (name, score, jpeg) in enumerate(rows)
    ]


def file_of(name: str) -> Path | None:
    """Return the file of a row, if its id is an absolute path of an existing file; other ids are not those of files."""
    exists = Path(name).is_absolute() and os.path.isfile(name)  # noqa: PTH113 - Path's raises for a closed folder
    return Path(name) if exists else None


def is_missing(name: str) -> bool:
    """Return whether the id of a row is the path of a file, or of a member of a tar file, that no longer exists."""
    path = Path(name)
    return path.is_absolute() and not os.path.lexists(name) and not any(os.path.isfile(one) for one in path.parents)  # noqa: PTH113 - Path's raises for a closed folder


def half_blocks(image: Image.Image, cells: int = _CELLS) -> Text:
    """Draw an image with half-block characters of two pixels each, `cells` long on its longest side."""
    scale = cells / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    text = Text(no_wrap=True, end="")
    for top in range(0, small.height, 2):
        if top:
            text.append("\n")
        for left in range(small.width):
            below = _color(small, left, top + 1) if top + 1 < small.height else None
            text.append("▀", Style(color=_color(small, left, top), bgcolor=below))
    return text


def _color(image: Image.Image, left: int, top: int) -> Color:
    return Color.from_rgb(*image.getpixel((left, top)))  # type: ignore[misc]  # an RGB image's pixel is a triple


def hit_table(
    hits: Sequence[Hit], columns: Sequence[str], *, title: str = "", thumbnails: bool = False, first_rank: int = 1
) -> Table:
    """Return the hits of one query as a table with some of their columns."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    if thumbnails:
        table.add_column("", no_wrap=True, min_width=_CELLS)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("image", overflow="fold")
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for rank, hit in enumerate(hits, first_rank):
        cells = [Text(str(rank))]
        if thumbnails:
            cells.append(Text("") if hit.thumbnail is None else half_blocks(hit.thumbnail))
        cells += [Text(f"{hit.score:.4f}"), Text(_printable(hit.id))]
        cells += [Text(_cell(hit.columns.get(name))) for name in columns]
        table.add_row(*cells)
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    return _printable(f"{value:.4g}" if isinstance(value, float) else str(value))


def _printable(text: str) -> str:
    """Escape what a terminal would interpret or cannot encode."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _reason(hit: Hit) -> str:
    """Return why a hit duplicates the first of its group, as HTML; empty for the hit of a search."""
    reason = hit.columns.get(DUPLICATE)
    return f"{html.escape(str(reason))}<br>" if reason else ""


def hits_html(hits: Sequence[Hit]) -> str:
    """Return the hits of one query as a row of thumbnails with rank, score and name."""
    cells = []
    for rank, hit in enumerate(hits, 1):
        name = _printable(hit.id)
        image = f'<div style="height:{_HTML_SIZE}px"></div>'
        if hit.jpeg is not None:
            data = base64.b64encode(hit.jpeg).decode()
            image = (
                f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(name)}" '
                f'style="height:{_HTML_SIZE}px;width:100%;object-fit:contain;margin:0">'
            )
        cells.append(
            f'<figure style="width:{_HTML_SIZE}px;margin:4px;font-size:11px" title="{html.escape(name)}">{image}'
            f'<figcaption style="overflow-wrap:anywhere"><b>{rank}</b> · {hit.score:.3f}<br>{_reason(hit)}'
            f"{html.escape(PurePath(name).name or name)}</figcaption></figure>"
        )
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(cells) or "no hits"}</div>'
