"""The input of one user (photos and strokes) and the history, immutable values: every step returns a new session."""

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from PIL import Image, ImageDraw

from union_igrot.errors import DataError
from union_igrot.service.uploads import downscale

MAX_TURNS: Final = 50  # queries kept in the history; the oldest are dropped first
MAX_MARKS: Final = 50  # images that can be marked at once

MAX_LINKED_SKETCH: Final = 6_000  # characters of a sketch's coordinates that a link holds
_MAX_LINK: Final = 40_000  # characters of a link, and bytes of its contents
THUMBNAIL_SIDE, VIEW_SIDE = 160, 480
"""Longest sides of a thumbnail and of the query image, in pixels."""
GRID: Final = 1000  # stroke coordinates are 0..GRID
MAX_STROKES, MAX_POINTS = 500, 20_000
MAX_NAME: Final = 60

_CANVAS: Final = 512
_PEN: Final = 0.028  # stroke width relative to the pad's side
_INK, _PAPER = (24, 24, 24), "white"

Stroke = tuple[tuple[int, int], ...]  # points of a pen stroke, both coordinates 0..1000 from the upper left corner


@dataclass(frozen=True, slots=True)
class Reference:
    """The query image."""

    # A sketch drawn on the page, an uploaded photo, or an image of the gallery.
    kind: Literal["sketch", "photo", "result"]
    name: str  # title on the page
    thumbnail: bytes  # a small PNG or JPEG
    view: bytes = b""  # a larger one; empty for a sketch, which the pad shows
    strokes: tuple[Stroke, ...] = ()
    image: bytes = b""  # the PNG or JPEG of a photo that is searched with
    id: str | None = None  # id of a gallery image
    backend: int = 0  # number of the backend that found a gallery image
    path: str | None = None  # file of a gallery image, if any
    details: Mapping[str, str] = field(default_factory=dict)  # further columns to show, by name


@dataclass(frozen=True, slots=True)
class Mark:
    """A gallery image marked as relevant or not relevant."""

    id: str
    title: str
    thumbnail: bytes  # a small PNG or JPEG
    liked: bool  # True for "more like this", False for "less like this"


@dataclass(frozen=True, slots=True)
class Turn:
    """One query of the history."""

    reference: Reference | None
    text: str
    where: str = ""  # the filter; empty for none
    marks: tuple[Mark, ...] = ()  # images marked with + or -
    page: int = 0  # page of the results that is shown, from 0

    @property
    def link(self) -> str:
        """The query as text for the page's URL; a photo and a long sketch are only named by a digest."""
        values: dict[str, Any] = {"text": self.text, "where": self.where, "page": self.page}
        values["marks"] = [[mark.id, mark.liked] for mark in self.marks]
        if (held := self.reference) is not None:
            drawn = json.dumps(held.strokes) if held.kind == "sketch" else ""
            if held.kind == "result":
                values |= {"id": held.id, "backend": held.backend}
            elif drawn and len(drawn) <= MAX_LINKED_SKETCH:
                values["strokes"] = held.strokes
            else:
                values["held"] = hashlib.sha256(held.image or drawn.encode()).hexdigest()[:16]
        text = json.dumps({name: value for name, value in values.items() if value}, separators=(",", ":"))
        return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode().rstrip("=")

    @property
    def liked(self) -> tuple[str, ...]:
        """Ids of the images marked with +."""
        return tuple(mark.id for mark in self.marks if mark.liked)

    @property
    def disliked(self) -> tuple[str, ...]:
        """Ids of the images marked with -."""
        return tuple(mark.id for mark in self.marks if not mark.liked)


@dataclass(frozen=True, slots=True)
class Session:
    """State of one user."""

    turns: tuple[Turn, ...] = ()
    at: int = -1  # index of the one that is shown; -1 is the start page
    reference: Reference | None = None  # photo or gallery image for the next query; None while the sketch pad is used
    marks: tuple[Mark, ...] = ()  # marks for the next query
    compared: int | None = None  # number of the backend whose results are shown beside the first one's, or None
    sample_seed: int = 0  # seed of the images shown on the start page

    @property
    def present(self) -> Turn | None:
        """The query whose results are shown; None on the start page."""
        return self.turns[self.at] if self.at >= 0 else None

    @property
    def has_pending_changes(self) -> bool:
        """Whether the query image or the marks changed since the last search."""
        return (self.reference, self.marks) != (
            self._current_reference,
            () if self.present is None else self.present.marks,
        )

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to undo."""
        return self.at >= 0 or self.has_pending_changes

    @property
    def can_redo(self) -> bool:
        """Whether there is a step to redo."""
        return self.at + 1 < len(self.turns)

    @property
    def size(self) -> int:
        """Approximate bytes of all stored images; shared ones count each time."""
        held = [turn.reference for turn in self.turns] + [self.reference]
        marks = [mark for turn in self.turns for mark in turn.marks] + list(self.marks)
        total = sum(len(one.thumbnail) + len(one.view) + len(one.image) for one in held if one is not None)
        return total + sum(len(mark.thumbnail) for mark in marks)

    @property
    def _current_reference(self) -> Reference | None:
        reference = None if self.present is None else self.present.reference
        return None if reference is None or reference.kind == "sketch" else reference

    def search(self, reference: Reference | None, text: str, where: str = "") -> "Session":
        """Add a query with the current marks; undone steps are dropped."""
        turn = Turn(reference, " ".join(text.split()), where.strip(), self.marks)
        if reference is None and not turn.text and not turn.liked:
            what = "A filter alone ranks nothing" if turn.where else "There is nothing to search with yet"
            raise DataError(f"{what}: draw, give a photo, click an image, mark one with +, or type a text.")
        turns = (*self.turns[: self.at + 1], turn)[-MAX_TURNS:]
        asked = replace(self, turns=turns, at=len(turns) - 1)
        return replace(asked, reference=asked._current_reference)

    def find(self, link: str) -> "Session | None":
        """Go to the query and page of a link; None if the history does not contain it."""
        page = read_link(link).get("page", 0)
        for at in reversed(range(len(self.turns))):
            if replace(self.turns[at], page=page).link == link:
                return self.go_to(at).turn_page(page)
        return None

    def go_to(self, to: int) -> "Session":
        """Go to another query of the history, or to the start page (-1), and restore its query image and marks."""
        if not -1 <= to < len(self.turns):
            raise DataError("There is no such step in the history any more.")
        moved = replace(self, at=to)
        return replace(
            moved, reference=moved._current_reference, marks=() if moved.present is None else moved.present.marks
        )

    def undo(self) -> "Session":
        """Revert changes since the last search; without changes, the search itself."""
        if not self.can_undo:
            raise DataError("There is nothing to undo.")
        return self.go_to(self.at if self.has_pending_changes else self.at - 1)

    def redo(self) -> "Session":
        """Redo the step that was undone."""
        if not self.can_redo:
            raise DataError("There is nothing to redo.")
        return self.go_to(self.at + 1)

    def set_reference(self, reference: Reference | None) -> "Session":
        """Set the query image of the next search; None returns to the sketch pad."""
        return replace(self, reference=reference)

    def mark(self, marked: Mark) -> "Session":
        """Mark an image for the next search; the same mark again removes it."""
        others = tuple(mark for mark in self.marks if mark.id != marked.id)
        if any((mark.id, mark.liked) == (marked.id, marked.liked) for mark in self.marks):
            return replace(self, marks=others)
        if len(others) >= MAX_MARKS:
            raise DataError(f"{MAX_MARKS} images are marked already; remove a mark first.")
        return replace(self, marks=(*others, marked))

    def unmark(self, name: str | None = None) -> "Session":
        """Remove the mark of one image, or all marks."""
        return replace(self, marks=() if name is None else tuple(mark for mark in self.marks if mark.id != name))

    def turn_page(self, page: int) -> "Session":
        """Show another page of the results."""
        if self.present is None or page < 0:
            raise DataError("There is no such page.")
        turns = list(self.turns)
        turns[self.at] = replace(self.present, page=page)
        return replace(self, turns=tuple(turns))

    def compare(self, compared: int | None) -> "Session":
        """Show the results of another backend beside the first one's, from the first page; None stops comparing."""
        if compared is not None and compared < 1:
            raise DataError("There is no such method to compare with.")
        # With two columns a page holds half as many results, so page numbers change their meaning.
        return replace(self, compared=compared, turns=tuple(replace(turn, page=0) for turn in self.turns))

    def resample(self) -> "Session":
        """Show other images on the start page."""
        return replace(self, sample_seed=self.sample_seed + 1)

    def restart(self) -> "Session":
        """Clear the history; keep the comparison."""
        return Session(compared=self.compared, sample_seed=self.sample_seed + 1)


def read_link(link: str) -> dict[str, Any]:
    """Decode `Turn.link`; the values are not validated, except that `page` is a number from 0 and `marks` is a list.

    Raises:
        DataError: If it is invalid.
    """
    try:
        if len(link) > _MAX_LINK:
            raise ValueError(link)
        unpacked = zlib.decompressobj()
        text = unpacked.decompress(base64.urlsafe_b64decode(link + "=" * (-len(link) % 4)), _MAX_LINK)
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()  # raises for invalid Unicode
        page, marks = values.setdefault("page", 0), values.setdefault("marks", [])
        if type(page) is not int or not 0 <= page <= _MAX_LINK or not all(len(mark) == 2 for mark in marks):
            raise ValueError(page, marks)
    except (ValueError, TypeError, AttributeError, RecursionError, zlib.error):
        raise DataError("This link is damaged; copy it again or start a new search.") from None
    return dict(values)


def photo_reference(image: Image.Image, name: str) -> Reference:
    """Return an uploaded photo as a query image."""
    small, view = (encode_thumbnail(downscale(image, side)) for side in (THUMBNAIL_SIDE, VIEW_SIDE))
    return Reference("photo", name, small, view, image=encode_thumbnail(image))


def read_sketch(given: Any) -> Reference | None:
    """Read strokes, each a list of points, each two integers 0..1000; None for an empty pad."""
    if given is None or given == []:
        return None
    try:
        strokes = tuple(tuple(_point(point) for point in stroke) for stroke in given)
    except (TypeError, ValueError):
        raise DataError("The sketch is invalid; reload the page and draw again.") from None
    if len(strokes) > MAX_STROKES or sum(map(len, strokes)) > MAX_POINTS:
        raise DataError("The sketch has too many strokes; clear the pad and draw fewer.")
    strokes = tuple(stroke for stroke in strokes if stroke)
    if not strokes:
        return None
    return Reference(
        "sketch", "your sketch", encode_thumbnail(downscale(draw_strokes(strokes), THUMBNAIL_SIDE)), strokes=strokes
    )


def draw_strokes(strokes: Sequence[Stroke], scale: float = 1.0) -> Image.Image:
    """Draw strokes with a round pen on white, 512 x 512, RGB.

    Args:
        strokes: At least one, each of at least one point.
        scale: Largest size of the drawing relative to the page, above 0 and at most 1. A larger drawing is scaled
            down and centered, with the same pen width.
    """
    page = Image.new("RGB", (_CANVAS, _CANVAS), _PAPER)
    pen = ImageDraw.Draw(page)
    width = round(_PEN * _CANVAS)
    for stroke in _fit(strokes, scale):
        points = [(x * _CANVAS / GRID, y * _CANVAS / GRID) for x, y in stroke]
        pen.line(points, fill=_INK, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=_INK)
    return page


def _fit(strokes: Sequence[Stroke], scale: float) -> list[list[tuple[float, float]]]:
    xs, ys = ([point[axis] for stroke in strokes for point in stroke] for axis in (0, 1))
    side = max(max(xs) - min(xs), max(ys) - min(ys))
    if side <= scale * GRID:
        return [[(float(x), float(y)) for x, y in stroke] for stroke in strokes]
    by, middle = scale * GRID / side, ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    return [[(GRID / 2 + by * (x - middle[0]), GRID / 2 + by * (y - middle[1])) for x, y in s] for s in strokes]


def encode_thumbnail(image: Image.Image) -> bytes:
    """Encode an image: PNG if it is small, else JPEG."""
    file = io.BytesIO()
    if max(image.size) <= THUMBNAIL_SIDE // 2:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()


def decode_thumbnail(data: bytes) -> Image.Image:
    """Undo `encode_thumbnail`."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        return image.convert("RGB")


def short_file_name(name: str) -> str:
    """Return a file name without folders and control characters, cut to 60 characters."""
    plain = "".join(letter for letter in name.replace("\\", "/").rsplit("/", 1)[-1] if letter.isprintable()).strip()
    return (plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 1]}…") or "The photo"


def _point(given: Any) -> tuple[int, int]:
    x, y = given
    if not all(type(value) is int and 0 <= value <= GRID for value in (x, y)):
        raise ValueError(given)
    return x, y
