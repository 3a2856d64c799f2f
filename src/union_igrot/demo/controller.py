"""The demo without HTML or HTTP: user actions change sessions and produce screens. Used by one thread."""

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from PIL import Image

from union_igrot.demo.backends import DisplayedImage, GalleryBackend
from union_igrot.demo.session import (
    GRID,
    VIEW_SIDE,
    Mark,
    Reference,
    Session,
    Stroke,
    decode_thumbnail,
    draw_strokes,
    encode_thumbnail,
    photo_reference,
    read_link,
    read_sketch,
)
from union_igrot.errors import ConfigError, DataError, UnionError
from union_igrot.gallery.queries import Term, parse_term
from union_igrot.service.uploads import KEPT_SIDE, downscale

MAX_SESSIONS: Final = 256  # sessions kept; the least recently used are dropped first
MAX_BYTES: Final = 2**30  # bytes of images kept for all sessions together
MAX_PAGES: Final = 4  # recent pages of a session whose images can be opened; two browser windows share one session
MAX_TEXT: Final = 300  # characters of a text
MAX_WHERE: Final = 500  # characters of a filter
MAX_RANK: Final = 2400  # last rank that the pages reach
MARK_REMOVED: Final = "Mark removed."
SESSION_LOST: Final = "The history of this page was lost: the server was restarted or dropped old sessions."


@dataclass(frozen=True)
class ResultColumn:
    """Results of one backend."""

    backend: int
    name: str
    images: Sequence[DisplayedImage]  # the images of this page
    first: int = 1  # rank of the first of them, from 1


@dataclass(frozen=True)
class Screen:
    """What the page shows after an action; None leaves a region unchanged."""

    token: str
    session: Session
    message: str = ""
    columns: Sequence[ResultColumn] | None = None  # the results: one column, or two when backends are compared
    last: bool = True  # whether this is the last page
    shared: frozenset[str] = frozenset()  # ids of the images in both columns
    strokes: Sequence[Stroke] | None = None  # new content of the sketch pad
    text: str | None = None  # new content of the text field
    where: str | None = None  # new content of the filter field
    large: "LargeImage | None" = None  # an image to show large
    moved: bool = False  # whether the history has to be rendered again

    @property
    def heading(self) -> str:
        """Heading of the results; empty if none are shown."""
        if self.columns is None:
            return ""
        turn, first = self.session.present, self.columns[0]
        if turn is None:
            return "Some images of the gallery"
        if first.images:
            return f"Results {first.first:,} to {first.first + len(first.images) - 1:,}"
        return "No image matches the filter" if turn.where and turn.page == 0 else "No further results"


@dataclass(frozen=True)
class LargeImage:
    """A gallery image, reduced to 1,024 pixels."""

    backend: int
    item: DisplayedImage
    image: bytes
    width: int
    height: int


Parameters = Mapping[str, Any]


@final
class DemoController:
    """Sessions of all users over one or more backends."""

    def __init__(self, backends: Sequence[GalleryBackend], *, page: int = 24) -> None:
        if not backends:
            raise ConfigError("the demo needs at least one backend")
        self.backends, self.page = tuple(backends), page
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._shown: dict[str, deque[frozenset[tuple[int, str]]]] = {}
        """Images on the last pages of each session; only these can be opened."""
        self._actions: dict[str, Callable[[str, Session, Parameters], Screen]] = {
            "show": self._show,
            "search": self._search,
            "pick": self._pick,
            "crop": self._crop,
            "drop": self._drop,
            "mark": self._mark,
            "unmark": self._unmark,
            "undo": self._undo,
            "redo": lambda token, session, _: self._at_turn(token, session.redo(), "Redone."),
            "back": lambda token, session, given: self._at_turn(token, session.go_to(_integer(given, "turn")), ""),
            "page": self._turn_page,
            "compare": self._compare,
            "resample": lambda token, session, _: self._with_results(token, session.resample(), "Other images."),
            "restart": self._restart,
            "large": self._large,
        }

    def act(self, token: str, action: str, given: Parameters) -> Screen:
        """Perform one action of a user."""
        if action not in self._actions:
            raise DataError("Unknown action; reload the page.")
        known, session = self._session(token)
        screen = self._actions[action](known, session, given)
        return self._store(token, screen)

    def set_photo(self, token: str, photo: Reference) -> Screen:
        """Set an uploaded photo as the query image."""
        known, session = self._session(token)
        session, message = session.set_reference(photo), f"The next search uses {photo.name}."
        if known == token:
            return self._store(token, Screen(token, session, message))
        return self._store(
            token, self._with_results(known, session, message)
        )  # the page shows another session's images

    def _session(self, token: str) -> tuple[str, Session]:
        if token in self._sessions:
            self._sessions.move_to_end(token)
            return token, self._sessions[token]
        return secrets.token_urlsafe(24), Session()

    def _store(self, sent: str, screen: Screen) -> Screen:
        """Store the new state; `sent` is the session id that the page sent."""
        token = screen.token
        self._sessions[token] = screen.session
        self._sessions.move_to_end(token)
        self._sizes[token] = screen.session.size
        if screen.columns is not None:
            shown = {(column.backend, one.id) for column in screen.columns for one in column.images}
            self._shown.setdefault(token, deque(maxlen=MAX_PAGES)).append(frozenset(shown))
        while len(self._sessions) > MAX_SESSIONS or (len(self._sessions) > 1 and sum(self._sizes.values()) > MAX_BYTES):
            gone, _ = self._sessions.popitem(last=False)
            del self._sizes[gone]
            self._shown.pop(gone, None)
        if sent in ("new", token):
            return screen
        return replace(screen, message=f"{SESSION_LOST} {screen.message}".strip(), moved=True)

    def _show(self, token: str, session: Session, given: Parameters) -> Screen:
        link = given.get("link")
        try:
            if not isinstance(link, str):
                return self._at_turn(token, session, "")
            return self._at_turn(token, session.find(link) or self._follow(session, read_link(link)), "")
        except UnionError as error:  # the gallery has changed; show the start page and keep the history
            return self._at_turn(token, session.go_to(-1), str(error))

    def _follow(self, session: Session, given: Parameters) -> Session:
        """Add the query of a link; its images are looked up in the gallery."""
        if "held" in given:
            raise DataError("This link's photo or sketch is not stored in it; choose the photo or draw again.")
        reference = read_sketch(given.get("strokes"))
        if given.get("id") is not None:
            number = _integer(given, "backend") if "backend" in given else 0
            if not isinstance(given["id"], str) or not 0 <= number < len(self.backends):
                raise DataError("This link is damaged; copy it again or start a new search.")
            reference = self._reference(number, self.backends[number].item(given["id"]))
        session = session.unmark()
        for name, liked in given["marks"]:
            one = self.backends[0].item(str(name))
            session = session.mark(Mark(one.id, one.title, one.thumbnail, liked is True))
        text, where = _checked_text(given)
        session, page = session.search(reference, text, where), given["page"]
        last = min(MAX_RANK, len(self.backends[0])) // self._per_page(session)
        return session.turn_page(min(page, last))

    def _reference(self, number: int, one: DisplayedImage) -> Reference:
        view = encode_thumbnail(downscale(self.backends[number].image(one.id), VIEW_SIDE))
        return Reference(
            "result", one.title, one.thumbnail, view, id=one.id, backend=number, path=one.path, details=one.details
        )

    def _search(self, token: str, session: Session, given: Parameters) -> Screen:
        text, where = _checked_text(given)
        reference = session.reference if session.reference is not None else read_sketch(given.get("strokes"))
        return self._with_results(token, session.search(reference, text, where), "")

    def _pick(self, token: str, session: Session, given: Parameters) -> Screen:
        number, one = self._displayed(token, given)
        message = "Selected. Type what should change, or search for similar images."
        return Screen(token, session.set_reference(self._reference(number, one)), message, text="")

    def _crop(self, token: str, session: Session, given: Parameters) -> Screen:
        """Replace the query image by a rectangle of it, given in thousandths of its width and height."""
        held = session.reference
        left, top, right, bottom = (_integer(given, name) for name in ("left", "top", "right", "bottom"))
        if held is None or not (0 <= left < right <= GRID and 0 <= top < bottom <= GRID):
            raise DataError("This is not a part of a query image; choose an image and draw the rectangle again.")
        image = self._query_image(held, self.backends[held.backend])
        x, y = (left * image.width // GRID, top * image.height // GRID)
        part = image.crop((x, y, max(x + 1, right * image.width // GRID), max(y + 1, bottom * image.height // GRID)))
        name = f"part of {held.name.removeprefix('part of ')}"
        return Screen(token, session.set_reference(photo_reference(part, name)), "The next search uses this part.")

    def _drop(self, token: str, session: Session, _: Parameters) -> Screen:
        return Screen(token, session.set_reference(None), "Back to the sketch pad.")

    def _mark(self, token: str, session: Session, given: Parameters) -> Screen:
        _, one = self._displayed(token, given)
        marked = Mark(one.id, one.title, one.thumbnail, given.get("liked") is True)
        changed = session.mark(marked)
        if all(mark.id != marked.id for mark in changed.marks):
            return Screen(token, changed, MARK_REMOVED)
        verb = "prefers" if marked.liked else "avoids"
        return Screen(token, changed, f"The next search {verb} images like this one.")

    def _unmark(self, token: str, session: Session, given: Parameters) -> Screen:
        name = given.get("id")
        return Screen(token, session.unmark(name if isinstance(name, str) else None), MARK_REMOVED)

    def _undo(self, token: str, session: Session, _: Parameters) -> Screen:
        if not session.has_pending_changes:
            return self._at_turn(token, session.undo(), "Undone.")
        text, where = (None, None) if session.present is None else (session.present.text, session.present.where)
        message = "Changes since the last search are undone."
        return Screen(token, session.undo(), message, text=text, where=where)

    def _turn_page(self, token: str, session: Session, given: Parameters) -> Screen:
        page = _integer(given, "page")
        if page * self._per_page(session) >= min(MAX_RANK, len(self.backends[0])):
            raise DataError("There is no such page.")
        return self._with_results(token, session.turn_page(page), "", moved=False)

    def _compare(self, token: str, session: Session, given: Parameters) -> Screen:
        compared = None if given.get("compared") is None else _integer(given, "compared")
        if compared is not None and compared >= len(self.backends):
            raise DataError("There is no such method to compare with.")
        return self._with_results(token, session.compare(compared), "", moved=False)

    def _large(self, token: str, session: Session, given: Parameters) -> Screen:
        number, one = self._displayed(token, given)
        image = self.backends[number].image(one.id)
        data = encode_thumbnail(downscale(image, KEPT_SIDE))
        return Screen(token, session, large=LargeImage(number, one, data, *image.size))

    def _displayed(self, token: str, given: Parameters) -> tuple[int, DisplayedImage]:
        """Find an image on the user's pages; any other id is refused before it is looked up."""
        number, name = given.get("backend"), given.get("id")
        held = self._sessions[token].reference if token in self._sessions else None
        known = {(held.backend, held.id)} if held and held.id else set()
        known = known.union(*self._shown.get(token, ()))
        if not isinstance(number, int) or not isinstance(name, str) or (number, name) not in known:
            raise DataError("This image is not on the page any more; search again.")
        return number, self.backends[number].item(name)

    def _at_turn(self, token: str, session: Session, message: str) -> Screen:
        """Restore a query: its results, its sketch and its text."""
        present = session.present
        if present is None:  # keep what was drawn and typed before the first search
            return self._with_results(token, session, message)
        reference = present.reference
        strokes = None if reference is None or reference.kind != "sketch" else reference.strokes
        return self._with_results(token, session, message, strokes=strokes, text=present.text, where=present.where)

    def _restart(self, token: str, session: Session, _: Parameters) -> Screen:
        return self._with_results(token, session.restart(), "Started over.", strokes=(), text="", where="")

    def _with_results(self, token: str, session: Session, message: str, *, moved: bool = True, **more: Any) -> Screen:
        """Compute the results that the session shows."""
        turn, per_page = session.present, self._per_page(session)
        if turn is None:
            first = self.backends[0]
            column = ResultColumn(0, first.name, first.sample(self.page, session.sample_seed))
            return Screen(token, session, message, [column], moved=moved, **more)
        skip = turn.page * per_page
        columns, further = [], False
        for number in [0] if session.compared is None else [0, session.compared]:
            backend = self.backends[number]
            image = None if turn.reference is None else self._query_image(turn.reference, backend)
            exclude = () if turn.reference is None or turn.reference.id is None else (turn.reference.id,)
            text, terms = _split_terms(turn.text)
            query = {"where": turn.where or None, "liked": turn.liked, "disliked": turn.disliked}
            found = backend.search(skip, per_page + 1, image, text, **query, exclude=exclude, terms=terms)
            columns.append(ResultColumn(number, backend.name, found[:per_page], skip + 1))
            further |= len(found) > per_page
        found_by = [frozenset(one.id for one in column.images) for column in columns]
        shared = found_by[0] & found_by[1] if len(found_by) == 2 else frozenset()
        last = not further or skip + per_page >= MAX_RANK
        return Screen(token, session, message, columns, last, shared, moved=moved, **more)

    def _per_page(self, session: Session) -> int:
        return self.page if session.compared is None or session.present is None else max(1, self.page // 2)

    def _query_image(self, reference: Reference, backend: GalleryBackend) -> Image.Image:
        if reference.kind == "sketch":
            return draw_strokes(reference.strokes, backend.sketch_scale)
        if reference.kind == "photo":
            return decode_thumbnail(reference.image)
        assert reference.id is not None
        try:
            return self.backends[reference.backend].image(reference.id)
        except DataError:  # it was removed from the gallery after it was selected
            return decode_thumbnail(reference.image)


def _checked_text(given: Parameters) -> tuple[str, str]:
    """Return the text and the filter of a query."""
    text, where = given.get("text", ""), given.get("where", "")
    for name, value, most in (("text", text, MAX_TEXT), ("filter", where, MAX_WHERE)):
        if not isinstance(value, str) or len(value) > most:
            raise DataError(f"The {name} is longer than {most} characters; shorten it.")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DataError(f"The {name} contains invalid Unicode; type it again.")
    return text, where


def _split_terms(text: str) -> tuple[str | None, Sequence[Term]]:
    """Split a text with semicolons: a first part without a weight is the text, the others are weighted terms."""
    if ";" not in text:
        return text or None, ()
    first, *others = [parse_term(part, images=False) for part in text.split(";") if part.strip()] or [Term()]
    return (first.text, others) if first.weight == 1 else (None, [first, *others])


def _integer(given: Parameters, name: str) -> int:
    value = given.get(name)
    if type(value) is not int or abs(value) > 10**6:
        raise DataError("The page sent an unexpected value; reload it.")
    return value
