"""Statistics of metrics over queries: bootstrap intervals, paired differences and a randomization test.

The intervals are percentile bootstraps over queries (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13). If queries come in classes, classes are resampled first and then the queries within each (Davison and
Hinkley, Bootstrap Methods and their Application, 1997, section 3.8): queries of one class resemble each other, so that
resampling queries alone makes intervals too narrow, most of all with few classes.

Arguments out of range are a ConfigError, values that are not of the same queries a DataError.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from union_igrot.errors import ConfigError, DataError, check_count
from union_igrot.metrics.functional import average

_DRAWS_AT_ONCE = 1 << 22  # 32 MiB of float64; a few such arrays are alive at a time
_SIGNS_AT_ONCE = 2**24

_Floats: TypeAlias = npt.NDArray[np.float64]
_Ints: TypeAlias = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """Lower and upper bound of a mean; both nan without values, and for a single one, which says nothing of others."""

    low: float
    high: float


class Difference(NamedTuple):
    """Mean difference between two methods over the same queries, and its bounds, which are nan for less than two."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[Tensor, " queries"],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    labels: Int[Tensor, " queries"] | None = None,
    classes: Int[Tensor, " queries"] | None = None,
) -> Interval:
    """Bound the mean of a metric by resampling the queries.

    Deterministic; the global random states of torch and NumPy are neither read nor changed.

    Args:
        values: One value per query; nan is removed first.
        level: Share of resampled means between the bounds, 0..1.
        resamples: Number of resamples.
        seed: Seed of the draws.
        labels: If given, the mean is that of the means over queries with one label (macro). Each label is then
            resampled on its own and keeps its size.
        classes: If given, classes are resampled before the queries within them. If they are also the labels, the mean
            is that of the resampled classes' means.

    Returns:
        The bounds, in the units of `values`.
    """
    return bootstrap_intervals({"values": values}, level, resamples, seed, labels, classes)["values"]


def bootstrap_intervals(
    values: Mapping[str, Float[Tensor, " queries"]],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    labels: Int[Tensor, " queries"] | None = None,
    classes: Int[Tensor, " queries"] | None = None,
) -> dict[str, Interval]:
    """Bound the means of several metrics of the same queries, by name; arguments are as for `bootstrap_interval`.

    Metrics that are defined on the same queries share their resamples; each gets the same bounds as alone.
    """
    if not 0 < level < 1:
        raise ConfigError(f"invalid value for level: {level} (expected a number between 0 and 1, such as 0.95)")
    check_count("resamples", resamples)
    lengths = {name: len(x) for name, x in values.items()}
    lengths |= {name: len(x) for name, x in (("labels", labels), ("classes", classes)) if x is not None}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the metrics are not of the same queries: {lengths}; pass one value per query for each")
    # Metrics that are defined on the same queries are resampled together.
    together: dict[bytes, list[str]] = defaultdict(list)
    arrays = {name: x.detach().to("cpu", torch.float64).numpy() for name, x in values.items()}
    for name, array in arrays.items():
        together[np.isnan(array).tobytes()].append(name)
    strata, clusters = (None if x is None else x.cpu().numpy().astype(np.int64) for x in (labels, classes))
    bounds: dict[str, Interval] = {}
    for names in together.values():
        kept = ~np.isnan(arrays[names[0]])
        if kept.sum() < 2:
            bounds |= dict.fromkeys(names, Interval(float("nan"), float("nan")))
            continue
        columns = [arrays[name][kept] for name in names]
        stratum = None if strata is None else strata[kept]
        if clusters is None:
            means = _resampled_means(columns, stratum, resamples, seed)
        else:
            means = _resampled_class_means(columns, clusters[kept], stratum, resamples, seed)
        edges = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1)
        bounds |= {name: Interval(float(edges[0, i]), float(edges[1, i])) for i, name in enumerate(names)}
    return {name: bounds[name] for name in values}


def paired_interval(
    first: Float[Tensor, " queries"],
    second: Float[Tensor, " queries"],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    labels: Int[Tensor, " queries"] | None = None,
    classes: Int[Tensor, " queries"] | None = None,
) -> Difference:
    """Bound the mean of `first` minus `second`; the other arguments are as for `bootstrap_interval`.

    Much narrower than two separate intervals suggest, since easy queries are easy for both. The difference is clear if
    both bounds are on one side of 0. Queries for which either is nan are left out.
    """
    gaps = _query_differences(first, second)
    low, high = bootstrap_interval(gaps, level, resamples, seed, labels, classes)
    mean = average(gaps, None if labels is None else labels.cpu(), "micro" if labels is None else "macro")
    return Difference(float(mean), low, high)


def median_difference(
    first: Float[Tensor, " queries"],
    second: Float[Tensor, " queries"] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    classes: Int[Tensor, " queries"] | None = None,
) -> Difference:
    """Return the median of `first` minus that of `second`, or the median of `first`, with its bounds.

    Classes, if given, and queries are resampled, the same ones for both. Queries for which either is nan are left out.
    """
    other = torch.zeros_like(first) if second is None else second
    kept = ~_query_differences(first, other).isnan()
    if not kept.any():
        return Difference(*[float("nan")] * 3)
    pair = [x.detach().to("cpu", torch.float64)[kept].numpy() for x in (first, other)]
    groups = np.zeros(len(pair[0]), np.int64) if classes is None else classes.cpu()[kept].numpy().astype(np.int64)
    one, zero = _resampled_medians(pair, groups, resamples, seed)
    edges = np.quantile(one - zero, [(1 - level) / 2, (1 + level) / 2])
    low, high = map(float, edges if len(groups) > 1 else (np.nan, np.nan))
    return Difference(float(np.median(pair[0]) - np.median(pair[1])), low, high)


def _resampled_medians(columns: list[_Floats], classes: _Ints, resamples: int, seed: int) -> _Floats:
    """Resample classes and the queries within each, and take the median of each metric."""
    order, starts, sizes = _strata(classes, len(classes))
    ordered = np.stack(columns)[:, order]
    draw, medians = np.random.default_rng(seed), np.empty((len(columns), resamples))
    for at in range(resamples):
        picked = draw.integers(0, len(starts), len(starts))
        slots = np.repeat(sizes[picked], sizes[picked])
        rows = (draw.random(len(slots)) * slots).astype(np.int64) + np.repeat(starts[picked], sizes[picked])
        medians[:, at] = np.median(ordered[:, rows], axis=1)
    return medians


def randomization_test(
    first: Float[Tensor, " queries"],
    second: Float[Tensor, " others"],
    rounds: int = 10_000,
    seed: int = 0,
    classes: Int[Tensor, " queries"] | None = None,
) -> float:
    """Return the two-sided p-value of the mean difference of two methods over the same queries.

    Under the null hypothesis the two methods' values of a query are exchangeable, so the sign of each query's
    difference is drawn at random, `rounds` times (Fisher's paired randomization test; for retrieval: Smucker, Allan,
    Carterette, CIKM 2007). With `classes`, the methods are exchanged for whole classes of queries, whose differences
    resemble each other.

    Returns:
        The share of draws at least as far from 0 as the observed difference, the observation itself included: from 1 /
        (rounds + 1) to 1. Queries for which either is nan are left out.
    """
    check_count("rounds", rounds)
    gaps = _query_differences(first, second).numpy()
    kept = ~np.isnan(gaps)
    if not kept.any():
        raise DataError("no query has a value under both methods; compare metrics that are defined for both")
    gaps = gaps[kept]
    if classes is not None:
        gaps = np.bincount(np.unique(classes.numpy()[kept], return_inverse=True)[1], weights=gaps)
    # Sums that are equal on paper differ in their last bits.
    bound = abs(gaps.sum()) - 1e-9 * np.abs(gaps).sum()
    moved = gaps[gaps != 0]
    draw = np.random.default_rng(seed)
    as_far = 0
    step = max(1, _SIGNS_AT_ONCE // max(1, len(moved)))
    for begin in range(0, rounds, step):
        count = min(step, rounds - begin)
        signs = draw.integers(0, 2, (count, len(moved)), dtype=np.int8).astype(np.float64) * 2 - 1
        as_far += int((np.abs(signs @ moved) >= bound).sum())
    return (as_far + 1) / (rounds + 1)


def _query_differences(first: Float[Tensor, " queries"], second: Float[Tensor, " others"]) -> Float[Tensor, " queries"]:
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} values are not of the same queries; pass one per query")
    return first.detach().to("cpu", torch.float64) - second.detach().to("cpu", torch.float64)


def _strata(classes: _Ints | None, n: int) -> tuple[_Ints, _Ints, _Ints]:
    """Return the order of the queries by class, and the start and size of each class (one class without labels)."""
    if classes is None:
        return np.arange(n), np.zeros(1, np.int64), np.array([n])
    order = np.argsort(classes, kind="stable")
    _, starts, sizes = np.unique(classes[order], return_index=True, return_counts=True)
    return order, starts, sizes


def _resampled_means(columns: list[_Floats], classes: _Ints | None, resamples: int, seed: int) -> _Floats:
    """Resample the queries and average each metric; the draws do not depend on how many are drawn at once."""
    n = len(columns[0])
    order, starts, sizes = _strata(classes, n)
    start_of, size_of = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    ordered = [column[order] for column in columns]
    means = np.empty((len(columns), resamples))
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // n)
    for begin in range(0, resamples, step):
        rows = slice(begin, min(begin + step, resamples))
        draws = generator.random((rows.stop - rows.start, n))
        draws *= size_of
        drawn = draws.astype(np.int64)
        drawn += start_of
        for i, column in enumerate(ordered):
            # The draws are used up, so their memory is reused; `clip` avoids a copy.
            np.take(column, drawn, out=draws, mode="clip")
            if len(starts) == 1:
                means[i, rows] = draws.mean(axis=1)
            else:
                means[i, rows] = (np.add.reduceat(draws, starts, axis=1) / sizes).mean(axis=1)
    return means


def _resampled_class_means(
    columns: list[_Floats], classes: _Ints, strata: _Ints | None, resamples: int, seed: int
) -> _Floats:
    """Resample classes within each stratum, then queries within each class, and average each metric.

    If the strata are the classes themselves, the classes' means are averaged. The draws do not depend on how many are
    drawn at once.
    """
    macro = strata is not None and np.array_equal(strata, classes)
    strata = np.zeros_like(classes) if strata is None or macro else strata
    order = np.lexsort((classes, strata))
    runs = np.stack([strata[order], classes[order]])
    (parts, _), starts, sizes = np.unique(runs, axis=1, return_index=True, return_counts=True)
    groups = [np.flatnonzero(parts == part) for part in np.unique(parts)]
    means = np.empty((len(columns), resamples))
    pick, draw = (np.random.default_rng([seed, stream]) for stream in range(2))
    step = max(1, _DRAWS_AT_ONCE // (2 * len(classes)))
    ordered, edges = [column[order] for column in columns], np.cumsum([0, *map(len, groups[:-1])])
    for begin in range(0, resamples, step):
        count = min(step, resamples - begin)
        picked = pick.random((count, len(starts)))
        drawn = np.concatenate([g[(picked[:, g] * len(g)).astype(np.int64)] for g in groups], axis=1)
        slots = sizes[drawn].ravel()
        within = (draw.random(slots.sum()) * np.repeat(slots, slots)).astype(np.int64)
        within += np.repeat(starts[drawn].ravel(), slots)
        bounds = np.cumsum(slots) - slots
        for i, column in enumerate(ordered):
            sums = np.add.reduceat(column[within], bounds).reshape(drawn.shape)
            if macro:
                means[i, begin : begin + count] = (sums / sizes[drawn]).mean(axis=1)
                continue
            totals = np.add.reduceat(sums, edges, axis=1) / np.add.reduceat(sizes[drawn], edges, axis=1)
            means[i, begin : begin + count] = totals.mean(axis=1)
    return means
