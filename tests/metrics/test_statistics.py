"""Bootstrap intervals (known cases, invariances, coverage), and the randomization test against every sign pattern."""

import math
import random
import statistics as statistics_of
from itertools import chain, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics import statistics
from union_igrot.metrics.functional import average
from union_igrot.metrics.statistics import (
    bootstrap_interval,
    bootstrap_intervals,
    median_difference,
    paired_interval,
    randomization_test,
)


def some(n=200, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 5))
def test_bounds_are_within_the_values_and_deterministic(values, seed):
    x = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(x, resamples=50, seed=seed)
    assert x.min() - 1e-12 <= low <= high <= x.max() + 1e-12
    assert bootstrap_interval(x, resamples=50, seed=seed) == (low, high)


def test_a_single_query_has_no_bounds():
    one = torch.tensor([float("nan"), 0.5])
    found = [bootstrap_interval(one), paired_interval(one, one)[1:], median_difference(one)[1:]]
    assert all(math.isnan(bound) for bounds in found for bound in bounds)


@pytest.mark.slow
def test_bounds_are_near_the_normal_approximation():
    x = some(2000)
    low, high = bootstrap_interval(x, level=0.95, resamples=4000)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert low == pytest.approx((x.mean() - half).item(), abs=0.1 * half.item())
    assert high == pytest.approx((x.mean() + half).item(), abs=0.1 * half.item())


def test_the_true_mean_is_mostly_between_the_bounds():
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(torch.rand(60, generator=generator), level=0.8, resamples=200, seed=trial)
        inside += low <= 0.5 <= high
    assert 0.7 <= inside / 200 <= 0.9


def test_a_higher_level_is_wider_and_another_seed_is_another_draw():
    x = some()
    narrow, wide = bootstrap_interval(x, level=0.5), bootstrap_interval(x, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert bootstrap_interval(x, seed=1) != bootstrap_interval(x, seed=2)


def test_nan_is_left_out():
    x = some()
    holes = torch.cat([torch.tensor([torch.nan]), x[:50], torch.tensor([torch.nan, torch.nan]), x[50:]])
    assert bootstrap_interval(holes) == bootstrap_interval(x)
    assert all(math.isnan(bound) for bound in bootstrap_interval(torch.full((3,), torch.nan)))


@pytest.mark.parametrize("options", [{}, {"labels": torch.arange(90) % 7}, {"classes": torch.arange(90) % 7}])
def test_the_chunk_size_of_draws_changes_nothing(monkeypatch, options):
    x = some(90)
    whole = bootstrap_interval(x, resamples=100, **options)
    for at_once in (1, 900, 5000):
        monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", at_once)
        assert bootstrap_interval(x, resamples=100, **options) == whole


def test_global_random_states_are_neither_read_nor_changed():
    x = some()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = bootstrap_interval(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert bootstrap_interval(x) == first


def test_metrics_share_their_resamples():
    x = some()
    holes = x.clone()
    holes[3] = torch.nan
    together = bootstrap_intervals({"a": x, "twice": 2 * x, "holes": holes, "negative": -x})
    assert list(together) == ["a", "twice", "holes", "negative"]
    assert together["a"] == bootstrap_interval(x)
    assert together["holes"] == bootstrap_interval(holes)
    assert together["twice"] == pytest.approx([2 * bound for bound in together["a"]], abs=1e-12)
    assert together["negative"] == pytest.approx([-bound for bound in reversed(together["a"])], abs=1e-12)


def test_macro_weighs_classes_and_keeps_their_sizes():
    # A class of equal values adds no spread, however large it is; the mean is the classes'.
    values = torch.cat([torch.full((900,), 0.2), torch.tensor([0.0, 1.0] * 50)])
    labels = torch.cat([torch.full((900,), 5), torch.full((100,), -1)])
    low, high = bootstrap_interval(values, labels=labels, resamples=2000)
    half = 1.96 * (0.5 / math.sqrt(100)) / 2
    assert low == pytest.approx(0.35 - half, abs=0.006)
    assert high == pytest.approx(0.35 + half, abs=0.006)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    mixed = bootstrap_interval(values[shuffled], labels=labels[shuffled], resamples=2000)
    assert mixed == pytest.approx((low, high), abs=0.006)
    alone = bootstrap_interval(values, labels=torch.zeros(1000, dtype=torch.int64))
    assert alone == bootstrap_interval(values)


def test_a_paired_difference_is_of_the_same_queries():
    x = some()
    better = x + 0.01
    gap = paired_interval(better, x)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.01, 0.01, 0.01), abs=1e-12)
    assert paired_interval(x, better).high < 0
    holes = x.clone()
    holes[:20] = torch.nan
    kept = paired_interval(some(seed=9)[20:], x[20:])
    assert paired_interval(some(seed=9), holes) == pytest.approx(kept, abs=1e-12)
    nothing = paired_interval(x[:2], torch.full((2,), torch.nan))
    assert all(math.isnan(part) for part in nothing)


def test_a_paired_macro_difference_is_of_the_macro_means():
    x, y, labels = some(seed=1), some(seed=2), (torch.arange(200) // 3) % 5
    gap = paired_interval(x, y, labels=labels)
    assert gap.mean == pytest.approx((average(x, labels, "macro") - average(y, labels, "macro")).item(), abs=1e-12)
    assert gap.low < gap.mean < gap.high


def test_wrong_arguments_are_errors():
    x = some(4)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ConfigError, match="level"):
            bootstrap_interval(x, level=level)
    with pytest.raises(ConfigError, match="resamples: 0"):
        bootstrap_interval(x, resamples=0)
    with pytest.raises(DataError, match="not of the same queries"):
        bootstrap_intervals({"a": x, "b": x[:3]})


def every_pattern(gaps):
    """The share of all sign patterns at least as far from zero."""
    observed = abs(sum(gaps))
    totals = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in product((-1, 1), repeat=len(gaps))]
    return sum(total >= observed - 1e-9 for total in totals) / len(totals)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8))
def test_near_the_share_of_all_sign_patterns(gaps):
    first = torch.tensor(gaps, dtype=torch.float64)
    found = randomization_test(first, torch.zeros_like(first), rounds=4000)
    assert found == pytest.approx(every_pattern(gaps), abs=0.05)


def test_equal_methods_and_clear_differences():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert randomization_test(values, values) == 1
    assert randomization_test(values + 0.1, values, rounds=999) == pytest.approx(1 / 1000)
    assert randomization_test(values, values + 0.1, rounds=999) == pytest.approx(1 / 1000)


def test_wrong_arguments_of_the_test_are_errors():
    ones = torch.ones(3)
    with pytest.raises(ConfigError, match="rounds: 0"):
        randomization_test(ones, ones, rounds=0)
    with pytest.raises(DataError, match="3 and 2"):
        randomization_test(ones, torch.ones(2))
    with pytest.raises(DataError, match="no query"):
        randomization_test(ones * float("nan"), ones)


def test_resampled_classes_equal_a_plain_loop():
    values, classes = some(60), torch.arange(60) % 7
    strata = torch.arange(60) // 30
    plain, class_of = values.tolist(), classes.tolist()
    for labels in (None, classes, strata):
        low, high = bootstrap_interval(values, labels=labels, classes=classes, resamples=2000)
        blocks = [range(30), range(30, 60)] if labels is strata else [range(60)]
        grouped = [[[plain[i] for i in block if class_of[i] == c] for c in range(7)] for block in blocks]
        draw, found = random.Random(0), []
        for _ in range(2000):
            means = []
            for groups in grouped:
                drawn = [draw.choices(group, k=len(group)) for group in draw.choices(groups, k=7)]
                if labels is classes:
                    means.append(statistics_of.fmean(map(statistics_of.fmean, drawn)))
                else:
                    means.append(statistics_of.fmean(chain(*drawn)))
            found.append(statistics_of.fmean(means))
        found.sort()
        assert low == pytest.approx(found[50], abs=0.02)
        assert high == pytest.approx(found[1950], abs=0.02)


def test_classes_that_differ_widen_intervals_and_equal_ones_do_not_matter():
    classes = torch.arange(4).repeat_interleave(100)
    values = torch.tensor([0.1, 0.4, 0.6, 0.9])[classes].double() + 0.01 * some(400)
    plain, resampled = bootstrap_interval(values), bootstrap_interval(values, classes=classes)
    assert resampled.high - resampled.low > 5 * (plain.high - plain.low)
    one = torch.zeros(400, dtype=torch.int64)
    assert bootstrap_interval(values, classes=one) == pytest.approx(plain, abs=0.01)
    alone = torch.arange(400)
    assert bootstrap_interval(values, classes=alone) == pytest.approx(plain, abs=0.01)


def test_a_randomization_test_over_classes_is_exact_for_few():
    classes = torch.arange(4).repeat_interleave(50)
    first = torch.tensor([0.2, 0.4, 0.6, 0.9])[classes]
    assert randomization_test(first, torch.zeros(200)) < 0.001
    assert randomization_test(first, torch.zeros(200), classes=classes) == pytest.approx(2 / 16, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_medians_and_their_differences(grouped):
    draw = np.random.default_rng(0)
    first = torch.tensor(draw.integers(1, 50, 41), dtype=torch.float64)
    second = first + torch.tensor(draw.integers(3, 9, 41), dtype=torch.float64)
    classes = torch.arange(41) % 5 if grouped else None
    alone = median_difference(first, classes=classes)
    assert alone.mean == float(np.median(first.numpy()))
    assert first.min() <= alone.low <= alone.mean <= alone.high <= first.max()
    gap = median_difference(first, second, classes=classes)
    assert gap.mean == float(np.median(first.numpy()) - np.median(second.numpy()))
    assert gap.high < 0  # paired: every query's rank is lower
    missing = torch.full_like(first, float("nan"))
    assert all(math.isnan(x) for x in median_difference(first, missing))
