from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from small_world import LinearBackbone, extractor, trainable
from union_igrot import shapes_cir, shapes_sbir
from union_igrot.demo.backends import (
    GalleryBackend,
    SyntheticBackend,
    SyntheticGallery,
    model_name,
    open_backend,
)
from union_igrot.demo.session import decode_thumbnail
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import parse_term
from union_igrot.images.decode import open_image
from union_igrot.images.transforms import image_batch


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((240, 160), Image.Resampling.NEAREST).save(tmp_path / f"image {number}.png")
    return tmp_path


@pytest.fixture
def backend(folder) -> GalleryBackend:
    model = trainable()
    gallery = Gallery(MemoryIndex(model.backbone.dim), model, "/somewhere/photos.lance")
    paths = sorted(folder.glob("*.png"))
    gallery.add(paths, columns={"artist": [f"artist {n}" for n in range(11)] + [None], "year": list(range(12))})
    return GalleryBackend(gallery, "photos.lance")


def test_results_are_the_gallerys(backend, folder):
    image = open_image(folder / "image 3.png")
    found = backend.search(0, 5, image, "in red")
    expected = backend._gallery.search(image, "in red", 5)
    assert [(one.id, one.score) for one in found] == [(hit.id, hit.score) for hit in expected]
    assert [one.thumbnail for one in found] == [hit.jpeg for hit in expected]
    assert [one.id for one in backend.search(3, 2, image, "in red")] == expected.ids[3:]
    terms = [parse_term(("large", -0.5))]
    weighted = backend.search(0, 12, image, "in red", terms=terms)
    assert [one.id for one in weighted] == backend._gallery.search(image, "in red", 12, terms=[("large", -0.5)]).ids
    without = backend.search(0, 12, image, "in red", exclude=expected.ids[:1])
    assert [one.id for one in without][:4] == expected.ids[1:]
    assert (len(backend), backend.gallery, backend.warning) == (12, "photos.lance", "")
    assert backend.name == f"photos.lance: {backend.model}"


def test_marks_and_filters_are_the_gallerys(backend):
    names = backend._gallery.ids()
    request = {"text": "red", "where": "year >= 4", "liked": names[5:7], "disliked": names[8:9]}
    expected = backend._gallery.search(None, "red", 12, "year >= 4", liked=names[5:7], disliked=names[8:9])
    assert [one.id for one in backend.search(0, 12, **request)] == expected.ids
    assert set(expected.ids) == set(names[4:]) - {names[8]}
    assert [one.id for one in backend.search(0, 1, liked=names[5:6])] == names[5:6]
    with pytest.raises(ConfigError, match=r"^Filter 'yeer = 1': there is no column 'yeer'"):
        backend.search(0, 1, None, "red", where="yeer = 1")
    with pytest.raises(DataError, match=r"photos\.lance no longer contains all marked images"):
        backend.search(0, 1, None, "red", liked=["gone.jpg"])
    assert {"artist", "year", "width"} <= set(backend.columns)
    assert "thumbnail" not in backend.columns


def test_an_image_has_its_path_and_the_users_columns(backend, folder):
    path = folder / "image 10.png"
    one = backend.item(str(path))
    place = sorted(folder.glob("*.png")).index(path)
    assert (one.title, one.path) == ("image 10.png", str(path))
    assert one.details == {"artist": f"artist {place}", "year": str(place)}
    assert backend.image(str(path)).tobytes() == open_image(path).tobytes()
    assert backend.item(str(sorted(folder.glob("*.png"))[-1])).details == {"year": "11"}
    for change in (lambda: path.write_bytes(b"broken"), path.unlink):
        change()
        assert max(backend.image(str(path)).size) == 160  # the thumbnail


def test_no_file_outside_the_index_is_opened(backend, folder, monkeypatch):
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    for ask in (backend.item, backend.image):
        with pytest.raises(DataError):
            ask(str(folder / "secret.png"))
    monkeypatch.chdir(folder)
    Image.new("RGB", (500, 500), "red").save(folder / "p.png")
    named = Image.new("RGB", (48, 48), "blue")
    backend._gallery.add([named, named.rotate(9)], ids=["p.png", "n" * 400])  # names, not paths
    assert backend.image("p.png").size == backend.image("n" * 400).size == (48, 48)
    assert all(hit.path is None for hit in backend._gallery.search(named, k=2))


def test_rows_without_thumbnail(folder, backend):
    rows = backend._rows.fetch([str(folder / "image 0.png")])
    columns = {name: values for name, values in rows.columns.items() if name != "thumbnail"}
    backend._rows.upsert(type(rows)(["shard.tar/0.png"], rows.vectors, columns))
    one = backend.item("shard.tar/0.png")
    assert (one.title, one.path) == ("0.png", "shard.tar/0.png")
    assert one.thumbnail.startswith(b"\x89PNG")
    with pytest.raises(ImageError, match=r"0\.png cannot be opened"):
        backend.image("shard.tar/0.png")


def test_samples(backend):
    samples = [[one.id for one in backend.sample(5, seed)] for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert len(backend.sample(50, 0)) == 12
    backend._rows.delete(samples[0][:2])  # by another process
    left = [one.id for one in backend.sample(50, 0)]
    assert (len(left), set(left) & set(samples[0][:2])) == (10, set())
    backend._rows.delete(left)
    assert backend.sample(5, 0) == []


def test_an_index_that_is_missing_or_empty(monkeypatch):
    with pytest.raises(ConfigError):
        open_backend("nonsense")
    monkeypatch.setattr(Gallery, "open", lambda uri, *_, **__: Gallery(None, trainable(), uri))
    with pytest.raises(DataError, match="contains no images; add some with union-index"):
        open_backend("empty.lance")


@pytest.fixture(scope="module")
def small() -> SyntheticGallery:
    return SyntheticGallery(20)


@pytest.fixture(scope="module")
def synthetic(small, tmp_path_factory) -> SyntheticBackend:
    model = trainable("sum", "frozen")
    return small.backend("sum", model, extractor(tmp_path_factory.mktemp("features"), model.backbone))


@pytest.mark.slow
def test_the_generated_world_is_ranked_as_literally(small, tmp_path):
    model = trainable()
    backend = small.backend("trained", model, extractor(tmp_path, model.backbone))
    query = shapes_cir("test", 20, distractors=5).queries[0]
    image = query.image.open()
    with torch.inference_mode():
        embedded = model.embed_queries(image_batch([image], model.preprocess), [query.text])[0]
        images = image_batch([item.image for item in small.items], model.preprocess)
        scores = (model.embed_gallery(images) @ embedded).tolist()
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    gone = small.items[order[2]].id
    expected = [small.items[place].id for place in order if small.items[place].id != gone]
    request = {"image": image, "text": query.text, "exclude": (gone,)}
    found = backend.search(0, 30, **request)
    assert [one.id for one in found[:10]] == expected[:10]
    assert [one.score for one in found[:2]] == pytest.approx([scores[place] for place in order[:2]], abs=1e-5)
    assert [one.id for one in backend.search(12, 5, **request)] == [one.id for one in found[12:17]]
    assert len(backend.search(len(backend) - 3, 10, image, query.text)) == 3


@pytest.mark.slow
def test_images_of_the_generated_world_are_embedded_once(small, tmp_path):
    for _ in range(2):
        backbone = LinearBackbone()
        small.backend("trained", trainable(backbone=backbone), extractor(tmp_path, backbone))
        seen = sum(backbone.image_batches)
        assert seen in (0, len({item.image.key for item in small.items}), len(small.items))
    assert seen == 0


@pytest.mark.slow
def test_the_generated_world_is_that_of_both_benchmarks(small, synthetic):
    cir, sbir = shapes_cir("test", 20, distractors=5).gallery, shapes_sbir("test", 1, gallery=20).gallery
    assert [item.image for item in small.items] == [item.image for item in (*cir, *sbir)]
    assert len({item.id for item in small.items}) == len(synthetic) == len(cir) + len(sbir)
    last = small.items[-1]
    one = synthetic.item(last.id)
    assert (one.title, one.details, one.path) == (last.caption, {"class": last.label}, None)
    images = (decode_thumbnail(one.thumbnail), last.image.open(), synthetic.image(one.id))
    assert len({image.tobytes() for image in images}) == 1
    for ask in (synthetic.item, synthetic.image):
        with pytest.raises(DataError):
            ask("photo-99999")
    samples = [[one.id for one in synthetic.sample(9, seed)] for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]


def test_the_generated_world_is_filtered_and_refined(small, synthetic):
    labels = {item.id: item.label for item in small.items}
    captions = {item.id: item.caption for item in small.items}
    label = next(label for label in labels.values() if label)
    found = synthetic.search(0, 100, None, "red", where=f"class = '{label}'")
    assert {one.id for one in found} == {name for name, given in labels.items() if given == label}
    found = synthetic.search(0, 1000, None, "red", where=synthetic.example)
    assert {one.id for one in found} == {n for n in labels if labels[n] == "star" or "red" in captions[n]}
    liked, disliked = small.items[3].id, small.items[4].id
    found = synthetic.search(0, len(synthetic), liked=(liked,), disliked=(disliked,))
    assert (found[0].id, len(found)) == (liked, len(synthetic) - 1)
    assert disliked not in {one.id for one in found}


def test_models_are_named_and_the_bundled_one_has_a_warning(backend):
    model = trainable("transagg", "union")
    model.backbone.name = "tiny"
    assert model_name(model) == "tiny, transagg + union"
    tiny = GalleryBackend(Gallery(MemoryIndex(model.backbone.dim), model, "a.lance"), "a.lance")
    assert (tiny.sketch_scale, backend.sketch_scale) == (0.55, 1.0)
    assert "only knows generated shapes" in tiny.warning
