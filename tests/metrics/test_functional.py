"""Metrics of hit masks against the published worked example, slow oracles and properties."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings, strategies as st

from slow_metrics import slow_ap, slow_precision, slow_recall
from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.functional import (
    average,
    average_precision,
    precision_at_k,
    recall_at_k,
)

NAN = float("nan")
NORMS = ("min", "hits", "all")
RULES = ("step", "trapezoid", "voc")
CUTS = ("k", "relevant", "attainable")

CONVENTIONS = {
    "A": ("min", "step"),
    "B": ("hits", "step"),
    "C": ("all", "step"),
    "D": ("min", "voc"),
    "E": ("hits", "trapezoid"),
    "F": ("all", "trapezoid"),
}
FIRST = [1, 0, 1, 0, 0, 1, 0, 0, 1, 0]
SECOND = [1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
THIRD = [0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
FOURTH = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
EXAMPLES = [
    # relevance, R, k, (A, B, C, D, E, F), (P1, P2, P3)
    (FIRST, 4, 5, (0.4167, 0.8333, 0.4167, 0.4167, 0.7917, 0.3958), (0.4, 0.5, 0.5)),
    (FIRST, 4, 10, (0.6528, 0.6528, 0.6528, 0.6528, 0.6108, 0.6108), (0.4, 0.5, 1.0)),
    (SECOND, 8, 5, (0.3333, 0.8333, 0.2083, 0.3333, 0.7917, 0.1979), (0.4, 0.4, 0.4)),
    (SECOND, 8, 10, (0.2083, 0.8333, 0.2083, 0.2083, 0.7917, 0.1979), (0.2, 0.25, 0.25)),
    (THIRD, 3, 5, (0.5889, 0.5889, 0.5889, 0.6444, 0.4611, 0.4611), (0.6, 0.6667, 1.0)),
    (THIRD, 3, 10, (0.5889, 0.5889, 0.5889, 0.6444, 0.4611, 0.4611), (0.3, 0.6667, 1.0)),
    (FOURTH, 1, 5, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    (FOURTH, 1, 10, (0.1429, 0.1429, 0.1429, 0.1429, 0.0714, 0.0714), (0.1, 0.0, 1.0)),
]


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def count(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


@st.composite
def rankings(draw, min_rows=1):
    """Whole rankings of some queries, some of them without a relevant candidate."""
    width = draw(st.integers(1, 24))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=min_rows, max_size=5))
    return mask(*rows)


def assert_equal(given_values, expected):
    torch.testing.assert_close(
        given_values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("column", range(6), ids=list(CONVENTIONS))
@pytest.mark.parametrize(("relevance", "relevant", "k", "expected", "_"), EXAMPLES)
def test_worked_example_of_average_precision(relevance, relevant, k, expected, _, column):
    norm, rule = list(CONVENTIONS.values())[column]
    value = average_precision(mask(relevance), count(relevant), k, norm, rule)
    assert value.item() == pytest.approx(expected[column], abs=5.1e-5)


@pytest.mark.parametrize(("relevance", "relevant", "k", "_", "expected"), EXAMPLES)
def test_worked_example_of_precision(relevance, relevant, k, _, expected):
    values = [precision_at_k(mask(relevance), count(relevant), k, cut).item() for cut in CUTS]
    assert values == pytest.approx(expected, abs=5.1e-5)


def test_reference_epsilon_belongs_to_its_pair_alone():
    row, one = mask([1, 0]), count(1)
    assert average_precision(row, one, 1, "hits", "trapezoid").item() == pytest.approx(1 / 1.00001, abs=1e-12)
    for norm in NORMS:
        for rule in RULES:
            if (norm, rule) != ("hits", "trapezoid"):
                assert average_precision(row, one, 1, norm, rule).item() == 1.0


@settings(max_examples=15, deadline=None)
@given(rankings(), st.integers(1, 30), st.integers(0, 3))
def test_metrics_equal_the_oracles(hits, k, beyond):
    whole = hits.sum(1)
    cut_after = hits.shape[1]
    for n_relevant, ks in ((whole, (k, None)), (whole + beyond, (min(k, cut_after),))):
        rows, numbers = hits.int().tolist(), n_relevant.tolist()
        for at in ks:
            for norm in NORMS:
                for rule in RULES:
                    expected = [slow_ap(r, n, at, norm, rule) for r, n in zip(rows, numbers, strict=True)]
                    assert_equal(average_precision(hits, n_relevant, at, norm, rule), expected)
        for cut in CUTS:
            expected = [slow_precision(r, n, ks[0], cut) for r, n in zip(rows, numbers, strict=True)]
            assert_equal(precision_at_k(hits, n_relevant, ks[0], cut), expected)
        for mode in ("any", "fraction"):
            expected = [slow_recall(r, n, ks[0], mode) for r, n in zip(rows, numbers, strict=True)]
            assert_equal(recall_at_k(hits, n_relevant, ks[0], mode), expected)


def test_a_perfect_ranking_and_an_empty_batch():
    hits, n_relevant = mask([1, 1, 1, 0]), count(3)
    for norm in NORMS:
        assert average_precision(hits, n_relevant, norm=norm).item() == 1.0
    nothing = average_precision(torch.zeros(0, 4, dtype=torch.bool), count(), 2, rule="voc")
    assert nothing.shape == (0,)


def test_a_mask_cut_too_early_is_an_error():
    hits = mask([1, 0, 1], [0, 0, 1])
    for k in (None, 4):
        with pytest.raises(DataError, match=r"end at rank 3 and row 1 holds 1 of 2 .* k <= 3"):
            average_precision(hits, count(2, 2), k)
    with pytest.raises(DataError, match="end at rank 3"):
        recall_at_k(hits, count(2, 2), 4)
    with pytest.raises(DataError, match="end at rank 3"):
        precision_at_k(hits, count(2, 2), 4)
    assert precision_at_k(hits, count(2, 1), 4).tolist() == [0.5, 0.25]


def test_more_hits_than_relevant_candidates_is_an_error():
    for metric in (recall_at_k, precision_at_k, average_precision):
        with pytest.raises(DataError, match="row 0 has 2 hits but n_relevant says 1"):
            metric(mask([1, 1]), count(1), 2)


@pytest.mark.parametrize("metric", [recall_at_k, precision_at_k, average_precision])
def test_k_below_1_is_an_error(metric):
    with pytest.raises(ConfigError, match="k: 0 "):
        metric(mask([1]), count(1), 0)


def test_unknown_conventions_are_errors(monkeypatch):
    # Type checks, on in tests alone, would refuse these first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    hits, one = mask([1]), count(1)
    for call in (
        lambda: recall_at_k(hits, one, 1, "all"),
        lambda: precision_at_k(hits, one, 1, "n"),
        lambda: average_precision(hits, one, 1, "mean"),
        lambda: average_precision(hits, one, 1, "min", "spline"),
        lambda: average(torch.ones(1), how="median"),
    ):
        with pytest.raises(ConfigError, match="expected one of"):
            call()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0, NAN]), st.integers(-2, 3)), min_size=1, max_size=20))
def test_averages_equal_the_oracles(pairs):
    values = torch.tensor([v for v, _ in pairs], dtype=torch.float64)
    labels = count(*[c for _, c in pairs])
    kept = [(v, c) for v, c in pairs if not math.isnan(v)]
    classes = {c: [v for v, d in kept if d == c] for _, c in kept}
    micro = sum(v for v, _ in kept) / len(kept) if kept else NAN
    macro = sum(sum(vs) / len(vs) for vs in classes.values()) / len(classes) if classes else NAN
    assert average(values).item() == pytest.approx(micro, nan_ok=True)
    assert average(values, labels).item() == pytest.approx(micro, nan_ok=True)
    assert average(values, labels, "macro").item() == pytest.approx(macro, nan_ok=True)


def test_macro_needs_labels():
    with pytest.raises(ConfigError, match="no labels were given"):
        average(torch.ones(2), how="macro")
