"""The images of the demo in README and documentation, taken of the real page.

union-demo &
python docs/images/shoot.py http://127.0.0.1:7860
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
LIMIT = 200_000
STAR = [(0.5, 0.2), (0.58, 0.42), (0.8, 0.42), (0.62, 0.56), (0.69, 0.78), (0.5, 0.65)]
STAR = [*STAR, *[(1 - x, y) for x, y in reversed(STAR)]]
SHOTS: dict[str, dict[str, Any]] = {
    "demo.webp": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "demo-compare-dark.webp": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "demo-phone.webp": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True},
    "demo-phone-dark.webp": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True},
}


def settled(page: Page) -> None:
    """Wait until a step is shown."""
    page.locator("body:not([aria-busy])").wait_for()


def walk(page: Page, *, compare: bool) -> None:
    """Draw a star, search, pick an answer, mark another, ask for another color."""
    box = page.locator("#pad canvas").bounding_box()
    assert box is not None
    for at, (x, y) in enumerate(STAR):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=6)
        if at == 0:
            page.mouse.down()
    page.mouse.up()
    page.click("#search")
    settled(page)
    page.locator(".pick").nth(2).click()
    settled(page)
    page.locator(".cards .marks button:first-child").nth(5).click()
    settled(page)
    page.get_by_label("Text").fill("make the star blue")
    page.click("#search")
    settled(page)
    if compare:
        page.get_by_label("Compare with").select_option(index=1)
        settled(page)


def kept(shot: bytes) -> bytes:
    """Pack an image as tightly as it can be without changing a pixel."""
    file = io.BytesIO()
    Image.open(io.BytesIO(shot)).convert("RGB").save(file, "WEBP", lossless=True, quality=100, method=6)
    if file.tell() > LIMIT:
        raise SystemExit(f"an image of {file.tell():,} bytes is above the limit of {LIMIT:,}; make its window smaller")
    return file.getvalue()


def main(address: str) -> None:
    """Take all images."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for name, options in SHOTS.items():
            page = browser.new_context(**options).new_page()
            page.goto(address)
            page.wait_for_selector(".cards li")
            walk(page, compare="compare" in name)
            if "dark" in name and "phone" in name:
                page.evaluate("document.getElementById('query').scrollIntoView()")
            page.evaluate("document.activeElement.blur()")
            page.mouse.move(2, 2)
            (HERE / name).write_bytes(kept(page.screenshot()))
            page.context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860")
