"""Contact sheets: queries with their first results as a PNG, drawn with Pillow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from union_igrot.errors import ImageError
from union_igrot.evaluation.results import ScoredBenchmark
from union_igrot.storage.files import write_atomic
from union_igrot.types import ImageSource, Query

_RIGHT, _WRONG, _INK, _FAINT = (22, 140, 60), (200, 60, 50), (30, 30, 30), (205, 205, 205)
_GAP, _CAPTION, _HEAD = 8, 16, 22
TILE_SIDE = 96
"""Side of a tile in pixels."""
Opener = Callable[[ImageSource], Image.Image]
"""Opens a source as an RGB image."""


@dataclass(frozen=True)
class SheetRow:
    """One query on a contact sheet, with score and image of each result, best first; a missing image is None.

    `relevant` decides the color of each result's frame; it is empty if that is not known.
    """

    text: str
    images: Sequence[Image.Image | None]
    results: Sequence[tuple[float, Image.Image | None]]
    relevant: Sequence[bool] = ()


def contact_sheet(path: Path, rows: Sequence[SheetRow], columns: int = 8) -> None:
    """Draw queries, framed dark, with their results, each with rank and score, `columns` side by side, as a PNG."""
    cell = TILE_SIDE + _CAPTION + _GAP
    side = max(len(row.images) for row in rows)
    width = (side + columns) * (TILE_SIDE + _GAP) + 3 * _GAP
    lines = [max(1, math.ceil(len(row.results) / columns)) for row in rows]
    sheet = Image.new("RGB", (width, sum(_HEAD + count * cell for count in lines) + _GAP), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(12)
    top = _GAP
    for row, count in zip(rows, lines, strict=True):
        pen.text((_GAP, top), " ".join(row.text.split())[: width // 8] or "(no text)", fill=_INK, font=font)
        for index, image in enumerate(row.images):
            sheet.paste(_tile(image, _INK), (_GAP + index * (TILE_SIDE + _GAP), top + _HEAD))
        for index, (score, image) in enumerate(row.results):
            left = 2 * _GAP + (side + index % columns) * (TILE_SIDE + _GAP)
            upper = top + _HEAD + index // columns * cell
            frame = _FAINT if not row.relevant else _RIGHT if row.relevant[index] else _WRONG
            sheet.paste(_tile(image, frame), (left, upper))
            pen.text((left, upper + TILE_SIDE), f"{index + 1} · {score:.3f}", fill=_INK, font=small)
        top += _HEAD + count * cell
    # Level 3 is fast, and the file only a tenth larger than the smallest.
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG", compress_level=3))


def benchmark_sheet(
    path: Path, scored: ScoredBenchmark, method: str, open_image: Opener, queries: int = 12, results: int = 8
) -> None:
    """Draw some queries of a benchmark with the first results of a method, relevant ones framed green, as a PNG.

    The `queries` shown are spread evenly over the benchmark.
    """
    everything = scored.benchmark.queries
    count = min(queries, len(everything))
    chosen = [round(i * (len(everything) - 1) / max(1, count - 1)) for i in range(count)]
    ranking = scored.scores[method].ranking

    def row_of(index: int) -> SheetRow:
        query = everything[index]
        pairs = zip(ranking.positions[index, :results].tolist(), ranking.scores[index, :results].tolist(), strict=True)
        found = [(scored.benchmark.gallery[at], score) for at, score in pairs if at >= 0]  # a subset may be padded
        return SheetRow(
            query_text(query) or "",
            [opened(open_image, query.image)],
            [(score, opened(open_image, item.image)) for item, score in found],
            [item.id in query.targets for item, _ in found] if query.targets else (),
        )

    contact_sheet(path, [row_of(index) for index in chosen])


def query_text(query: Query) -> str | None:
    """Return a query's text on one line, else its class; None without both."""
    return " / ".join(filter(None, query.wordings)) or query.label


def opened(open_image: Opener, source: ImageSource) -> Image.Image | None:
    """Return an image; None if it cannot be opened, as metrics and rankings are valid without it."""
    try:
        return open_image(source)
    except ImageError:
        return None


def _tile(image: Image.Image | None, frame: tuple[int, int, int]) -> Image.Image:
    image = image or Image.new("RGB", (1, 1), _FAINT)
    tile = Image.new("RGB", (TILE_SIDE, TILE_SIDE), "white")
    scale = (TILE_SIDE - 8) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    tile.paste(resized, ((TILE_SIDE - size[0]) // 2, (TILE_SIDE - size[1]) // 2))
    ImageDraw.Draw(tile).rectangle((0, 0, TILE_SIDE - 1, TILE_SIDE - 1), outline=frame, width=3)
    return tile
