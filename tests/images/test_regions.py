"""Regions of image files in their paths."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import ExifTags, Image

from small_gallery import COUNT, fill_gallery
from small_world import trainable
from union_igrot.errors import ConfigError, ImageError
from union_igrot.images.decode import open_region, split_region


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image whose pixels hold their column and row, 40 x 20."""
    folder = tmp_path_factory.mktemp("regions")
    rows, columns = np.mgrid[:20, :40]
    Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("region", "corner", "size"),
    [
        ("5,6,10,8", (5, 6), (10, 8)),
        (" 5, 6 , 10,8 ", (5, 6), (10, 8)),
        ("0,0,40,20", (0, 0), (40, 20)),
        ("39,19,1,1", (39, 19), (1, 1)),
        ("10%,20%,50%,50%", (4, 4), (20, 10)),
        ("25%,5,12.5%,15", (10, 5), (5, 15)),
        ("50%,50%,50%,50%", (20, 10), (20, 10)),
    ],
)
def test_a_region_is_cut_out(folder, region, corner, size):
    found = open_region(f"{folder}/a.png#{region}", at_least=1)
    assert found.size == size
    assert found.getpixel((0, 0)) == (*corner, 0)
    assert found.getpixel((size[0] - 1, size[1] - 1)) == (corner[0] + size[0] - 1, corner[1] + size[1] - 1, 0)


@pytest.mark.slow
@given(st.integers(0, 39), st.integers(0, 19), st.integers(1, 40), st.integers(1, 20))
def test_a_region_is_a_slice_or_an_error(folder, x, y, width, height):
    path = f"{folder}/a.png#{x},{y},{width},{height}"
    if x + width > 40 or y + height > 20:
        with pytest.raises(ConfigError, match="40 x 20"):
            open_region(path)
    else:
        whole = np.asarray(open_region(folder / "a.png"))
        assert np.array_equal(np.asarray(open_region(path)), whole[y : y + height, x : x + width])


@pytest.mark.parametrize("region", ["0,0,0,5", "40,0,1,1", "0,0,41,5", "60%,0,50%,5", "1,2,3", "1,2,3,4,5", "-1,2,3,4"])
def test_an_invalid_region_is_a_one_line_error(folder, region):
    with pytest.raises(ConfigError, match=r"invalid region of .*a\.png: #") as caught:
        open_region(f"{folder}/a.png#{region}")
    assert "\n" not in str(caught.value)


def test_a_word_behind_an_existing_file_is_not_a_region(folder):
    with pytest.raises(ConfigError, match="expected FILE#x,y,width,height in pixels or percent"):
        open_region(folder / "a.png#left")
    with pytest.raises(ImageError, match=r"b\.png: the image is missing"):
        open_region(folder / "b.png#1,2,3,4")
    with pytest.raises(ImageError, match=r"b#1\.png: the image is missing"):
        open_region(folder / "b#1.png")


def test_existing_files_with_the_sign_in_their_name_open(folder):
    whole = Image.open(folder / "a.png")
    for name in ("a #1.png", "a.png#1,2,3,4"):
        whole.save(folder / name, "PNG")
        try:
            assert split_region(folder / name) == (str(folder / name), None)
            assert open_region(folder / name).size == (40, 20)
            assert open_region(f"{folder / name}#1,2,3,4").getpixel((0, 0)) == (1, 2, 0)
        finally:
            (folder / name).unlink()


def test_a_region_counts_after_the_orientation(folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by 90 degrees to the right: 20 x 40
    Image.open(folder / "a.png").save(folder / "turned.png", exif=exif)
    found = open_region(f"{folder}/turned.png#0,0,20,10")
    assert found.size == (20, 10)
    assert found.getpixel((0, 0)) == (0, 19, 0)  # the lower left corner of the file
    assert found.getpixel((19, 9)) == (9, 0, 0)


def test_a_search_takes_regions(folder):
    gallery = fill_gallery(trainable().eval())
    region = f"{folder}/a.png#5,6,10,8"
    cut = Image.open(folder / "a.png").crop((5, 6, 15, 14))
    assert gallery.search(region, k=COUNT).scores == gallery.search(cut, k=COUNT).scores
    found = gallery.search(terms=[region, ("red", -1)], k=COUNT)
    assert found.scores == gallery.search(terms=[cut, ("red", -1)], k=COUNT).scores
    with pytest.raises(ConfigError, match="40 x 20"):
        gallery.search(f"{folder}/a.png#5,6,10,80")
