"""What happens when a user acts: the session's next step, the answers to show, the sentence to say.

Keeps the sessions, each under a secret name, and the engines. One thread uses it. Does not know
HTML or HTTP, nor how an engine finds its answers.
"""

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from PIL import Image

from union_igrot.demo.backends import DisplayedImage, SearchBackend, SearchRequest
from union_igrot.demo.session import Mark, Reference, Session, Stroke
from union_igrot.demo.uploads import (
    KEPT_SIDE,
    VIEW_SIDE,
    Limits,
    decode_thumbnail,
    downscale,
    draw_strokes,
    encode_thumbnail,
    photo,
    sketch,
)
from union_igrot.errors import ConfigError, DataError, UnionError

MAX_SESSIONS: Final = 256
"""Users that are remembered; whoever has not acted for longest is forgotten first."""
MAX_BYTES: Final = 2**30
"""Bytes of pictures that are remembered for all users together."""
MAX_PAGES: Final = 4
"""Pages of one user whose pictures can be asked for; a second window on one session has another page."""
MAX_TEXT: Final = 300
"""Letters of a sentence."""
MAX_WHERE: Final = 500
"""Letters of a filter."""
MAX_RANK: Final = 2400
"""How far down a ranking the pages go."""
MARK_REMOVED: Final = "No longer marked."
SESSION_LOST: Final = "The history of this page is gone: the server was started anew, or has since served many others."


@dataclass(frozen=True)
class ResultColumn:
    """Some answers of one engine.

    Attributes:
        engine: Its number.
        name: What its method is called.
        answers: The pictures of this page.
        first: Rank of the first of them, from 1.
    """

    engine: int
    name: str
    answers: Sequence[DisplayedImage]
    first: int = 1


@dataclass(frozen=True)
class Screen:
    """What the page shows after a step; None stays as it was.

    Attributes:
        token: The session's secret name.
        session: The session.
        say: A sentence on what was done.
        columns: The answers: one column, or two where two engines are compared.
        last: Whether there is no further page.
        shared: Ids of the pictures that stand in both columns, where there are two.
        strokes: What the pad is to show.
        text: What the sentence's field is to hold.
        where: What the filter's field is to hold.
        large: A picture to show large.
        moved: Whether the history may look different.
    """

    token: str
    session: Session
    say: str = ""
    columns: Sequence[ResultColumn] | None = None
    last: bool = True
    shared: frozenset[str] = frozenset()
    strokes: Sequence[Stroke] | None = None
    text: str | None = None
    where: str | None = None
    large: "LargeImage | None" = None
    moved: bool = False

    @property
    def heading(self) -> str:
        """What the answers are called, their ranks, or that there are none; empty where none are shown."""
        if self.columns is None:
            return ""
        turn, first = self.session.present, self.columns[0]
        if turn is None:
            return "Some pictures of the gallery"
        if first.answers:
            return f"Answers {first.first:,} to {first.first + len(first.answers) - 1:,}"
        return "No picture passes the filter" if turn.where and turn.page == 0 else "No further answers"


@dataclass(frozen=True)
class LargeImage:
    """A picture of the gallery in full, reduced to 1,024 pixels."""

    engine: int
    answer: DisplayedImage
    picture: bytes
    width: int
    height: int


Parameters = Mapping[str, Any]


@final
class DemoController:
    """All users' sessions over some engines.

    Args:
        engines: At least one; the first answers, and the others can be compared with it.
        page: Pictures a page.
        limits: What a photo may be at most.
    """

    def __init__(self, engines: Sequence[SearchBackend], *, page: int = 24, limits: Limits | None = None) -> None:
        if not engines:
            raise ConfigError("a demo needs at least one engine")
        self.engines, self.page, self.limits = tuple(engines), page, limits or Limits()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._shown: dict[str, deque[frozenset[tuple[int, str]]]] = {}
        """The pictures on each session's last pages: no others can be asked for."""
        self._actions: dict[str, Callable[[str, Session, Parameters], Screen]] = {
            "show": self._show,
            "search": self._search,
            "pick": self._pick,
            "drop": self._drop,
            "mark": self._mark,
            "unmark": self._unmark,
            "undo": self._undo,
            "redo": lambda token, session, _: self._at_turn(token, session.redo(), "Done again."),
            "back": lambda token, session, given: self._at_turn(token, session.go(_integer(given, "turn")), ""),
            "page": self._turn_page,
            "compare": self._compare,
            "resample": lambda token, session, _: self._with_results(token, session.resample(), "Other pictures."),
            "restart": self._restart,
            "large": self._large,
        }

    def act(self, token: str, action: str, given: Parameters) -> Screen:
        """Take one step for one user.

        Args:
            token: The session's name; where it is not known, a new session begins under another name.
            action: `show` (all anew), `search`, `pick`, `drop`, `mark`, `unmark`, `undo`, `redo`, `back`, `page`,
                `compare`, `resample`, `restart` or `large`.
            given: What the action needs: `text`, `where` and `strokes`; `engine`, `id` and `liked`; `turn`; `page`;
                `compared`.

        Returns:
            What to show. A step that fails leaves the session as it was.

        Raises:
            UnionError: A sentence for the page.
        """
        if action not in self._actions:
            raise DataError("The page asked for something unknown; reload it.")
        known, session = self._session(token)
        screen = self._actions[action](known, session, given)
        return self._store(token, screen)

    def upload_photo(self, token: str, name: str, data: bytes) -> Screen:
        """Take a photo as what the next request starts from.

        Raises:
            ImageError: Where it cannot be used; a sentence for the page.
        """
        held = photo(data, name, self.limits)
        known, session = self._session(token)
        say = f"{held.name} is what the next search starts from."
        if known == token:
            return self._store(token, Screen(token, session.hold(held), say))
        return self._store(
            token, self._with_results(known, session.hold(held), say)
        )  # its pictures were another session's

    def _session(self, token: str) -> tuple[str, Session]:
        if token in self._sessions:
            self._sessions.move_to_end(token)
            return token, self._sessions[token]
        return secrets.token_urlsafe(24), Session()

    def _store(self, told: str, screen: Screen) -> Screen:
        """Remember where a step led; `told` is the name under which the page knows its session."""
        token = screen.token
        self._sessions[token] = screen.session
        self._sessions.move_to_end(token)
        self._sizes[token] = screen.session.size
        if screen.columns is not None:
            shown = {(column.engine, one.id) for column in screen.columns for one in column.answers}
            self._shown.setdefault(token, deque(maxlen=MAX_PAGES)).append(frozenset(shown))
        while len(self._sessions) > MAX_SESSIONS or (len(self._sessions) > 1 and sum(self._sizes.values()) > MAX_BYTES):
            gone, _ = self._sessions.popitem(last=False)
            del self._sizes[gone]
            self._shown.pop(gone, None)
        if told in ("new", token):
            return screen
        return replace(screen, say=f"{SESSION_LOST} {screen.say}".strip(), moved=True)

    def _show(self, token: str, session: Session, given: Parameters) -> Screen:
        del given
        try:
            return self._at_turn(token, session, "")
        except UnionError as error:  # the gallery has changed: its history is still there, and what can be asked
            return self._at_turn(token, session.go(-1), str(error))

    def _search(self, token: str, session: Session, given: Parameters) -> Screen:
        text = given.get("text", "")
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise DataError(f"A sentence has at most {MAX_TEXT} letters; shorten it.")
        where = given.get("where", "")
        if not isinstance(where, str) or len(where) > MAX_WHERE:
            raise DataError(f"A filter has at most {MAX_WHERE} letters; shorten it.")
        if any("\ud800" <= letter <= "\udfff" for letter in text + where):
            raise DataError("There is half a letter in the sentence or the filter; type it again.")
        reference = session.reference if session.reference is not None else sketch(given.get("strokes"))
        return self._with_results(token, session.ask(reference, text, where), "")

    def _pick(self, token: str, session: Session, given: Parameters) -> Screen:
        number, one = self._displayed(token, given)
        view = encode_thumbnail(downscale(self.engines[number].picture(one.id), VIEW_SIDE))
        held = Reference(
            "result", one.title, one.thumbnail, view, id=one.id, engine=number, path=one.path, details=one.details
        )
        say = "Picked. Say what should be different, or search for more like it."
        return Screen(token, session.hold(held), say, text="")

    def _drop(self, token: str, session: Session, given: Parameters) -> Screen:
        del given
        return Screen(token, session.hold(None), "The pad is back.")

    def _mark(self, token: str, session: Session, given: Parameters) -> Screen:
        _, one = self._displayed(token, given)
        marked = Mark(one.id, one.title, one.thumbnail, given.get("liked") is True)
        changed = session.mark(marked)
        if all(mark.id != marked.id for mark in changed.marks):
            return Screen(token, changed, MARK_REMOVED)
        return Screen(token, changed, f"The next search {'comes closer to' if marked.liked else 'goes away from'} it.")

    def _unmark(self, token: str, session: Session, given: Parameters) -> Screen:
        name = given.get("id")
        return Screen(token, session.unmark(name if isinstance(name, str) else None), MARK_REMOVED)

    def _undo(self, token: str, session: Session, given: Parameters) -> Screen:
        del given
        if not session.has_pending_changes:
            return self._at_turn(token, session.undo(), "Taken back.")
        text, where = (None, None) if session.present is None else (session.present.text, session.present.where)
        say = "What was picked and marked since the last search is taken back."
        return Screen(token, session.undo(), say, text=text, where=where)

    def _turn_page(self, token: str, session: Session, given: Parameters) -> Screen:
        page = _integer(given, "page")
        if page * self._per_page(session) >= min(MAX_RANK, len(self.engines[0])):
            raise DataError("There is no such page.")
        return self._with_results(token, session.turn_page(page), "", moved=False)

    def _compare(self, token: str, session: Session, given: Parameters) -> Screen:
        compared = None if given.get("compared") is None else _integer(given, "compared")
        if compared is not None and compared >= len(self.engines):
            raise DataError("There is no such method to compare with.")
        return self._with_results(token, session.compare(compared), "", moved=False)

    def _large(self, token: str, session: Session, given: Parameters) -> Screen:
        number, answer = self._displayed(token, given)
        image = self.engines[number].picture(answer.id)
        data = encode_thumbnail(downscale(image, KEPT_SIDE))
        return Screen(token, session, large=LargeImage(number, answer, data, *image.size))

    def _displayed(self, token: str, given: Parameters) -> tuple[int, DisplayedImage]:
        """Find a picture that stands on the user's page; any other name is refused before it is looked up."""
        number, name = given.get("engine"), given.get("id")
        held = self._sessions[token].reference if token in self._sessions else None
        known = {(held.engine, held.id)} if held and held.id else set()
        known = known.union(*self._shown.get(token, ()))
        if not isinstance(number, int) or not isinstance(name, str) or (number, name) not in known:
            raise DataError("This picture is not on the page any more; search again.")
        return number, self.engines[number].answer(name)

    def _at_turn(self, token: str, session: Session, say: str) -> Screen:
        """Show a turn as it was asked: its answers, its sketch on the pad, its sentence in the field."""
        present = session.present
        if present is None:  # what was drawn and typed before the first request is not taken away
            return self._with_results(token, session, say)
        asked = present.reference
        strokes = None if asked is None or asked.kind != "sketch" else asked.strokes
        return self._with_results(token, session, say, strokes=strokes, text=present.text, where=present.where)

    def _restart(self, token: str, session: Session, given: Parameters) -> Screen:
        del given
        return self._with_results(token, session.restart(), "Started over.", strokes=(), text="", where="")

    def _with_results(self, token: str, session: Session, say: str, *, moved: bool = True, **more: Any) -> Screen:
        """Find what the session's page shows."""
        turn, per_page = session.present, self._per_page(session)
        if turn is None:
            first = self.engines[0]
            column = ResultColumn(0, first.name, first.some(self.page, session.sample_seed))
            return Screen(token, session, say, [column], moved=moved, **more)
        skip = turn.page * per_page
        columns, further = [], False
        for number in [0] if session.compared is None else [0, session.compared]:
            engine = self.engines[number]
            picture = None if turn.reference is None else self._query_image(turn.reference, engine)
            exclude = () if turn.reference is None or turn.reference.id is None else (turn.reference.id,)
            asked = SearchRequest(picture, turn.text or None, turn.where or None, turn.liked, turn.disliked, exclude)
            found = engine.search(asked, skip, per_page + 1)
            columns.append(ResultColumn(number, engine.name, found[:per_page], skip + 1))
            further |= len(found) > per_page
        found_by = [frozenset(one.id for one in column.answers) for column in columns]
        shared = found_by[0] & found_by[1] if len(found_by) == 2 else frozenset()
        last = not further or skip + per_page >= MAX_RANK
        return Screen(token, session, say, columns, last, shared, moved=moved, **more)

    def _per_page(self, session: Session) -> int:
        return self.page if session.compared is None or session.present is None else max(1, self.page // 2)

    def _query_image(self, reference: Reference, engine: SearchBackend) -> Image.Image:
        if reference.kind == "sketch":
            return draw_strokes(reference.strokes, engine.sketch_scale)
        if reference.kind == "photo":
            return decode_thumbnail(reference.picture)
        assert reference.id is not None
        try:
            return self.engines[reference.engine].picture(reference.id)
        except DataError:  # it has left the gallery since it was clicked
            return decode_thumbnail(reference.picture)


def _integer(given: Parameters, name: str) -> int:
    value = given.get(name)
    if type(value) is not int or abs(value) > 10**6:
        raise DataError("The page sent something unexpected; reload it.")
    return value
