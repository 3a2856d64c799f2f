import math

import pytest
import torch
from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.reporting.contact_sheets import contact_sheet, curve_picture, read_curves
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, Ranking

RIGHT, WRONG, UNKNOWN = (22, 140, 60), (200, 60, 50), (205, 205, 205)


class Flat:
    """An image of one color."""

    def __init__(self, key, colour, size=(30, 20)):
        self.key, self.colour, self.size = key, colour, size

    def open(self):
        return Image.new("RGB", self.size, self.colour)


def benchmark(targets, queries=3, gallery=5, size=(30, 20)):
    items = [GalleryItem(f"g{n}", Flat(f"g{n}", (n * 40, 0, 0), size)) for n in range(gallery)]
    asked = [
        Query(f"q{n}", Flat(f"q{n}", "blue", size), text="make it red " * n, targets=targets) for n in range(queries)
    ]
    return Benchmark("b", "test", "cir", asked, items, Protocol())


def ranking(queries=3, k=4):
    return Ranking(torch.arange(k).expand(queries, k).clone(), torch.linspace(1, 0, k).expand(queries, k).clone())


def colours(path):
    with Image.open(path) as sheet:
        sheet.load()
        return sheet.size, {colour for _, colour in sheet.getcolors(100_000)}, sheet.copy()


def test_right_answers_are_framed_green_and_wrong_ones_red(tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet(path, benchmark(("g1",)), ranking(), lambda source: source.open())
    _, seen, sheet = colours(path)
    assert {RIGHT, WRONG} <= seen
    frames = [sheet.getpixel((2 * 8 + (at + 1) * (96 + 8), 8 + 20)) for at in range(4)]
    assert frames == [WRONG, RIGHT, WRONG, WRONG]


def test_a_picture_that_is_gone_by_now_leaves_its_place_empty(tmp_path):
    def opened(source):
        if source.key == "g2":
            raise ImageError("gone")
        return source.open()

    contact_sheet(tmp_path / "sheet.png", benchmark(("g1",)), ranking(), opened)
    _, _, sheet = colours(tmp_path / "sheet.png")
    middles = [sheet.getpixel((2 * 8 + (at + 1) * (96 + 8) + 48, 8 + 20 + 48)) for at in range(4)]
    assert middles == [(0, 0, 0), (40, 0, 0), UNKNOWN, (120, 0, 0)]


def test_without_known_targets_no_answer_is_called_wrong(tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet(path, benchmark(()), ranking(), lambda source: source.open())
    _, seen, _ = colours(path)
    assert UNKNOWN in seen
    assert not {RIGHT, WRONG} & seen


@pytest.mark.parametrize(("queries", "k"), [(1, 1), (2, 4), (40, 3)])
def test_the_sheet_is_as_large_as_what_it_shows(tmp_path, queries, k):
    path = tmp_path / "sheet.png"
    contact_sheet(path, benchmark(("g1",), queries), ranking(queries, k), lambda source: source.open())
    (width, height), _, _ = colours(path)
    assert (width, height) == ((k + 1) * 104 + 16, min(queries, 12) * 130 + 8)


def test_a_subset_that_is_filled_up_leaves_its_place_white(tmp_path):
    path = tmp_path / "sheet.png"
    filled = Ranking(torch.tensor([[1, 2, -1, -1]]), torch.zeros(1, 4))
    contact_sheet(path, benchmark(("g1",), queries=1), filled, lambda source: source.open())
    _, _, sheet = colours(path)
    frames = [sheet.getpixel((2 * 8 + (at + 1) * (96 + 8), 8 + 20)) for at in range(4)]
    assert frames == [RIGHT, WRONG, (255, 255, 255), (255, 255, 255)]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_odd_pictures_are_shown_too(tmp_path, size):
    contact_sheet(tmp_path / "s.png", benchmark(("g1",), size=size), ranking(), lambda source: source.open())
    assert colours(tmp_path / "s.png")[0][0] > 0


def test_nothing_half_written_gets_the_name(tmp_path):
    (tmp_path / "s.png").write_text("old")

    def broken(_: object) -> Image.Image:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        contact_sheet(tmp_path / "s.png", benchmark(("g1",)), ranking(), broken)
    assert (tmp_path / "s.png").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_curves_of_an_interrupted_training_are_joined_by_step(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("epoch,step,train/loss,val/score\n0,4,2.0,\n0,9,1.5,\n0,9,,40.0\n1,14,9.0,\n")
    second.write_text("epoch,step,train/loss,val/score\n1,14,1.0,\n1,19,0.5,50.0\n")
    assert read_curves([first, second]) == {
        "train/loss": [(4, 2.0), (9, 1.5), (14, 1.0), (19, 0.5)],
        "val/score": [(9, 40.0), (19, 50.0)],
    }
    assert read_curves([]) == {}


@pytest.mark.parametrize(
    "curve",
    [
        [(0.0, 1.0)],
        [(0.0, 1.0), (1.0, 1.0)],
        [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf)],
        [(0.0, math.nan)],
        [(float(n), n**0.5) for n in range(500)],
    ],
)
def test_any_curve_can_be_drawn(tmp_path, curve):
    curve_picture(tmp_path / "c.png", {"train/loss": curve, "val/score": curve, "third": curve})
    size, seen, _ = colours(tmp_path / "c.png")
    assert size == (870, 470)
    assert ((40, 90, 190) in seen) == any(math.isfinite(y) for _, y in curve)
