import pytest
import torch
from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.evaluation.results import ScoredBenchmark
from union_igrot.reporting.contact_sheets import benchmark_sheet
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, Ranking, Scores

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


def draw(path, targets=("g1",), queries=3, found=None, opened=lambda source: source.open(), **options):
    scores = Scores({}, found or ranking(queries))
    scored = ScoredBenchmark(benchmark(targets, queries, **options), {"trained": scores})
    benchmark_sheet(path, scored, "trained", opened)
    with Image.open(path) as sheet:
        sheet.load()
        return sheet.copy()


def corners(sheet, down=0):
    """The pixels at some place of the four tiles of the first row."""
    return [sheet.getpixel((2 * 8 + (at + 1) * (96 + 8) + down, 8 + 22 + down)) for at in range(4)]


def test_relevant_results_are_framed_green_and_others_red(tmp_path):
    assert corners(draw(tmp_path / "sheet.png")) == [WRONG, RIGHT, WRONG, WRONG]


def test_a_missing_image_leaves_an_empty_tile(tmp_path):
    def opened(source):
        if source.key == "g2":
            raise ImageError("gone")
        return source.open()

    sheet = draw(tmp_path / "sheet.png", opened=opened)
    assert corners(sheet, 48) == [(0, 0, 0), (40, 0, 0), UNKNOWN, (120, 0, 0)]


def test_without_known_targets_no_result_is_called_wrong(tmp_path):
    assert set(corners(draw(tmp_path / "sheet.png", ()))) == {UNKNOWN}


def test_a_padded_subset_leaves_its_place_white(tmp_path):
    padded = Ranking(torch.tensor([[1, 2, -1, -1]]), torch.zeros(1, 4))
    sheet = draw(tmp_path / "sheet.png", queries=1, found=padded)
    assert corners(sheet) == [RIGHT, WRONG, (255, 255, 255), (255, 255, 255)]


@pytest.mark.parametrize(("queries", "size"), [(1, (1, 1)), (2, (1, 500)), (40, (500, 1))])
def test_at_most_twelve_queries_and_images_of_any_shape_are_shown(tmp_path, queries, size):
    sheet = draw(tmp_path / "sheet.png", queries=queries, size=size)
    assert sheet.size == (9 * 104 + 24, min(queries, 12) * (22 + 96 + 16 + 8) + 8)
