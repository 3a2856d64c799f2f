"""Search results as a table, as half blocks, as HTML and on a sheet."""

import io
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from union_igrot.gallery.results import Hit, half_blocks, hit_table, hits_html
from union_igrot.reporting.contact_sheets import SheetRow, contact_sheet


def jpeg(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (160, 80), color).save(file, format="JPEG")
    return file.getvalue()


def found(name: str, score: float, columns: dict[str, Any] | None = None, color: str | None = "red") -> Hit:
    return Hit(name, score, columns or {}, None if color is None else jpeg(color))


def shown(thing: Any, width: int = 80, colour: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=colour, force_terminal=colour is not None)
    console.print(thing)
    return console.file.getvalue()


def test_half_blocks_are_the_pixels_two_by_two():
    image = Image.new("RGB", (2, 3))
    pixels = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7), (1, 2, 3), (4, 5, 6)]
    for place, pixel in enumerate(pixels):
        image.putpixel((place % 2, place // 2), pixel)
    text = half_blocks(image, 3)
    assert text.plain == "▀▀\n▀▀"
    styles = [span.style for span in text.spans]
    colours = [tuple(style.color.triplet) for style in styles]
    below = [tuple(style.bgcolor.triplet) if style.bgcolor else None for style in styles]
    assert colours == [pixels[0], pixels[1], pixels[4], pixels[5]]
    assert below == [pixels[2], pixels[3], None, None]


@pytest.mark.parametrize(("size", "lines", "width"), [((160, 80), 4, 16), ((80, 160), 8, 8), ((1, 900), 8, 1)])
def test_half_blocks_keep_the_shape(size, lines, width):
    rows = half_blocks(Image.new("RGB", size), 16).plain.split("\n")
    assert (len(rows), {len(row) for row in rows}) == (lines, {width})


def test_a_table_has_a_line_a_hit():
    hits = [found("/a/b [red].jpg", 0.98765, {"year": 2020, "x": 0.5}), found("sha256:1", -0.1, {"year": None})]
    said = shown(hit_table(hits, ["year", "x"], title="'[bold]it's'"))
    assert "'[bold]it's'" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["1", "0.9877", "/a/b", "[red].jpg", "2020", "0.5"] in lines
    assert ["2", "-0.1000", "sha256:1"] in lines
    assert "▀" not in said
    with_pictures = shown(hit_table([*hits, found("c", 0.0, color=None)], [], thumbnails=True), 80, "truecolor")
    assert with_pictures.count("▀") == 2 * 16 * 4
    assert "\x1b[38;2;254;0;0" in with_pictures


def test_what_a_terminal_would_act_upon_is_shown_by_its_escape():
    said = shown(hit_table([found("a\x1b[2Jb\nc\u202ed.jpg", 0.5, {"x": "\x07"})], ["x"]))
    assert "\x1b" not in said
    assert "a\\x1b[2Jb\\nc\\u202ed.jpg" in said
    assert "\\x07" in said


def test_html_holds_pictures_scores_and_escaped_names():
    text = hits_html([found('/a/<b>"&.jpg', 0.5), found("none", 0.25, color=None)])
    assert text.count("<img") == 1
    assert "data:image/jpeg;base64," in text
    assert "<b>1</b> · 0.500<br>&lt;b&gt;&quot;&amp;.jpg" in text
    assert 'title="/a/&lt;b&gt;&quot;&amp;.jpg"' in text
    assert "<b>2</b> · 0.250<br>none" in text
    assert "no hits" in hits_html([])


def test_a_sheet_has_room_for_every_query_and_answer(tmp_path):
    red, blue = Image.new("RGB", (160, 80), "red"), Image.new("RGB", (30, 90), "blue")
    many = SheetRow("two\npictures", [red, blue], [(0.5, blue)] * 11)
    contact_sheet(tmp_path / "sheet.png", [many, SheetRow("", [], [(0.1, None)]), SheetRow("none", [red], [])])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB"
        colours = {pixel: count for count, pixel in sheet.getcolors(2**20)}
        assert colours[(255, 0, 0)] > 2 * 88 * 40
        assert colours[(0, 0, 255)] > 12 * 20 * 80
        assert sheet.height > 4 * 96
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
