import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.demo.session import MAX_MARKS, MAX_TURNS, Mark, Reference, Session
from union_igrot.errors import DataError

SKETCH = Reference("sketch", "your sketch", b"small", strokes=(((1, 2), (3, 4)),))
PICKED = Reference("result", "a star", b"small", b"view", id="p1")
PHOTO = Reference("photo", "cat.jpg", b"small", b"view", image=b"pixels")


def test_a_question_needs_a_reference_or_a_sentence():
    with pytest.raises(DataError, match="nothing to search with"):
        Session().search(None, "  \n ")
    assert Session().search(None, " red \n star ").present.text == "red star"
    assert Session().search(SKETCH, "").present.reference is SKETCH


def test_marks_are_asked_with_and_come_back_with_their_turn():
    more, less = Mark("a", "a star", b"small", liked=True), Mark("b", "a house", b"small", liked=False)
    session = Session().mark(more).mark(less)
    asked = session.search(None, "")
    assert (asked.present.liked, asked.present.disliked) == (("a",), ("b",))
    assert asked.marks == session.marks  # they stay until they are taken away
    other = asked.mark(Mark("a", "a star", b"small", liked=False))
    assert [(mark.id, mark.liked) for mark in other.marks] == [("b", False), ("a", False)]
    assert other.mark(other.marks[1]).marks == (less,)
    assert other.unmark("b").marks == other.marks[1:]
    assert other.unmark().search(SKETCH, "").undo().marks == (more, less)
    assert other.undo() == asked  # first what no request has asked yet
    assert asked.undo().marks == ()
    assert asked.set_reference(PICKED).marks == asked.marks
    assert asked.restart().marks == ()
    with pytest.raises(DataError, match="nothing to search with"):
        Session().mark(less).search(None, "")  # less of something alone is no request
    full = Session()
    for number in range(MAX_MARKS):
        full = full.mark(Mark(str(number), "", b"", liked=True))
    with pytest.raises(DataError, match="remove a mark first"):
        full.mark(more)
    assert len(full.mark(Mark("7", "", b"", liked=False)).marks) == MAX_MARKS


def test_a_filter_belongs_to_its_turn():
    session = Session().search(SKETCH, "", " class = 'dog'\n").search(SKETCH, "red")
    assert [turn.where for turn in session.turns] == ["class = 'dog'", ""]


def test_undo_redo_and_a_new_question_after_an_undo():
    one = Session().search(SKETCH, "")
    two = one.set_reference(PICKED).search(PICKED, "in red").turn_page(3)
    back = two.undo()
    assert (back.at, back.present, back.reference) == (0, one.present, None)  # a sketch stands on the pad
    assert back.redo() == two
    assert back.undo().present is None
    assert back.undo().redo() == back
    other = back.search(PHOTO, "small")
    assert [turn.reference for turn in other.turns] == [SKETCH, PHOTO]
    assert not other.can_redo
    with pytest.raises(DataError, match="nothing to redo"):
        other.redo()
    with pytest.raises(DataError, match="nothing to undo"):
        Session().undo()
    with pytest.raises(DataError, match="no such step"):
        other.go_to(2)


def test_going_back_gives_the_question_its_reference_again():
    session = Session().search(PHOTO, "a").search(PICKED, "b").search(None, "c")
    assert session.go_to(0).reference is PHOTO
    assert session.go_to(1).reference is PICKED
    assert session.go_to(2).reference is None
    assert session.set_reference(PHOTO).go_to(-1).reference is None


def test_undo_takes_first_back_what_was_not_asked_yet():
    asked = Session().search(SKETCH, "").search(PICKED, "in red")
    assert not asked.has_pending_changes
    for changed in (asked.set_reference(PHOTO), asked.set_reference(None), asked.mark(Mark("a", "a", b"", liked=True))):
        assert changed.has_pending_changes
        assert changed.undo() == asked
    draw_strokes = asked.undo()
    assert (draw_strokes.has_pending_changes, draw_strokes.present.reference) == (False, SKETCH)  # the pad is no pick
    assert Session().set_reference(PHOTO).can_undo
    assert Session().set_reference(PHOTO).undo() == Session()


def test_the_size_is_that_of_the_pictures():
    assert Session().size == 0
    mark = Mark("a", "a star", b"12345", liked=True)
    photo = Reference("photo", "cat", b"123", b"1234", image=b"12")
    assert Session().set_reference(photo).mark(mark).size == 14
    assert Session().set_reference(photo).mark(mark).search(photo, "").size == 28


def test_pages_belong_to_their_turn():
    session = Session().search(SKETCH, "").turn_page(2).search(PICKED, "").turn_page(1)
    assert [turn.page for turn in session.turns] == [2, 1]
    assert session.undo().present.page == 2
    for wrong in (lambda: Session().turn_page(0), lambda: session.turn_page(-1)):
        with pytest.raises(DataError, match="no such page"):
            wrong()


def test_comparing_starts_at_the_first_page_and_outlives_a_new_start():
    session = Session().search(SKETCH, "").turn_page(4).compare(2)
    assert (session.compared, session.present.page) == (2, 0)
    assert Session().compare(1).compared == 1
    fresh = session.restart()
    assert (fresh.compared, fresh.turns, fresh.at, fresh.sample_seed) == (2, (), -1, 1)
    with pytest.raises(DataError):
        session.compare(0)


def test_the_oldest_questions_are_forgotten_first():
    session = Session()
    for number in range(MAX_TURNS + 7):
        session = session.search(None, f"request {number}")
    assert len(session.turns) == MAX_TURNS
    assert (session.turns[0].text, session.present.text) == ("request 7", f"request {MAX_TURNS + 6}")


class Tape:
    """The slow, literal oracle: a list of texts and a place in it."""

    def __init__(self):
        self.texts, self.at = [], 0

    def do(self, step):
        kind, value = step
        if kind == "ask":
            self.texts = [*self.texts[: self.at], value]
            self.at = len(self.texts)
        elif kind == "undo":
            self.at = max(0, self.at - 1)
        elif kind == "redo":
            self.at = min(len(self.texts), self.at + 1)
        elif value + 1 <= len(self.texts):
            self.at = value + 1


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["red", "blue", "on sand"])),
    st.tuples(st.sampled_from(["undo", "redo"]), st.none()),
    st.tuples(st.just("go"), st.integers(-1, 6)),
)


def taken(session, kind, value):
    if kind == "ask":
        return session.search(None, value)
    return session.go_to(value) if kind == "go" else getattr(session, kind)()


@settings(deadline=None, max_examples=50)
@given(st.lists(STEPS, max_size=30))
def test_any_steps_give_what_a_tape_gives(steps):
    tape, session = Tape(), Session()
    for step in steps:
        tape.do(step)
        before = session
        try:
            session = taken(session, *step)
        except DataError:
            assert session == before
    assert [turn.text for turn in session.turns] == tape.texts
    assert session.at == tape.at - 1
    assert session.can_undo == (tape.at > 0)
    assert session.can_redo == (tape.at < len(tape.texts))
