"""The protocol's conventions beyond the plain ones, against literal loops."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from small_world import Noise, cir_benchmark
from union_igrot.errors import DataError, UnionError
from union_igrot.evaluation.evaluate import means, method_result
from union_igrot.evaluation.scoring import score
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query


def embeddings(benchmark, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (benchmark.queries, benchmark.gallery)
    return [torch.randint(-2, 3, (len(side), 4), generator=generator).float() for side in sides]


def with_protocol(**changes):
    benchmark = cir_benchmark()
    return replace(benchmark, protocol=replace(benchmark.protocol, **changes))


def test_means_of_metrics_are_metrics():
    benchmark = with_protocol(means=(("R@5", "Rs@1"),))
    found = score(benchmark, *embeddings(benchmark)).values
    expected = (found["R@5"] + found["Rs@1"]) / 2
    assert torch.equal(found["(R@5 + Rs@1)/2"].nan_to_num(-1), expected.nan_to_num(-1))


def own_candidates(ties):
    """Each query ranks three images of its own; the target is the first, as GeneCIS stores it."""
    items = tuple(GalleryItem(f"g{i}", Noise(i)) for i in range(6))
    asked = (
        Query("a", Noise(50), "red", ("g0",), subset=("g0", "g1", "g2")),
        Query("b", Noise(51), "red", ("g3",), subset=("g3", "g4")),
    )
    protocol = Protocol(metrics=("R@1", "R@2"), primary="R@1", candidates="subset", ties=ties)
    return Benchmark("own", "val", "cir", asked, items, protocol)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"metrics": ("R@1", "MeanRank"), "primary": "MeanRank"}, "primary"), ({"candidates": "subset"}, "subset")],
)
def test_what_cannot_be_scored_is_one_clear_error(changes, word):
    benchmark = with_protocol(**{"metrics": ("R@1",), "primary": "R@1", **changes})
    bare = replace(benchmark, queries=tuple(replace(query, subset=None) for query in benchmark.queries))
    with pytest.raises(UnionError, match=word):
        score(bare, *embeddings(bare))


def test_an_embedding_that_is_not_finite_is_an_error_for_own_candidates_too():
    benchmark = own_candidates("pessimistic")
    with pytest.raises(DataError, match="nan"):
        score(benchmark, torch.full((2, 4), float("nan")), torch.ones(6, 4))


def slow_rank(query, scores, names, late):
    """The rank of the first target; with `late`, candidates with its score are before it unless they are targets."""
    candidates = [place for place, name in enumerate(names) if name not in query.exclude]
    relevant = [names[place] in query.targets for place in candidates]
    keys = [(-scores[place], hit if late else place) for place, hit in zip(candidates, relevant, strict=True)]
    ranked = [hit for _, hit in sorted(zip(keys, relevant, strict=True))]
    return ranked.index(True) + 1 if any(ranked) else math.nan


@pytest.mark.parametrize("ties", ["gallery order", "pessimistic"])
def test_ranks_of_the_first_target_and_their_mean_and_median(ties):
    benchmark = with_protocol(metrics=("R@1", "R@5", "MeanRank", "MedianRank"), primary="R@1", means=(), ties=ties)
    queries, gallery = embeddings(benchmark)
    names = [item.id for item in benchmark.gallery]
    table = (queries @ gallery.T).tolist()
    expected = [
        slow_rank(q, row, names, ties == "pessimistic") for q, row in zip(benchmark.queries, table, strict=True)
    ]
    scores = score(benchmark, queries, gallery)
    assert scores.values["MeanRank"].tolist() == pytest.approx(expected, nan_ok=True)
    for k in (1, 5):
        recalls = [math.nan if math.isnan(rank) else float(rank <= k) for rank in expected]
        assert scores.values[f"R@{k}"].tolist() == pytest.approx(recalls, nan_ok=True)
    kept = sorted(rank for rank in expected if not math.isnan(rank))
    found = means(benchmark, scores)
    assert found["MeanRank"] == pytest.approx(sum(kept) / len(kept))
    assert found["MedianRank"] == statistics.median(kept)


def test_metrics_over_groups_of_queries_equal_plain_loops():
    names = ("mAP", "mmAP", "minmAP", "hit@1", "groupR@1")
    benchmark = with_protocol(metrics=names, primary="mAP", means=())
    labels = ["x", "y", "x", "x", "y"]
    queries = tuple(replace(q, label=labels[at % 5]) for at, q in enumerate(benchmark.queries))
    benchmark = replace(benchmark, queries=queries)
    scores = score(benchmark, *embeddings(benchmark))
    rows = [(q.label, x) for q, x in zip(queries, scores.values["mAP"].tolist(), strict=True) if not math.isnan(x)]
    groups = [[x for label, x in rows if label == one] for one in ("x", "y")]
    tops = [(q.label, x) for q, x in zip(queries, scores.values["hit@1"].tolist(), strict=True) if not math.isnan(x)]
    found = means(benchmark, scores)
    assert found["mAP"] == pytest.approx(100 * sum(x for _, x in rows) / len(rows))
    assert found["mmAP"] == pytest.approx(50 * sum(sum(group) / len(group) for group in groups))
    assert found["minmAP"] == pytest.approx(50 * sum(map(min, groups)))
    assert found["hit@1"] == pytest.approx(100 * sum(x for _, x in tops) / len(tops))
    assert found["groupR@1"] == pytest.approx(
        50 * sum(max(x for label, x in tops if label == one) for one in ("x", "y"))
    )
    result = method_result(benchmark, "sum", scores, {}, {}, 0)
    for name in names:
        low, high = result.intervals[name]
        assert low <= result.metrics[name] + 1e-9
        assert high >= result.metrics[name] - 1e-9


def test_a_macro_average_can_be_over_tags():
    benchmark = with_protocol(average="macro", groups="tag", metrics=("R@5",), primary="R@5", means=())
    queries = tuple(replace(q, tags=("a" if at < 2 else "b",)) for at, q in enumerate(benchmark.queries))
    benchmark = replace(benchmark, queries=queries)
    scores = score(benchmark, *embeddings(benchmark))
    values = scores.values["R@5"]
    expected = (values[:2].nanmean() + values[2:].nanmean()) / 2
    assert means(benchmark, scores)["R@5"] == pytest.approx(100 * expected.item())


@pytest.mark.parametrize("ties", ["gallery order", "expected", "pessimistic"])
def test_shared_candidates_are_ranked_as_a_gallery_of_their_own(ties):
    """As in i-CIR: the queries of an instance share one tuple of candidates, which differ in number by instance."""
    items = tuple(GalleryItem(f"g{i}", Noise(i)) for i in range(90))
    own = {"x": tuple(f"g{i}" for i in range(0, 90, 4)), "y": tuple(f"g{i}" for i in range(1, 90, 2))}
    asked = tuple(
        Query(f"{name}{at}", Noise(99), "red", own[name][at : at + 3], subset=own[name], label=name)
        for name in own
        for at in range(4)
    )
    protocol = Protocol(metrics=("mAP", "R@5"), primary="mAP", ties=ties, candidates="subset", ap_norm="all")
    whole = Benchmark("own", "test", "cir", asked, items, protocol)
    queries, gallery = embeddings(whole)
    found = score(whole, queries, gallery)
    for name, ids in own.items():
        rows = [at for at, query in enumerate(asked) if query.label == name]
        places = [int(one[1:]) for one in ids]
        part = replace(
            whole,
            queries=tuple(replace(asked[row], subset=None) for row in rows),
            gallery=tuple(items[place] for place in places),
            protocol=replace(protocol, candidates="gallery"),
        )
        alone = score(part, queries[rows], gallery[places])
        for metric in protocol.metrics:
            assert found.values[metric][rows].tolist() == pytest.approx(alone.values[metric].tolist())
    assert found.ranking.positions.shape == (8, 45)
    assert found.ranking.positions[0, 23:].tolist() == [-1] * 22
