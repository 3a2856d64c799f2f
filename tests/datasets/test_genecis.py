"""GeneCIS: candidates, and the cut-out pixels."""

import json

import numpy as np
import official
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from union_igrot.datasets.loading import load_benchmark
from union_igrot.errors import DataError, ImageError
from union_igrot.images.decode import image_key, open_image
from union_igrot.images.identity import Crop
from union_igrot.types import LazyImage


def cut(photo, box):
    """Cut as the specification words it, pixel by pixel."""
    height, width = photo.shape[:2]
    x, y, w, h = box
    left, top = max(0, x - 0.7 * w), max(0, y - 0.7 * h)
    right, bottom = min(width, left + 1.7 * w), min(height, top + 1.7 * h)
    left, top, right, bottom = round(left), round(top), round(right), round(bottom)
    side = max(right - left, bottom - top)
    out = np.zeros((side, side, 3), np.uint8)
    above, beside = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    for row in range(top, bottom):
        for column in range(left, right):
            out[above + row - top, beside + column - left] = photo[row, column]
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "7.png"
    pixels = np.random.default_rng(0).integers(1, 256, (30, 41, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


@pytest.mark.parametrize("box", [(20, 15, 5, 7), (1, 1, 10, 4), (35, 25, 6, 5), (0, 0, 41, 30), (10.5, 3.25, 7.5, 11)])
def test_crop_examples(photo, box):
    path, pixels = photo
    assert np.array_equal(np.asarray(open_image(Crop(path, box))), cut(pixels, box))


def test_dilation_goes_left_and_up(photo):
    path, pixels = photo
    square = np.asarray(Crop(path, (20, 10, 10, 10)).open())
    assert np.array_equal(square, pixels[3:20, 13:30])
    clamped = np.asarray(Crop(path, (2, 2, 10, 10)).open())
    assert np.array_equal(clamped, pixels[:17, :17])


@settings(deadline=None, max_examples=15)
@given(st.tuples(*[st.floats(0, 28, width=16)] * 2, *[st.floats(1, 40, width=16)] * 2))
def test_any_crop(photo, box):
    path, pixels = photo
    wanted = cut(pixels, box)
    assert np.array_equal(np.asarray(Crop(path, box).open()), wanted)


def test_crop_identity(photo, tmp_path):
    path, _ = photo
    crop = Crop(path, (1, 2, 3, 4))
    assert isinstance(crop, LazyImage)
    assert image_key(crop) == crop.key != Crop(path, (1, 2, 3, 5)).key
    missing = Crop(tmp_path / "none.jpg", (1, 2, 3, 4))  # made without a look at the file
    assert isinstance(missing, LazyImage)
    assert "|missing|" in missing.key
    with pytest.raises(ImageError, match="missing"):
        missing.open()
    with pytest.raises(ImageError, match="lies outside of 41 x 30 pixels"):
        Crop(path, (100, 2, 3, 4)).open()


def test_candidates(tmp_path):
    official.genecis(tmp_path)
    for task, count in (("focus_attribute", 10), ("change_attribute", 15), ("focus_object", 15), ("change_object", 15)):
        benchmark = load_benchmark("genecis", tmp_path, task=task)
        query = benchmark.queries[0]
        assert len(query.subset) == count
        assert query.targets == query.subset[:1]
        assert query.text == "color 0"
        protocol = benchmark.protocol
        assert (protocol.ties, protocol.candidates) == ("pessimistic", "subset")
        assert protocol.metrics == ("R@1", "R@2", "R@3")
        assert len(benchmark.gallery) == 3 + count  # shared candidates occur once
    crop = load_benchmark("genecis", tmp_path, task="focus_attribute").queries[3].image
    assert crop == Crop(tmp_path / "VG_100K/3.jpg", (3, 4, 12.5, 9))


def test_a_target_among_the_other_candidates_is_kept(tmp_path):
    official.genecis(tmp_path, with_images=False)
    file = tmp_path / "genecis/change_object.json"
    rows = json.loads(file.read_text())
    rows[0]["gallery"][3] = rows[0]["target"]
    file.write_text(json.dumps(rows))
    query = load_benchmark("genecis", tmp_path, task="change_object", check_images=False).queries[0]
    assert len(query.subset) == 15
    assert query.subset.count(query.targets[0]) == 2


@pytest.mark.parametrize(
    "box", [None, [], [1, 2, 3], [1, 2, 0, 4], [1, 2, 3, -4], [1, 2, 3, "4"], [1, 2, 3, True], [1e99, 0, 1, 1]]
)
def test_a_wrong_box(tmp_path, box):
    official.genecis(tmp_path, with_images=False)
    file = tmp_path / "genecis/change_attribute.json"
    rows = json.loads(file.read_text())
    rows[2]["gallery"][4]["instance_bbox"] = box
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"change_attribute\.json, row 2, gallery\[4\]: instance_bbox is"):
        load_benchmark("genecis", tmp_path, task="change_attribute", check_images=False)
