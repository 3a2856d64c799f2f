import base64
import html
import re

import pytest

from demo_backends import Squares
from union_igrot.demo.controller import DemoController
from union_igrot.demo.rendering import STATIC, PageRenderer, data_uri, static_file

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


@pytest.fixture
def controller() -> DemoController:
    return DemoController([Squares(), Squares("other <b>", step=-1)], page=6)


def test_nothing_given_becomes_markup(controller):
    view = PageRenderer(controller)
    token = controller.act("new", "search", {"text": HOSTILE}).token
    controller.act(token, "compare", {"compared": 1})
    controller.act(token, "pick", {"engine": 0, "id": view_ids(view.regions(controller.act(token, "show", {})))[0]})
    shown = view.regions(controller.act(token, "show", {}))
    whole = view.page() + "".join(shown[name] for name in ("history", "reference", "results"))
    assert "onerror=alert" in html.unescape(whole)
    assert "<img src=x" not in whole
    assert "<b>" not in whole
    assert "Say &lt;anything&gt;." in whole
    assert "square <s" not in whole
    assert "square &lt;s" in whole


def view_ids(regions) -> list[str]:
    return re.findall(r'"id": "(\w+)"', regions["results"])


def test_pictures_travel_inside_the_page(controller):
    view = PageRenderer(controller)
    screen = controller.act("new", "search", {"text": "a"})
    results = view.regions(screen)["results"]
    sources = re.findall(r'src="([^"]*)"', results)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for source, answer in zip(sources, screen.columns[0].answers, strict=True):
        assert base64.b64decode(source.partition(",")[2]) == answer.thumbnail
    assert data_uri(b"\xff\xd8\xff").startswith("data:image/jpeg;base64,")


def test_the_page_and_its_files_name_no_other_host(controller):
    whole = PageRenderer(controller).page() + "".join(static_file(name).decode() for name in STATIC)
    whole = whole.replace("http://www.w3.org/2000/svg", "")  # a name, which is never asked for
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", whole)


def test_regions_tell_what_changed(controller):
    view = PageRenderer(controller)
    found = view.regions(controller.act("new", "search", {"text": "abc", "strokes": [[[1, 2], [3, 4]]]}))
    assert "Results 1 to 6 of 60" in found["results"]
    assert (found["told"], found["can"]) == ("Results 1 to 6", {"undo": True, "redo": False, "restart": True})
    assert (found["text"], found["strokes"], found["large"], found["compared"]) == (None, None, None, None)
    assert found["history"].count('aria-current="step"') == 1
    picked = view.regions(controller.act(found["token"], "pick", {"engine": 0, "id": "s4"}))
    assert (picked["results"], picked["history"]) == (None, None)
    assert "square &lt;s4&gt;" in picked["reference"]
    assert "/pictures/s4.png" in picked["reference"]
    laid = view.regions(controller.act(found["token"], "undo", {}))
    assert (laid["results"], laid["history"], laid["reference"].strip()) == (None, None, "")
    undone = view.regions(controller.act(found["token"], "undo", {}))
    assert 'class="undone"' in undone["history"]
    assert undone["can"] == {"undo": False, "redo": True, "restart": True}
    redone = view.regions(controller.act(found["token"], "redo", {}))
    assert redone["strokes"] == (((1, 2), (3, 4)),)
    large = view.regions(controller.act(found["token"], "large", {"engine": 0, "id": "s4"}))
    assert "640 \u00d7 480" in large["large"]
    assert "c&amp;s4" in large["large"]


def test_marks_and_filters_are_shown(controller):
    view = PageRenderer(controller)
    assert "Columns: class, &#34;taken &lt;by&gt;&#34;" in view.page()
    token = controller.act("new", "search", {"text": "a"}).token
    controller.act(token, "mark", {"engine": 0, "id": "s2", "liked": True})
    shown = view.regions(controller.act(token, "mark", {"engine": 0, "id": "s3", "liked": False}))
    assert shown["marks"] == {"s2": True, "s3": False}
    assert [shown["marked"].count(words) for words in ("<p>More like</p>", "<p>Less like</p>")] == [1, 1]
    assert "Remove mark: square &lt;s2&gt;" in shown["marked"]
    found = view.regions(controller.act(token, "search", {"text": "red", "where": "class = '<b>'"}))
    assert "1&nbsp;liked, 1&nbsp;disliked" in re.sub(r"<[^>]*>", "", found["history"])
    assert "class = &#39;&lt;b&gt;&#39;" in found["history"]
    assert "of 60" not in found["results"]  # how many pass the filter is not counted
    none = view.regions(controller.act(token, "search", {"text": "red", "where": "nothing"}))
    assert "No image matches the filter" in none["results"]
    assert view.regions(controller.act(token, "unmark", {}))["marked"].strip() == ""


def test_every_control_has_a_name(controller):
    """Each input has a label, each button words or an aria-label, each picture an alt."""
    view = PageRenderer(controller)
    token = controller.act("new", "search", {"text": "a"}).token
    controller.act(token, "pick", {"engine": 0, "id": "s3"})
    controller.act(token, "mark", {"engine": 0, "id": "s4", "liked": True})
    shown = view.regions(controller.act(token, "large", {"engine": 0, "id": "s3"}))
    regions = view.regions(controller.act(token, "show", {}))
    whole = view.page() + regions["history"] + regions["reference"] + regions["results"] + shown["large"]
    whole += regions["marked"]
    labelled = set(re.findall(r'<label for="(\w+)"', whole))
    for tag in re.findall(r"<(?:input|select)[^>]*>", whole):
        assert "aria-label=" in tag or re.search(r'id="(\w+)"', tag)[1] in labelled, tag
    for tag, inner in re.findall(r"(<button[^>]*>)(.*?)</button>", whole, re.DOTALL):
        assert "aria-label=" in tag or re.sub(r"<[^>]*>", "", inner).strip(), tag
    assert all(" alt=" in tag for tag in re.findall(r"<img[^>]*>", whole))
    assert '<html lang="en">' in whole
    identities = re.findall(r'\sid="([\w-]+)"', whole)
    assert len(identities) == len(set(identities))
