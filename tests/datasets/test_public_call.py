"""Every benchmark through the public names, with the options as the documentation spells them."""

import official
import pytest

import union_igrot

CALLS = [
    ("fashioniq", "val", {"category": "dress", "gallery": "original"}),
    ("fashioniq", "val", {"category": "toptee", "gallery": "val"}),
    ("cirr", "val", {}),
    ("cirr", "test1", {}),
    ("circo", "val", {}),
    ("circo", "test", {}),
    ("genecis", "val", {"task": "focus_object"}),
    ("genecis", "val", {"task": "change_attribute"}),
    ("lasco", "val", {}),
    ("llavasco", "val", {}),
    ("llavasco", "train", {"stride": 2, "limit": 7}),
    ("dtin", "val", {"domain": "cartoon"}),
    ("dtin", "val", {"domain": "sculpture"}),
    ("sketchy", "zeroshot0", {}),
    ("sketchy", "zeroshot1", {}),
    ("tuberlin", "test", {}),
    ("quickdraw", "test", {}),
    ("training_sketchy", "train", {}),
    ("training_sketchy", "train", {"build": 5}),
]


def test_all_eleven_are_called():
    assert {name for name, _, _ in CALLS} == set(official.WRITERS)


@pytest.mark.parametrize(("name", "split", "options"), CALLS)
def test_the_public_call_gives_queries_gallery_and_protocol(tmp_path, name, split, options):
    official.WRITERS[name](tmp_path, with_images=False)
    benchmark = union_igrot.load_benchmark(name, str(tmp_path), split=split, check_images=False, **options)
    assert isinstance(benchmark, union_igrot.Benchmark)
    assert benchmark.split == split
    assert benchmark.protocol.metrics
    known = {item.id for item in benchmark.gallery}
    for query in benchmark.queries:
        assert isinstance(query, union_igrot.Query)
        assert set(query.targets) <= known
        assert set(query.exclude) <= known
        assert set(query.subset or ()) <= known
    assert any(query.targets for query in benchmark.queries) == (
        split not in ("test1",) and (name, split) != ("circo", "test")
    )


def test_pictures_are_looked_for_unless_told_not_to(tmp_path):
    official.circo(tmp_path, with_images=False)
    with pytest.raises(union_igrot.UnionError, match="images are missing"):
        union_igrot.load_benchmark("circo", tmp_path, split="val")
    assert union_igrot.load_benchmark("circo", tmp_path, "val", False).gallery


def test_the_public_training_call_gives_triplets(tmp_path):
    official.training_sketchy(tmp_path)
    drawn = union_igrot.load_training("training_sketchy", tmp_path, build=5, seed=1)
    assert len(drawn.triplets) == 5
    assert drawn.classes
