import io

import pytest
from PIL import Image

from demo_backends import Squares
from union_igrot.demo import controller as module
from union_igrot.demo.controller import MARK_REMOVED, MAX_SESSIONS, MAX_TEXT, MAX_WHERE, SESSION_LOST, DemoController
from union_igrot.demo.uploads import Limits
from union_igrot.errors import ConfigError, DataError, ImageError

STROKES = [[[0, 500], [1000, 500]]]


@pytest.fixture
def controller() -> DemoController:
    return DemoController([Squares(), Squares("backward", step=-1)], page=10)


def ids(screen, column=0):
    return [one.id for one in screen.columns[column].answers]


def test_the_start_shows_some_pictures_and_others_when_asked(controller):
    first = controller.act("new", "show", {})
    assert ids(first) == [f"s{n}" for n in range(10)]
    assert first.columns[0].answers[0].score is None
    assert (first.session.present, first.say, first.strokes, first.text) == (None, "", None, None)
    again = controller.act(first.token, "resample", {})
    assert ids(again) == [f"s{n}" for n in range(1, 11)]


def test_a_walk_through_turns_pages_and_back(controller):
    token = controller.act("new", "show", {}).token
    found = controller.act(token, "search", {"text": "", "strokes": STROKES})
    assert (ids(found), found.last) == ([f"s{n}" for n in range(10)], False)
    assert controller.engines[0].asked == [((24, 24, 24), None, None)]

    second = controller.act(token, "page", {"page": 1})
    assert (ids(second), second.columns[0].first) == ([f"s{n}" for n in range(10, 20)], 11)

    picked = controller.act(token, "pick", {"engine": 0, "id": "s12"})
    assert (picked.columns, picked.text) == (None, "")  # the answers stay, the sentence was of the last request
    held = picked.session.reference
    assert (held.kind, held.id, held.path, held.details) == ("result", "s12", "/pictures/s12.png", {"class": "c&s12"})
    assert Image.open(io.BytesIO(held.view)).size == (480, 360)

    refined = controller.act(token, "search", {"text": " in  red "})
    assert controller.engines[0].asked[-1] == ((48, 100, 200), "in red", "s12")
    assert "s12" not in ids(refined)
    assert [turn.text for turn in refined.session.turns] == ["", "in red"]

    undone = controller.act(token, "undo", {})
    assert (ids(undone), undone.session.at) == ([f"s{n}" for n in range(10, 20)], 0)  # on the page it was left on
    assert (undone.strokes, undone.text, undone.session.reference) == ((((0, 500), (1000, 500)),), "", None)
    redone = controller.act(token, "redo", {})
    assert (ids(redone), redone.text, redone.strokes) == (ids(refined), "in red", None)
    start = controller.act(token, "back", {"turn": -1})
    assert (start.session.present, start.strokes, start.text) == (None, None, None)  # the pad is not emptied
    over = controller.act(token, "restart", {})
    assert (over.session.turns, over.strokes, over.text) == ((), (), "")


def test_the_last_page_has_no_next_one():
    controller = DemoController([Squares(count=25)], page=10)
    token = controller.act("new", "search", {"text": "a"}).token
    shown = [controller.act(token, "page", {"page": page}) for page in (1, 2)]
    assert [(len(ids(screen)), screen.last) for screen in shown] == [(10, False), (5, True)]
    for page in (3, -1, "1", True, 10**9, None):
        with pytest.raises(DataError):
            controller.act(token, "page", {"page": page})


def test_two_methods_side_by_side(controller):
    token = controller.act("new", "search", {"text": "abc"}).token
    controller.act(token, "page", {"page": 2})
    both = controller.act(token, "compare", {"compared": 1})
    assert ids(both) == ["s3", "s4", "s5", "s6", "s7"]
    assert ids(both, 1) == ["s3", "s2", "s1", "s0", "s59"]
    assert both.shared == {"s3"}
    assert [column.name for column in both.columns] == ["forward", "backward"]
    controller.act(token, "pick", {"engine": 1, "id": "s59"})
    controller.act(token, "search", {"text": ""})
    for engine in controller.engines:
        assert engine.asked[-1] == ((236, 100, 200), None, "s59")
    alone = controller.act(token, "compare", {"compared": None})
    assert (len(alone.columns), alone.shared) == (1, frozenset())
    for compared in (0, 2, -1, "1"):
        with pytest.raises(DataError):
            controller.act(token, "compare", {"compared": compared})


def test_a_photo_is_held_until_it_is_laid_aside(controller):
    file = io.BytesIO()
    Image.new("RGB", (50, 50), (9, 200, 9)).save(file, "PNG")
    given = controller.upload_photo("new", "cat.png", file.getvalue())
    assert given.session.reference.name == "cat.png"
    assert "cat.png" in given.say
    controller.act(given.token, "search", {"text": "", "strokes": STROKES})  # what is on the hidden pad does not count
    assert controller.engines[0].asked[-1] == ((9, 200, 9), None, None)
    assert controller.act(given.token, "drop", {}).session.reference is None
    controller.act(given.token, "search", {"text": "", "strokes": STROKES})
    assert controller.engines[0].asked[-1][0] == (24, 24, 24)


def test_a_mistake_changes_nothing(controller):
    token = controller.act("new", "search", {"text": "a"}).token
    before = controller.act(token, "show", {}).session
    for action, given in (
        ("search", {"text": ""}),
        ("search", {"text": 7}),
        ("search", {"text": "x" * (MAX_TEXT + 1)}),
        ("search", {"text": "a", "strokes": "scribble"}),
        ("search", {"text": "a", "where": 7}),
        ("search", {"text": "invalid Unicode \ud800"}),
        ("search", {"text": "a", "where": "class = '\udfff'"}),
        ("search", {"text": "a", "where": "x" * (MAX_WHERE + 1)}),
        ("mark", {"engine": 0, "id": "s59", "liked": True}),
        ("back", {"turn": 5}),
        ("redo", {}),
        ("explode", {}),
    ):
        with pytest.raises(DataError):
            controller.act(token, action, given)
    with pytest.raises(ImageError):
        controller.upload_photo(token, "x", b"broken")
    with pytest.raises(ImageError):
        DemoController([Squares()], limits=Limits(megabytes=0.001)).upload_photo(token, "x", bytes(2000))
    assert controller.act(token, "show", {}).session == before


def test_marks_and_a_filter_go_with_the_question(controller):
    token = controller.act("new", "search", {"text": "a"}).token
    liked = controller.act(token, "mark", {"engine": 0, "id": "s2", "liked": True})
    assert (liked.columns, liked.say) == (None, "The next search prefers images like this one.")
    assert [(mark.id, mark.title, mark.liked) for mark in liked.session.marks] == [("s2", "square <s2>", True)]
    controller.act(token, "mark", {"engine": 0, "id": "s3", "liked": False})
    found = controller.act(token, "search", {"text": "", "where": " class = 'c&s4' "})
    asked = controller.engines[0].requests[-1]
    assert (asked.liked, asked.disliked, asked.where, asked.image) == (("s2",), ("s3",), "class = 'c&s4'", None)
    assert "s3" not in ids(found)
    undone = controller.act(token, "undo", {})
    assert (undone.where, undone.session.marks) == ("", ())
    redone = controller.act(token, "redo", {})
    assert (redone.where, len(redone.session.marks)) == ("class = 'c&s4'", 2)
    assert controller.act(token, "mark", {"engine": 0, "id": "s2", "liked": True}).say == MARK_REMOVED
    assert controller.act(token, "unmark", {"id": "s3"}).session.marks == ()
    controller.act(token, "mark", {"engine": 0, "id": "s2", "liked": True})
    assert controller.act(token, "unmark", {}).session.marks == ()
    nothing = controller.act(token, "search", {"text": "a", "where": "nothing"})
    assert (ids(nothing), nothing.last) == ([], True)
    assert controller.act(token, "restart", {}).where == ""


@pytest.mark.parametrize("action", ["pick", "large", "mark"])
@pytest.mark.parametrize(
    "given", [{"engine": 0, "id": "s55"}, {"engine": 1, "id": "s1"}, {"engine": 0, "id": "/etc/x"}, {}]
)
def test_only_pictures_on_the_page_can_be_asked_for(controller, action, given):
    token = controller.act("new", "show", {}).token
    with pytest.raises(DataError, match="not on the page any more"):
        controller.act(token, action, given)
    with pytest.raises(DataError, match="not on the page any more"):
        controller.act("new", action, {"engine": 0, "id": "s1"})  # somebody who was shown nothing yet


def test_a_picture_is_shown_large_and_the_one_at_hand_stays_askable(controller):
    token = controller.act("new", "show", {}).token
    large = controller.act(token, "large", {"engine": 0, "id": "s3"}).large
    assert (large.answer.id, large.width, large.height) == ("s3", 640, 480)
    controller.act(token, "pick", {"engine": 0, "id": "s3"})
    controller.act(token, "search", {"text": "x" * 20})
    assert controller.act(token, "large", {"engine": 0, "id": "s3"}).large.answer.id == "s3"


def test_users_are_kept_apart(controller):
    tokens = [controller.act("new", "search", {"text": "x" * n}).token for n in range(1, 6)]
    assert len(set(tokens)) == 5
    for n, token in enumerate(tokens, 1):
        assert [turn.text for turn in controller.act(token, "show", {}).session.turns] == ["x" * n]


def test_whoever_was_quiet_for_longest_is_forgotten_and_told_so(controller):
    first = controller.act("new", "search", {"text": "a"}).token
    second = controller.act("new", "search", {"text": "b"}).token
    controller.act(first, "show", {})
    for _ in range(MAX_SESSIONS - 1):
        controller.act("new", "show", {})
    assert controller.act(first, "show", {}).token == first
    gone = controller.act(second, "show", {})
    assert (gone.token != second, gone.say, gone.session.turns) == (True, SESSION_LOST, ())


def test_pictures_of_all_users_together_are_bounded(controller, monkeypatch):
    file = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(file, "PNG")
    first = controller.upload_photo("new", "a.png", file.getvalue())
    monkeypatch.setattr(module, "MAX_BYTES", 2 * first.session.size)
    second = controller.upload_photo("new", "b.png", file.getvalue())
    assert controller.act(first.token, "show", {}).token == first.token
    third = controller.upload_photo("new", "c.png", file.getvalue())
    assert [controller.act(one.token, "show", {}).token == one.token for one in (first, third)] == [True, True]
    gone = controller.upload_photo(second.token, "d.png", file.getvalue())
    assert (gone.say.startswith(SESSION_LOST), gone.moved, len(ids(gone))) == (True, True, 10)  # with pictures to click


def test_two_windows_of_one_session_can_both_be_used(controller):
    token = controller.act("new", "show", {}).token
    one = ids(controller.act(token, "search", {"text": "a"}))
    other = ids(controller.act(token, "search", {"text": "a" * 30}))
    assert set(one) - set(other)
    assert controller.act(token, "pick", {"engine": 0, "id": next(iter(set(one) - set(other)))}).session.reference


def test_undo_lays_a_pick_aside_before_it_goes_back(controller):
    token = controller.act("new", "search", {"text": "abc"}).token
    controller.act(token, "pick", {"engine": 0, "id": "s4"})
    laid = controller.act(token, "undo", {})
    assert (laid.session.reference, laid.session.at, laid.text, laid.columns) == (None, 0, "abc", None)
    assert controller.act(token, "undo", {}).session.at == -1


def test_a_made_up_name_opens_no_session(controller):
    assert controller.act("guessed", "show", {}).token != "guessed"


def test_a_desk_needs_an_engine():
    with pytest.raises(ConfigError):
        DemoController([])
