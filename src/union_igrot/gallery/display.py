"""Search results for people: a table, thumbnails made of half blocks, a line of images for notebooks.

Knows ids, scores, columns and thumbnails. Does not know how anything was found.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final, Protocol as Interface, runtime_checkable

from PIL import Image
from rich import box
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

_CELLS: Final = 16
_HTML_SIZE: Final = 112


@runtime_checkable
class Shown(Interface):
    """What can be shown of one result."""

    @property
    def id(self) -> str:
        """What the image is called, its path or the id that it was given."""
        ...

    @property
    def score(self) -> float:
        """Cosine similarity to the query."""
        ...

    @property
    def columns(self) -> Mapping[str, Any]:
        """Further values by name."""
        ...

    @property
    def jpeg(self) -> bytes | None:
        """A thumbnail as a JPEG file, or None."""
        ...

    @property
    def thumbnail(self) -> Image.Image | None:
        """The thumbnail as an image, or None."""
        ...


def half_blocks(image: Image.Image, cells: int = _CELLS) -> Text:
    """Draw an image with half-block characters, two pixels of true color each.

    Args:
        image: The image.
        cells: Width in characters that the longest side fills; half as many lines at most.
    """
    scale = cells / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    text = Text(no_wrap=True, end="")
    for top in range(0, small.height, 2):
        if top:
            text.append("\n")
        for left in range(small.width):
            above = Color.from_rgb(*_pixel(small, left, top))
            below = Color.from_rgb(*_pixel(small, left, top + 1)) if top + 1 < small.height else None
            text.append("▀", Style(color=above, bgcolor=below))
    return text


def _pixel(image: Image.Image, left: int, top: int) -> tuple[int, int, int]:
    red, green, blue = image.getpixel((left, top))  # type: ignore[misc]  # an RGB image's pixel is a triple
    return red, green, blue


def hit_table(hits: Sequence[Shown], columns: Sequence[str], *, title: str = "", thumbnails: bool = False) -> Table:
    """Lay out the answers to one query, best first.

    Args:
        hits: The answers.
        columns: Names of the columns to show.
        title: What was asked.
        thumbnails: Whether each line has its image.
    """
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    if thumbnails:
        table.add_column("", no_wrap=True, min_width=_CELLS)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("picture", overflow="fold")
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for rank, hit in enumerate(hits, 1):
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
    """Show what a terminal would act upon, or could not encode, by its escape."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def hits_html(hits: Sequence[Shown]) -> str:
    """Write the answers to one query as a line of images, each with rank, score and name; as notebooks show it."""
    cells = []
    for rank, hit in enumerate(hits, 1):
        name = _printable(hit.id)
        short = html.escape(PurePath(name).name or name)
        image = f'<div style="height:{_HTML_SIZE}px"></div>'
        if hit.jpeg is not None:
            data = base64.b64encode(hit.jpeg).decode()
            image = (
                f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(name)}" '
                f'style="height:{_HTML_SIZE}px;width:100%;object-fit:contain;margin:0">'
            )
        cells.append(
            f'<figure style="width:{_HTML_SIZE}px;margin:4px;font-size:11px" title="{html.escape(name)}">{image}'
            f'<figcaption style="overflow-wrap:anywhere"><b>{rank}</b> · {hit.score:.3f}<br>{short}</figcaption>'
            "</figure>"
        )
    inside = "".join(cells) or "nothing found"
    return f'<div style="display:flex;flex-wrap:wrap">{inside}</div>'
