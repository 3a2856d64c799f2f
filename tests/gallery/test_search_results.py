"""Search results as a table, as half blocks, as HTML and on a contact sheet."""

import io
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from union_igrot.gallery.results import Hit, half_blocks, hit_table, hits_html, is_missing
from union_igrot.reporting.contact_sheets import SheetRow, contact_sheet


def jpeg(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (160, 80), color).save(file, format="JPEG")
    return file.getvalue()


def make_hit(name: str, score: float, columns: dict[str, Any] | None = None, color: str | None = "red") -> Hit:
    return Hit(name, score, columns or {}, None if color is None else jpeg(color))


def render(thing: Any, width: int = 80, color: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=color, force_terminal=color is not None)
    console.print(thing)
    return console.file.getvalue()


def test_half_blocks_show_two_pixels_per_character():
    image = Image.new("RGB", (2, 3))
    pixels = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7), (1, 2, 3), (4, 5, 6)]
    for i, pixel in enumerate(pixels):
        image.putpixel((i % 2, i // 2), pixel)
    text = half_blocks(image, 3)
    assert text.plain == "▀▀\n▀▀"
    styles = [span.style for span in text.spans]
    colors = [tuple(style.color.triplet) for style in styles]
    below = [tuple(style.bgcolor.triplet) if style.bgcolor else None for style in styles]
    assert colors == [pixels[0], pixels[1], pixels[4], pixels[5]]
    assert below == [pixels[2], pixels[3], None, None]


@pytest.mark.parametrize(("size", "lines", "width"), [((160, 80), 4, 16), ((80, 160), 8, 8), ((1, 900), 8, 1)])
def test_half_blocks_keep_the_aspect_ratio(size, lines, width):
    rows = half_blocks(Image.new("RGB", size), 16).plain.split("\n")
    assert (len(rows), {len(row) for row in rows}) == (lines, {width})


def test_a_table_has_one_row_per_hit():
    hits = [make_hit("/a/b [red].jpg", 0.98765, {"year": 2020, "x": 0.5}), make_hit("sha256:1", -0.1, {"year": None})]
    text = render(hit_table(hits, ["year", "x"], title="'[bold]it's'"))
    assert "'[bold]it's'" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "0.9877", "/a/b", "[red].jpg", "2020", "0.5"] in lines
    assert ["2", "-0.1000", "sha256:1"] in lines
    assert "▀" not in text
    with_thumbnails = render(hit_table([*hits, make_hit("c", 0.0, color=None)], [], thumbnails=True), 80, "truecolor")
    assert with_thumbnails.count("▀") == 2 * 16 * 4
    assert "\x1b[38;2;254;0;0" in with_thumbnails


def test_ids_of_missing_files(tmp_path):
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"")
    missing = [str(tmp_path / "gone.jpg"), str(tmp_path / "gone" / "a.tar" / "b.jpg")]
    assert all(is_missing(name) for name in missing)
    existing = [str(shard), str(shard / "b.jpg"), str(shard / "deep" / "b.jpg"), "sha256:1", "photo 1", "a/b.jpg"]
    assert not any(is_missing(name) for name in existing)


def test_control_characters_are_escaped():
    text = render(hit_table([make_hit("a\x1b[2Jb\nc\u202ed.jpg", 0.5, {"x": "\x07"})], ["x"]))
    assert "\x1b" not in text
    assert "a\\x1b[2Jb\\nc\\u202ed.jpg" in text
    assert "\\x07" in text


def test_html_holds_thumbnails_scores_and_escaped_names():
    text = hits_html([make_hit('/a/<b>"&.jpg', 0.5), make_hit("none", 0.25, color=None)])
    assert text.count("<img") == 1
    assert "data:image/jpeg;base64," in text
    assert "<b>1</b> · 0.500<br>&lt;b&gt;&quot;&amp;.jpg" in text
    assert 'title="/a/&lt;b&gt;&quot;&amp;.jpg"' in text
    assert "<b>2</b> · 0.250<br>none" in text
    assert "no hits" in hits_html([])


def test_a_contact_sheet_shows_every_query_and_hit(tmp_path):
    red, blue = Image.new("RGB", (160, 80), "red"), Image.new("RGB", (30, 90), "blue")
    many = SheetRow("two\npictures", [red, blue], [(0.5, blue)] * 11)
    contact_sheet(tmp_path / "sheet.png", [many, SheetRow("", [], [(0.1, None)]), SheetRow("none", [red], [])])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB"
        counts = {pixel: count for count, pixel in sheet.getcolors(2**20)}
        assert counts[(255, 0, 0)] > 2 * 88 * 40
        assert counts[(0, 0, 255)] > 12 * 20 * 80
        assert sheet.height > 4 * 96
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
