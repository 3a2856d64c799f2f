"""A running demo, and a browser that records its requests and errors."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from served_demo import served

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Without these Chromium sends requests of its own.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo without arguments: the generated world."""
    with served(tmp_path_factory.mktemp("demo"), "megabytes=1") as where:
        yield where


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `nox -s browser` does")
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("there is no Chromium; install Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@dataclass
class Visitor:
    """A user with a separate browser context.

    Attributes:
        page: Playwright's page.
        complaints: Messages of the browser's console, and requests to another host.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)

    def settled(self) -> None:
        """Wait until the response is shown."""
        self.page.locator("body:not([aria-busy])").wait_for()

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_selector(".cards li")
        self.settled()

    def draw(self, *strokes: list[tuple[float, float]]) -> None:
        """Draw strokes, points relative to the pad."""
        box = self.page.locator("#pad canvas").bounding_box()
        for stroke in strokes:
            for at, (x, y) in enumerate(stroke):
                self.page.mouse.move(
                    box["x"] + x * box["width"], box["y"] + y * box["height"], steps=1 if at == 0 else 5
                )
                if at == 0:
                    self.page.mouse.down()
            self.page.mouse.up()

    def search(self, text: str | None = None) -> None:
        if text is not None:
            self.page.get_by_label("Text").fill(text)
        self.page.get_by_role("button", name="Search", exact=True).click()
        self.settled()

    def filter(self, where: str) -> None:
        if not self.page.locator("#where").is_visible():
            self.page.locator("summary").click()
        self.page.get_by_role("textbox", name="Filter").fill(where)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click()
        self.settled()

    def pick(self, rank: int) -> None:
        self.page.locator(".pick").nth(rank - 1).click()
        self.settled()

    def titles(self) -> list[str]:
        """Titles of the images on the page, in order."""
        return [card.get_attribute("title") for card in self.page.locator(".pick").all()]

    def turns(self) -> list[str]:
        """Texts of the steps of the history, without the start."""
        return self.page.locator("#history .words").all_inner_texts()[1:]

    def problem(self) -> str:
        self.page.wait_for_selector("#problem:not([hidden])")
        return self.page.locator("#problem").inner_text()


@pytest.fixture
def visit(chromium: Any, address: str) -> Iterator[Any]:
    """Open the page for a new user, any number of times; at the end no browser may have reported an error."""
    visitors: list[Visitor] = []

    def one(where: str = address, **options: Any) -> Visitor:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        visitor = Visitor(context.new_page())
        visitors.append(visitor)
        complaints = visitor.complaints
        visitor.page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        visitor.page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        visitor.page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, where, "data:")) else complaints.append(request.url)
            ),
        )
        visitor.page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        visitor.open(where)
        return visitor

    yield one
    for visitor in visitors:
        visitor.page.context.close()
    assert [visitor.complaints for visitor in visitors if visitor.complaints] == []


STAR = [(0.5, 0.2), (0.58, 0.42), (0.8, 0.42), (0.62, 0.56), (0.69, 0.78), (0.5, 0.65)]
STAR = [*STAR, *[(1 - x, y) for x, y in reversed(STAR)]]


@pytest.fixture
def star() -> list[tuple[float, float]]:
    """The outline of a star, relative to the pad."""
    return STAR
