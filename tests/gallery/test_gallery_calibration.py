"""A calibrated gallery against the calibration of an evaluation, on every engine."""

import pytest
import torch
from torch.nn.functional import normalize

from index_locations import MILVUS, new_location, random_rows
from small_gallery import COUNT, agrees, embed_images, names, noise_image, slow_ranking
from small_world import DIM, trainable
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation.calibration import calibrate
from union_igrot.gallery.engines import Rows
from union_igrot.gallery.gallery import Gallery
from union_igrot.images.transforms import image_batch

WEIGHT = 2.0  # so large that it changes the order


def training_queries(count=9, seed=3):
    return normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1).half().float()


@pytest.fixture(scope="module")
def calibrated():
    model = trainable("transagg", "residual").eval()
    model.calibration = {"cir": training_queries(), "sbir": training_queries(7, 4)}
    return model


def add_images(gallery, numbers=range(COUNT)):
    return gallery.add([noise_image(number) for number in numbers], [f"p{number}" for number in numbers])


@torch.inference_mode()
def evaluated_ranking(model, task, query):
    """Score every image as a calibrated evaluation does; best first."""
    rows = model.embed_gallery(image_batch([noise_image(n) for n in range(COUNT)], model.preprocess))
    wide, items, _ = calibrate(model, task, query[None], rows, WEIGHT)
    return sorted(zip(names(), (wide @ items.T)[0].tolist(), strict=True), key=lambda pair: -pair[1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["memory", "lance", MILVUS])
def test_scores_are_those_of_an_evaluation(calibrated, engine, tmp_path):
    location = new_location(engine, tmp_path)
    with Gallery.open(location.uri, calibrated, calibration=WEIGHT) as gallery:
        add_images(gallery)
        location.opened.append(gallery.index)
        assert gallery.describe()["calibration"] == WEIGHT
        (sketch,) = embed_images(calibrated, [40])
        assert agrees(gallery.search(noise_image(40), k=COUNT), evaluated_ranking(calibrated, "sbir", sketch))
        (composed,) = embed_images(calibrated, [40], ["small"])
        expected = evaluated_ranking(calibrated, "cir", composed)
        assert agrees(gallery.search(noise_image(40), "small", k=COUNT), expected)
        assert [name for name, _ in expected] != [name for name, _ in slow_ranking(calibrated, composed)]
        # Text alone, and results alone, are of neither task.
        with torch.inference_mode():
            (text,) = calibrated.embed_queries(None, ["small"])
        assert agrees(gallery.search(text="small", k=COUNT), slow_ranking(calibrated, text))
        (liked,) = calibrated.encode_gallery([noise_image(2)])
        assert agrees(gallery.search(liked="p2", k=COUNT), slow_ranking(calibrated, liked))
        # The calibrated scores of terms add up.
        length = float((2 * sketch + composed - text).norm())
        parts = (evaluated_ranking(calibrated, task, one) for task, one in (("sbir", sketch), ("cir", composed)))
        first, second, third = (dict(part) for part in (*parts, slow_ranking(calibrated, text)))
        added = [(name, (2 * first[name] + second[name] - third[name]) / length) for name in first]
        found = gallery.search(terms=[(noise_image(40), 2), (noise_image(40), "small"), ("small", -1)], k=COUNT)
        assert agrees(found, sorted(added, key=lambda pair: -pair[1]))
    location.remove()


@pytest.mark.slow
def test_an_index_keeps_its_calibration(calibrated, tmp_path):
    pytest.importorskip("lance", reason="the extra of lance is not installed")
    uri = tmp_path / "photos.lance"
    with Gallery.open(uri, calibrated, calibration=WEIGHT) as gallery:
        add_images(gallery, range(6))
    other = trainable("transagg", "residual").eval()  # the same heads, without training queries
    with Gallery.open(uri, other) as gallery:
        assert len(gallery.search(noise_image(40))) == 6  # a search needs none
        with pytest.raises(CheckpointError, match="other training queries"):
            add_images(gallery, range(6, 7))
    with Gallery.open(uri, calibrated, calibration=WEIGHT) as gallery:
        add_images(gallery, range(6, COUNT))
        (sketch,) = embed_images(calibrated, [40])
        assert agrees(gallery.search(noise_image(40), k=COUNT), evaluated_ranking(calibrated, "sbir", sketch))
    for create in (True, False):
        with pytest.raises(ConfigError, match=r"calibration=2, not 0;"):
            Gallery.open(uri, calibrated, calibration=0.0, create=create)


def test_a_model_of_one_task_calibrates_that_task(tmp_path):
    model = trainable("transagg", "residual").eval()
    model.calibration = {"cir": training_queries()}
    gallery = Gallery.open("memory:", model, calibration=WEIGHT)
    add_images(gallery)
    (sketch,) = embed_images(model, [40])
    assert agrees(gallery.search(noise_image(40), k=COUNT), slow_ranking(model, sketch))


@pytest.mark.parametrize(
    ("queries", "weight", "error", "message"),
    [
        (None, 0.25, DataError, "no training queries for calibration"),
        ({"cir": torch.ones(1, DIM)}, -1.0, ConfigError, r"calibration: -1\.0"),
        ({"cir": torch.ones(1, DIM)}, float("nan"), ConfigError, "calibration: nan"),
    ],
)
def test_mistakes(queries, weight, error, message):
    model = trainable("transagg", "residual").eval()
    model.calibration = queries
    with pytest.raises(error, match=message):
        add_images(Gallery.open("memory:", model, calibration=weight))


def test_the_approximate_index_finds_what_exact_search_finds(tmp_path):
    location = new_location("lance", tmp_path)
    rows = random_rows([str(n) for n in range(600)], dim=DIM)
    bias = -0.25 * torch.rand(600, 2, generator=torch.Generator().manual_seed(1))
    wide = location.create(DIM + 2)
    wide.upsert(Rows(rows.ids, torch.cat([rows.vectors, bias], dim=1), {}))
    wide.optimize()
    queries = torch.cat([random_rows(["q"] * 8, dim=DIM, seed=2).vectors, torch.eye(2).repeat(4, 1)], dim=1)
    # So few rows have fewer partitions than are searched.
    for exact, near in zip(*(wide.search(queries, 10, mode=mode) for mode in ("exact", "ann")), strict=True):
        assert exact.ids == near.ids
    location.remove()
