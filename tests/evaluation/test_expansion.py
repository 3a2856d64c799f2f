"""Query expansion against plain loops, and in evaluation."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from small_world import DIM, cir_benchmark, extractor, trainable
from union_igrot.errors import ConfigError
from union_igrot.evaluation.calibration import expand_queries, neighbor_means
from union_igrot.evaluation.evaluate import evaluate_benchmark
from union_igrot.evaluation.tables import as_html, as_text
from union_igrot.features.embedding import embed_benchmark


def unit(count, seed):
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def lengthened(vector):
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector] if length else vector


@pytest.mark.parametrize("candidates", ["gallery", "subset"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_expanded_queries_equal_plain_loops(candidates, count):
    benchmark = cir_benchmark()
    benchmark = replace(benchmark, protocol=replace(benchmark.protocol, candidates=candidates))
    queries, gallery = unit(len(benchmark.queries), 0), unit(len(benchmark.gallery), 1)
    items = {item.id: row for item, row in zip(benchmark.gallery, gallery.tolist(), strict=True)}
    wanted = []
    for query, vector in zip(benchmark.queries, queries.tolist(), strict=True):
        names = items if candidates == "gallery" else query.subset or ()
        rivals = [items[name] for name in names if name not in query.exclude]
        rivals.sort(key=lambda item, query=vector: -sum(a * b for a, b in zip(item, query, strict=True)))
        mean = lengthened([sum(row[at] for row in rivals[:count]) for at in range(DIM)])
        wanted.append(lengthened([x + 0.5 * y for x, y in zip(vector, mean, strict=True)]))
    torch.testing.assert_close(expand_queries(benchmark, queries, gallery, count), torch.tensor(wanted))


def test_a_negative_number_is_refused():
    with pytest.raises(ConfigError, match=r"query_expansion: -1 \(expected an integer >= 1\)"):
        expand_queries(cir_benchmark(), unit(23, 0), unit(31, 1), -1)


@pytest.mark.slow
def test_only_the_trained_method_is_expanded_and_says_so(tmp_path):
    model, benchmark = trainable("transagg", "residual").eval(), cir_benchmark()
    model.calibration = {"cir": unit(9, 2)}
    filled = extractor(tmp_path, model.backbone)
    plain = evaluate_benchmark(model, benchmark, filled)
    found = evaluate_benchmark(model, benchmark, filled, calibration=0.5, query_expansion=3)
    before, after = ([one.metrics for one in result.methods] for result in (plain, found))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    queries, gallery, _ = embed_benchmark(model, benchmark, filled)
    scores = expand_queries(benchmark, queries, gallery, 3) @ gallery.T
    scores -= 0.5 * neighbor_means(gallery, model.calibration["cir"])
    ranking = found.scored[0].scores["trained"].ranking
    torch.testing.assert_close(ranking.scores, scores.gather(1, ranking.positions), atol=1e-5, rtol=0)
    assert found.methods[-1].model["query_expansion"] == 3
    for text in (as_text(found), as_html(found)):
        assert "trained, calibrated, expanded" in text
        assert "expanded: each query plus 0.5 times the unit mean of its first 3 results" in text
    assert "expanded" not in as_text(plain)
