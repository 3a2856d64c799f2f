"""Expected metrics of tied rankings against averages over every order."""

from itertools import chain, permutations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.errors import ConfigError
from union_igrot.evaluation.evaluate import means
from union_igrot.evaluation.scoring import score
from union_igrot.metrics import functional
from union_igrot.metrics.functional import (
    TieGroups,
    average_precision,
    expected_average_precision,
    expected_precision_at_k,
    expected_recall_at_k,
    precision_at_k,
    recall_at_k,
    sampled_values,
)
from union_igrot.metrics.names import MetricFamily
from union_igrot.metrics.retrieval import RankedHits, RetrievalMetrics
from union_igrot.metrics.statistics import paired_interval
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

CONVENTIONS = [
    *((recall_at_k, expected_recall_at_k, {"mode": mode}) for mode in ("any", "fraction")),
    *((precision_at_k, expected_precision_at_k, {"cut": cut}) for cut in ("k", "relevant", "attainable")),
    *(
        (average_precision, expected_average_precision, {"norm": norm, "rule": rule})
        for norm, rule in product(("min", "all", "hits"), ("step", "trapezoid", "voc"))
    ),
]


def groups_of(scores, relevant):
    scores, relevant = torch.tensor([scores]), torch.tensor([relevant])
    better = (scores[:, None] > scores[:, :, None]).sum(2)
    equal = (scores[:, None] == scores[:, :, None]).sum(2)
    return TieGroups.of(better, equal, relevant)


def every_order(scores, relevant):
    """The hit masks of all rankings that sort the scores."""
    levels = [[r for s, r in zip(scores, relevant, strict=True) if s == level] for level in sorted(set(scores))[::-1]]
    return torch.tensor([list(chain(*parts)) for parts in product(*map(permutations, levels))])


@st.composite
def rankings(draw):
    scores = draw(st.lists(st.integers(0, 2), min_size=2, max_size=7).filter(lambda s: max(map(s.count, s)) <= 4))
    relevant = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)).filter(any))
    return [float(s) for s in scores], relevant


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(rankings(), st.integers(1, 8))
def test_expected_values_are_means_over_every_order(ranking, k):
    scores, relevant = ranking
    groups, orders = groups_of(scores, relevant), every_order(scores, relevant)
    n_relevant = torch.full((len(orders),), sum(relevant))
    for compute, expected, options in CONVENTIONS:
        for depth in (k, None) if compute is average_precision else (k,):
            found = expected(groups, depth, **options)
            if found is not None:
                mean = compute(orders, n_relevant, depth, **options).mean().item()
                assert found.item() == pytest.approx(mean, abs=1e-12), (compute.__name__, options, depth)


@pytest.mark.slow
def test_what_has_no_closed_form_is_averaged_over_seeded_orders(monkeypatch):
    monkeypatch.setattr(functional, "SAMPLED_ORDERS", 400)
    scores, relevant = [2.0, 1.0, 1.0, 1.0, 0.0], [False, True, False, True, True]
    groups, orders = groups_of(scores, relevant), every_order(scores, relevant)
    n_relevant = torch.full((len(orders),), 3)
    for options in ({"norm": "hits", "rule": "step"}, {"norm": "min", "rule": "voc"}):
        assert expected_average_precision(groups, 3, **options) is None
        mean = average_precision(orders, n_relevant, 3, **options).mean().item()
        found = sampled_values(average_precision, groups, 3, options)
        assert found.item() == pytest.approx(mean, abs=0.03)
        assert found.equal(sampled_values(average_precision, groups, 3, options))


def collapsed(protocol, order):
    """Ten queries of two classes and a gallery in which nothing differs, in some order."""
    items = [GalleryItem(f"g{n}", Path(f"g{n}"), "ab"[n % 2]) for n in range(20)]
    gallery = [items[n] for n in order]
    targets = {label: tuple(item.id for item in items if item.label == label) for label in "ab"}
    queries = [Query(f"q{n}", Path(f"q{n}"), None, targets["ab"[n % 2]], label="ab"[n % 2]) for n in range(10)]
    return Benchmark("b", "test", "sbir", queries, gallery, protocol)


def test_a_collapsed_model_gets_the_expected_values_in_any_gallery_order():
    protocol = Protocol(metrics=("mAP", "mAP@5", "P@5", "R@1", "R@3"), primary="mAP")
    orders = (range(20), sorted(range(20), key=lambda n: n % 2), torch.randperm(20).tolist())
    vectors = torch.ones(10, 4), torch.ones(20, 4)
    found = [score(collapsed(protocol, order), *vectors).values for order in orders]
    for values in found:
        for name in protocol.metrics:
            assert values[name].equal(found[0][name])
            assert len(values[name].unique()) == 1
        gap = paired_interval(values["mAP"], found[0]["mAP"])
        assert gap == (0, 0, 0)
    assert found[0]["R@1"][0].item() == pytest.approx(0.5)
    assert found[0]["P@5"][0].item() == pytest.approx(0.5)
    assert found[0]["R@3"][0].item() == pytest.approx(1 - 10 * 9 * 8 / (20 * 19 * 18))
    by_class = collapsed(Protocol(metrics=("mAP",), primary="mAP", ties="gallery order"), orders[1])
    assert means(by_class, score(by_class, *vectors))["mAP"] != pytest.approx(
        100 * found[0]["mAP"].mean().item(), abs=1
    )


def test_a_metric_of_another_package_is_averaged_over_orders():
    family = MetricFamily("MRR", lambda hits, _, k: (hits[:, :k] / torch.arange(1, k + 1)).amax(1).double())
    groups = groups_of([1.0, 1.0], [True, False])
    metrics = RetrievalMetrics(("R@1",))
    metrics.update(RankedHits(torch.tensor([[True, False]]), torch.tensor([1]), groups), torch.tensor([0]))
    assert metrics.values()["R@1"].item() == pytest.approx(0.5)
    assert sampled_values(family.function(), groups, 2, {}).item() == pytest.approx(0.75, abs=0.05)
    with pytest.raises(ConfigError):
        RetrievalMetrics(("R@0",))
