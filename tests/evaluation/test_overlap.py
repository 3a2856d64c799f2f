"""What of a test a model was trained on: kept with the model, counted, and never guessed."""

import json
from dataclasses import replace

import pytest

from small_world import LinearBackbone, cir_benchmark, encoder, trainable
from union_igrot.errors import CheckpointError
from union_igrot.evaluation.evaluate import combine, evaluate, seen_images
from union_igrot.images.identity import image_identities
from union_igrot.models.model import IGROTModel, load


@pytest.fixture
def model():
    return trainable("sum", "frozen")


def test_pictures_are_counted_on_both_sides(model):
    benchmark = cir_benchmark(queries=12, gallery=20)
    assert seen_images(model, benchmark) is None
    model.training_images = frozenset()
    assert seen_images(model, benchmark) == {"queries": 0, "gallery": 0}
    model.training_images = image_identities(item.image for item in benchmark.gallery[:5])
    first = {item.image for item in benchmark.gallery[:5]}
    expected = sum(query.image in first for query in benchmark.queries)
    assert expected > 0
    assert seen_images(model, benchmark) == {"queries": expected, "gallery": 5}


def test_they_are_saved_and_loaded_with_the_model(model, tmp_path):
    model.training_images = image_identities(item.image for item in cir_benchmark().gallery)
    model.save(tmp_path / "m")
    assert IGROTModel.load(tmp_path / "m", model.backbone).training_images == model.training_images
    named = (tmp_path / "m" / "training_images.txt").read_text().split()
    assert named == sorted(model.training_images)
    (tmp_path / "m" / "training_images.txt").write_text("\n".join(named[:-1]))
    with pytest.raises(CheckpointError, match=r"training_images\.txt names 30 images, model\.json 31"):
        IGROTModel.load(tmp_path / "m", model.backbone)
    (tmp_path / "m" / "training_images.txt").unlink()
    assert IGROTModel.load(tmp_path / "m", model.backbone).training_images is None
    model.training_images = None
    model.save(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "model.json").read_text())["training_images"] is None
    assert IGROTModel.load(tmp_path / "other", model.backbone).training_images is None


def test_the_embedded_model_says_what_it_was_trained_on():
    tiny = load("tiny")
    assert tiny.training_images is not None
    assert len(tiny.training_images) == 15_000


def test_rows_of_a_training_hold_it_and_a_backbone_alone_has_no_such_row(model, tmp_path):
    benchmark = cir_benchmark(queries=8, gallery=10)
    model.training_images = image_identities([benchmark.gallery[0].image])
    filled = encoder(tmp_path, model.backbone)
    found = evaluate(model, benchmark, filled)
    assert [row["seen_images"] for row in found.rows[:-1]] == [None] * 4
    assert found.rows[-1]["seen_images"]["gallery"] == 1
    alone = evaluate(model, benchmark, filled, trained=False)
    assert list(alone.scores) == ["chance", "image", "text", "sum"]
    assert not any("gain95" in row for row in alone.rows)
    assert [row["metrics"] for row in alone.rows] == [row["metrics"] for row in found.rows[:-1]]


def test_a_mean_over_parts_counts_a_shared_gallery_once(tmp_path):
    backbone = LinearBackbone()
    model, filled = trainable("sum", "frozen", backbone), encoder(tmp_path, backbone)
    one = cir_benchmark(queries=8, gallery=10, name="a")
    model.training_images = image_identities([one.gallery[0].image, one.gallery[1].image])
    first = evaluate(model, one, filled)
    same = evaluate(model, replace(one, name="b"), filled)
    shared = combine([first, same], "both")[-1]
    assert (shared["n_queries"], shared["n_gallery"]) == (16, 10)
    assert shared["seen_images"] == {"queries": 2 * first.rows[-1]["seen_images"]["queries"], "gallery": 2}
    assert shared["parts"] == ["a", "b"]
    assert shared["metrics"]["mAP"] == pytest.approx(first.rows[-1]["metrics"]["mAP"])
    assert set(shared["gain95"]) == {"chance", "image", "text", "sum"}
    mean, low, high = shared["gain95"]["image"]["mAP"]
    rows = combine([first, same], "both")
    assert mean == pytest.approx(rows[-1]["metrics"]["mAP"] - rows[1]["metrics"]["mAP"])
    assert low <= mean <= high


def test_a_mean_over_parts_of_their_own_adds_their_galleries(model, tmp_path):
    filled = encoder(tmp_path, model.backbone)
    parts = [evaluate(model, cir_benchmark(8, size, size, name=str(size)), filled) for size in (10, 12)]
    rows = combine(parts, "mean")
    assert rows[-1]["n_gallery"] == 22
    assert rows[-1]["seen_images"] is None
