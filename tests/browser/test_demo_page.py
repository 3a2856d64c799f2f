"""The demo's page as its users have it: in a browser, over HTTP, on the generated world."""

import io
import re

import pytest
from PIL import Image

pytestmark = pytest.mark.browser


def png(*size: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
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
    assert user.titles() == found  # the answers stay until the next request
    colour = next(name for name in ("blue", "green", "purple") if name not in title)
    user.search(f"make the star {colour}")
    assert user.turns() == ["sketch", f"+ “make the star {colour}”"]
    refined = user.titles()
    assert refined != found
    assert sum(colour in title for title in refined[:6]) >= 2, refined

    user.press("Undo")
    assert user.titles() == found
    assert user.page.locator("#pad").is_visible()
    user.press("Redo")
    assert user.titles() == refined
    assert user.page.get_by_label("Text").input_value() == f"make the star {colour}"
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
    assert user.titles() == plain  # the answers stay until the next request
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

    user.press("Undo")  # what was not asked yet
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
    user.page.locator("#filtered", has_text="class = 'house'").wait_for()  # folded away, it still holds


@pytest.mark.parametrize(
    ("where", "said"),
    [("colour = 'red'", "colour"), ("class = ", "class"), ("class > 3 or", "class")],
)
def test_a_filter_that_cannot_be_read_is_answered_with_a_sentence(visit, where, said):
    user = visit()
    user.filter(where)
    user.search("a star")
    assert said in user.problem()
    assert user.page.locator("#where").input_value() == where
    user.filter("class = 'no such thing'")
    user.search()
    assert user.page.inner_text("#results h2") == "No image matches the filter"


def test_steps_wait_for_one_another_and_none_is_lost(visit):
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


def test_who_cannot_see_is_told_and_the_focus_stays(visit, star):
    user = visit()
    told = user.page.locator("#told")
    user.draw(star)
    user.search()
    assert told.inner_text() == "Results 1 to 24"
    user.press("Next page")
    assert told.inner_text() == "Results 25 to 48"
    user.page.get_by_role("button", name="Undo", exact=True).focus()
    user.page.keyboard.press("Enter")
    user.settled()
    assert told.inner_text() == "Some images of the gallery"
    focused = "document.activeElement.id || document.activeElement.dataset.act"
    assert user.page.evaluate(focused) == "history"  # Undo is off now
    user.pick(1)
    user.page.locator("#reference .zoom").click()
    user.page.locator("dialog[open]").wait_for()
    user.page.keyboard.press("Escape")
    assert user.page.evaluate("document.activeElement.className") == "zoom"


def test_a_stroke_survives_a_new_start_and_other_keys_are_the_browsers(visit):
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
    assert user.page.locator("#say").inner_text() == "Pen down."
    user.page.keyboard.press("Control+ArrowRight")
    assert user.page.locator("#pad-help").is_visible()


def test_pages_of_answers(visit, star):
    user = visit()
    user.draw(star)
    user.search()
    first = user.titles()
    user.press("Next page")
    assert set(first).isdisjoint(user.titles()) or user.titles() != first
    assert user.page.locator(".rank").first.inner_text() == "25"
    user.press("Previous page")
    assert user.titles() == first


def test_the_picture_large(visit):
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
    assert user.page.locator(".columns h3").all_inner_texts() == ["trained: transagg + union", "image alone, untrained"]
    assert [column.locator("li").count() for column in user.page.locator(".columns section").all()] == [12, 12]
    said = user.page.locator("#results > p").last.inner_text()
    shared = int(re.match(r"(\d+) of these 12 images were found by both", said)[1])
    assert user.page.locator(".both").count() == 2 * shared
    user.page.get_by_label("Compare with").select_option(label="nothing")
    user.settled()
    assert user.page.locator(".columns h3").count() == 0


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("broken.jpg", png(60, 60)[:70], "Cannot decode broken.jpg"),
        ("words.png", b"these are words", "Cannot decode words.png"),
        ("huge.png", bytes(1_000_001), "huge.png is larger than 1 MB"),
        ("bomb.png", png(9000, 6000), "bomb.png has more than 50 million pixels"),
    ],
)
def test_a_file_that_cannot_be_used_is_answered_with_a_sentence(visit, name, data, said):
    user = visit()
    user.page.set_input_files("#file", files=[{"name": name, "mimeType": "image/png", "buffer": data}])
    assert user.problem().startswith(said)
    assert user.page.locator("#pad").is_visible()
    user.search("a red star")  # and the page goes on
    assert user.turns() == ["“a red star”"]
    assert user.page.locator("#problem").is_hidden()


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
            [kind, made, list(png(90, 90, colour="blue"))],
        )
        user.page.wait_for_selector(f"#reference img[alt='{kind}.png']")
    user.press("Back to the pad")
    assert user.page.locator("#pad").is_visible()


def test_nothing_drawn_and_nothing_typed(visit):
    user = visit()
    user.search()
    assert user.problem().startswith("There is nothing to search with yet")


def test_the_pad_takes_strokes_back(visit):
    user = visit()
    assert user.page.get_by_role("button", name="Undo stroke").is_disabled()
    user.draw([(0.2, 0.2), (0.8, 0.8)], [(0.2, 0.8), (0.8, 0.2)])
    draw_strokes = "document.querySelector('canvas').toDataURL()"
    both = user.page.evaluate(draw_strokes)
    user.page.get_by_role("button", name="Undo stroke").click()
    one = user.page.evaluate(draw_strokes)
    user.page.get_by_role("button", name="Clear").click()
    none = user.page.evaluate(draw_strokes)
    assert len(both) > len(one) > len(none)
    user.draw([(0.2, 0.2), (0.8, 0.8)])
    assert user.page.evaluate(draw_strokes) == one


def test_all_of_it_by_keyboard(visit):
    user = visit()
    keys = user.page.keyboard
    user.page.locator("#pad canvas").focus()
    keys.press("Space")
    for arrow in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        for _ in range(6):
            keys.press(arrow)
    keys.press("Space")
    for _ in range(4):  # undo stroke, clear, photo, sentence
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
    assert user.page.evaluate("document.activeElement.id") == "text"  # where the next sentence is typed
    keys.type("put it on sand")
    keys.press("Enter")
    user.page.wait_for_selector("#history li:nth-child(3)")
    user.settled()
    user.page.get_by_role("button", name="Undo", exact=True).focus()
    keys.press("Enter")
    user.page.wait_for_selector(".undone")
    user.settled()
    assert user.page.evaluate("document.activeElement.dataset.act") == "undo"  # the focus is not lost


def test_a_reload_keeps_the_history_and_two_users_have_two(visit):
    one, two = visit(), visit()
    one.search("a red star")
    two.search("a blue house")
    one.page.reload()
    one.page.wait_for_selector(".score")
    assert one.turns() == ["“a red star”"]
    assert two.turns() == ["“a blue house”"]
