"""Recall, precision and average precision of hit masks, one value per query.

A hit mask has one row per query: the ranking of its candidates, best first, True at relevant candidates. `n_relevant`
is the number of relevant candidates of each query in its whole ranking.

Values are 0..1, and nan for a query without a relevant candidate. The caller decides whether such a query is left
out (`average` does) or counts as 0 (`values.nan_to_num(0)`, as DTIN does). An unknown convention and a k below 1 are a
ConfigError; masks that contradict `n_relevant`, or end before k with relevant candidates beyond, are a DataError.

Expected metrics of rankings with ties are averages over all orders of the candidates that have equal scores. Recall,
precision and average precision by the step or trapezoid rule have closed forms (McSherry and Najork, Computing
Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores, ECIR 2008). For other conventions
and registered metrics, a fixed number of seeded orders is averaged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from union_igrot.errors import ConfigError, DataError, check_choice, check_count
from union_igrot.metrics.names import Reduction
from union_igrot.types import ApNorm, ApRule, Average, PrecisionCut, RecallMode

REFERENCE_EPSILON = 1e-5
"""Added to the number of hits in the divisor by the UNION authors' code."""


def recall_at_k(
    hits: Bool[Tensor, "queries depth"], n_relevant: Int[Tensor, " queries"], k: int, mode: RecallMode = "any"
) -> Float[Tensor, " queries"]:
    """Return the recall within the first k candidates.

    `any` returns 1 if at least one relevant candidate is among them (CIRR, FashionIQ, GeneCIS); `fraction` returns the
    share that is (Pic2Word's DTIN metric, there with 1e-5 added to the divisor).
    """
    check_choice("mode", mode, get_args(RecallMode))
    top = _top(hits, k)
    found = top.sum(1)
    _check_counts(found, n_relevant, hits.shape[1], k)
    real = widest_float(hits.device)
    recall = (found > 0).to(real) if mode == "any" else found.to(real) / n_relevant
    return _undefined_as_nan(recall, n_relevant)


def precision_at_k(
    hits: Bool[Tensor, "queries depth"], n_relevant: Int[Tensor, " queries"], k: int, cut: PrecisionCut = "k"
) -> Float[Tensor, " queries"]:
    """Return the precision within the first k candidates.

    With h the hits among the first k and R = `n_relevant`, the conventions in use are `k`: h / k (UNION, SAKE,
    torchmetrics), whose divisor stays k in a smaller gallery; `relevant`: the share among the first min(k, R), so that
    the list gets shorter too (ZSE-SBIR); and `attainable`: h / min(k, R) (doodle2search). If R >= k, all three are
    equal.
    """
    check_choice("cut", cut, get_args(PrecisionCut))
    top = _top(hits, k)
    found = top.sum(1)
    _check_counts(found, n_relevant, hits.shape[1], k)
    attainable = n_relevant.clamp(max=k)
    if cut == "relevant":
        found = (top & (torch.arange(top.shape[1], device=hits.device) < attainable[:, None])).sum(1)
    real = widest_float(hits.device)
    precision = found.to(real) / (k if cut == "k" else attainable)
    return _undefined_as_nan(precision, n_relevant)


def average_precision(
    hits: Bool[Tensor, "queries depth"],
    n_relevant: Int[Tensor, " queries"],
    k: int | None = None,
    norm: ApNorm = "min",
    rule: ApRule = "step",
) -> Float[Tensor, " queries"]:
    """Return the average precision of each ranking, under any of the conventions in use.

    With P(i) the precision among the first i, R = `n_relevant`, h the hits among the first k, and sums over those
    hits, the published conventions are

    - `min`, `step`: sum P(i) / min(k, R). CIRCO, SEARLE, LinCIR (strict)
    - `hits`, `step`: sum P(i) / h. SEM-PCYC, torchmetrics (lenient)
    - `all`, `step`: sum P(i) / R. Whole rankings; scikit-learn without ties
    - `min`, `voc`: sum max P(j) over j >= i / min(k, R). SAKE, ZSE-SBIR
    - `hits`, `trapezoid`: sum of means / (h + 1e-5). UNION's released code
    - `all`, `trapezoid`: sum of means / R. cnnimageretrieval-pytorch, i-CIR

    where "means" are of the precision at a hit and the precision just before it (1 before the first rank). The 1e-5 is
    part of the pair (`hits`, `trapezoid`) because the one published user of that pair has it. A query with R > 0 and
    no hit among the first k gets 0 under every convention.

    Args:
        hits: Rankings as hit masks, of any depth that includes the first k candidates.
        n_relevant: Number of relevant candidates.
        k: Cut-off, at least 1; None for the whole ranking.
        norm: Divisor.
        rule: How the area under the precision-recall curve is computed.
    """
    check_choice("norm", norm, get_args(ApNorm))
    check_choice("rule", rule, get_args(ApRule))
    ranks, found = _ranks_of_hits(_top(hits, k))
    _check_counts(found, n_relevant, hits.shape[1], k)
    real = widest_float(hits.device)
    positions = ranks.to(real)
    nth = torch.arange(1, ranks.shape[1] + 1, dtype=real, device=hits.device)
    heights = nth / positions
    if rule == "trapezoid":
        before = torch.where(ranks == 1, 1, (nth - 1) / (positions - 1))
        heights = (heights + before) / 2
    heights = heights.masked_fill(nth > found[:, None], 0)
    if rule == "voc" and heights.shape[1]:
        heights = heights.flip(1).cummax(1).values.flip(1).masked_fill(nth > found[:, None], 0)
    area = heights.sum(1)
    if norm == "hits":
        divisor = found.to(real) + REFERENCE_EPSILON if rule == "trapezoid" else found.clamp(min=1)
    else:
        divisor = n_relevant if norm == "all" or k is None else n_relevant.clamp(max=k)
    return _undefined_as_nan(area / divisor, n_relevant)


def first_rank(
    hits: Bool[Tensor, "queries depth"],
    n_relevant: Int[Tensor, " queries"],
    _: None = None,
) -> Float[Tensor, " queries"]:
    """Return the rank of the first relevant candidate, from 1, in whole rankings.

    FS-COCO reports its mean, CSTBIR its median.
    """
    found = hits.sum(1)
    _check_counts(found, n_relevant, hits.shape[1], None)
    real = widest_float(hits.device)
    filled = torch.nn.functional.pad(hits.to(torch.uint8), (0, 1))  # argmax needs a column
    return _undefined_as_nan(filled.argmax(1).to(real) + 1, n_relevant)


def group_values(
    values: Float[Tensor, " queries"], groups: Int[Tensor, " queries"], how: Reduction
) -> Float[Tensor, " groups"]:
    """Reduce the values of each group of queries to one, without nan; a group without a value is left out.

    i-CIR's mmAP is the mean over instances of the instance's mean, its minmAP that of the instance's minimum.
    """
    check_choice("reduction", how, get_args(Reduction))
    kept = ~values.isnan()
    found: tuple[Tensor, Tensor] = torch.unique(groups[kept], return_inverse=True)
    names = {"mean": "mean", "minimum": "amin", "maximum": "amax"}
    empty = values.new_zeros(len(found[0]))
    return empty.scatter_reduce(0, found[1], values[kept], names[how], include_self=False)


def average(
    values: Float[Tensor, " queries"], labels: Int[Tensor, " queries"] | None = None, how: Average = "micro"
) -> Float[Tensor, ""]:
    """Average the queries' values, without nan; nan if no query has a value.

    `micro` is the mean over queries; `macro` is the mean of the means of the classes given by `labels`, without classes
    that have no value.

    Raises:
        ConfigError: If labels are missing for `macro`, or `how` is unknown.
    """
    check_choice("how", how, get_args(Average))
    if how == "micro":
        return values.nanmean()
    if labels is None:
        raise ConfigError(
            "a macro average needs the classes of the queries, and no labels were given; pass labels or use micro"
        )
    kept = ~values.isnan()
    found: tuple[Tensor, Tensor, Tensor] = torch.unique(labels[kept], return_inverse=True, return_counts=True)
    _, classes, sizes = found
    sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add(0, classes, values[kept])
    return torch.mean(sums / sizes)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device (MPS has no float64)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _top(hits: Bool[Tensor, "queries depth"], k: int | None) -> Bool[Tensor, "queries top"]:
    return hits if k is None else hits[:, : check_count("k", k)]


def _check_counts(
    found: Int[Tensor, " queries"], n_relevant: Int[Tensor, " queries"], depth: int, k: int | None
) -> None:
    """Refuse masks that would yield too low a metric.

    A mask that ends before k is complete if it holds every relevant candidate.
    """
    more = found > n_relevant
    if more.any():
        row = int(more.nonzero()[0])
        raise DataError(
            f"row {row} has {int(found[row])} hits but n_relevant says {int(n_relevant[row])}; "
            "count the relevant candidates of the same rankings, after exclusions"
        )
    fewer = found < n_relevant
    if (k is None or k > depth) and fewer.any():
        row = int(fewer.nonzero()[0])
        raise DataError(
            f"the rankings end at rank {depth} and row {row} holds {int(found[row])} of {int(n_relevant[row])} "
            f"relevant candidates, too few for {'the whole ranking' if k is None else f'k = {k}'}; "
            f"pass longer rankings or k <= {depth}"
        )


def _ranks_of_hits(
    top: Bool[Tensor, "queries top"],
) -> tuple[Int[Tensor, "queries most"], Int[Tensor, " queries"]]:
    """Return the ranks (from 1) of each row's hits, padded with 1, and the number of hits.

    Works on the hits alone, which are few even in the ranking of a large gallery.
    """
    rows, columns = top.nonzero(as_tuple=True)
    found = rows.bincount(minlength=top.shape[0])
    first = found.cumsum(0) - found
    nth = torch.arange(len(rows), device=top.device) - first[rows]
    most = int(found.max()) if len(found) else 0
    ranks = torch.ones(top.shape[0], most, dtype=torch.int64, device=top.device)
    ranks[rows, nth] = columns + 1
    return ranks, found


def _undefined_as_nan(
    values: Float[Tensor, " queries"], n_relevant: Int[Tensor, " queries"]
) -> Float[Tensor, " queries"]:
    return values.masked_fill(n_relevant == 0, torch.nan)


SAMPLED_ORDERS = 200
"""Orders that are averaged if there is no closed form."""


class TieGroups(NamedTuple):
    """The relevant candidates of some rankings by score; a group are all candidates with one score.

    Attributes:
        start: Number of candidates with a higher score.
        size: Number of candidates with this score.
        hits: Number of relevant ones among them; 0 in padding.
    """

    start: Int[Tensor, "queries groups"]
    size: Int[Tensor, "queries groups"]
    hits: Int[Tensor, "queries groups"]

    @classmethod
    def of(
        cls,
        better: Int[Tensor, "queries items"],
        equal: Int[Tensor, "queries items"],
        counted: Bool[Tensor, "queries items"],
    ) -> "TieGroups":
        """Group relevant candidates; `counted` tells entries from padding.

        For each relevant candidate, `better` is the number of candidates with a higher score, `equal` the number with
        its score, itself included.
        """
        start, order = better.masked_fill(~counted, torch.iinfo(torch.int64).max).sort(dim=1)
        counted = counted.gather(1, order)
        hits = torch.searchsorted(start, start, right=True) - torch.searchsorted(start, start)
        first = counted.clone()
        first[:, 1:] &= start[:, 1:] != start[:, :-1]
        return cls(start.masked_fill(~first, 0), equal.gather(1, order).masked_fill(~first, 1), hits * first)

    @property
    def ambiguous(self) -> Bool[Tensor, " queries"]:
        """Which rankings have a relevant and another candidate with the same score."""
        return ((self.hits > 0) & (self.size > self.hits)).any(1)

    @property
    def n_relevant(self) -> Int[Tensor, " queries"]:
        """Number of relevant candidates."""
        return self.hits.sum(1)


def expected_recall_at_k(ties: TieGroups, k: int, mode: RecallMode = "any") -> Float[Tensor, " queries"]:
    """Return the expected `recall_at_k`."""
    if mode == "fraction":
        return _expected_hits(ties, torch.tensor(k, device=ties.start.device)) / ties.n_relevant
    # The probability of no hit among the first k is a product over groups of hypergeometric probabilities.
    size, hits = ties.size.double(), ties.hits.double()
    drawn = (k - ties.start).clamp(min=0).minimum(ties.size).double()
    misses = size - hits
    logs = _log_choose(misses, drawn.minimum(misses)) - _log_choose(size, drawn)
    none = torch.where(drawn > misses, 0.0, logs.exp()).prod(1)
    return 1 - none


def expected_first_rank(ties: TieGroups, _: None = None) -> Float[Tensor, " queries"]:
    """Return the expected `first_rank`: the first of h hits among n candidates is at (n + 1) / (h + 1)."""
    start = ties.start.masked_fill(ties.hits == 0, torch.iinfo(torch.int64).max)
    row = start.argmin(1, keepdim=True)
    first, size, hits = (x.gather(1, row)[:, 0].double() for x in ties)
    return first + (size + 1) / (hits + 1)


def expected_precision_at_k(ties: TieGroups, k: int, cut: PrecisionCut = "k") -> Float[Tensor, " queries"]:
    """Return the expected `precision_at_k`."""
    attainable = ties.n_relevant.clamp(max=k)
    depth = attainable if cut == "relevant" else torch.full_like(attainable, k)
    return _expected_hits(ties, depth[:, None]) / (k if cut == "k" else attainable)


def expected_average_precision(
    ties: TieGroups, k: int | None = None, norm: ApNorm = "min", rule: ApRule = "step"
) -> Float[Tensor, " queries"] | None:
    """Return the expected `average_precision`; None if the convention has no closed form."""
    end = ties.start + ties.size
    depth = end.max() if k is None else torch.tensor(k, device=end.device)
    cut = bool(((ties.start < depth) & (depth < end) & (ties.hits > 0)).any())
    if rule == "voc" or (norm == "hits" and (cut or rule == "trapezoid")):
        return None
    start, size, hits = ties.start.double(), ties.size.double(), ties.hits.double()
    drawn = (depth - ties.start).clamp(min=0).minimum(ties.size).double()
    before = hits.cumsum(1) - hits
    # Given a hit at the j-th place of a group, each other place of it is a hit with this probability.
    density = (hits - 1).clamp(min=0) / (size - 1).clamp(min=1)
    rise = _harmonic(start + drawn) - _harmonic(start)
    area = density * drawn + (before + 1 - density * (start + 1)) * rise
    if rule == "trapezoid":
        rise = _harmonic((start + drawn - 1).clamp(min=0)) - _harmonic((start - 1).clamp(min=0))
        ahead = density * drawn + (before - density * start) * rise
        first = torch.where(drawn > 0, 1 + density * (drawn - 1), 0.0)
        area = (area + torch.where(ties.start == 0, first, ahead)) / 2
    total = (area * hits / size).sum(1)
    relevant = ties.n_relevant
    if norm == "hits":
        return total / _expected_hits(ties, depth).clamp(min=1)
    return total / (relevant if norm == "all" or k is None else relevant.clamp(max=k))


def sampled_values(
    compute: Callable[..., Tensor], ties: TieGroups, k: int | None, options: dict[str, Any]
) -> Float[Tensor, " queries"]:
    """Average a metric over seeded orders of the tied candidates."""
    depth = int((ties.start + ties.size).max())
    total = torch.zeros(len(ties.start), dtype=torch.float64)
    groups = [tensor.tolist() for tensor in ties]
    for seed in range(SAMPLED_ORDERS):
        generator = torch.Generator().manual_seed(seed)
        hits = torch.zeros(len(total), depth, dtype=torch.bool)
        for row, (starts, sizes, counts) in enumerate(zip(*groups, strict=True)):
            for start, size, count in zip(starts, sizes, counts, strict=True):
                hits[row, start + torch.randperm(size, generator=generator)[:count]] = True
        total += compute(hits, ties.n_relevant.cpu(), k, **options).double()
    return total / SAMPLED_ORDERS


def _expected_hits(ties: TieGroups, depth: Int[Tensor, "..."]) -> Float[Tensor, " queries"]:
    """Return the expected number of hits among the first `depth` candidates."""
    inside = (depth - ties.start).clamp(min=0).minimum(ties.size)
    return (ties.hits * inside.double() / ties.size).sum(1)


def _harmonic(n: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the harmonic numbers 1 + 1/2 + ... + 1/n, 0 for 0."""
    return torch.digamma(n + 1) - torch.digamma(torch.ones_like(n))


def _log_choose(n: Float[Tensor, "..."], k: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
