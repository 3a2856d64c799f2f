"""Each image and text is encoded once for all models, at any token budget, however often interrupted."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from small_world import DIM, TRANSAGG, LinearBackbone, Noise, cir_benchmark, extractor, sbir_benchmark, trainable
from union_igrot.evaluation import evaluate as evaluation
from union_igrot.evaluation.evaluate import evaluate_benchmark
from union_igrot.features.embedding import embed_benchmark, embed_models
from union_igrot.features.extractor import BufferedWriter, FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.images.decode import image_key
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.factory import build_query_head
from union_igrot.models.model import IGROTModel, baseline
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

pytestmark = pytest.mark.slow

ALL = 2**40


def repeated_images():
    """Composed queries of which several have one image, some also one text, and a gallery that holds their images."""
    benchmark = cir_benchmark(20, 31)
    again = [replace(query, id=f"again{i}", text="red") for i, query in enumerate(benchmark.queries[:6])]
    same = [replace(query, id=f"same{i}") for i, query in enumerate(benchmark.queries[10:13])]
    return replace(benchmark, queries=(*benchmark.queries, *again, *same))


def images_of(benchmark):
    return {image_key(one.image) for side in (benchmark.queries, benchmark.gallery) for one in side}


def same(found, expected):
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


CASES = [(repeated_images, "union", 0), (sbir_benchmark, "shared", ALL)]
OTHERS = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product([repeated_images, sbir_benchmark], ["union", "shared"], [0, ALL])
    if case not in CASES
]


@pytest.mark.parametrize(("make", "target", "budget"), [*CASES, *OTHERS])
def test_an_evaluation_encodes_each_image_text_and_the_null_text_once(tmp_path, monkeypatch, make, target, budget):
    monkeypatch.setattr(evaluation, "embed_models", functools.partial(embed_models, token_budget=budget))
    backbone, benchmark = LinearBackbone(), make()
    model = trainable("transagg", target, backbone)
    evaluate_benchmark(model, benchmark, extractor(tmp_path, backbone))
    assert sum(backbone.image_batches) == len(images_of(benchmark))
    texts = sorted(itertools.chain(*backbone.text_batches))
    assert texts == sorted({query.text or "" for query in benchmark.queries} | {""})
    assert len(backbone.text_batches) == 1 + -(-(len(texts) - 1) // 8)
    before = len(backbone.image_batches)
    evaluate_benchmark(model, benchmark, extractor(tmp_path, backbone))
    assert len(backbone.image_batches) == before
    assert sorted(itertools.chain(*backbone.text_batches)) == texts


@pytest.mark.parametrize("target", ["union", "shared"])
def test_embeddings_of_a_stream_equal_those_of_stored_tokens(tmp_path, target):
    backbone, benchmark = LinearBackbone(), repeated_images()
    model = trainable("transagg", target, backbone).eval()
    streamed, stored = (extractor(tmp_path / name, backbone, batch_size=5) for name in ("streamed", "stored"))
    expected = embed_benchmark(model, benchmark, stored)
    same(embed_benchmark(model, benchmark, streamed, token_budget=0), expected)
    keys = [f"image/{image_key(query.image)}" for query in benchmark.queries]
    assert streamed.store.missing(keys, tokens=True)
    assert not streamed.store.missing(keys, tokens=False)
    assert not stored.store.missing(keys, tokens=True)
    # What was stored gives the same again, without the backbone.
    before = len(backbone.image_batches)
    for name in ("streamed", "stored"):
        again = extractor(tmp_path / name, backbone, batch_size=5)
        same(embed_benchmark(model, benchmark, again, token_budget=0), expected)
    assert len(backbone.image_batches) == before


def test_embeddings_are_those_of_the_model_for_each_query_and_image(tmp_path):
    backbone, benchmark = LinearBackbone(), repeated_images()
    benchmark = replace(benchmark, queries=benchmark.queries[:6] + benchmark.queries[-5:])
    model = trainable("transagg", "union", backbone).eval()
    found = embed_benchmark(model, benchmark, extractor(tmp_path, backbone, batch_size=5), token_budget=0)
    own = extractor(tmp_path / "own", backbone)
    with torch.inference_mode():
        for at, query in enumerate(benchmark.queries):
            image = own.lookup(own.extract_images([query.image], tokens=True), tokens=True)
            expected = model.embed_queries(image, [query.text])[0]
            torch.testing.assert_close(found.queries[at], expected, rtol=0, atol=1e-5)
        for at, item in enumerate(benchmark.gallery):
            image = own.lookup(own.extract_images([item.image], tokens=False), tokens=False)
            torch.testing.assert_close(found.gallery[at], model.embed_gallery(image)[0], rtol=0, atol=1e-5)


def test_stores_of_half_precision_round_a_stream_as_they_round_what_they_store(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark(8, 12)
    model = trainable("transagg", "union", backbone).eval()
    found = []
    for name, budget in itertools.product(("streamed", "stored"), (0, ALL)):
        store = FeatureStore(tmp_path / name, backbone.fingerprint(), dtype="float16")
        half = FeatureExtractor(backbone, store, batch_size=8, workers=0, progress=False)
        found.append(embed_benchmark(model, benchmark, half, token_budget=budget))
        same(found[-1], found[0])
    exact = embed_benchmark(model, benchmark, extractor(tmp_path / "exact", backbone))
    assert not torch.allclose(found[0].queries, exact.queries, rtol=0, atol=1e-6)


class Stopped(Backbone):
    """The linear backbone, interrupted after some images."""

    def __init__(self, after):
        super().__init__()
        self.inner, self.after = LinearBackbone(), after
        self.name, self.dim, self.preprocess = self.inner.name, self.inner.dim, self.inner.preprocess
        self.freeze()

    def fingerprint(self):
        return self.inner.fingerprint()

    def encode_image(self, images):
        if sum(self.inner.image_batches) >= self.after:
            raise KeyboardInterrupt
        return self.inner.encode_image(images)

    def encode_text(self, texts):
        return self.inner.encode_text(texts)


@pytest.mark.parametrize(("target", "killed"), [("union", False), ("shared", False), ("shared", True)])
def test_an_interrupted_stream_resumes_after_its_finished_blocks(tmp_path, monkeypatch, target, killed):
    benchmark = cir_benchmark(40, 60)
    stopped = Stopped(32 if killed else 16)
    model = trainable("transagg", target, stopped).eval()
    with monkeypatch.context() as patch:
        if killed:  # what is in memory is lost
            patch.setattr(BufferedWriter, "__exit__", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            embed_benchmark(model, benchmark, extractor(tmp_path, stopped), token_budget=0)
    assert sum(stopped.inner.image_batches) == stopped.after
    backbone = LinearBackbone()
    model = trainable("transagg", target, backbone).eval()
    found = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=0)
    reused = len(images_of(benchmark)) - sum(backbone.image_batches)
    assert 0 < reused <= 32 if killed else reused == 16
    same(found, embed_benchmark(model, benchmark, extractor(tmp_path / "whole", backbone)))


def test_finished_embeddings_belong_to_one_model_and_its_options(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark()
    model = trainable("transagg", "union", backbone).eval()
    fusion = build_query_head("transagg", DIM, **{**TRANSAGG, "dropout": 0.0, "mask": "legacy"})
    fusion.load_state_dict(model.fusion.state_dict())
    other = IGROTModel(backbone, fusion, model.target).eval()
    assert other.describe()["heads"] == model.describe()["heads"]  # of the same weights
    assert other.fingerprint() != model.fingerprint()
    first = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=0)
    encoded = sum(backbone.image_batches)
    second = embed_benchmark(other, benchmark, extractor(tmp_path, backbone), token_budget=0)
    assert sum(backbone.image_batches) > encoded
    same(second, embed_benchmark(other, benchmark, extractor(tmp_path / "own", backbone)))
    assert not torch.allclose(first.queries, second.queries, atol=1e-3)


def test_models_are_embedded_together_as_each_alone(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark()
    models = {
        "sum": baseline(backbone, "sum"),
        "one": trainable("transagg", "union", backbone, seed=1).eval(),
        "two": trainable("transagg", "shared", backbone, seed=2).eval(),
    }
    together = dict(embed_models(models, benchmark, extractor(tmp_path / "together", backbone), token_budget=0))
    assert list(together) == list(models)
    assert sum(backbone.image_batches) == len(images_of(benchmark))
    for name, model in models.items():
        alone = embed_benchmark(model, benchmark, extractor(tmp_path / name, backbone))
        same(together[name], alone)
        assert set(alone.seconds) == {"encode", "embed"}
        assert min(alone.seconds.values()) >= 0


@pytest.mark.parametrize("budget", [0, ALL])
def test_embeddings_of_several_wordings_are_averaged(tmp_path, budget):
    backbone = LinearBackbone()
    wordings = (("red square", "square red night"), "blue", ("large", "small", "night"), None)
    queries = tuple(Query(f"q{i}", Noise(i % 2), text, ("g0",)) for i, text in enumerate(wordings))
    items = tuple(GalleryItem(f"g{i}", Noise(10 + i)) for i in range(3))
    benchmark = Benchmark("b", "val", "cir", queries, items, Protocol("p", ("R@1",), "R@1"))
    model = trainable("transagg", "union", backbone).eval()
    found = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=budget)
    own = extractor(tmp_path / "own", backbone)
    for at, query in enumerate(queries):
        image = own.lookup(own.extract_images([query.image], tokens=True), tokens=True)
        with torch.inference_mode():
            each = [F.normalize(model.embed_queries(image, [text])[0], dim=-1) for text in query.wordings]
        expected = F.normalize(sum(each) / len(each), dim=-1)
        torch.testing.assert_close(found.queries[at], expected, rtol=0, atol=1e-5)
