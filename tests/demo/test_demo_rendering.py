import base64
import html
import re
from pathlib import Path

import pytest

from demo_backends import Squares
from union_igrot.demo import server
from union_igrot.demo.controller import DemoController
from union_igrot.demo.server import PageRenderer, data_uri, show_controls
from union_igrot.service.uploads import Limits

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


@pytest.fixture
def controller() -> DemoController:
    return DemoController([Squares(), Squares("other <b>", step=-1)], page=6)


@pytest.fixture
def view(controller) -> PageRenderer:
    return PageRenderer(controller, Limits())


def test_no_input_becomes_markup(controller, view):
    token = controller.act("new", "search", {"text": HOSTILE}).token
    controller.act(token, "compare", {"compared": 1})
    name = re.findall(r'"id": "(\w+)"', view.regions(controller.act(token, "show", {}))["results"])[0]
    controller.act(token, "pick", {"backend": 0, "id": name})
    shown = view.regions(controller.act(token, "show", {}))
    whole = view.page() + "".join(shown[name] for name in ("history", "reference", "results"))
    assert "onerror=alert" in html.unescape(whole)
    for forbidden in ("<img src=x", "<b>", "square <s"):
        assert forbidden not in whole
    assert "Say &lt;anything&gt;." in whole
    assert "square &lt;s" in whole


def test_weighted_terms_are_chips(controller, view):
    found = view.regions(controller.act("new", "search", {"text": f"a beach; -2:{HOSTILE};"}))["results"]
    assert "<img src=x" not in found
    assert [html.unescape(one) for one in re.findall('data-term="(.*?)"', found)] == ["a beach", f"-2:{HOSTILE}"]
    assert 'class="chips"' not in view.regions(controller.act("new", "search", {"text": "a beach"}))["results"]


def test_control_and_bidi_characters_are_shown(controller, view):
    assert show_controls("a\u202egpj.exe \x1b[2J\x00") == "a\\u202egpj.exe \\x1b[2J\\x00"
    assert show_controls("שלום 日本語\u3000é 👩‍💻\n") == "שלום 日本語\u3000é 👩‍💻\n"
    found = view.regions(controller.act("new", "search", {"text": "abc\u202ecba"}))
    assert "abc\\u202ecba" in found["history"]


def test_images_are_embedded_in_the_page(controller, view):
    screen = controller.act("new", "search", {"text": "a"})
    sources = re.findall(r'src="([^"]*)"', view.regions(screen)["results"])
    assert len(sources) == 6
    for source, image in zip(sources, screen.columns[0].images, strict=True):
        kind, _, data = source.partition(",")
        assert (kind, base64.b64decode(data)) == ("data:image/png;base64", image.thumbnail)
    assert data_uri(b"\xff\xd8\xff").startswith("data:image/jpeg;base64,")


def test_the_page_and_its_files_name_no_other_host(view):
    whole = view.page() + "".join(path.read_text() for path in (Path(server.__file__).parent / "static").iterdir())
    whole = whole.replace("http://www.w3.org/2000/svg", "")  # a namespace
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", whole)


def test_regions_contain_what_changed(controller, view):
    found = view.regions(controller.act("new", "search", {"text": "abc", "strokes": [[[1, 2], [3, 4]]]}))
    assert "Results 1 to 6 of 60" in found["results"]
    assert (found["heading"], found["can"]) == ("Results 1 to 6", {"undo": True, "redo": False, "restart": True})
    assert (found["text"], found["strokes"], found["large"], found["compared"]) == (None, None, None, None)
    assert found["history"].count('aria-current="step"') == 1
    token = found["token"]
    picked = view.regions(controller.act(token, "pick", {"backend": 0, "id": "s4"}))
    assert (picked["results"], picked["history"], picked["pending"], picked["link"]) == (
        None,
        None,
        True,
        found["link"],
    )
    assert "square &lt;s4&gt;" in picked["reference"]
    assert "/images/s4.png" in picked["reference"]
    reverted = view.regions(controller.act(token, "undo", {}))
    assert (reverted["results"], reverted["history"], reverted["reference"].strip()) == (None, None, "")
    undone = view.regions(controller.act(token, "undo", {}))
    assert 'class="undone"' in undone["history"]
    assert (undone["can"], undone["link"]) == ({"undo": False, "redo": True, "restart": True}, "")
    assert view.regions(controller.act(token, "redo", {}))["strokes"] == (((1, 2), (3, 4)),)
    large = view.regions(controller.act(token, "large", {"backend": 0, "id": "s4"}))["large"]
    assert "640 \u00d7 480" in large
    assert "c&amp;s4" in large


def test_marks_filters_and_the_model_are_shown(controller, view):
    page = view.page()
    assert "Columns: class, &#34;taken &lt;by&gt;&#34;" in page
    assert "Model: squares model" in page
    token = controller.act("new", "search", {"text": "a"}).token
    controller.act(token, "mark", {"backend": 0, "id": "s2", "liked": True})
    shown = view.regions(controller.act(token, "mark", {"backend": 0, "id": "s3", "liked": False}))
    assert shown["marks"] == {"s2": True, "s3": False}
    assert [shown["marked"].count(words) for words in ("<p>More like</p>", "<p>Less like</p>")] == [1, 1]
    assert "Remove mark: square &lt;s2&gt;" in shown["marked"]
    found = view.regions(controller.act(token, "search", {"text": "red", "where": "class = '<b>'"}))
    assert "1&nbsp;liked, 1&nbsp;disliked" in re.sub(r"<[^>]*>", "", found["history"])
    assert "class = &#39;&lt;b&gt;&#39;" in found["history"]
    assert "of 60" not in found["results"]  # how many images pass the filter is not counted
    none = view.regions(controller.act(token, "search", {"text": "red", "where": "nothing"}))
    assert "No image matches the filter" in none["results"]
    assert view.regions(controller.act(token, "unmark", {}))["marked"].strip() == ""


def test_every_control_has_a_name(controller, view):
    """Each input has a label, each button a text or an aria-label, each image an alt text."""
    token = controller.act("new", "search", {"text": "a"}).token
    controller.act(token, "pick", {"backend": 0, "id": "s3"})
    controller.act(token, "mark", {"backend": 0, "id": "s4", "liked": True})
    large = view.regions(controller.act(token, "large", {"backend": 0, "id": "s3"}))["large"]
    regions = view.regions(controller.act(token, "show", {}))
    names = ("history", "reference", "results", "marked")
    whole = view.page() + "".join(regions[name] for name in names) + large
    labelled = set(re.findall(r'<label for="(\w+)"', whole))
    for tag in re.findall(r"<(?:input|select)[^>]*>", whole):
        assert "aria-label=" in tag or re.search(r'id="(\w+)"', tag)[1] in labelled, tag
    for tag, inner in re.findall(r"(<button[^>]*>)(.*?)</button>", whole, re.DOTALL):
        filled_by_script = 'id="bar-search"' in tag
        assert filled_by_script or "aria-label=" in tag or re.sub(r"<[^>]*>", "", inner).strip(), tag
    assert all(" alt=" in tag for tag in re.findall(r"<img[^>]*>", whole))
    assert '<html lang="en">' in whole
    identities = re.findall(r'\sid="([\w-]+)"', whole)
    assert len(identities) == len(set(identities))
