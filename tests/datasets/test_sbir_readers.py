"""Sketch benchmarks: lists, classes, and pairs to train on."""

from collections import Counter

import official
import pytest

from union_igrot.datasets.annotations import read_classes, read_labeled_paths
from union_igrot.datasets.loading import load_benchmark, load_training
from union_igrot.errors import ConfigError, DataError


def test_paths_hold_blanks(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("./hot air balloon/xx yy.png 12 \n\nimages/cow/304. cow-1.jpeg 1\n")
    rows = read_labeled_paths(file)
    assert [(row.path, row.label) for row in rows] == [
        ("hot air balloon/xx yy.png", 12),
        ("images/cow/304. cow-1.jpeg", 1),
    ]
    assert rows[1].place == f"{file}, line 3"
    file.write_text("hot air balloon 3\ncat 0\n")
    assert read_classes(file) == {3: "hot air balloon", 0: "cat"}


@pytest.mark.parametrize(
    ("name", "split", "primary"),
    [
        ("sketchy", "zeroshot1", "mAP"),
        ("sketchy", "zeroshot0", "mAP@200"),
        ("tuberlin", "test", "mAP"),
        ("quickdraw", "test", "mAP"),
    ],
)
def test_relevance_is_the_class(tmp_path, name, split, primary):
    official.WRITERS[name](tmp_path)
    benchmark = load_benchmark(name, tmp_path, split=split)
    assert (benchmark.task, benchmark.protocol.primary) == ("sbir", primary)
    assert benchmark.protocol.metrics == ("mAP", "mAP@200", "P@100", "P@200")
    assert (len(benchmark.queries), len(benchmark.gallery)) == (9, 12)
    labels = {item.id: item.label for item in benchmark.gallery}
    for query in benchmark.queries:
        assert set(query.targets) == {name for name, label in labels.items() if label == query.label}
    assert len({id(query.targets) for query in benchmark.queries}) == 3  # one tuple a class
    assert {query.label for query in benchmark.queries} == set(official.CLASSES)


def test_the_authors_average_precision(tmp_path):
    official.sketchy(tmp_path)
    strict, lenient = (load_benchmark("sketchy", tmp_path, preset=p).protocol for p in ("official", "union_reference"))
    assert (strict.ap_norm, strict.ap_rule) == ("min", "step")
    assert (lenient.name, lenient.ap_norm, lenient.ap_rule) == ("union_reference", "hits", "trapezoid")
    assert "lenient" in lenient.note


def test_a_class_of_sketches_needs_photos(tmp_path):
    official.tuberlin(tmp_path, with_images=False)
    file = tmp_path / "zeroshot/ImageResized_ready_filelist_zero.txt"
    file.write_text(
        "".join(line for line in file.read_text().splitlines(True) if not line.startswith("ImageResized_ready/bell"))
    )
    with pytest.raises(DataError, match=r"png_ready_filelist_zero\.txt, line 7: class 'bell' has no photo"):
        load_benchmark("tuberlin", tmp_path, check_images=False)


def test_the_authors_training_pairs(tmp_path):
    official.training_sketchy(tmp_path)
    training = load_training("training_sketchy", tmp_path)
    assert len(training.triplets) == 6
    first = training.triplets[0]
    assert (first.text, first.group, first.task) == ("a real image of sketch", "cat", "sbir")
    assert first.image.name == "s0.png"
    assert first.target.name == "p0.jpg"
    assert training.classes == ("cat",)
    (tmp_path / "zeroshot1/training_sketchy.txt").rename(tmp_path / "zeroshot1/sketchy_train.txt")
    assert load_training("training_sketchy", tmp_path).triplets == training.triplets
    (tmp_path / "zeroshot1/sketchy_train.txt").unlink()
    with pytest.raises(DataError, match="build=5000"):
        load_training("training_sketchy", tmp_path)


def test_drawn_training_pairs(tmp_path):
    official.sketchy(tmp_path)
    training = load_training("training_sketchy", tmp_path, build=36, seed=4)
    assert training == load_training("training_sketchy", tmp_path, build=36, seed=4)
    assert training != load_training("training_sketchy", tmp_path, build=36, seed=5)
    assert set(Counter(triplet.group for triplet in training.triplets).values()) == {12}
    assert set(Counter(triplet.image for triplet in training.triplets).values()) == {4}
    assert set(Counter(triplet.target for triplet in training.triplets).values()) == {3}
    assert all(
        triplet.image.parent.name == triplet.target.parent.name == triplet.group for triplet in training.triplets
    )
    assert training.classes == tuple(sorted(official.CLASSES))
    assert "train" in training.triplets[0].image.name  # the training lists, not the unseen classes'
    with pytest.raises(ConfigError, match=r"build .*: 0"):
        load_training("training_sketchy", tmp_path, build=0)
    with pytest.raises(ConfigError, match="one of zeroshot1, zeroshot0"):
        load_training("training_sketchy", tmp_path, build=1, lists="zeroshot2")
