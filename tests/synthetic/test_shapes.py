"""The generated benchmarks against a literal reading of every image and text."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from test_scenes import plain, satisfying

from union_igrot.errors import DataError
from union_igrot.synthetic.scenes import EDIT_KINDS, HELD_OUT_SHAPES, SEEN_SHAPES, SHAPES, Scene, Thing
from union_igrot.synthetic.shapes import ShapesImage, shapes_cir, shapes_sbir, shapes_training

DIGEST = """
import hashlib
from union_igrot.synthetic.shapes import shapes_cir, shapes_sbir, shapes_training
digest = hashlib.sha256()
for bench in (shapes_cir("val", 12, 5, distractors=9), shapes_sbir("test", 21, 5, 23)):
    for query in bench.queries:
        digest.update(repr((query.id, query.image.key, query.text, query.targets, query.subset, query.tags)).encode())
        digest.update(query.image.open().tobytes())
    for item in bench.gallery:
        digest.update(repr((item.id, item.image.key, item.label, item.caption)).encode())
        digest.update(item.image.open().tobytes())
for triplet in shapes_training(20, 10, 5).triplets:
    digest.update(repr((triplet.image.key, triplet.text, triplet.target.key, triplet.group, triplet.task)).encode())
print(digest.hexdigest())
"""
GOLDEN = "f24e118d78dce90d8ab38166ef6bdf75be74512831b6295c643c3175d116b09e"


@pytest.fixture(scope="module")
def cir():
    return shapes_cir("test", queries=120, seed=3, distractors=40)


@pytest.fixture(scope="module")
def sbir():
    return shapes_sbir("test", queries=120, seed=3, gallery=100)


def scenes_of(benchmark):
    return [x.image.scene for x in (*benchmark.queries, *benchmark.gallery)]


@pytest.mark.slow
def test_same_seed_same_world_for_any_hash_seed():
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == GOLDEN


@pytest.mark.slow
def test_targets_are_all_images_that_satisfy_the_text(cir):
    shown = {item.id: item.image.scene for item in cir.gallery}
    several = 0
    for query in cir.queries:
        targets, rules = satisfying(query.text, {plain(query.image.scene)})
        targets -= {plain(query.image.scene)}
        right = {name for name, scene in shown.items() if plain(scene) in targets}
        assert set(query.targets) == right
        assert len(query.targets) == len(right) > 0
        assert query.tags == (("two changes",) if len(rules) == 2 else query.tags)
        several += len(right) > 1
    assert several > len(cir.queries) / 3
    assert {tag for query in cir.queries for tag in query.tags} == {*EDIT_KINDS, "two changes"}


@pytest.mark.slow
def test_reference_is_excluded_and_rendered_again(cir):
    images = {item.id: item.image for item in cir.gallery}
    for query in cir.queries:
        (reference,) = query.exclude
        assert images[reference] == query.image
        again = [name for name, image in images.items() if image.scene == query.image.scene and name != reference]
        assert again
        assert not set(again) & set(query.targets)
        assert all(images[name].key != query.image.key for name in again)


def test_subsets_hold_six_with_the_reference_and_one_target(cir):
    images = {item.id: item.image for item in cir.gallery}
    full = 0
    for query in cir.queries:
        assert len(set(query.subset)) == len(query.subset) == 6
        assert query.exclude[0] in query.subset
        assert len(set(query.targets) & set(query.subset)) == 1
        # The same scene in another image is the hardest negative.
        assert sum(images[name].scene == query.image.scene for name in query.subset) >= 2
        near = [n for n in query.subset if shared(images[n].scene, query.image.scene)]
        full += len(near) >= 4
    assert full > 0.6 * len(cir.queries)


def shared(scene, reference):
    """Whether a scene is the reference but for a thing or the background."""
    return scene.background == reference.background or set(scene.things) & set(reference.things)


def test_references_have_their_number_of_edits(cir):
    counts = Counter(query.exclude for query in cir.queries)
    assert set(counts.values()) == {2}
    assert len(shapes_cir("test", queries=7, edits=3, distractors=9).queries) == 7


@pytest.mark.slow
def test_gallery_is_of_the_split_and_of_unique_images(cir, sbir):
    for benchmark in (cir, sbir):
        assert {scene.split for scene in scenes_of(benchmark)} == {"test"}
        keys = [item.image.key for item in benchmark.gallery]
        assert len(set(keys)) == len(keys)
        assert {item.image.style for item in benchmark.gallery} == {"photo"}
        for item in benchmark.gallery:
            assert all(t.shape in item.caption for t in item.image.scene.things)


def test_sketch_queries_find_all_photos_of_their_shape(sbir):
    for query in sbir.queries:
        (thing,) = query.image.scene.things
        assert query.image.style == "sketch"
        assert (query.label, query.text, query.exclude, query.subset) == (thing.shape, None, (), None)
        assert query.tags == (("held-out",) if thing.shape in HELD_OUT_SHAPES else ("seen",))
        right = [item.id for item in sbir.gallery if [t.shape for t in item.image.scene.things] == [thing.shape]]
        assert list(query.targets) == right
        assert {item.label for item in sbir.gallery if item.id in right} == {thing.shape}
    assert {query.label for query in sbir.queries} == set(SHAPES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_held_out_shapes_are_sketched_in_test_alone(split):
    benchmark = shapes_sbir(split, queries=60, gallery=30)
    assert {query.label for query in benchmark.queries} == set(SEEN_SHAPES)
    assert {item.label for item in benchmark.gallery} == set(SEEN_SHAPES)


def test_training_samples():
    data = shapes_training(100, 50, seed=2)
    assert [t.task for t in data.triplets] == ["cir"] * 100 + ["sbir"] * 50
    assert data.classes == SEEN_SHAPES
    for sample in data.triplets:
        assert sample.image.scene.split == sample.target.scene.split == "train"
        assert (sample.image.style, sample.target.style) == ("photo" if sample.task == "cir" else "sketch", "photo")
        if sample.task == "cir":
            assert plain(sample.target.scene) in satisfying(sample.text, {plain(sample.image.scene)})[0]
            assert sample.group == sample.target.scene.code
        else:
            (drawn,), (shown,) = sample.image.scene.things, sample.target.scene.things
            assert sample.text is None
            assert sample.group == drawn.shape == shown.shape
            assert drawn.shape in SEEN_SHAPES
    assert len({sample.image.key for sample in data.triplets}) == 150


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from(["photo", "sketch"]))
def test_key_is_the_identity_of_the_pixels(seed, other, style):
    things = (Thing("star", "red", "small", "plain", "left"), Thing("boat", "pink", "large", "dotted", "right"))
    image = ShapesImage(Scene("sea", things), seed, style)
    twin = ShapesImage(Scene("sea", things), other, style)
    assert (image.key == twin.key) == (seed == other) == (image.open().tobytes() == twin.open().tobytes())
    # Things are drawn in their order: in the other order they are another image of the same scene.
    turned = ShapesImage(Scene("sea", things[::-1]), seed, style)
    assert turned.scene.code == image.scene.code
    assert (image.key == turned.key) <= (image.open().tobytes() == turned.open().tobytes())
    assert turned.key != image.key


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: shapes_cir("dev"), ["'dev'", "train, val, test"]),
        (lambda: shapes_sbir("dev"), ["'dev'", "train, val, test"]),
        (lambda: shapes_cir(queries=0), ["queries: 0", ">= 1"]),
        (lambda: shapes_cir(edits=-1), ["edits: -1", ">= 1"]),
        (lambda: shapes_cir(distractors=-1), ["distractors: -1", ">= 0"]),
        (lambda: shapes_cir(queries=1, distractors=0), ["subsets of six", "distractors"]),
        (lambda: shapes_sbir(queries=0), ["queries: 0", ">= 1"]),
        (lambda: shapes_sbir("test", gallery=19), ["gallery: 19", ">= 20"]),
        (lambda: shapes_training(0, 0), ["0 triplets and 0 pairs"]),
        (lambda: shapes_training(-1, 5), ["-1 triplets"]),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(make, words):
    with pytest.raises(DataError) as error:
        make()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)
