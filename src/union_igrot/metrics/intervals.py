"""Bootstrap intervals of mean metrics, and of the difference between two methods.

The percentile bootstrap over queries (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13). Knows one value a query. Does not know which metric it is.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.functional import average

_DRAWS_AT_ONCE = 1 << 22  # 32 MiB of float64: a few such arrays are alive at a time

_Floats: TypeAlias = npt.NDArray[np.float64]
_Ints: TypeAlias = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """Bounds of a mean; both nan where there is no value.

    Attributes:
        low: Lower bound.
        high: Upper bound.
    """

    low: float
    high: float


class Difference(NamedTuple):
    """Mean difference between two methods and its bounds; nan where there is no pair.

    Attributes:
        mean: Mean of the first minus mean of the second, over the same queries.
        low: Lower bound.
        high: Upper bound.
    """

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[Tensor, " queries"],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    labels: Int[Tensor, " queries"] | None = None,
) -> Interval:
    """Bound the mean of a metric by resampling the queries.

    The same arguments give the same bounds; torch's and NumPy's global random states are
    neither read nor changed.

    Args:
        values: One value a query; nan is left out before anything is drawn.
        level: Share of resampled means between the bounds, within 0..1.
        resamples: How many times the queries are drawn.
        seed: Of the draws.
        labels: Given, the mean is that of the classes' means (macro). Each class is then
            resampled on its own and keeps its size: the classes are the benchmark's,
            the queries of a class are a sample.

    Returns:
        The bounds, in the units of `values`.

    Raises:
        ConfigError: Where `level` or `resamples` is out of range.
    """
    return bootstrap_intervals({"values": values}, level, resamples, seed, labels)["values"]


def bootstrap_intervals(
    values: Mapping[str, Float[Tensor, " queries"]],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    labels: Int[Tensor, " queries"] | None = None,
) -> dict[str, Interval]:
    """Bound the means of several metrics of the same queries.

    Metrics that are defined on the same queries share their resamples, and each gets what
    `bootstrap_interval` gives it alone.

    Args:
        values: For each name one value a query; nan is left out.
        level: Share of resampled means between the bounds, within 0..1.
        resamples: How many times the queries are drawn.
        seed: Of the draws.
        labels: Given, the means are macro means; see `bootstrap_interval`.

    Returns:
        The bounds by name, in the order of `values`.

    Raises:
        ConfigError: Where `level` or `resamples` is out of range.
        DataError: Where the metrics, or metrics and labels, differ in length.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; give a whole number from 1, such as 1000")
    lengths = {name: len(x) for name, x in values.items()} | ({} if labels is None else {"labels": len(labels)})
    if len(set(lengths.values())) > 1:
        raise DataError(f"the metrics are not of the same queries: {lengths}; give one value a query for each")
    # Metrics with values at the same queries are drawn together, once.
    together: dict[bytes, list[str]] = defaultdict(list)
    arrays = {name: x.detach().to("cpu", torch.float64).numpy() for name, x in values.items()}
    for name, array in arrays.items():
        together[np.isnan(array).tobytes()].append(name)
    classes = None if labels is None else labels.cpu().numpy().astype(np.int64)
    bounds: dict[str, Interval] = {}
    for names in together.values():
        kept = ~np.isnan(arrays[names[0]])
        if not kept.any():
            bounds |= dict.fromkeys(names, Interval(float("nan"), float("nan")))
            continue
        columns = [arrays[name][kept] for name in names]
        means = _resampled_means(columns, None if classes is None else classes[kept], resamples, seed)
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
) -> Difference:
    """Bound the mean difference of two methods over the same queries.

    Much narrower than two separate intervals suggest, since easy queries are easy for
    both: a difference whose bounds are on one side of 0 is worth naming.

    Args:
        first: One value a query.
        second: One value a query, of the same queries in the same order.
        level: Share of resampled differences between the bounds, within 0..1.
        resamples: How many times the queries are drawn.
        seed: Of the draws.
        labels: Given, the means are macro means; see `bootstrap_interval`.

    Returns:
        Mean of `first` minus `second`, and its bounds. A query where either is nan is
        left out.

    Raises:
        ConfigError: Where `level` or `resamples` is out of range.
        DataError: Where the two differ in length.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} values are not of the same queries; give one a query for both")
    gaps = first.detach().to("cpu", torch.float64) - second.detach().to("cpu", torch.float64)
    low, high = bootstrap_interval(gaps, level, resamples, seed, labels)
    mean = average(gaps, None if labels is None else labels.cpu(), "micro" if labels is None else "macro")
    return Difference(float(mean), low, high)


def _strata(classes: _Ints | None, n: int) -> tuple[_Ints, _Ints, _Ints]:
    """Order the queries by class; give that order and each class's start and size.

    A mean over queries is a macro mean with one class that holds all.
    """
    if classes is None:
        return np.arange(n), np.zeros(1, np.int64), np.array([n])
    order = np.argsort(classes, kind="stable")
    _, starts, sizes = np.unique(classes[order], return_index=True, return_counts=True)
    return order, starts, sizes


def _resampled_means(columns: list[_Floats], classes: _Ints | None, resamples: int, seed: int) -> _Floats:
    """Draw the queries again and again, some resamples at a time, and average each metric.

    The draws come from one stream, row by row, so that they do not depend on how many
    rows are drawn at once.
    """
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
            # The draws are spent, so their memory is used again; `clip` only spares a copy.
            np.take(column, drawn, out=draws, mode="clip")
            if len(starts) == 1:
                means[i, rows] = draws.mean(axis=1)
            else:
                means[i, rows] = (np.add.reduceat(draws, starts, axis=1) / sizes).mean(axis=1)
    return means
