"""Expected metrics of rankings with ties: averages over all orders of the candidates that have equal scores.

Recall, precision and average precision by the step or trapezoid rule have closed forms (McSherry and Najork, Computing
Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores, ECIR 2008, for precision, recall
and average precision). For other conventions and registered metrics, a fixed number of seeded orders is averaged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from union_igrot.types import ApNorm, ApRule, PrecisionCut, RecallMode

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
