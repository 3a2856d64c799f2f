"""A gallery of photo files on every engine: weighted terms, filters on dates and places, duplicates, pages."""

import pytest
import torch
from torch.nn.functional import normalize

from indexing_world import QUIET
from photo_files import NIKON, PIXEL, photo
from small_gallery import agrees
from small_world import trainable
from union_igrot.gallery.gallery import Gallery

COLORS = ("navy", "red", "green", "gold", "white", "black")


@pytest.fixture(scope="module")
def model():
    return trainable().eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of photos; the red one is there twice."""
    folder = tmp_path_factory.mktemp("photos")
    for number, color in enumerate((*COLORS, "red")):
        path = folder / ("lake", "city")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo((PIXEL, NIKON, ({}, {}, {}))[number % 3 if number < 6 else 1], color=color))
    (folder / "lake" / "0.txt").write_text("Ann's boat, 50% off\n犬\n", encoding="utf-8")
    return folder


@pytest.fixture
def gallery(location, model, photos):
    with Gallery.open(location.uri, model) as made:
        made.update(photos, QUIET)
        location.opened.append(made.index)
        yield made


def numbers(ids):
    return sorted(int(name.rsplit("/", 1)[1].split(".")[0]) for name in ids)


FILTERS = {
    "taken >= '2024-05-01' and camera like 'Pixel%'": [0, 3],
    "taken between '2023-12-31' and '2024-01-01'": [1, 4, 6],
    "taken is null or taken < '2024'": [1, 2, 4, 5, 6],
    "latitude between 47.4 and 47.5 and longitude < -122": [0, 3],
    "not (latitude > 0)": [],
    "longitude is null": [1, 2, 4, 5, 6],
    "class = 'city' and lens is not null": [3],
    "class in ('lake', 'sea') and camera != 'NIKON'": [0],
    "caption like 'Ann''s%'": [0],
}


@pytest.mark.slow
def test_filters_on_columns_from_files(gallery):
    for where, expected in FILTERS.items():
        assert numbers(gallery.ids(where)) == expected, where
        assert numbers(gallery.search(text="small", k=9, where=where).ids) == expected, where


@pytest.mark.slow
def test_terms_pages_and_duplicates(gallery, model, photos):
    ids = gallery.ids()
    image = photos / "lake" / "2.jpg"
    with torch.inference_mode():
        text, one = model.embed_queries(None, ["small"])[0], model.encode_queries([image])[0]
        rows = gallery.index.fetch(ids).vectors
    query = normalize(2 * normalize(one, dim=-1) - 0.5 * normalize(text, dim=-1), dim=-1)
    expected = sorted(zip(ids, (rows @ query).tolist(), strict=True), key=lambda pair: -pair[1])
    terms = [(image, 2), ("small", -0.5)]
    assert agrees(gallery.search(terms=terms, k=9), expected)
    assert agrees(gallery.search(terms=terms, k=2, offset=3), expected[3:5])
    least = (expected[3][1] + expected[4][1]) / 2
    assert agrees(gallery.search(terms=terms, k=9, min_score=least), expected[:4])
    assert gallery.search(terms=terms, min_score=2.0).nothing_near

    (group,) = gallery.duplicates(threshold=None)
    assert (numbers(group.ids), group[1].columns["duplicate"]) == ([1, 6], "same file")
    assert group[0].thumbnail.size == (12, 10)
    assert gallery.duplicates(threshold=None, where="taken >= '2024'") == []
