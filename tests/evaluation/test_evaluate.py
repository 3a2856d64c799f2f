"""Metrics of a benchmark equal those of plain loops; results are complete and say what the model was trained on."""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from slow_metrics import slow_ap, slow_precision, slow_recall
from small_world import DIM, LinearBackbone, Noise, cir_benchmark, extractor, sbir_benchmark, trainable
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation import scoring
from union_igrot.evaluation.evaluate import (
    average_parts,
    describe_validation,
    evaluate_benchmark,
    means,
    method_result,
    seen_images,
)
from union_igrot.evaluation.ranking import rank_chunks
from union_igrot.evaluation.results import EvaluationResult, SeenImages
from union_igrot.evaluation.scoring import RANKING_DEPTH, Relevance, score
from union_igrot.features.embedding import embed_benchmark
from union_igrot.images.identity import image_identities
from union_igrot.models.model import IGROTModel, baseline, load
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

KEYS = [
    *("benchmark", "split", "method", "n_queries", "n_gallery", "n_skipped", "protocol", "metrics", "ci95", "by_tag"),
    *("seen_classes", "seen_images", "model", "seconds", "versions", "seed", "arithmetic"),
]


def small_integers(benchmark, seed=0, dim=4):
    """Embeddings whose products are exact, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    sides = (benchmark.queries, benchmark.gallery)
    return [torch.randint(-2, 3, (len(side), dim), generator=generator).float() for side in sides]


def ranked(benchmark, query, scores, ids=None):
    """The ids of the candidates, best first, ties in gallery order."""
    gone = query.exclude if benchmark.protocol.exclude_reference else ()
    rows = [
        (-scores[place], place, item.id)
        for place, item in enumerate(benchmark.gallery)
        if item.id not in gone and (ids is None or item.id in ids)
    ]
    return [name for _, _, name in sorted(rows)]


def metric(name, benchmark, query, scores):
    kind, _, depth = name.partition("@")
    k = int(depth) if depth else None
    inside = None
    if kind == "Rs":
        inside = set(query.subset or ())
    ranking = ranked(benchmark, query, scores, inside)
    hits = [candidate in query.targets for candidate in ranking]
    if kind in ("R", "Rs"):
        return slow_recall(hits, sum(hits), k, "any")
    if kind == "P":
        return slow_precision(hits, sum(hits), k, "k")
    return slow_ap(hits, sum(hits), k, benchmark.protocol.ap_norm, benchmark.protocol.ap_rule)


def mean_of(benchmark, column):
    kept = [(query.label, x) for query, x in zip(benchmark.queries, column, strict=True) if not math.isnan(x)]
    if benchmark.protocol.average == "micro":
        return sum(x for _, x in kept) / len(kept)
    classes = {label: [x for other, x in kept if other == label] for label, _ in kept}
    return sum(sum(column) / len(column) for column in classes.values()) / len(classes)


def compare(benchmark, queries, gallery):
    found = score(benchmark, queries, gallery)
    products = (queries.double() @ gallery.double().T).tolist()
    assert list(found.values) == list(benchmark.protocol.metrics)
    for name, column in found.values.items():
        expected = [metric(name, benchmark, q, row) for q, row in zip(benchmark.queries, products, strict=True)]
        assert column.tolist() == pytest.approx(expected, abs=1e-9, nan_ok=True), name
        assert means(benchmark, found)[name] == pytest.approx(100 * mean_of(benchmark, expected), abs=1e-7)
    for place, (query, row) in enumerate(zip(benchmark.queries, products, strict=True)):
        best = [benchmark.gallery[p].id for p in found.ranking.positions[place].tolist()]
        expected = ranked(benchmark, query, row)
        assert best == expected[: len(best)]
        scores = found.ranking.scores[place].tolist()
        assert scores == pytest.approx([row[p] for p in found.ranking.positions[place].tolist()])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["step", "trapezoid", "voc"])
@pytest.mark.parametrize("norm", ["min", "hits", "all"])
def test_composed_metrics_equal_plain_loops(norm, rule):
    benchmark = cir_benchmark()
    benchmark = replace(benchmark, protocol=replace(benchmark.protocol, ap_norm=norm, ap_rule=rule))
    found = compare(benchmark, *small_integers(benchmark))
    assert [name for name, column in found.values.items() if column[3].isnan()] == list(benchmark.protocol.metrics)
    assert [name for name, column in found.values.items() if column[5].isnan()] == ["Rs@1", "Rs@2"]


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_sketch_metrics_equal_plain_loops(average):
    benchmark = sbir_benchmark()
    assert len({id(query.targets) for query in benchmark.queries}) == 4
    compare(replace(benchmark, protocol=replace(benchmark.protocol, average=average)), *small_integers(benchmark, 3))


def test_excluded_items_are_never_among_the_first_results():
    benchmark = cir_benchmark(queries=12, gallery=20)
    found = score(benchmark, *small_integers(benchmark))
    assert found.ranking.positions.shape == (12, 19)
    excluded = Relevance.of(benchmark).exclude
    assert all(not set(row) & set(out) for row, out in zip(found.ranking.positions.tolist(), excluded, strict=True))
    assert (found.ranking.scores.diff(dim=1) <= 0).all()
    large = cir_benchmark(queries=6, gallery=80)
    assert score(large, *small_integers(large)).ranking.positions.shape == (6, RANKING_DEPTH)


def test_chunks_change_nothing(monkeypatch):
    benchmark = cir_benchmark(queries=30)
    sides = small_integers(benchmark, 1)
    whole = score(benchmark, *sides)
    chunks = []

    def few_at_once(queries, gallery, exclude, fused):
        for chunk in rank_chunks(queries, gallery, exclude, 7 * 8 * len(gallery), fused):
            chunks.append(chunk.queries)
            yield chunk

    monkeypatch.setattr(scoring, "rank_chunks", few_at_once)
    cut = score(benchmark, *sides)
    assert len(chunks) == 5
    for name, column in whole.values.items():
        torch.testing.assert_close(cut.values[name], column, atol=0, rtol=0, equal_nan=True)
    assert cut.ranking.positions.equal(whole.ranking.positions)


def test_some_rows_alone_get_the_metrics_they_have_among_all():
    benchmark = cir_benchmark()
    queries, gallery = small_integers(benchmark, 2)
    whole = score(benchmark, queries, gallery)
    rows = torch.tensor([20, 3, 8])
    some = score(benchmark, queries[rows], gallery, rows)
    for name, column in some.values.items():  # in the order of the queries
        torch.testing.assert_close(column, whole.values[name][[3, 8, 20]], atol=0, rtol=0, equal_nan=True)
    assert some.ranking.positions.equal(whole.ranking.positions[rows])  # in the order given


def test_a_perfect_model():
    items = tuple(GalleryItem(f"g{i}", Noise(i)) for i in range(40))
    queries = tuple(Query(f"q{i}", Noise(50 + i), "x", (f"g{i}",), subset=(f"g{i}", "g39", "g38")) for i in range(30))
    protocol = Protocol("p", ("R@1", "mAP", "mAP@10", "Rs@1"), "mAP")
    benchmark = Benchmark("b", "val", "cir", queries, items, protocol)
    gallery = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert means(benchmark, score(benchmark, gallery[:30], gallery)) == dict.fromkeys(protocol.metrics, 100.0)


def test_metrics_without_any_value_are_nan_and_survive_json():
    benchmark = cir_benchmark(queries=6)
    hidden = replace(benchmark, queries=tuple(replace(query, targets=()) for query in benchmark.queries))
    found = score(hidden, *small_integers(hidden))
    result = EvaluationResult((method_result(hidden, "trained", found, {}, {}, 0),))
    (again,) = EvaluationResult.from_json(result.to_json()).methods
    for one in (*result.methods, again):
        assert all(math.isnan(metric) for metric in one.metrics.values())
        assert all(math.isnan(bound) for span in one.intervals.values() for bound in span)
    assert set(again.to_dict()["metrics"].values()) == {None}


def test_missing_subsets_or_classes_are_errors():
    sketches, composed = sbir_benchmark(), cir_benchmark()
    subsets = replace(sketches, protocol=Protocol("p", ("Rs@1",), "Rs@1"))
    with pytest.raises(DataError, match="subset"):
        score(subsets, *small_integers(subsets))
    classes = replace(composed, protocol=replace(composed.protocol, average="macro"))
    queries, gallery = small_integers(classes)
    with pytest.raises(ConfigError, match="labels"):
        means(classes, score(classes, queries, gallery))
    queries[4, 0] = math.nan
    with pytest.raises(DataError, match="position 4"):
        score(composed, queries, gallery)


def test_lazily_created_queries_keep_their_targets():
    class Lazy(Sequence):
        """Makes each query anew, so that its tuples do not live on."""

        def __init__(self, items):
            self.items = items

        def __len__(self):
            return 200

        def __getitem__(self, i):
            if i >= 200:
                raise IndexError
            return Query(f"q{i}", Noise(i), None, tuple(item.id for item in self.items[i % 30 : i % 30 + 1]))

    items = tuple(GalleryItem(f"g{i}", Noise(i)) for i in range(30))
    benchmark = Benchmark("b", "val", "sbir", Lazy(items), items, Protocol())
    assert [places.tolist() for places in Relevance.of(benchmark).targets] == [[i % 30] for i in range(200)]


def test_every_image_and_text_is_encoded_once_for_all_methods(tmp_path):
    backbone = LinearBackbone()
    benchmark = cir_benchmark()
    filled = extractor(tmp_path, backbone)
    model = trainable("transagg", "shared", backbone).eval()
    backbone.text_batches.clear()
    queries, gallery, seconds = embed_benchmark(model, benchmark, filled)
    assert queries.shape == (23, DIM)
    assert gallery.shape == (31, DIM)
    assert set(seconds) == {"encode", "embed"}
    images = {item.image for item in benchmark.gallery} | {query.image for query in benchmark.queries}
    assert sum(backbone.image_batches) == len(images)
    spoken = [text for batch in backbone.text_batches for text in batch if text]
    assert sorted(spoken) == sorted({query.text for query in benchmark.queries})
    before = len(backbone.image_batches)
    embed_benchmark(baseline(backbone, "sum"), benchmark, filled)
    assert len(backbone.image_batches) == before


def test_embeddings_are_those_of_the_model(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark()
    filled = extractor(tmp_path, backbone, batch_size=5)
    model = trainable("transagg", "union", backbone).eval()
    queries, gallery, _ = embed_benchmark(model, benchmark, filled)
    images = filled.lookup(filled.extract_images([q.image for q in benchmark.queries], tokens=True), tokens=True)
    items = filled.lookup(filled.extract_images([i.image for i in benchmark.gallery], tokens=False), tokens=False)
    with torch.no_grad():
        texts = backbone.encode_text([query.text for query in benchmark.queries])
        torch.testing.assert_close(queries, model.embed_queries(images, texts), atol=1e-5, rtol=0)
        torch.testing.assert_close(gallery, model.embed_gallery(items), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    backbone = LinearBackbone()
    filled = extractor(tmp_path_factory.mktemp("cache"), backbone)
    return [
        evaluate_benchmark(trainable("transagg", "union", backbone), benchmark, filled, seed=1)
        for benchmark in (cir_benchmark(40, 60), sbir_benchmark(60, 40))
    ]


def test_results_have_the_documented_fields(found):
    for result in found:
        (scored,), methods = result.scored, ["chance", "image", "text", "sum", "product", "trained"]
        benchmark = scored.benchmark
        assert [one.method for one in result.methods] == list(scored.scores) == methods
        for one in result.methods:
            optional = (["gain95"] if one.method == "trained" else []) + (["n_classes"] if one.n_classes else [])
            assert list(one.to_dict()) == KEYS + optional
            assert one.n_classes == (4 if benchmark.task == "sbir" else 0)
            assert one.arithmetic == {"device": "cpu", "precision": "float32", "kept": "float32"}
            assert (one.n_queries, one.n_gallery) == (len(benchmark.queries), len(benchmark.gallery))
            assert one.protocol == benchmark.protocol
            assert list(one.metrics) == list(one.intervals) == list(benchmark.protocol.metrics)
            assert one.seed == 1
            assert {"torch", "python", "union-igrot"} <= set(one.versions)
            for name, value in one.metrics.items():
                low, high = one.intervals[name]
                slack = 1e-9  # sums are taken in another order
                assert -slack <= low <= value + slack <= high + 2 * slack <= 100 + 3 * slack, (one, name)
                expected = mean_of(benchmark, scored.scores[one.method].values[name].tolist())
                assert value == pytest.approx(100 * expected)


def test_differences_are_those_of_the_methods(found):
    for result in found:
        trained = result.methods[-1]
        assert set(trained.differences) == {"chance", "image", "text", "sum", "product"}
        for other in result.methods[:-1]:
            for name, (mean, low, high) in trained.differences[other.method].items():
                assert low - 1e-9 <= mean <= high + 1e-9
                assert mean == pytest.approx(trained.metrics[name] - other.metrics[name], abs=1e-6)


def test_metrics_by_tag_are_means_over_their_queries(found):
    composed, sketches = found
    column = composed.scored[0].scores["trained"].values["mAP"]
    by_tag = composed.methods[-1].by_tag
    assert set(by_tag) == {"tag0", "tag1"}
    for tag, values in (("tag0", column[0::2]), ("tag1", column[1::2])):
        assert by_tag[tag].n_queries == 20
        assert by_tag[tag].value == pytest.approx(100 * values.nanmean().item())
    assert sketches.methods[-1].by_tag == {}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(tmp_path, found):
    backbone = LinearBackbone()
    again = evaluate_benchmark(
        trainable("transagg", "union", backbone), cir_benchmark(40, 60), extractor(tmp_path, backbone), 1
    )
    timeless = [[replace(one, seconds={}) for one in result.methods] for result in (again, found[0])]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_chance_is_what_chance_expects(tmp_path):
    gallery, queries = 50, 500
    items = tuple(GalleryItem(f"g{i}", Noise(i % 3)) for i in range(gallery))
    rng = random.Random(0)
    asked = tuple(Query(f"q{i}", Noise(0), "x", (f"g{rng.randrange(gallery)}",)) for i in range(queries))
    benchmark = Benchmark("b", "val", "cir", asked, items, Protocol("p", ("R@1", "R@10", "mAP"), "mAP"))
    backbone = LinearBackbone()
    chance = evaluate_benchmark(baseline(backbone, "image"), benchmark, extractor(tmp_path, backbone)).methods[0]
    harmonic = sum(1 / rank for rank in range(1, gallery + 1)) / gallery
    expected = {"R@1": 1 / gallery, "R@10": 10 / gallery, "mAP": harmonic}
    for name, mean in expected.items():
        # Four standard errors; queries share the gallery's random vectors, which adds a little.
        slack = 400 * math.sqrt(mean * (1 - mean) / queries)
        assert chance.metrics[name] == pytest.approx(100 * mean, abs=slack), name


@pytest.mark.slow
def test_evaluation_leaves_the_model_in_evaluation_mode(tmp_path):
    backbone = LinearBackbone()
    model = trainable("transagg", "union", backbone, dropout=0.5).train()
    first, second = (
        evaluate_benchmark(model, cir_benchmark(8), extractor(tmp_path, backbone)).methods[-1] for _ in range(2)
    )
    assert not model.training
    assert first.metrics == second.metrics


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


def test_training_images_are_saved_with_the_model(model, tmp_path):
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


def test_the_bundled_model_records_its_training_images():
    tiny = load("tiny")
    assert tiny.training_images is not None
    assert len(tiny.training_images) == 15_000


@pytest.mark.slow
def test_only_trained_heads_have_an_overlap(model, tmp_path):
    benchmark = cir_benchmark(queries=8, gallery=10)
    model.training_images = image_identities([benchmark.gallery[0].image])
    filled = extractor(tmp_path, model.backbone)
    found = evaluate_benchmark(model, benchmark, filled)
    assert [one.seen_images for one in found.methods[:-1]] == [None] * 5
    assert found.methods[-1].seen_images.gallery == 1
    alone = evaluate_benchmark(model, benchmark, filled, trained=False)
    assert list(alone.scored[0].scores) == ["chance", "image", "text", "sum", "product"]
    assert not any(one.differences for one in alone.methods)
    assert [one.metrics for one in alone.methods] == [one.metrics for one in found.methods[:-1]]


@pytest.mark.slow
def test_texts_that_the_backbone_cuts_are_counted(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark(queries=8, gallery=10)
    backbone.context, backbone.token_count = 4, lambda text: len(text.split()) + 1
    found = evaluate_benchmark(trainable("sum", "frozen", backbone), benchmark, extractor(tmp_path, backbone))
    expected = sum(len(query.text.split()) > 3 for query in benchmark.queries)
    assert expected > 1
    assert [one.n_truncated for one in found.methods] == [0, *[expected] * 5]
    assert found.methods[-1].to_dict()["n_truncated"] == expected
    assert f"{expected} query texts cut at the backbone's token limit" in " ".join(str(found).split())
    assert average_parts([found, found], "both").methods[-1].n_truncated == 2 * expected


@pytest.mark.slow
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
    assert set(shared.differences) == {"chance", "image", "text", "sum", "product"}
    mean, low, high = shared.differences["image"]["mAP"]
    assert mean == pytest.approx(shared.metrics["mAP"] - methods[1].metrics["mAP"])
    assert low <= mean <= high
    assert list(shared.to_dict())[-3:] == ["arithmetic", "gain95", "parts"]


@pytest.mark.slow
def test_a_mean_over_parts_of_their_own_adds_their_galleries(model, tmp_path):
    filled = extractor(tmp_path, model.backbone)
    parts = [evaluate_benchmark(model, cir_benchmark(8, size, size, name=str(size)), filled) for size in (10, 12)]
    mean = average_parts(parts, "mean").methods[-1]
    assert mean.n_gallery == 22
    assert mean.seen_images is None


@pytest.mark.slow
def test_a_bar_follows_an_evaluation_to_its_end(tmp_path, monkeypatch, capsys):
    """Of images whose features are in the store, too."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    model, filled = trainable(), extractor(tmp_path)
    shown = []
    for _ in range(2):
        filled.progress = True
        evaluate_benchmark(model, cir_benchmark(), filled)
        shown.append(re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().err))
    assert "encoding noise_cir images" in shown[0]
    assert "embedding noise_cir images" in shown[1]
    for text in shown:
        assert re.search(r"evaluating noise_cir .* 11/11", text)
        assert text.index("evaluating") > text.rindex("noise_cir images")


@pytest.mark.slow
def test_other_galleries_and_classes_of_validation_are_noted(tmp_path):
    model, filled = trainable(), extractor(tmp_path)
    test = sbir_benchmark()

    def noted(*validation):
        model.metadata["validation"] = json.loads(json.dumps(describe_validation(validation)))
        result = evaluate_benchmark(model, test, filled)
        assert EvaluationResult.from_json(result.to_json()).methods == result.methods
        assert all(one.validation_note == "" for one in result.methods[:-1])
        found = result.methods[-1].validation_note.removeprefix("not comparable with the metrics of ")
        assert found.removeprefix("validation in training, which has ") in " ".join(str(result).split())
        return found.removeprefix("validation in training, which has ")

    assert noted() == noted(cir_benchmark(gallery=7), test, replace(cir_benchmark(), name="more")) == ""
    assert noted(sbir_benchmark(gallery=12)) == "12 gallery images instead of 29"
    assert noted(sbir_benchmark(gallery=12, classes=3)) == (
        "12 gallery images instead of 29 and 3 classes instead of 4"
    )
    renamed = [replace(query, label=f"{query.label}!") for query in test.queries]
    assert noted(replace(test, queries=renamed)) == "the same number of other classes"
