"""Whether one method beats another by more than chance: a paired randomization test.

Knows values of the same queries under two methods. Does not know what the values measure.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import ConfigError, DataError

_AT_ONCE = 2**24


def randomization_test(
    first: Float[Tensor, " queries"], second: Float[Tensor, " others"], rounds: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p-value of the mean difference of two methods over the same queries.

    Under the null hypothesis the two methods' values of a query could be exchanged, so the
    sign of each query's difference is drawn at random, `rounds` times (Fisher's test; for
    retrieval: Smucker, Allan, Carterette, CIKM 2007).

    Args:
        first: One value a query.
        second: One value a query, of the same queries in the same order.
        rounds: How often the signs are drawn.
        seed: Of the draws.

    Returns:
        The share of draws at least as far from 0 as what was observed, the observation
        itself counted: from 1 / (rounds + 1) to 1. Queries where either is nan are left out.

    Raises:
        ConfigError: Where `rounds` is below 1.
        DataError: Where the lengths differ or no query has both values.
    """
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds cannot be drawn; give at least 1")
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} values are not of the same queries; give one a query for both")
    gaps = (first.detach().to("cpu", torch.float64) - second.detach().to("cpu", torch.float64)).numpy()
    gaps = gaps[~np.isnan(gaps)]
    if not len(gaps):
        raise DataError("no query has a value under both methods; compare metrics that both define")
    # Sums over signs differ from the observed sum in the last bits where they are equal on paper.
    bound = abs(gaps.sum()) - 1e-9 * np.abs(gaps).sum()
    moved = gaps[gaps != 0]
    draw = np.random.default_rng(seed)
    as_far = 0
    step = max(1, _AT_ONCE // max(1, len(moved)))
    for begin in range(0, rounds, step):
        count = min(step, rounds - begin)
        signs = draw.integers(0, 2, (count, len(moved)), dtype=np.int8).astype(np.float64) * 2 - 1
        as_far += int((np.abs(signs @ moved) >= bound).sum())
    return (as_far + 1) / (rounds + 1)
