"""Each image and text through the backbone once for all models, in whatever token_budget, however often interrupted."""

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

ALL = 2**40


def shared_pictures():
    """Composed queries of which several show one image, some asking the same, and a gallery that holds them."""
    benchmark = cir_benchmark(20, 31)
    again = [replace(query, id=f"again{i}", text="red") for i, query in enumerate(benchmark.queries[:6])]
    same = [replace(query, id=f"same{i}") for i, query in enumerate(benchmark.queries[10:13])]
    return replace(benchmark, queries=(*benchmark.queries, *again, *same))


def pictures_of(benchmark):
    return {image_key(one.image) for side in (benchmark.queries, benchmark.gallery) for one in side}


CASES = list(itertools.product([shared_pictures, sbir_benchmark], ["union", "shared"], [0, ALL]))
QUICK = [(shared_pictures, "union", 0), (sbir_benchmark, "shared", ALL)]


@pytest.mark.parametrize(
    ("make", "target", "token_budget"),
    [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES if c not in QUICK)],
)
def test_an_evaluation_passes_each_picture_and_text_and_the_null_text_once(
    tmp_path, monkeypatch, make, target, token_budget
):
    monkeypatch.setattr(evaluation, "embed_models", functools.partial(embed_models, token_budget=token_budget))
    backbone, benchmark = LinearBackbone(), make()
    model = trainable("transagg", target, backbone)
    evaluate_benchmark(model, benchmark, extractor(tmp_path, backbone))
    assert sum(backbone.image_batches) == len(pictures_of(benchmark))
    spoken = sorted(itertools.chain(*backbone.text_batches))
    assert spoken == sorted({query.text or "" for query in benchmark.queries} | {""})
    texts = len(set(spoken)) - 1
    assert len(backbone.text_batches) == 1 + -(-texts // 8)
    before = len(backbone.image_batches)
    evaluate_benchmark(model, benchmark, extractor(tmp_path, backbone))
    assert len(backbone.image_batches) == before
    assert sorted(itertools.chain(*backbone.text_batches)) == spoken


@pytest.mark.parametrize("target", ["union", "shared"])
def test_embeddings_of_a_stream_are_those_of_kept_tokens(tmp_path, target):
    backbone, benchmark = LinearBackbone(), shared_pictures()
    model = trainable("transagg", target, backbone).eval()
    streamed, kept = (extractor(tmp_path / name, backbone, batch_size=5) for name in ("streamed", "kept"))
    for found, expected in zip(
        embed_benchmark(model, benchmark, streamed, token_budget=0),
        embed_benchmark(model, benchmark, kept),
        strict=True,
    ):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    keys = [f"image/{image_key(query.image)}" for query in benchmark.queries]
    assert streamed.store.missing(keys, tokens=True)
    assert not streamed.store.missing(keys, tokens=False)
    assert not kept.store.missing(keys, tokens=True)
    # And what was kept gives the same again, without the backbone.
    before = len(backbone.image_batches)
    again = [
        embed_benchmark(model, benchmark, extractor(tmp_path / name, backbone, 5), token_budget=0)
        for name in ("streamed", "kept")
    ]
    assert len(backbone.image_batches) == before
    for queries, gallery, _ in again:
        torch.testing.assert_close(queries, embed_benchmark(model, benchmark, kept)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(gallery, embed_benchmark(model, benchmark, kept)[1], rtol=0, atol=1e-6)


def test_embeddings_are_what_the_model_says_of_each_query_and_picture(tmp_path):
    backbone, benchmark = LinearBackbone(), shared_pictures()
    benchmark = replace(benchmark, queries=benchmark.queries[:6] + benchmark.queries[-5:])
    model = trainable("transagg", "union", backbone).eval()
    queries, gallery, _ = embed_benchmark(model, benchmark, extractor(tmp_path, backbone, batch_size=5), token_budget=0)
    own = extractor(tmp_path / "own", backbone)
    with torch.inference_mode():
        for place, query in enumerate(benchmark.queries):
            image = own.lookup(own.extract_images([query.image], tokens=True), tokens=True)
            torch.testing.assert_close(queries[place], model.embed_queries(image, [query.text])[0], rtol=0, atol=1e-5)
        for place, item in enumerate(benchmark.gallery):
            image = own.lookup(own.extract_images([item.image], tokens=False), tokens=False)
            torch.testing.assert_close(gallery[place], model.embed_gallery(image)[0], rtol=0, atol=1e-5)


def test_half_precision_stores_round_a_stream_as_they_round_what_they_keep(tmp_path):
    backbone, benchmark = LinearBackbone(), shared_pictures()
    model = trainable("transagg", "union", backbone).eval()
    found = []
    for name, token_budget in (("streamed", 0), ("kept", ALL)):
        for _ in range(2):
            store = FeatureStore(tmp_path / name, backbone.fingerprint(), dtype="float16")
            half = FeatureExtractor(backbone, store, batch_size=8, workers=0, progress=False)
            found.append(embed_benchmark(model, benchmark, half, token_budget=token_budget))
    for queries, gallery, _ in found[1:]:
        torch.testing.assert_close(queries, found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(gallery, found[0][1], rtol=0, atol=1e-6)
    exact = embed_benchmark(model, benchmark, extractor(tmp_path / "exact", backbone))[0]
    assert not torch.allclose(found[0][0], exact, rtol=0, atol=1e-6)


class Stopped(Backbone):
    """The linear backbone, interrupted when it has seen some images."""

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


@pytest.mark.parametrize("target", ["union", "shared"])
def test_an_interrupted_stream_goes_on_after_its_finished_blocks(tmp_path, target):
    benchmark = cir_benchmark(40, 60)
    stopped = Stopped(16)
    model = trainable("transagg", target, stopped).eval()
    with pytest.raises(KeyboardInterrupt):
        embed_benchmark(model, benchmark, extractor(tmp_path, stopped), token_budget=0)
    assert sum(stopped.inner.image_batches) == 16
    backbone = LinearBackbone()
    model = trainable("transagg", target, backbone).eval()
    found = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=0)
    assert sum(backbone.image_batches) == len(pictures_of(benchmark)) - 16
    expected = embed_benchmark(model, benchmark, extractor(tmp_path / "whole", backbone))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_killed_stream_goes_on_after_what_was_written(tmp_path, monkeypatch):
    benchmark = cir_benchmark(40, 60)
    stopped = Stopped(32)
    model = trainable("transagg", "shared", stopped).eval()
    with monkeypatch.context() as killed:
        flush = BufferedWriter.flush
        killed.setattr(
            BufferedWriter, "flush", lambda writer: flush(writer) if len(writer._keys) >= writer._size else None
        )
        with pytest.raises(KeyboardInterrupt):
            embed_benchmark(model, benchmark, extractor(tmp_path, stopped), token_budget=0)
    backbone = LinearBackbone()
    model = trainable("transagg", "shared", backbone).eval()
    found = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=0)
    assert 0 < len(pictures_of(benchmark)) - sum(backbone.image_batches) <= 32
    expected = embed_benchmark(model, benchmark, extractor(tmp_path / "whole", backbone))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_finished_embeddings_belong_to_one_model_and_its_options(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark()
    model = trainable("transagg", "union", backbone).eval()
    fusion = build_query_head("transagg", DIM, **{**TRANSAGG, "dropout": 0.0, "mask": "legacy"})
    fusion.load_state_dict(model.fusion.state_dict())
    other = IGROTModel(backbone, fusion, model.target).eval()
    assert other.describe()["heads"] == model.describe()["heads"]  # of the same weights
    assert other.fingerprint() != model.fingerprint()
    first = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=0)[0]
    passed = sum(backbone.image_batches)
    second = embed_benchmark(other, benchmark, extractor(tmp_path, backbone), token_budget=0)[0]
    assert sum(backbone.image_batches) > passed
    torch.testing.assert_close(second, embed_benchmark(other, benchmark, extractor(tmp_path / "own", backbone))[0])
    assert not torch.allclose(first, second, atol=1e-3)


def test_models_are_embedded_together_as_each_alone(tmp_path):
    backbone, benchmark = LinearBackbone(), cir_benchmark()
    models = {
        "sum": baseline(backbone, "sum"),
        "one": trainable("transagg", "union", backbone, seed=1).eval(),
        "two": trainable("transagg", "shared", backbone, seed=2).eval(),
    }
    together = dict(embed_models(models, benchmark, extractor(tmp_path / "together", backbone), token_budget=0))
    assert list(together) == list(models)
    assert sum(backbone.image_batches) == len(pictures_of(benchmark))
    for name, model in models.items():
        queries, gallery, seconds = embed_benchmark(model, benchmark, extractor(tmp_path / name, backbone))
        torch.testing.assert_close(together[name].queries, queries, rtol=0, atol=1e-6)
        torch.testing.assert_close(together[name].gallery, gallery, rtol=0, atol=1e-6)
        assert set(seconds) == {"encode", "embed"}
        assert min(seconds.values()) >= 0


@pytest.mark.parametrize("token_budget", [0, ALL])
def test_embeddings_of_several_wordings_are_averaged(tmp_path, token_budget):
    backbone = LinearBackbone()
    wordings = (("red square", "square red night"), "blue", ("large", "small", "night"), None)
    asked = tuple(Query(f"q{i}", Noise(i % 2), text, ("g0",)) for i, text in enumerate(wordings))
    items = tuple(GalleryItem(f"g{i}", Noise(10 + i)) for i in range(3))
    benchmark = Benchmark("b", "val", "cir", asked, items, Protocol("p", ("R@1",), "R@1"))
    model = trainable("transagg", "union", backbone).eval()
    found, _, _ = embed_benchmark(model, benchmark, extractor(tmp_path, backbone), token_budget=token_budget)
    own = extractor(tmp_path / "own", backbone)
    for place, query in enumerate(asked):
        image = own.lookup(own.extract_images([query.image], tokens=True), tokens=True)
        with torch.inference_mode():
            each = [F.normalize(model.embed_queries(image, [text])[0], dim=-1) for text in query.wordings]
        expected = F.normalize(sum(each) / len(each), dim=-1)
        torch.testing.assert_close(found[place], expected, rtol=0, atol=1e-5)
