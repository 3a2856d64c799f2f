"""A page of HTML taken apart, and the rules that each page of ours keeps."""

import re
from html.parser import HTMLParser
from itertools import pairwise

from tinyhtml5.parser import HTMLParser as Browser

VOID = {"meta", "img", "rect", "line", "path", "circle", "polyline"}


class Page(HTMLParser):
    """The elements of a page in their order: tag, attributes, own text, and the tags around."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "around": [one["tag"] for one in self._open], **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, *tags, **attributes):
        found = [one for one in self.elements if one["tag"] in tags]
        return [one for one in found if attributes.items() <= one.items()]

    def lines_of(self, caption):
        """The cells' texts of every table with a caption, line by line."""
        at = [n for n, one in enumerate(self.elements) if one["tag"] == "figcaption" and caption in one["text"]]
        tables = []
        for start in at:
            lines = []
            for one in self.elements[start + 1 :]:
                if one["tag"] == "figure":
                    break
                if one["tag"] == "tr":
                    lines.append([])
                elif one["tag"] in {"th", "td"}:
                    lines[-1].append(one["text"])
            tables.append(lines)
        return tables


def check_page(text):
    """What holds for every page."""
    browser = Browser()
    browser.parse(text)
    assert browser.errors == []
    page = Page(text)
    assert not page.all("script", "link", "iframe", "object", "base", "form")
    assert not [one for one in page.elements for name in one if name.startswith("on")]
    for one in page.elements:
        assert one.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,")
        assert one.get("href", "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [one["id"] for one in page.elements if "id" in one]
    assert len(ids) == len(set(ids))
    assert {one["href"].removeprefix("#") for one in page.all("a")} <= set(ids)
    assert all(one["aria-labelledby"] in ids for one in page.elements if "aria-labelledby" in one)
    levels = [int(one["tag"][1]) for one in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(one["alt"].strip() for one in page.all("img"))
    assert all(one["aria-label"] or one["aria-hidden"] == "true" for one in page.all("svg") if "role" in one)
    assert all(one.get("scope") in {"col", "row"} for one in page.all("th"))
    assert len(page.all("table")) == len(page.all("figcaption")) - len(page.all("svg", role="img"))
    (root,) = page.all("html")
    assert root["lang"] == "en"
    assert page.all("meta", name="viewport")
    assert page.all("meta", content="default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    return page
