"""Training-free fusions against literal formulas and FREEDOM's golden values."""

import json
import math
import statistics
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from small_world import cir_benchmark, extractor, trainable
from union_igrot.cli.settings import _FUSIONS
from union_igrot.datasets.loading import load_benchmark
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.evaluate import evaluate_benchmark, means
from union_igrot.evaluation.fusion import FUSIONS, embed_corpora, fuse, projection
from union_igrot.evaluation.scoring import score
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SHARED = Path(__file__).parents[2] / "../shared"
GOLDEN = SHARED / "golden/freedom_ltll.json"


def unit(rows, seed, dim=6):
    draw = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draw, dim=-1)


def normal(scores):
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
    return [(1 + math.erf((x - mean) / deviation / math.sqrt(2))) / 2 for x in scores]


def literal(name, image, text):
    """The scores of one query with its candidates."""
    if name == "product":
        return [i * t for i, t in zip(image, text, strict=True)]
    return [(i + t) / 2 for i, t in zip(normal(image), normal(text), strict=True)]


@pytest.mark.parametrize("candidates", ["gallery", "subset"])
@pytest.mark.parametrize("name", ["product", "weicom"])
def test_scores_are_fused_over_the_candidates(name, candidates):
    images, texts, gallery = unit(4, 0), unit(4, 1), unit(30, 2)
    subsets = [tuple(f"g{at}" for at in range(row, 30, row + 2)) for row in range(4)]
    queries = tuple(Query(f"q{row}", Path("none"), "x", own[:2], subset=own) for row, own in enumerate(subsets))
    items = tuple(GalleryItem(f"g{at}", Path("none")) for at in range(30))
    protocol = Protocol(metrics=("mAP",), primary="mAP", candidates=candidates)
    scores = score(Benchmark("x", "y", "cir", queries, items, protocol), *fuse(name, images, texts, gallery))
    for row, own in enumerate(subsets):
        places = [int(one[1:]) for one in own] if candidates == "subset" else list(range(30))
        image, text = ((side[row] @ gallery[places].T).tolist() for side in (images, texts))
        fused = literal(name, image, text)
        expected = [places[at] for at in sorted(range(len(places)), key=lambda at: -fused[at])]
        assert [at for at in scores.ranking.positions[row].tolist() if at >= 0] == expected
        assert scores.ranking.scores[row, : len(places)].tolist() == pytest.approx(
            sorted(fused, reverse=True), abs=1e-5
        )


def test_slerp_is_halfway_on_the_sphere():
    images, texts, gallery = unit(5, 0), unit(5, 1), unit(7, 2)
    texts[4] = images[4]
    halfway, same = fuse("slerp", images, texts, gallery)
    assert same is gallery
    torch.testing.assert_close(halfway.norm(dim=1), torch.ones(5))
    torch.testing.assert_close((halfway * images).sum(1), (halfway * texts).sum(1))
    angle = (images * texts).sum(1).clamp(-1, 1).acos()
    torch.testing.assert_close((halfway * images).sum(1).clamp(-1, 1).acos(), angle / 2, atol=1e-3, rtol=0)


def test_the_projection_keeps_what_subjects_have_and_styles_have_not():
    subjects = torch.tensor([[3.0, 0, 1], [-3, 0, -1], [0, 2, 1], [0, -2, -1]])
    styles = torch.tensor([[0.0, 0, 9], [0, 0, -9]])
    kept = projection(subjects, styles)
    torch.testing.assert_close(kept @ kept, kept, atol=1e-5, rtol=0)
    assert kept.diagonal()[:2].min() > 0.9
    assert kept[2, 2] < 0.1


def test_basic_needs_its_corpora(tmp_path):
    model = trainable()
    with pytest.raises(ConfigError, match="basic needs corpora"):
        fuse("basic", unit(2, 0), unit(2, 1), unit(3, 2))
    with pytest.raises(ConfigError, match="fusions: 'best'"):
        fuse("best", unit(2, 0), unit(2, 1), unit(3, 2))
    (tmp_path / "one.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"one\.txt: has 1 texts"):
        embed_corpora(model, [tmp_path / "one.txt"])


@pytest.mark.slow
def test_every_fusion_is_a_method_beside_the_others(tmp_path):
    assert _FUSIONS == FUSIONS
    for name, lines in (("subjects", "cat\ndog\nred boat\n"), ("styles", "a sketch\na photo at night\n")):
        (tmp_path / name).write_text(lines)
    model = trainable()
    chosen = {"fusions": FUSIONS, "corpora": [tmp_path / "subjects", tmp_path / "styles"]}
    found = evaluate_benchmark(model, cir_benchmark(), extractor(tmp_path / "cache", model.backbone), **chosen)
    methods = [one.method for one in found.methods]
    assert methods == ["chance", "image", "text", "sum", *FUSIONS, "trained"]
    assert [one.model["fusion"]["kind"] for one in found.methods[4:8]] == list(FUSIONS)
    assert "WeiCom" in str(found)
    alone = evaluate_benchmark(model, cir_benchmark(), extractor(tmp_path / "cache", model.backbone), fusions=())
    assert [one.method for one in alone.methods] == ["chance", "image", "text", "sum", "trained"]


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_file(), reason="FREEDOM's lists and golden values are in ../shared")
def test_the_product_equals_the_official_code():
    def feature(key):
        vector = np.random.default_rng(zlib.crc32(f"0:{key}".encode())).standard_normal(32).astype(np.float32)
        return vector / np.linalg.norm(vector)

    root = SHARED / "data/annotations/freedom/ltll"
    benchmark = load_benchmark("ltll", root, check_images=False)
    mixed = np.stack([0.35 * feature(item.label) + feature(item.id) for item in benchmark.gallery])
    gallery = torch.from_numpy(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))
    at = {item.id: row for row, item in enumerate(benchmark.gallery)}
    images = gallery[[at[query.id.rpartition("@")[0]] for query in benchmark.queries]]
    texts = torch.from_numpy(np.stack([feature(query.text) for query in benchmark.queries]))
    scores = score(benchmark, *fuse("product", images, texts, gallery))
    golden = json.loads(GOLDEN.read_text())["product"]
    for pair, expected in golden.items():
        rows = [row for row, query in enumerate(benchmark.queries) if query.tags == (pair.replace("-->", " -> "),)]
        found = {name: 100 * values[rows].mean().item() for name, values in scores.values.items()}
        assert found == pytest.approx(expected, abs=0.01)
    whole = sum(expected["mAP"] for expected in golden.values()) / 2
    assert means(benchmark, scores)["mAP"] == pytest.approx(whole, abs=0.01)
