"""The protocol's conventions beyond the plain ones, against literal loops."""

import math
from dataclasses import replace

import pytest
import torch

from small_world import Noise, cir_benchmark
from union_igrot.errors import DataError
from union_igrot.evaluation.scoring import score
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query


def embeddings(benchmark, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (benchmark.queries, benchmark.gallery)
    return [torch.randint(-2, 3, (len(side), 4), generator=generator).float() for side in sides]


def order(scores, ids):
    """Positions best first, ties by gallery order."""
    return sorted(ids, key=lambda place: (-scores[place], place))


def with_protocol(**changes):
    benchmark = cir_benchmark()
    return replace(benchmark, protocol=replace(benchmark.protocol, **changes))


def rankings(benchmark, queries, gallery):
    names = [item.id for item in benchmark.gallery]
    for query, scores in zip(benchmark.queries, (queries @ gallery.T).tolist(), strict=True):
        allowed = [place for place, name in enumerate(names) if name not in query.exclude]
        yield query, [names[place] for place in order(scores, allowed)]


def test_recall_can_look_for_the_first_target_alone():
    benchmark = with_protocol(recall_targets="first")
    queries, gallery = embeddings(benchmark)
    found = score(benchmark, queries, gallery).values
    expected = [
        float(query.targets[0] in ranking[:5]) if query.targets else math.nan
        for query, ranking in rankings(benchmark, queries, gallery)
    ]
    assert found["R@5"].tolist() == pytest.approx(expected, nan_ok=True)
    # The other metrics look for all targets as before.
    plain = score(with_protocol(), queries, gallery).values
    assert torch.equal(found["mAP"].nan_to_num(-1), plain["mAP"].nan_to_num(-1))
    assert list(found) == list(plain)


def test_recall_can_be_the_fraction_found():
    benchmark = with_protocol(recall="fraction")
    queries, gallery = embeddings(benchmark)
    found = score(benchmark, queries, gallery).values["R@5"].tolist()
    expected = [
        sum(name in query.targets for name in ranking[:5]) / len(query.targets) if query.targets else math.nan
        for query, ranking in rankings(benchmark, queries, gallery)
    ]
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_query_without_targets_is_left_out_or_counts_as_zero():
    queries, gallery = embeddings(cir_benchmark())
    omitted = score(with_protocol(), queries, gallery).values["mAP"]
    counted = score(with_protocol(unanswered="zero"), queries, gallery).values["mAP"]
    assert omitted[3].isnan()
    assert counted[3] == 0
    assert torch.equal(omitted.nan_to_num(0), counted)


def test_means_of_metrics_are_metrics():
    benchmark = with_protocol(means=(("R@5", "Rs@1"),))
    found = score(benchmark, *embeddings(benchmark)).values
    expected = (found["R@5"] + found["Rs@1"]) / 2
    assert torch.equal(found["(R@5 + Rs@1)/2"].nan_to_num(-1), expected.nan_to_num(-1))


def test_subset_rankings_are_the_whole_rankings_of_the_subset():
    benchmark = cir_benchmark()
    queries, gallery = embeddings(benchmark)
    scores = score(benchmark, queries, gallery)
    names = [item.id for item in benchmark.gallery]
    for row, (query, ranking) in enumerate(rankings(benchmark, queries, gallery)):
        wanted = [name for name in ranking if name in (query.subset or ())]
        assert [names[at] for at in scores.subsets[row].tolist() if at >= 0] == wanted


def own_candidates(ties):
    """Each query ranks three images of its own; the target is the first, as GeneCIS stores it."""
    items = tuple(GalleryItem(f"g{i}", Noise(i)) for i in range(6))
    asked = (
        Query("a", Noise(50), "red", ("g0",), subset=("g0", "g1", "g2")),
        Query("b", Noise(51), "red", ("g3",), subset=("g3", "g4")),
    )
    protocol = Protocol(metrics=("R@1", "R@2"), primary="R@1", candidates="subset", ties=ties)
    return Benchmark("own", "val", "cir", asked, items, protocol)


def test_pessimistic_ties_put_the_target_last():
    benchmark = own_candidates("pessimistic")
    same = torch.ones(6, 4)
    values = score(benchmark, torch.ones(2, 4), same).values
    assert values["R@1"].tolist() == [0, 0]
    assert values["R@2"].tolist() == [0, 1]
    kind = score(own_candidates("gallery order"), torch.ones(2, 4), same).values
    assert kind["R@1"].tolist() == [1, 1]


def test_own_candidates_are_ranked_by_score():
    benchmark = own_candidates("pessimistic")
    gallery = torch.tensor([[1.0, 0], [3, 0], [2, 0], [5, 0], [4, 0], [9, 0]])
    scores = score(benchmark, torch.tensor([[1.0, 0], [1, 0]]), gallery)
    assert scores.ranking.positions.tolist() == [[1, 2, 0], [3, 4, -1]]
    assert scores.values["R@1"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"ties": "pessimistic"}, "candidates=subset"), ({"candidates": "subset"}, "subset")],
)
def test_what_cannot_be_scored_is_one_clear_error(changes, word):
    benchmark = with_protocol(**changes)
    bare = replace(benchmark, queries=tuple(replace(query, subset=None) for query in benchmark.queries))
    bare = replace(bare, protocol=replace(bare.protocol, metrics=("R@1",), primary="R@1"))
    with pytest.raises(DataError, match=word):
        score(bare, *embeddings(bare))


def test_an_embedding_that_is_not_finite_is_an_error_for_own_candidates_too():
    benchmark = own_candidates("pessimistic")
    with pytest.raises(DataError, match="nan"):
        score(benchmark, torch.full((2, 4), float("nan")), torch.ones(6, 4))
