"""Images of results: contact sheets of rankings and the curve of a training.

Drawn with Pillow alone. Does not know how images are read from disk (an opener is given)
or how a metric came about.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from union_igrot.errors import ImageError
from union_igrot.storage.atomic import write_atomic
from union_igrot.types import Benchmark, ImageSource, Ranking

_RIGHT, _WRONG, _INK, _FAINT = (22, 140, 60), (200, 60, 50), (30, 30, 30), (205, 205, 205)
_TILE, _GAP, _TEXT = 96, 8, 34
SIDE = _TILE
"""Pixels of an image's side that a sheet shows."""
Opener = Callable[[ImageSource], Image.Image]
Curve = list[tuple[float, float]]


def _save(image: Image.Image, path: Path) -> None:
    # Level 3 is a tenth larger than the smallest, in a third of the time.
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", compress_level=3))


def _opened(open_image: Opener, source: ImageSource) -> Image.Image:
    """Open an image; an empty place where it is gone by now, since the metrics stand without it."""
    try:
        return open_image(source)
    except ImageError:
        return Image.new("RGB", (1, 1), _FAINT)


def _tile(image: Image.Image, frame: tuple[int, int, int]) -> Image.Image:
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    scale = (_TILE - 8) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tile.paste(image.resize(size, Image.Resampling.LANCZOS), ((_TILE - size[0]) // 2, (_TILE - size[1]) // 2))
    ImageDraw.Draw(tile).rectangle((0, 0, _TILE - 1, _TILE - 1), outline=frame, width=3)
    return tile


def contact_sheet(
    path: Path, benchmark: Benchmark, ranking: Ranking, open_image: Opener, queries: int = 12, answers: int = 8
) -> None:
    """Draw some queries with their first answers, right ones framed green.

    Args:
        path: The PNG to write.
        benchmark: Whose queries were ranked.
        ranking: The first answers to all of its queries.
        open_image: Opens a source as an RGB image.
        queries: How many queries, spread evenly over the benchmark.
        answers: How many answers to each.
    """
    count = min(queries, len(benchmark.queries))
    answers = min(answers, ranking.positions.shape[1])
    chosen = [round(i * (len(benchmark.queries) - 1) / max(1, count - 1)) for i in range(count)]
    width = (answers + 1) * (_TILE + _GAP) + 2 * _GAP
    sheet = Image.new("RGB", (width, count * (_TILE + _TEXT) + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for line, place in enumerate(chosen):
        query = benchmark.queries[place]
        top = line * (_TILE + _TEXT) + _GAP
        words = " / ".join(filter(None, query.wordings)) or query.label or "(no text)"
        pen.text((_GAP, top), words[: width // 8], fill=_INK, font=font)
        top += 20
        sheet.paste(_tile(_opened(open_image, query.image), _INK), (_GAP, top))
        targets = set(query.targets)
        for at, position in enumerate(ranking.positions[place, :answers].tolist()):
            if position < 0:  # a subset smaller than others is filled up
                break
            item = benchmark.gallery[position]
            frame = _FAINT if not targets else _RIGHT if item.id in targets else _WRONG
            sheet.paste(_tile(_opened(open_image, item.image), frame), (2 * _GAP + (at + 1) * (_TILE + _GAP), top))
    _save(sheet, path)


@dataclass(frozen=True)
class SheetLine:
    """One query on a sheet of answers.

    Attributes:
        words: Its text; may be empty.
        images: Its images.
        answers: Score and thumbnail of each answer, best first; None where there is no thumbnail.
    """

    words: str
    images: Sequence[Image.Image]
    answers: Sequence[tuple[float, Image.Image | None]]


def answer_sheet(path: Path, lines: Sequence[SheetLine], across: int = 8) -> None:
    """Draw queries, framed dark, with their answers, each with rank and score.

    Args:
        path: The PNG to write.
        lines: The queries; at least one.
        across: Answers side by side; more go on below.
    """
    caption, head = 16, 22
    cell = _TILE + caption + _GAP
    side = max(len(line.images) for line in lines)
    width = (side + across) * (_TILE + _GAP) + 3 * _GAP
    rows = [max(1, math.ceil(len(line.answers) / across)) for line in lines]
    sheet = Image.new("RGB", (width, sum(head + count * cell for count in rows) + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    top = _GAP
    for line, count in zip(lines, rows, strict=True):
        pen.text((_GAP, top), " ".join(line.words.split())[: width // 8] or "(no text)", fill=_INK, font=font)
        for place, image in enumerate(line.images):
            sheet.paste(_tile(image, _INK), (_GAP + place * (_TILE + _GAP), top + head))
        for place, (score, thumbnail) in enumerate(line.answers):
            left = 2 * _GAP + (side + place % across) * (_TILE + _GAP)
            upper = top + head + place // across * cell
            sheet.paste(_tile(thumbnail or Image.new("RGB", (1, 1), _FAINT), _FAINT), (left, upper))
            pen.text((left, upper + _TILE), f"{place + 1} · {score:.3f}", fill=_INK, font=ImageFont.load_default(12))
        top += head + count * cell
    _save(sheet, path)


def read_curves(logs: Sequence[Path]) -> dict[str, Curve]:
    """Read Lightning's `metrics.csv` files, in the order given, as (step, value) by column name."""
    curves: dict[str, dict[float, float]] = {}
    for log in logs:
        with log.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                for name, cell in row.items():
                    if name not in {"step", "epoch"} and cell:
                        curves.setdefault(name, {})[float(row["step"])] = float(cell)
    return {name: sorted(points.items()) for name, points in curves.items()}


def _panel(sheet: Image.Image, box: tuple[int, int, int, int], name: str, curve: Curve) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left, top, right, bottom = box
    pen.text((left, top), name, fill=_INK, font=font)
    top, left = top + 22, left + 56
    values = [value for _, value in curve if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or 1.0
    first, last = curve[0][0], curve[-1][0]
    for share in (0.0, 0.5, 1.0):
        y = bottom - 18 - share * (bottom - 18 - top)
        pen.line((left, y, right, y), fill=_FAINT)
        pen.text((left - 52, y - 8), f"{low + share * span:.3g}", fill=_INK, font=font)
    pen.text((left, bottom - 16), f"step {first:.0f}", fill=_INK, font=font)
    end = f"{last:.0f}"
    pen.text((right - pen.textlength(end, font=font), bottom - 16), end, fill=_INK, font=font)
    points = [
        (
            left + (x - first) / ((last - first) or 1) * (right - left),
            bottom - 18 - (y - low) / span * (bottom - 18 - top),
        )
        for x, y in curve
        if math.isfinite(y)
    ]
    if len(points) > 1:
        pen.line(points, fill=(40, 90, 190), width=2)
    for x, y in points if len(points) <= 40 else []:
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(40, 90, 190))


def curve_picture(path: Path, curves: dict[str, Curve]) -> None:
    """Draw each curve in a panel of its own, two in a row.

    Args:
        path: The PNG to write.
        curves: (step, value) by name; at least one, none empty.
    """
    wide, high = 420, 230
    lines = math.ceil(len(curves) / 2)
    sheet = Image.new("RGB", (2 * wide + 30, lines * high + 10), "white")
    for number, (name, curve) in enumerate(curves.items()):
        left, top = 10 + (number % 2) * (wide + 10), 10 + (number // 2) * high
        _panel(sheet, (left, top, left + wide - 10, top + high - 10), name, curve)
    _save(sheet, path)
