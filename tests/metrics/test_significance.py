"""The randomization test, against every sign pattern of a few queries."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.significance import randomization_test


def exact(gaps):
    """The share of all sign patterns at least as far from zero."""
    observed = abs(sum(gaps))
    totals = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in product((-1, 1), repeat=len(gaps))]
    return sum(total >= observed - 1e-9 for total in totals) / len(totals)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8))
def test_near_the_share_of_all_sign_patterns(gaps):
    first = torch.tensor(gaps, dtype=torch.float64)
    found = randomization_test(first, torch.zeros_like(first), rounds=4000)
    assert found == pytest.approx(exact(gaps), abs=0.05)


def test_equal_methods_and_clear_differences():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert randomization_test(values, values) == 1
    assert randomization_test(values + 0.1, values, rounds=999) == pytest.approx(1 / 1000)
    assert randomization_test(values, values + 0.1, rounds=999) == pytest.approx(1 / 1000)


def test_seeded_and_without_undefined_queries():
    first, second = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)).double()
    assert randomization_test(first, second, 500, 3) == randomization_test(first, second, 500, 3)
    holes = torch.cat([first, torch.tensor([float("nan")]).double()])
    assert randomization_test(holes, torch.cat([second, torch.ones(1).double()]), 500, 3) == randomization_test(
        first, second, 500, 3
    )


def test_mistakes():
    ones = torch.ones(3)
    with pytest.raises(ConfigError, match="0 rounds"):
        randomization_test(ones, ones, rounds=0)
    with pytest.raises(DataError, match="3 and 2"):
        randomization_test(ones, torch.ones(2))
    with pytest.raises(DataError, match="no query"):
        randomization_test(ones * float("nan"), ones)
