"""What of a test a model was trained on: kept with the model, counted, and never guessed."""

import json
from dataclasses import replace

import pytest

from small_world import LinearBackbone, cir_benchmark, extractor, trainable
from union_igrot.errors import CheckpointError
from union_igrot.evaluation.evaluate import average_parts, evaluate_benchmark, seen_images
from union_igrot.evaluation.results import SeenImages
from union_igrot.images.identity import image_identities
from union_igrot.models.model import IGROTModel, load


@pytest.fixture
def model():
    return trainable("sum", "frozen")


def test_images_are_counted_on_both_sides(model):
    benchmark = cir_benchmark(queries=12, gallery=20)
    assert seen_images(model, benchmark) is None
    model.training_images = frozenset()
    assert seen_images(model, benchmark) == SeenImages(0, 0)
    model.training_images = image_identities(item.image for item in benchmark.gallery[:5])
    first = {item.image for item in benchmark.gallery[:5]}
    expected = sum(query.image in first for query in benchmark.queries)
    assert expected > 0
    assert seen_images(model, benchmark) == SeenImages(expected, 5)


def test_they_are_saved_and_loaded_with_the_model(model, tmp_path):
    model.training_images = image_identities(item.image for item in cir_benchmark().gallery)
    model.save(tmp_path / "m")
    assert IGROTModel.load(tmp_path / "m", model.backbone).training_images == model.training_images
    named = (tmp_path / "m" / "training_images.txt").read_text().split()
    assert named == sorted(model.training_images)
    (tmp_path / "m" / "training_images.txt").write_text("\n".join(named[:-1]))
    with pytest.raises(CheckpointError, match=r"training_images\.txt lists 30 images .*31"):
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


def test_results_of_trained_heads_hold_it_and_a_backbone_alone_has_none(model, tmp_path):
    benchmark = cir_benchmark(queries=8, gallery=10)
    model.training_images = image_identities([benchmark.gallery[0].image])
    filled = extractor(tmp_path, model.backbone)
    found = evaluate_benchmark(model, benchmark, filled)
    assert [one.seen_images for one in found.methods[:-1]] == [None] * 4
    assert found.methods[-1].seen_images.gallery == 1
    alone = evaluate_benchmark(model, benchmark, filled, trained=False)
    assert list(alone.scored[0].scores) == ["chance", "image", "text", "sum"]
    assert not any(one.differences for one in alone.methods)
    assert [one.metrics for one in alone.methods] == [one.metrics for one in found.methods[:-1]]


def test_a_mean_over_parts_counts_a_shared_gallery_once(tmp_path):
    backbone = LinearBackbone()
    model, filled = trainable("sum", "frozen", backbone), extractor(tmp_path, backbone)
    one = cir_benchmark(queries=8, gallery=10, name="a")
    model.training_images = image_identities([one.gallery[0].image, one.gallery[1].image])
    first = evaluate_benchmark(model, one, filled)
    same = evaluate_benchmark(model, replace(one, name="b"), filled)
    methods = average_parts([first, same], "both").methods
    shared = methods[-1]
    assert (shared.n_queries, shared.n_gallery) == (16, 10)
    assert shared.seen_images == SeenImages(2 * first.methods[-1].seen_images.queries, 2)
    assert shared.parts == ("a", "b")
    assert shared.metrics["mAP"] == pytest.approx(first.methods[-1].metrics["mAP"])
    assert set(shared.differences) == {"chance", "image", "text", "sum"}
    mean, low, high = shared.differences["image"]["mAP"]
    assert mean == pytest.approx(shared.metrics["mAP"] - methods[1].metrics["mAP"])
    assert low <= mean <= high
    assert list(shared.to_dict())[-3:] == ["arithmetic", "gain95", "parts"]


def test_a_mean_over_parts_of_their_own_adds_their_galleries(model, tmp_path):
    filled = extractor(tmp_path, model.backbone)
    parts = [evaluate_benchmark(model, cir_benchmark(8, size, size, name=str(size)), filled) for size in (10, 12)]
    mean = average_parts(parts, "mean").methods[-1]
    assert mean.n_gallery == 22
    assert mean.seen_images is None
