"""The demo's page in a browser, on the generated world."""

import io
import re

import pytest
from PIL import Image

pytestmark = pytest.mark.browser


def png(*size: int, color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def test_draw_search_refine_undo(visit, star):
    user = visit()
    user.draw(star)
    user.search()
    found = user.titles()
    assert len(found) == 24
    assert sum("star" in title for title in found) >= 12, found
    assert re.search(r"Results 1 to 24 of [\d,]+", user.page.inner_text("#results h2"))
    scores = [float(text) for text in user.page.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)

    first = user.page.locator(".pick").first
    title = first.get_attribute("title")
    user.pick(1)
    assert user.page.locator("#reference img").get_attribute("alt") == title
    assert user.titles() == found  # the results stay until the next search
    color = next(name for name in ("blue", "green", "purple") if name not in title)
    user.search(f"make the star {color}")
    assert user.turns() == ["sketch", f"+ “make the star {color}”"]
    refined = user.titles()
    before, after = (
        [rank for rank, title in enumerate(titles) if f"{color} " in title and "star" in title]
        for titles in (found, refined)
    )
    assert len(before) == len(after) >= 2
    assert all(new < old for new, old in zip(after, before, strict=True)), refined

    user.press("Undo")
    assert user.titles() == found
    assert user.page.locator("#pad").is_visible()
    user.press("Redo")
    assert user.titles() == refined
    assert user.page.get_by_label("Text").input_value() == f"make the star {color}"
    user.page.get_by_role("button", name="Start", exact=True).click()
    user.settled()
    assert user.page.inner_text("#results h2") == "Some images of the gallery"
    user.press("Start over")
    assert user.turns() == []
    assert user.page.locator("#pad-empty").is_visible()


def test_marks_and_a_filter_refine_and_are_undone(visit):
    user = visit()
    user.search("a star")
    plain = user.titles()
    wanted = next(rank for rank, title in enumerate(plain, 1) if "star" in title and "red" not in title)
    other = next(rank for rank, title in enumerate(plain, 1) if "red" in title)
    more = user.page.locator(".cards .marks button:first-child").nth(wanted - 1)
    less = user.page.locator(".cards .marks button:last-child").nth(other - 1)
    more.click()
    user.settled()
    less.click()
    user.settled()
    assert [more.get_attribute("aria-pressed"), less.get_attribute("aria-pressed")] == ["true", "true"]
    assert user.titles() == plain  # the results stay until the next search
    assert user.page.locator("#marks li").count() == 2
    box = user.page.locator("#marks img").first.bounding_box()
    middle = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
    assert user.page.evaluate("([x, y]) => document.elementFromPoint(x, y).tagName", middle) == "IMG"
    user.search()
    assert user.turns() == ["“a star”", "“a star” · 1\u00a0liked, 1\u00a0disliked"]
    marked = user.titles()
    assert marked != plain
    assert sum("red" in title for title in marked) < sum("red" in title for title in plain)

    user.filter("class = 'house'")
    user.search("on sand")
    assert user.turns()[-1] == "“on sand” · 1\u00a0liked, 1\u00a0disliked · class = 'house'"
    filtered = user.titles()
    assert filtered
    assert all("house" in title for title in filtered)
    user.page.locator("#marks button").first.click()
    user.settled()
    assert user.page.locator("#marks li").count() == 1

    user.press("Undo")  # the pending change
    assert (user.titles(), user.page.locator("#marks li").count()) == (filtered, 2)
    user.press("Undo")
    assert user.titles() == marked
    assert user.page.locator("#where").input_value() == ""
    assert user.page.locator("#marks li").count() == 2
    user.press("Undo")
    assert user.titles() == plain
    assert user.page.locator("#marks").is_hidden()
    user.press("Redo")
    user.press("Redo")
    assert user.titles() == filtered
    assert user.page.get_by_role("textbox", name="Filter").input_value() == "class = 'house'"
    user.page.locator("summary").click()
    user.page.locator("#filtered", has_text="class = 'house'").wait_for()  # folded, it is still active


def test_invalid_filters_and_an_empty_query(visit):
    user = visit()
    user.search()
    assert user.problem().startswith("There is nothing to search with yet")
    for where, named in (("colour = 'red'", "colour"), ("class = ", "class"), ("class > 3 or", "class")):
        user.filter(where)
        user.search("a star")
        assert named in user.problem()
        assert user.page.locator("#where").input_value() == where
    user.filter("class = 'no such thing'")
    user.search()
    assert user.page.inner_text("#results h2") == "No image matches the filter"


def test_quick_clicks_are_sent_in_order_and_none_is_lost(visit):
    user = visit()
    user.page.evaluate(
        "document.querySelectorAll('.cards .marks button:first-child').forEach((b, at) => at < 5 && b.click())"
    )
    user.settled()
    assert user.page.locator("#marks li").count() == 5
    user.page.evaluate(
        "for (let at = 0; at < 3; at++) document.getElementById('query').requestSubmit()"  # a triple click
    )
    user.settled()
    assert user.turns() == ["more like these · 5\u00a0liked"]
    user.page.get_by_label("Text").fill("a star")
    user.page.evaluate(
        """document.getElementById('query').requestSubmit();
        const compared = document.getElementById('compared');
        compared.value = "1";
        compared.dispatchEvent(new Event("change"));"""
    )
    user.settled()
    assert user.page.locator(".columns h3").count() == 2
    assert user.turns()[-1] == "“a star” · 5\u00a0liked"


def test_screen_readers_hear_the_heading_and_the_focus_stays(visit, star):
    user = visit()
    heading = user.page.locator("#heading")
    user.draw(star)
    user.search()
    assert heading.inner_text() == "Results 1 to 24"
    user.press("Next page")
    assert heading.inner_text() == "Results 25 to 48"
    user.page.get_by_role("button", name="Undo", exact=True).focus()
    user.page.keyboard.press("Enter")
    user.settled()
    assert heading.inner_text() == "Some images of the gallery"
    focused = "document.activeElement.id || document.activeElement.dataset.act"
    assert user.page.evaluate(focused) == "history"  # Undo is disabled now
    user.pick(1)
    user.page.locator("#reference .zoom").click()
    user.page.locator("dialog[open]").wait_for()
    user.page.keyboard.press("Escape")
    assert user.page.evaluate("document.activeElement.className") == "zoom"


def test_starting_over_while_drawing_and_keys_of_the_browser(visit):
    user = visit()
    box = user.page.locator("#pad canvas").bounding_box()
    user.page.mouse.move(box["x"] + 50, box["y"] + 50)
    user.page.mouse.down()
    user.page.evaluate("document.querySelector('[data-act=restart]').disabled = false")
    user.page.evaluate("document.querySelector('[data-act=restart]').click()")
    user.settled()
    user.page.mouse.move(box["x"] + 90, box["y"] + 90, steps=4)
    user.page.mouse.up()
    user.page.locator("#pad canvas").focus()
    user.page.keyboard.press("Space")
    assert user.page.locator("#message").inner_text() == "Pen down."
    user.page.keyboard.press("Control+ArrowRight")
    assert user.page.locator("#pad-help").is_visible()


def test_a_large_image(visit):
    user = visit()
    user.page.locator(".zoom").nth(3).click()
    dialog = user.page.locator("dialog[open]")
    dialog.wait_for()
    title = user.titles()[3]
    assert title in dialog.inner_text()
    assert "48 \u00d7 48" in dialog.inner_text()
    user.page.keyboard.press("Escape")
    assert dialog.count() == 0
    user.page.locator(".zoom").nth(3).click()
    dialog.get_by_role("button", name="Use as query").click()
    user.settled()
    assert user.page.locator("#reference img").get_attribute("alt") == title
    assert dialog.count() == 0


def test_two_methods_side_by_side(visit, star):
    user = visit()
    user.draw(star)
    user.search()
    user.page.get_by_label("Compare with").select_option(label="image alone, untrained")
    user.settled()
    assert user.page.locator(".columns h3").all_inner_texts() == [
        "trained: tiny, transagg + residual",
        "image alone, untrained",
    ]
    assert [column.locator("li").count() for column in user.page.locator(".columns section").all()] == [12, 12]
    note = user.page.locator("#results > p").last.inner_text()
    shared = int(re.match(r"(\d+) of these 12 images were found by both", note)[1])
    assert user.page.locator(".both").count() == 2 * shared
    user.page.get_by_label("Compare with").select_option(label="nothing")
    user.settled()
    assert user.page.locator(".columns h3").count() == 0


def test_photos_are_chosen_dropped_and_pasted(visit):
    user = visit()
    photo = {"name": "mine.png", "mimeType": "image/png", "buffer": png(200, 100)}
    user.page.set_input_files("#file", files=[photo])
    user.page.wait_for_selector("#reference img[alt='mine.png']")
    user.search("on sand")
    assert user.turns() == ["+ “on sand”"]
    for kind, made in (("drop", "DragEvent"), ("paste", "ClipboardEvent")):
        user.page.evaluate(
            """([kind, made, bytes]) => {
                const given = new DataTransfer();
                given.items.add(new File([new Uint8Array(bytes)], kind + ".png", { type: "image/png" }));
                const more = kind === "drop" ? { dataTransfer: given } : { clipboardData: given };
                document.body.dispatchEvent(new window[made](kind, { bubbles: true, cancelable: true, ...more }));
            }""",
            [kind, made, list(png(90, 90, color="blue"))],
        )
        user.page.wait_for_selector(f"#reference img[alt='{kind}.png']")
    user.press("Back to the pad")
    assert user.page.locator("#pad").is_visible()


def test_a_rectangle_on_the_query_image(visit):
    user = visit()
    user.page.set_input_files("#file", files=[{"name": "m.png", "mimeType": "image/png", "buffer": png(200, 100)}])
    shown = user.page.wait_for_selector("#reference img[alt='m.png']")
    box = shown.bounding_box()  # a square, with the image across its middle
    x, y, side = box["x"], box["y"], box["width"]
    user.page.mouse.move(x + 0.5 * side, y + 0.1 * side)  # above the image
    user.page.mouse.down()
    user.page.mouse.move(x + 0.8 * side, y + 0.4 * side)
    assert user.page.locator("#reference .frame").is_visible()
    user.page.mouse.move(x + side, y + 0.5 * side)
    user.page.mouse.up()
    part = user.page.wait_for_selector("#reference img[alt='part of m.png']")
    width, height = part.evaluate(
        "async (one) => { await one.decode(); return [one.naturalWidth, one.naturalHeight]; }"
    )
    assert abs(width - 100) <= 2
    assert abs(height - 50) <= 2
    assert user.page.locator("#reference .frame").count() == 0
    shown = user.page.wait_for_selector("#reference img[alt='part of m.png']")
    x, y, before = shown.bounding_box()["x"], shown.bounding_box()["y"], shown.get_attribute("src")
    finger = user.page.context.new_cdp_session(user.page)  # sideways first; up and down it scrolls
    for kind, at in (("touchStart", (0.1, 0.4)), ("touchMove", (0.5, 0.4)), ("touchMove", (0.9, 0.6))):
        points = [{"x": x + at[0] * side, "y": y + at[1] * side}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    user.page.wait_for_function("(old) => document.querySelector('#reference img').src !== old", arg=before)
    part = user.page.locator("#reference img")
    assert part.evaluate("(one) => one.naturalWidth") < width
    user.search("")
    assert len(user.turns()) == 1


def test_a_term_is_removed(visit):
    user = visit()
    user.search("on sand; 2:red; red")
    user.page.get_by_role("button", name="Remove term: 2:red").click()
    user.page.wait_for_selector("#history button:has-text('on sand; red')")
    assert user.page.locator("[data-term]").all_inner_texts() == ["on sand", "red"]


def test_undo_and_erase_strokes(visit):
    user = visit()
    assert user.page.get_by_role("button", name="Undo stroke").is_disabled()
    user.draw([(0.2, 0.2), (0.8, 0.8)], [(0.2, 0.8), (0.8, 0.2)])
    ink = "document.querySelector('canvas').toDataURL()"
    both = user.page.evaluate(ink)
    user.press("Undo stroke")
    one = user.page.evaluate(ink)
    user.press("Clear")
    none = user.page.evaluate(ink)
    assert len(both) > len(one) > len(none)
    user.press("Undo stroke")
    assert user.page.evaluate(ink) == one
    user.press("Eraser")
    user.draw([(0.5, 0.5), (0.52, 0.52)])
    hole = user.page.evaluate(ink)
    assert hole not in (one, none)
    painted = """() => {
        const copy = new OffscreenCanvas(1000, 1000).getContext("2d", { willReadFrequently: true });
        copy.drawImage(document.querySelector("canvas"), 0, 0);
        return [350, 500, 650].map((at) => copy.getImageData(at, at, 1, 1).data[3] > 0);
    }"""
    assert user.page.evaluate(painted) == [True, False, True]
    user.press("Undo stroke")
    assert user.page.evaluate(ink) == one
    user.draw([(0.1, 0.1), (0.9, 0.9)])
    assert user.page.evaluate(ink) == none
    assert user.page.get_by_role("button", name="Eraser").get_attribute("aria-pressed") == "false"


def test_the_page_by_keyboard(visit):
    user = visit()
    keys = user.page.keyboard
    user.page.locator("#pad canvas").focus()
    keys.press("Space")
    for arrow in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        for _ in range(6):
            keys.press(arrow)
    keys.press("Space")
    for _ in range(5):  # undo stroke, eraser, clear, photo, text
        keys.press("Tab")
    assert user.page.evaluate("document.activeElement.id") == "text"
    keys.press("Enter")
    user.page.wait_for_selector(".score")
    user.settled()
    assert user.turns() == ["sketch"]
    user.page.locator(".pick").nth(1).focus()
    keys.press("Enter")
    user.page.wait_for_selector("#reference img")
    user.settled()
    assert user.page.evaluate("document.activeElement.id") == "text"  # for the next text
    keys.type("put it on sand")
    keys.press("Enter")
    user.page.wait_for_selector("#history li:nth-child(3)")
    user.settled()
    user.page.get_by_role("button", name="Undo", exact=True).focus()
    keys.press("Enter")
    user.page.wait_for_selector(".undone")
    user.settled()
    assert user.page.evaluate("document.activeElement.dataset.act") == "undo"  # the focus is not lost


def test_reload_back_and_links_keep_the_state(visit, star):
    one, two = visit(), visit()
    start = one.titles()
    one.draw(star)
    one.search("a red star")
    two.search("a blue house")
    first = one.titles()
    one.press("Next page")
    second, rank = one.titles(), one.page.locator(".rank").first.inner_text()
    assert (second != first, rank) == (True, "25")
    one.page.reload()
    one.page.wait_for_selector(".score")
    one.settled()
    assert (one.turns(), one.titles()) == (["+ “a red star”"], second)
    assert two.turns() == ["“a blue house”"]
    for move, expected in (("back", first), ("back", start), ("forward", first), ("forward", second)):
        one.page.evaluate(f"history.{move}()")
        one.page.wait_for_function("(title) => document.querySelector('.pick')?.title === title", arg=expected[0])
        one.settled()
        assert one.titles() == expected
    other = visit(one.page.url)  # the link, opened by somebody else
    assert (other.titles(), other.turns()) == (second, ["+ “a red star”"])
    assert other.page.get_by_label("Text").input_value() == "a red star"
    two.page.evaluate("location.hash = '#q=damaged'")
    two.page.locator("#message", has_text="This link is damaged").wait_for()
