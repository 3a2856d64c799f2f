"""Every benchmark by its name, with the documented options, and what is held out for validation."""

import official
import pytest

from union_igrot.datasets.loading import hold_out, load_benchmark, load_parts, load_training, load_training_parts
from union_igrot.errors import ConfigError, DataError
from union_igrot.synthetic.shapes import shapes_training
from union_igrot.types import TrainingSet


def test_root_falls_back_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("UNION_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"root of cirr.* UNION_DATA"):
        load_benchmark("cirr")
    monkeypatch.setenv("UNION_DATA", str(tmp_path))
    official.cirr(tmp_path / "cirr")
    assert len(load_benchmark("cirr").queries) == 6
    official.training_sketchy(tmp_path / "sketchy")
    assert len(load_training("training_sketchy").triplets) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", official.WRITERS)
def test_parts(tmp_path, name):
    official.WRITERS[name](tmp_path, with_images=False)
    found = load_parts(name, tmp_path, check_images=False)
    assert len(found) == {"fashioniq": 3, "genecis": 4, "dtin": 4, "patterncom": 6, "circled": 5, "mmeb": 2}.get(
        name, 1
    )
    assert len({benchmark.name for benchmark in found}) == len(found)


@pytest.mark.parametrize("name", ["fashioniq", "cirr", "lasco", "llavasco", "training_sketchy"])
def test_training_sets(tmp_path, name):
    options = {"category": "dress"} if name == "fashioniq" else {}
    given = {} if name in ("llavasco", "training_sketchy") else {"splits": ("train",)}
    official.WRITERS[name](tmp_path, **given)
    training = load_training(name, tmp_path, **options)
    assert training.triplets
    assert all(triplet.image.is_file() and triplet.target.is_file() for triplet in training.triplets)
    assert {triplet.task for triplet in training.triplets} == {"sbir" if name == "training_sketchy" else "cir"}


def test_training_parts_and_validation(tmp_path):
    official.fashioniq(tmp_path, splits=("train",))
    whole, (held,) = load_training_parts("fashioniq", tmp_path, gallery="val")  # an option of the evaluation alone
    assert (len(whole.triplets) + len(held.queries), held.split) == (15, "held out")
    one, (held,) = load_training_parts("fashioniq", tmp_path, category="dress")
    assert len(one.triplets) + len(held.queries) == 5
    official.llavasco(tmp_path)
    training, (val,) = load_training_parts("llavasco", tmp_path, stride=2)
    assert (len(training.triplets), len(val.queries), val.split) == (5, 5, "val")


def test_averaged_texts_are_not_trained_on(tmp_path):
    official.WRITERS["fashioniq"](tmp_path, splits=("train",))
    with pytest.raises(ConfigError, match=r"'searle.* averages the embeddings of several texts"):
        load_training("fashioniq", tmp_path, category="dress", prompt="searle")


@pytest.mark.slow
@pytest.mark.parametrize(("triplets", "pairs", "task"), [(200, 0, "cir"), (0, 200, "sbir")])
def test_groups_are_held_out(triplets, pairs, task):
    whole = shapes_training(triplets, pairs)
    rest, held = hold_out(whole, 0.2)
    kept = {triplet.group for triplet in rest.triplets}
    labels = {item.id: item.label for item in held.gallery}
    out = set(labels.values()) - {None}
    assert not kept & out
    assert len(rest.triplets) + len(held.queries) == 200
    assert 0.2 * 200 <= len(held.queries) <= 0.5 * 200
    assert held.task == task
    assert set(rest.classes) == {name for name in whole.classes if name not in out}
    for query in held.queries:
        assert {labels[name] for name in query.targets} == {labels[query.targets[0]]}
        assert len(query.targets) == sum(label == labels[query.targets[0]] for label in labels.values())
        assert (query.text is None) == (task == "sbir")
        assert len(query.exclude) == (1 if task == "cir" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "held"), [(3, 1), (4, 2), (20, 2)])
def test_two_classes_of_sketches_are_held_out_if_two_remain(classes, held):
    whole = shapes_training(0, 400)
    few = [triplet for triplet in whole.triplets if triplet.group in whole.classes[:classes]]
    _, benchmark = hold_out(TrainingSet("few", few, whole.classes[:classes]), 0.01)
    assert len({item.label for item in benchmark.gallery}) == min(held, len(whole.classes))


def test_one_group_cannot_be_split():
    whole = shapes_training(0, 40)
    one = TrainingSet("one", [t for t in whole.triplets if t.group == whole.triplets[0].group])
    with pytest.raises(DataError, match="cannot be split"):
        hold_out(one)
