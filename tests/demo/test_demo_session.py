import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.demo.session import MAX_MARKS, MAX_TURNS, Mark, Reference, Session
from union_igrot.errors import DataError

SKETCH = Reference("sketch", "your sketch", b"small", strokes=(((1, 2), (3, 4)),))
PICKED = Reference("result", "a star", b"small", b"view", id="p1")
PHOTO = Reference("photo", "cat.jpg", b"small", b"view", image=b"pixels")
MARK = Mark("a", "a star", b"small", liked=True)


def test_a_query_needs_an_image_a_text_or_a_liked_image():
    for empty in (Session(), Session().mark(Mark("b", "", b"", liked=False))):
        with pytest.raises(DataError, match="nothing to search with"):
            empty.search(None, "  \n ")
    assert Session().search(None, " red \n star ").present.text == "red star"
    assert Session().search(SKETCH, "").present.reference is SKETCH
    session = Session().search(SKETCH, "", " class = 'dog'\n").search(SKETCH, "red")
    assert [turn.where for turn in session.turns] == ["class = 'dog'", ""]


def test_marks_belong_to_their_query():
    less = Mark("b", "a house", b"small", liked=False)
    session = Session().mark(MARK).mark(less)
    searched = session.search(None, "")
    assert (searched.present.liked, searched.present.disliked) == (("a",), ("b",))
    assert searched.marks == session.marks  # they stay until they are removed
    other = searched.mark(Mark("a", "a star", b"small", liked=False))
    assert [(mark.id, mark.liked) for mark in other.marks] == [("b", False), ("a", False)]
    assert other.mark(other.marks[1]).marks == (less,)
    assert other.unmark("b").marks == other.marks[1:]
    assert other.unmark().search(SKETCH, "").undo().marks == (MARK, less)
    assert other.undo() == searched  # reverts the pending mark first
    assert searched.undo().marks == searched.restart().marks == ()
    assert searched.set_reference(PICKED).marks == searched.marks
    full = Session()
    for number in range(MAX_MARKS):
        full = full.mark(Mark(str(number), "", b"", liked=True))
    with pytest.raises(DataError, match="remove a mark first"):
        full.mark(MARK)
    assert len(full.mark(Mark("7", "", b"", liked=False)).marks) == MAX_MARKS


def test_undo_redo_and_a_new_query_after_an_undo():
    one = Session().search(SKETCH, "")
    two = one.set_reference(PICKED).search(PICKED, "in red").turn_page(3)
    back = two.undo()
    assert (back.at, back.present, back.reference) == (0, one.present, None)  # the pad shows a sketch
    assert back.redo() == two
    assert back.undo().present is None
    assert back.undo().redo() == back
    other = back.search(PHOTO, "small")
    assert [turn.reference for turn in other.turns] == [SKETCH, PHOTO]
    assert not other.can_redo
    for step, message in (
        (other.redo, "nothing to redo"),
        (Session().undo, "nothing to undo"),
        (lambda: other.go_to(2), "no such step"),
    ):
        with pytest.raises(DataError, match=message):
            step()


def test_the_size_is_that_of_the_images():
    photo = Reference("photo", "cat", b"123", b"1234", image=b"12")
    assert Session().size == 0
    assert Session().set_reference(photo).mark(MARK).size == 14
    assert Session().set_reference(photo).mark(MARK).search(photo, "").size == 28


def test_pages_belong_to_their_query_and_comparing_starts_at_the_first():
    session = Session().search(SKETCH, "").turn_page(2).search(PICKED, "").turn_page(1)
    assert [turn.page for turn in session.turns] == [2, 1]
    assert session.undo().present.page == 2
    for wrong in (lambda: Session().turn_page(0), lambda: session.turn_page(-1)):
        with pytest.raises(DataError, match="no such page"):
            wrong()
    compared = session.compare(2)
    assert (compared.compared, compared.present.page) == (2, 0)
    fresh = compared.restart()
    assert (fresh.compared, fresh.turns, fresh.at, fresh.sample_seed) == (2, (), -1, 1)
    with pytest.raises(DataError):
        session.compare(0)


def test_the_oldest_queries_are_dropped_first():
    session = Session()
    for number in range(MAX_TURNS + 7):
        session = session.search(None, f"query {number}")
    assert len(session.turns) == MAX_TURNS
    assert (session.turns[0].text, session.present.text) == ("query 7", f"query {MAX_TURNS + 6}")


class Tape:
    """A literal oracle: a list of texts and a position in it."""

    def __init__(self):
        self.texts, self.at = [], 0

    def do(self, step):
        kind, value = step
        if kind == "search":
            self.texts = [*self.texts[: self.at], value]
            self.at = len(self.texts)
        elif kind == "undo":
            self.at = max(0, self.at - 1)
        elif kind == "redo":
            self.at = min(len(self.texts), self.at + 1)
        elif value + 1 <= len(self.texts):
            self.at = value + 1


STEPS = st.one_of(
    st.tuples(st.just("search"), st.sampled_from(["red", "blue", "on sand"])),
    st.tuples(st.sampled_from(["undo", "redo"]), st.none()),
    st.tuples(st.just("go_to"), st.integers(-1, 6)),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(STEPS, max_size=30))
def test_any_steps_equal_the_oracle(steps):
    tape, session = Tape(), Session()
    for step in steps:
        tape.do(step)
        before, (kind, value) = session, step
        try:
            arguments = (None, value) if kind == "search" else () if value is None else (value,)
            session = getattr(session, kind)(*arguments)
        except DataError:
            assert session == before
    assert [turn.text for turn in session.turns] == tape.texts
    assert session.at == tape.at - 1
    assert (session.can_undo, session.can_redo) == (tape.at > 0, tape.at < len(tape.texts))
    if session.present is not None:
        assert session.find(session.present.link).present == session.present
