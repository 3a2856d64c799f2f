from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from small_world import trainable
from union_igrot.demo.backends import SearchRequest
from union_igrot.demo.gallery_backend import FileItems, GalleryBackend, open_backend
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.engines.memory import MemoryIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.images.decode import open_image


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((240, 160), Image.Resampling.NEAREST).save(tmp_path / f"picture {number}.png")
    return tmp_path


@pytest.fixture
def engine(folder) -> GalleryBackend:
    model = trainable()
    rows = MemoryIndex(model.backbone.dim)
    gallery = Gallery(rows, model, "/somewhere/photos.lance")
    paths = sorted(folder.glob("*.png"))
    gallery.add(paths, columns={"artist": [f"artist {n}" for n in range(11)] + [None], "year": list(range(12))})
    return GalleryBackend(gallery, rows, FileItems("photos.lance"))


def test_answers_are_the_gallerys(engine, folder):
    asked = open_image(folder / "picture 3.png")
    found = engine.search(SearchRequest(asked, "in red"), 0, 5)
    straight = engine._gallery.search(asked, "in red", 5)
    assert [(one.id, one.score) for one in found] == [(hit.id, hit.score) for hit in straight]
    assert [one.thumbnail for one in found] == [hit.jpeg for hit in straight]
    assert [one.id for one in engine.search(SearchRequest(asked, "in red"), 3, 2)] == straight.ids[3:]
    without = engine.search(SearchRequest(asked, "in red", exclude=straight.ids[:1]), 0, 12)
    assert [one.id for one in without][:4] == straight.ids[1:]
    assert len(engine) == 12
    assert (engine.name, engine.gallery) == ("photos.lance: transagg + union", "photos.lance")


def test_marks_and_filters_are_the_gallerys(engine, folder):
    names = engine._gallery.ids()
    request = SearchRequest(None, "red", "year >= 4", liked=names[5:7], disliked=names[8:9])
    straight = engine._gallery.search(None, "red", 12, "year >= 4", liked=names[5:7], disliked=names[8:9])
    assert [one.id for one in engine.search(request, 0, 12)] == straight.ids
    assert set(straight.ids) == set(names[4:]) - {names[8]}
    liked_alone = engine.search(SearchRequest(liked=names[5:6]), 0, 1)
    assert [one.id for one in liked_alone] == names[5:6]
    with pytest.raises(ConfigError, match=r"^Filter 'yeer = 1': there is no column 'yeer'"):
        engine.search(SearchRequest(None, "red", "yeer = 1"), 0, 1)
    with pytest.raises(DataError, match=r"photos\.lance no longer contains all marked images"):
        engine.search(SearchRequest(None, "red", liked=["gone.jpg"]), 0, 1)
    assert {"artist", "year", "width"} <= set(engine.columns)
    assert "thumbnail" not in engine.columns


def test_a_picture_tells_its_path_and_the_users_columns(engine, folder):
    name = str(folder / "picture 10.png")
    one = engine.answer(name)
    place = sorted(folder.glob("*.png")).index(Path(name))
    assert (one.title, one.path) == ("picture 10.png", name)
    assert one.details == {"artist": f"artist {place}", "year": str(place)}
    assert engine.image(name).tobytes() == open_image(folder / "picture 10.png").tobytes()
    last = engine.answer(str(sorted(folder.glob("*.png"))[-1]))
    assert last.details == {"year": "11"}


def test_a_thumbnail_stands_for_a_file_that_is_gone(engine, folder):
    name = str(folder / "picture 4.png")
    Path(name).write_bytes(b"broken")
    assert max(engine.image(name).size) == 160
    Path(name).unlink()
    assert max(engine.image(name).size) == 160


def test_no_file_is_opened_that_the_index_does_not_hold(engine, folder):
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    for ask in (engine.answer, engine.image):
        with pytest.raises(DataError):
            ask(str(folder / "secret.png"))


def test_a_name_that_is_no_files_path_opens_no_file(engine, folder, monkeypatch):
    monkeypatch.chdir(folder)
    Image.new("RGB", (500, 500), "red").save(folder / "p.png")
    named = Image.new("RGB", (48, 48), "blue")
    engine._gallery.add([named, named.rotate(9)], ids=["p.png", "n" * 400])
    assert engine.image("p.png").size == (48, 48)
    assert engine.image("n" * 400).size == (48, 48)  # longer than a file's name can be
    assert all(hit.path is None for hit in engine._gallery.search(named, k=2))


def test_rows_without_thumbnail(folder, engine):
    rows = engine._rows.fetch([str(folder / "picture 0.png")])
    columns = {name: values for name, values in rows.columns.items() if name != "thumbnail"}
    engine._rows.upsert(type(rows)(["shard.tar/0.png"], rows.vectors, columns))
    one = engine.answer("shard.tar/0.png")
    assert (one.title, one.path) == ("0.png", "shard.tar/0.png")
    assert one.thumbnail.startswith(b"\x89PNG")
    with pytest.raises(ImageError, match=r"0\.png cannot be opened"):
        engine.image("shard.tar/0.png")


def test_pictures_to_start_from(engine):
    dealt = [[one.id for one in engine.some(5, sample_seed)] for sample_seed in (1, 1, 2)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert len(engine.some(50, 0)) == 12
    engine._rows.delete(dealt[0][:2])  # by somebody else, while the page is served
    left = [one.id for one in engine.some(50, 0)]
    assert (len(left), set(left) & set(dealt[0][:2])) == (10, set())
    engine._rows.delete(left)
    assert engine.some(5, 0) == []


def test_an_index_that_is_not_there_or_empty(monkeypatch):
    with pytest.raises(ConfigError):
        open_backend("nonsense")
    monkeypatch.setattr(Gallery, "open", lambda uri, *_, **__: Gallery(None, trainable(), uri))
    with pytest.raises(DataError, match="contains no images; add some with union-index"):
        open_backend("empty.lance")
