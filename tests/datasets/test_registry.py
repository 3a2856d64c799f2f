"""Names, options and folders of the one call that reads them all."""

import inspect

import official
import pytest

from union_igrot.datasets.prompts import PROMPTS
from union_igrot.datasets.registry import BENCHMARKS, load_benchmark, load_training, parts, splits
from union_igrot.errors import ConfigError


def test_names():
    assert set(BENCHMARKS) == set(official.WRITERS) == set(PROMPTS)
    with pytest.raises(ConfigError, match="benchmark is 'nope'; choose one of fashioniq, cirr, circo"):
        load_benchmark("nope", "/")
    with pytest.raises(ConfigError, match="choose one of fashioniq"):
        parts("nope")
    with pytest.raises(ConfigError, match="training data is 'circo'; choose one of fashioniq, cirr, lasco, llavasco"):
        load_training("circo", "/")


def test_split_option_and_preset(tmp_path):
    official.cirr(tmp_path, splits=("val",))
    with pytest.raises(ConfigError, match="split of cirr is 'dev'; choose one of val, train, test1"):
        load_benchmark("cirr", tmp_path, split="dev")
    with pytest.raises(ConfigError, match="cirr has no option 'stride'; it has prompt, preset"):
        load_benchmark("cirr", tmp_path, stride=2)
    with pytest.raises(ConfigError, match="prompt is 3; cirr takes str or None"):
        load_benchmark("cirr", tmp_path, prompt=3)
    with pytest.raises(ConfigError, match="stride is True; llavasco takes int or None"):
        load_benchmark("llavasco", tmp_path, stride=True)
    with pytest.raises(ConfigError, match="preset is 'mine'; choose one of official, union_reference"):
        load_benchmark("cirr", tmp_path, preset="mine")
    assert splits("cirr") == ("val", "train", "test1")


def test_root_falls_back_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("UNION_DATA", raising=False)
    with pytest.raises(ConfigError, match="root of cirr is not given and UNION_DATA is not set"):
        load_benchmark("cirr")
    monkeypatch.setenv("UNION_DATA", str(tmp_path))
    official.cirr(tmp_path / "cirr")
    assert len(load_benchmark("cirr").queries) == 6
    official.training_sketchy(tmp_path / "sketchy")
    assert len(load_training("training_sketchy").triplets) == 6


@pytest.mark.parametrize("name", official.WRITERS)
def test_parts_are_options(tmp_path, name):
    official.WRITERS[name](tmp_path, with_images=False)
    found = [load_benchmark(name, tmp_path, check_images=False, **part) for part in parts(name)]
    assert len({(benchmark.name, benchmark.split) for benchmark in found}) == len(found)
    listed = inspect.signature(load_benchmark).parameters
    assert list(listed)[:4] == ["name", "root", "split", "check_images"]


@pytest.mark.parametrize("name", ["fashioniq", "cirr", "lasco", "llavasco", "training_sketchy"])
def test_training_sets(tmp_path, name):
    options = {"category": "dress"} if name == "fashioniq" else {}
    given = {} if name in ("llavasco", "training_sketchy") else {"splits": ("train",)}
    official.WRITERS[name](tmp_path, **given)
    training = load_training(name, tmp_path, **options)
    assert training.triplets
    assert all(triplet.image.is_file() and triplet.target.is_file() for triplet in training.triplets)
    assert {triplet.task for triplet in training.triplets} == {"sbir" if name == "training_sketchy" else "cir"}


def test_averaged_wordings_are_not_trained_on(tmp_path):
    official.WRITERS["fashioniq"](tmp_path, splits=("train",))
    with pytest.raises(ConfigError, match=r"'searle.* averages the embeddings of several wordings.*to train with"):
        load_training("fashioniq", tmp_path, category="dress", prompt="searle")
