import base64
import io
import json
import zlib

import pytest
from PIL import Image

from demo_backends import Squares
from union_igrot.demo import controller as module
from union_igrot.demo.controller import MARK_REMOVED, MAX_TEXT, MAX_WHERE, SESSION_LOST, DemoController
from union_igrot.demo.session import Reference, photo_reference
from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.queries import Term
from union_igrot.service.uploads import Limits, decode_upload

STROKES = [[[0, 500], [1000, 500]]]


@pytest.fixture
def controller() -> DemoController:
    return DemoController([Squares(), Squares("backward", step=-1)], page=10)


def ids(screen, column=0):
    return [one.id for one in screen.columns[column].images]


def photo(name: str, size: int = 50) -> Reference:
    image = Image.effect_noise((size, size), 90) if size > 50 else Image.new("RGB", (size, size), (9, 200, 9))
    file = io.BytesIO()
    image.save(file, "PNG")
    return photo_reference(decode_upload(file.getvalue(), name, Limits()), name)


def test_the_start_page_shows_a_sample(controller):
    with pytest.raises(ConfigError):
        DemoController([])
    first = controller.act("new", "show", {})
    assert ids(first) == [f"s{n}" for n in range(10)]
    assert first.columns[0].images[0].score is None
    assert (first.session.present, first.message, first.strokes, first.text) == (None, "", None, None)
    assert ids(controller.act(first.token, "resample", {})) == [f"s{n}" for n in range(1, 11)]
    assert controller.act("guessed", "show", {}).token != "guessed"


def test_search_pages_pick_refine_undo(controller):
    token = controller.act("new", "show", {}).token
    found = controller.act(token, "search", {"text": "", "strokes": STROKES})
    assert (ids(found), found.last) == ([f"s{n}" for n in range(10)], False)
    assert controller.backends[0].searched == [((24, 24, 24), None, None)]

    second = controller.act(token, "page", {"page": 1})
    assert (ids(second), second.columns[0].first) == ([f"s{n}" for n in range(10, 20)], 11)

    picked = controller.act(token, "pick", {"backend": 0, "id": "s12"})
    assert (picked.columns, picked.text) == (None, "")  # the results stay; the text belonged to the last query
    held = picked.session.reference
    assert (held.kind, held.id, held.path, held.details) == ("result", "s12", "/images/s12.png", {"class": "c&s12"})
    assert Image.open(io.BytesIO(held.view)).size == (480, 360)

    refined = controller.act(token, "search", {"text": " in  red "})
    assert controller.backends[0].searched[-1] == ((48, 100, 200), "in red", "s12")
    assert "s12" not in ids(refined)
    assert [turn.text for turn in refined.session.turns] == ["", "in red"]

    undone = controller.act(token, "undo", {})
    assert (ids(undone), undone.session.at) == ([f"s{n}" for n in range(10, 20)], 0)  # on the same page
    assert (undone.strokes, undone.text, undone.session.reference) == ((((0, 500), (1000, 500)),), "", None)
    redone = controller.act(token, "redo", {})
    assert (ids(redone), redone.text, redone.strokes) == (ids(refined), "in red", None)
    start = controller.act(token, "back", {"turn": -1})
    assert (start.session.present, start.strokes, start.text) == (None, None, None)  # the pad is not cleared
    over = controller.act(token, "restart", {})
    assert (over.session.turns, over.strokes, over.text) == ((), (), "")


@pytest.mark.parametrize(
    ("typed", "text", "terms"),
    [
        ("a beach", "a beach", []),
        ("-5 degrees", "-5 degrees", []),
        ("a beach; -people; 2:sunset", "a beach", [("people", -1.0), ("sunset", 2.0)]),
        ("-people;", None, [("people", -1.0)]),
        ("0.5:a beach; sea", None, [("a beach", 0.5), ("sea", 1.0)]),
        # A file of the server is a text here.
        ("./secret.jpg; -/photos/a.png + red", "./secret.jpg", [("/photos/a.png + red", -1.0)]),
        ("image:a.png; 2:text:b", "image:a.png", [("text:b", 2.0)]),
        (" ; ", None, []),
    ],
)
def test_a_text_with_semicolons_has_weighted_terms(controller, typed, text, terms):
    token = controller.act("new", "show", {}).token
    found = controller.act(token, "search", {"text": typed, "strokes": STROKES})
    request = controller.backends[0].requests[-1]
    assert (request.text, list(request.terms)) == (text, [Term((), word, weight) for word, weight in terms])
    assert request.image is not None
    assert found.session.present.text == " ".join(typed.split())


def test_a_rectangle_of_the_query_image(controller):
    token = controller.act("new", "show", {}).token
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (30, 0, 60, 40))
    controller.set_photo(token, photo_reference(image, "mine.png"))
    right = {"left": 500, "top": 250, "right": 1000, "bottom": 750}
    cropped = controller.act(token, "crop", right)
    assert (cropped.session.reference.kind, cropped.session.reference.name) == ("photo", "part of mine.png")
    controller.act(token, "search", {"text": ""})
    request = controller.backends[0].requests[-1]
    assert request.image.size == (30, 20)
    assert request.image.getcolors() == [(600, (0, 0, 255))]
    again = controller.act(token, "crop", {"left": 0, "top": 0, "right": 1, "bottom": 1})
    assert again.session.reference.name == "part of mine.png"
    assert controller.act(token, "undo", {}).session.reference == cropped.session.reference
    controller.act(token, "search", {"text": "", "strokes": STROKES})
    for wrong in ({**right, "left": 1000}, {**right, "bottom": 1001}, {**right, "top": -1}, {**right, "top": 750}):
        with pytest.raises(DataError, match="not a part of a query image"):
            controller.act(token, "crop", wrong)
    for wrong in ({}, {**right, "left": "0"}, {**right, "left": 0.5}):
        with pytest.raises(DataError, match="unexpected value"):
            controller.act(token, "crop", wrong)
    controller.act(token, "drop", {})
    with pytest.raises(DataError, match="not a part of a query image"):
        controller.act(token, "crop", right)
    picked = controller.act(token, "pick", {"backend": 0, "id": "s3"})
    assert picked.session.reference.kind == "result"
    part = controller.act(token, "crop", right).session.reference
    assert (part.kind, part.id, part.name) == ("photo", None, "part of square <s3>")


def test_the_last_page():
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
    controller.act(token, "pick", {"backend": 1, "id": "s59"})
    controller.act(token, "search", {"text": ""})
    for backend in controller.backends:
        assert backend.searched[-1] == ((236, 100, 200), None, "s59")
    alone = controller.act(token, "compare", {"compared": None})
    assert (len(alone.columns), alone.shared) == (1, frozenset())
    for compared in (0, 2, -1, "1"):
        with pytest.raises(DataError):
            controller.act(token, "compare", {"compared": compared})


def test_a_photo_is_used_until_it_is_dropped(controller):
    token = controller.act("new", "show", {}).token
    shown = controller.set_photo(token, photo("cat.png"))
    assert (shown.session.reference.name, "cat.png" in shown.message, shown.columns) == ("cat.png", True, None)
    controller.act(token, "search", {"text": "", "strokes": STROKES})  # the hidden pad is ignored
    assert controller.backends[0].searched[-1] == ((9, 200, 9), None, None)
    assert controller.act(token, "drop", {}).session.reference is None
    controller.act(token, "search", {"text": "", "strokes": STROKES})
    assert controller.backends[0].searched[-1][0] == (24, 24, 24)


@pytest.mark.parametrize(
    ("action", "given"),
    [
        ("search", {"text": ""}),
        ("search", {"text": 7}),
        ("search", {"text": "x" * (MAX_TEXT + 1)}),
        ("search", {"text": "a", "strokes": "scribble"}),
        ("search", {"text": "a", "where": 7}),
        ("search", {"text": "invalid Unicode \ud800"}),
        ("search", {"text": "a", "where": "class = '\udfff'"}),
        ("search", {"text": "a", "where": "x" * (MAX_WHERE + 1)}),
        ("mark", {"backend": 0, "id": "s59", "liked": True}),
        ("back", {"turn": 5}),
        ("redo", {}),
        ("explode", {}),
    ],
)
def test_a_failed_action_changes_nothing(controller, action, given):
    token = controller.act("new", "search", {"text": "a"}).token
    before = controller.act(token, "show", {}).session
    with pytest.raises(DataError):
        controller.act(token, action, given)
    assert controller.act(token, "show", {}).session == before


def test_marks_and_a_filter_belong_to_the_query(controller):
    token = controller.act("new", "search", {"text": "a"}).token
    liked = controller.act(token, "mark", {"backend": 0, "id": "s2", "liked": True})
    assert (liked.columns, liked.message) == (None, "The next search prefers images like this one.")
    assert [(mark.id, mark.title, mark.liked) for mark in liked.session.marks] == [("s2", "square <s2>", True)]
    controller.act(token, "mark", {"backend": 0, "id": "s3", "liked": False})
    found = controller.act(token, "search", {"text": "", "where": " class = 'c&s4' "})
    request = controller.backends[0].requests[-1]
    assert (request.liked, request.disliked, request.where, request.image) == (("s2",), ("s3",), "class = 'c&s4'", None)
    assert "s3" not in ids(found)
    undone = controller.act(token, "undo", {})
    assert (undone.where, undone.session.marks) == ("", ())
    redone = controller.act(token, "redo", {})
    assert (redone.where, len(redone.session.marks)) == ("class = 'c&s4'", 2)
    assert controller.act(token, "mark", {"backend": 0, "id": "s2", "liked": True}).message == MARK_REMOVED
    assert controller.act(token, "unmark", {"id": "s3"}).session.marks == ()
    controller.act(token, "mark", {"backend": 0, "id": "s2", "liked": True})
    assert controller.act(token, "unmark", {}).session.marks == ()
    nothing = controller.act(token, "search", {"text": "a", "where": "nothing"})
    assert (ids(nothing), nothing.last) == ([], True)
    assert controller.act(token, "restart", {}).where == ""


@pytest.mark.parametrize("action", ["pick", "large", "mark"])
@pytest.mark.parametrize(
    "given", [{"backend": 0, "id": "s55"}, {"backend": 1, "id": "s1"}, {"backend": 0, "id": "/etc/x"}, {}]
)
def test_only_images_on_the_page_can_be_requested(controller, action, given):
    token = controller.act("new", "show", {}).token
    with pytest.raises(DataError, match="not on the page any more"):
        controller.act(token, action, given)
    with pytest.raises(DataError, match="not on the page any more"):
        controller.act("new", action, {"backend": 0, "id": "s1"})  # a session without a page


def test_a_large_image_and_pages_of_two_windows(controller):
    token = controller.act("new", "show", {}).token
    large = controller.act(token, "large", {"backend": 0, "id": "s3"}).large
    assert (large.item.id, large.width, large.height) == ("s3", 640, 480)
    controller.act(token, "pick", {"backend": 0, "id": "s3"})
    one = ids(controller.act(token, "search", {"text": "x" * 20}))
    assert controller.act(token, "large", {"backend": 0, "id": "s3"}).large.item.id == "s3"  # the query image
    other = ids(controller.act(token, "search", {"text": "x" * 40}))
    (name, *_) = set(one) - set(other)
    assert controller.act(token, "pick", {"backend": 0, "id": name}).session.reference.id == name


def test_sessions_are_separate_and_the_least_recently_used_are_dropped(controller, monkeypatch):
    monkeypatch.setattr(module, "MAX_SESSIONS", 8)
    tokens = [controller.act("new", "search", {"text": "x" * n}).token for n in range(1, 6)]
    for n, token in enumerate(tokens, 1):
        assert [turn.text for turn in controller.act(token, "show", {}).session.turns] == ["x" * n]
    controller.act(tokens[0], "show", {})
    for _ in range(4):
        controller.act("new", "show", {})
    assert controller.act(tokens[0], "show", {}).token == tokens[0]
    gone = controller.act(tokens[1], "show", {})
    assert (gone.token in tokens, gone.message, gone.session.turns) == (False, SESSION_LOST, ())


def test_images_of_all_sessions_are_bounded(controller, monkeypatch):
    first = controller.set_photo("new", photo("a.png", 300))
    monkeypatch.setattr(module, "MAX_BYTES", int(2.5 * first.session.size))
    second = controller.set_photo("new", photo("b.png", 300))
    assert controller.act(first.token, "show", {}).token == first.token
    third = controller.set_photo("new", photo("c.png", 300))
    assert [controller.act(one.token, "show", {}).token == one.token for one in (first, third)] == [True, True]
    gone = controller.set_photo(second.token, photo("d.png", 300))
    assert (gone.message.startswith(SESSION_LOST), gone.moved, len(ids(gone))) == (True, True, 10)  # a usable page


def test_a_link_shows_its_query_to_another_user_and_moves_in_the_own_history(controller):
    token = controller.act("new", "search", {"text": "red", "strokes": STROKES, "where": "class = 'c'"}).token
    one = controller.act(token, "page", {"page": 1})
    controller.act(token, "mark", {"backend": 0, "id": ids(one)[0], "liked": True})
    controller.act(token, "pick", {"backend": 0, "id": ids(one)[1]})
    two = controller.act(token, "search", {"text": "é, large"})
    for screen in (one, two):
        there = controller.act("new", "show", {"link": screen.session.present.link})
        mine, theirs = screen.session.present, there.session.present
        assert (theirs.text, theirs.where, theirs.page) == (mine.text, mine.where, mine.page)
        assert (theirs.marks, theirs.reference, ids(there)) == (mine.marks, mine.reference, ids(screen))
        here = controller.act(token, "show", {"link": screen.session.present.link})
        assert (here.session.turns, here.session.present, ids(here)) == (two.session.turns, mine, ids(screen))


def packed(**values: object) -> str:
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(values).encode())).decode()


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("", "damaged"),
        ("AAAA", "damaged"),
        ("ä", "damaged"),
        (packed(text="a", page=-1), "damaged"),
        (packed(text="a", page=True), "damaged"),
        (packed(text="a", marks=7), "damaged"),
        (packed(text="a", marks=[["s1"]]), "damaged"),
        (packed(id="s1", backend=9), "damaged"),
        (packed(id=["s1"]), "damaged"),
        (packed(id="\ud800"), "damaged"),
        (packed(text="x" * 10**6), "damaged"),  # unpacked no further than a link is long
        (packed(id="s99"), "not here"),
        (packed(text="a", marks=[["/etc/passwd", True]]), "not here"),
        (packed(text=7), "longer"),
        (packed(text="a", strokes="x"), "sketch is invalid"),
        (packed(), "nothing to search with"),
    ],
)
def test_a_damaged_link_shows_the_start_page(controller, link, message):
    shown = controller.act("new", "show", {"link": link})
    assert message in shown.message
    assert (shown.session.present, len(ids(shown))) == (None, 10)


def test_a_photo_is_in_no_link(controller):
    token = controller.set_photo("new", photo("cat.png")).token
    link = controller.act(token, "search", {"text": "red"}).session.present.link
    controller.act(token, "back", {"turn": -1})
    assert controller.act(token, "show", {"link": link}).session.at == 0
    assert "choose the photo" in controller.act("new", "show", {"link": link}).message
    scribble = [[[x, x * 7 % 1000] for x in range(1000)]] * 3
    longer = controller.act(token, "drop", {}) and controller.act(token, "search", {"strokes": scribble})
    assert len(longer.session.present.link) < 200
