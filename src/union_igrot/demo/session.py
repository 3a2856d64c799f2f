"""What one user did: the requests asked, turn after turn, and where among them the user stands.

Plain values; every step gives a new session and leaves the old one as it was. Does not know
how a request is answered, what a page looks like or who the user is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from union_igrot.errors import DataError

MAX_TURNS: Final = 50
"""Questions that are remembered; the oldest are forgotten first."""
MAX_MARKS: Final = 50
"""Pictures that can be marked at once."""

Stroke = tuple[tuple[int, int], ...]
"""The places a pen went through, both coordinates 0..1000 from the upper left corner."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a request starts from.

    Attributes:
        kind: A sketch drawn on the page, a photo given by the user, or a picture of the gallery.
        name: What it is called on the page.
        thumbnail: A small PNG or JPEG of it.
        view: A larger one, to look at; empty of a sketch, which the pad shows.
        strokes: Of a sketch, how it was drawn.
        picture: Of a photo, the PNG or JPEG that is searched with.
        id: Of a picture of the gallery, its id.
        engine: Of a picture of the gallery, the number of the engine that found it.
        path: Of a picture of the gallery, its file, where it has one.
        details: What else is known of it, by name.
    """

    kind: Literal["sketch", "photo", "result"]
    name: str
    thumbnail: bytes
    view: bytes = b""
    strokes: tuple[Stroke, ...] = ()
    picture: bytes = b""
    id: str | None = None
    engine: int = 0
    path: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mark:
    """A picture of the gallery that answers are to be more, or less, like.

    Attributes:
        id: Its id.
        title: What it is called on the page.
        thumbnail: A small PNG or JPEG of it.
        liked: Whether more like it is wanted, or less.
    """

    id: str
    title: str
    thumbnail: bytes
    liked: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One request and how far its answers were turned.

    Attributes:
        reference: What it starts from, or None where there is none.
        text: The sentence; empty where there is none.
        where: The filter; empty where there is none.
        marks: What answers are to be more or less like.
        page: Which page of the answers is shown, from 0.
    """

    reference: Reference | None
    text: str
    where: str = ""
    marks: tuple[Mark, ...] = ()
    page: int = 0

    @property
    def liked(self) -> tuple[str, ...]:
        """Ids of what more is wanted of."""
        return tuple(mark.id for mark in self.marks if mark.liked)

    @property
    def disliked(self) -> tuple[str, ...]:
        """Ids of what less is wanted of."""
        return tuple(mark.id for mark in self.marks if not mark.liked)


@dataclass(frozen=True, slots=True)
class Session:
    """All that is remembered of one user.

    Attributes:
        turns: The requests, oldest first.
        at: Which of them is shown; -1 is the start, before the first.
        reference: The photo or the picture that the next request starts from; None while the pad is used.
        marks: What the answers to the next request are to be more or less like.
        compared: Number of the engine whose answers are shown beside the first one's, or None.
        sample_seed: Which pictures are shown at the start: another number, others.
    """

    turns: tuple[Turn, ...] = ()
    at: int = -1
    reference: Reference | None = None
    marks: tuple[Mark, ...] = ()
    compared: int | None = None
    sample_seed: int = 0

    @property
    def present(self) -> Turn | None:
        """The request whose answers are shown; None at the start."""
        return self.turns[self.at] if self.at >= 0 else None

    @property
    def has_pending_changes(self) -> bool:
        """Whether something was picked, given, laid aside or marked that no request has asked yet."""
        return (self.reference, self.marks) != (self._held, () if self.present is None else self.present.marks)

    @property
    def can_undo(self) -> bool:
        """Whether there is something to take back."""
        return self.at >= 0 or self.has_pending_changes

    @property
    def can_redo(self) -> bool:
        """Whether a step was taken back and none was asked since."""
        return self.at + 1 < len(self.turns)

    @property
    def size(self) -> int:
        """Bytes of the pictures that are remembered, about; one that stands in several places is counted in each."""
        held = [turn.reference for turn in self.turns] + [self.reference]
        marks = [mark for turn in self.turns for mark in turn.marks] + list(self.marks)
        pictures = sum(len(one.thumbnail) + len(one.view) + len(one.picture) for one in held if one is not None)
        return pictures + sum(len(mark.thumbnail) for mark in marks)

    @property
    def _held(self) -> Reference | None:
        """What was at hand when the present request was asked; a sketch is on the pad."""
        reference = None if self.present is None else self.present.reference
        return None if reference is None or reference.kind == "sketch" else reference

    def ask(self, reference: Reference | None, text: str, where: str = "") -> "Session":
        """Ask a request with the marks there are; what was taken back before is forgotten.

        Raises:
            DataError: Where there is neither a reference nor a text, nor a picture that more is wanted of.
        """
        turn = Turn(reference, " ".join(text.split()), where.strip(), self.marks)
        if reference is None and not turn.text and not turn.liked:
            what = "A filter alone ranks nothing" if turn.where else "There is nothing to search with yet"
            raise DataError(f"{what}: draw, give a photo, click a picture, mark one with +, or type a sentence.")
        turns = (*self.turns[: self.at + 1], turn)[-MAX_TURNS:]
        asked = replace(self, turns=turns, at=len(turns) - 1)
        return replace(asked, reference=asked._held)

    def go(self, to: int) -> "Session":
        """Show the answers of another turn, or the start (-1), with its request at hand again.

        Raises:
            DataError: Where there is no such turn.
        """
        if not -1 <= to < len(self.turns):
            raise DataError("There is no such step in the history any more.")
        moved = replace(self, at=to)
        return replace(moved, reference=moved._held, marks=() if moved.present is None else moved.present.marks)

    def undo(self) -> "Session":
        """Take back what was picked and marked since the last request; where nothing was, the request.

        Raises:
            DataError: At the start.
        """
        if not self.can_undo:
            raise DataError("There is nothing to undo.")
        return self.go(self.at if self.has_pending_changes else self.at - 1)

    def redo(self) -> "Session":
        """Take the step again that was taken back.

        Raises:
            DataError: Where there is none.
        """
        if not self.can_redo:
            raise DataError("There is nothing to redo.")
        return self.go(self.at + 1)

    def hold(self, reference: Reference | None) -> "Session":
        """Choose what the next request starts from; None lays it aside and gives the pad back."""
        return replace(self, reference=reference)

    def mark(self, marked: Mark) -> "Session":
        """Mark a picture for the next request; the same mark once more takes it away.

        Raises:
            DataError: Where too many are marked.
        """
        others = tuple(mark for mark in self.marks if mark.id != marked.id)
        if any((mark.id, mark.liked) == (marked.id, marked.liked) for mark in self.marks):
            return replace(self, marks=others)
        if len(others) >= MAX_MARKS:
            raise DataError(f"{MAX_MARKS} pictures are marked already; take a mark away first.")
        return replace(self, marks=(*others, marked))

    def unmark(self, name: str | None = None) -> "Session":
        """Take the mark of a picture away, or all marks."""
        return replace(self, marks=() if name is None else tuple(mark for mark in self.marks if mark.id != name))

    def turn_page(self, page: int) -> "Session":
        """Show another page of the answers.

        Raises:
            DataError: At the start, where nothing was asked, or before the first page.
        """
        if self.present is None or page < 0:
            raise DataError("There is no such page.")
        turns = list(self.turns)
        turns[self.at] = replace(self.present, page=page)
        return replace(self, turns=tuple(turns))

    def compare(self, compared: int | None) -> "Session":
        """Choose whose answers are shown beside the first engine's, from the first page; None shows those alone.

        Raises:
            DataError: Where the first engine would be compared with itself.
        """
        if compared is not None and compared < 1:
            raise DataError("There is no such method to compare with.")
        # Of two columns a page holds half as many: numbers of pages would mean others than before.
        return replace(self, compared=compared, turns=tuple(replace(turn, page=0) for turn in self.turns))

    def resample(self) -> "Session":
        """Show other pictures at the start."""
        return replace(self, sample_seed=self.sample_seed + 1)

    def restart(self) -> "Session":
        """Forget everything but what is compared."""
        return Session(compared=self.compared, sample_seed=self.sample_seed + 1)
