"""Whole rankings, a few queries at a time: the first results, and the ranks of given items.

Average precision over a whole gallery needs the ranks of the relevant items, not the order of all others. So the
scores of a query are counted in narrow buckets, and only those that share a bucket with a requested item are sorted.
The guarantees of `exact` for the order hold here too.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.evaluation.exact import CHUNK_BYTES, blocks, check_exclusions, not_finite, products
from union_igrot.evaluation.fusion import FusedQueries
from union_igrot.models.devices import full_precision

_FEW_TIES = 64
"""Number of tied items in a row above which one stable sort is cheaper than single lookups."""
_FEW_ITEMS = 4
"""Number of items per row up to which their scores are compared one by one, instead of sorting all."""
_BUCKETS = 1 << 16
_LARGE = 1e38
_Floats: TypeAlias = npt.NDArray[np.float32]
_Ints: TypeAlias = npt.NDArray[np.int64]


@final
class RankedChunk:
    """Rankings of a few queries over the whole gallery; ties in gallery order.

    Valid until the next chunk is requested, which reuses its memory.

    Attributes:
        queries: Which queries these are.
        candidates: Number of candidates of each row. Excluded items come behind them, in gallery order.
    """

    def __init__(
        self,
        queries: slice,
        candidates: Int[Tensor, " chunk"],
        scores: Float32[Tensor, "chunk gallery"],
    ) -> None:
        self.queries, self.candidates = queries, candidates
        self._scores: Tensor | None = scores
        self._best: Tensor | None = None

    @property
    def scores(self) -> Float32[Tensor, "chunk gallery"]:
        """Scores of each query with each item; minus infinity if excluded."""
        if self._scores is None:
            raise RuntimeError(
                "the memory of this chunk was reused by the next one; process each before requesting another"
            )
        return self._scores

    def close(self) -> None:
        """Release the memory."""
        self._scores = None

    def first(self, k: int) -> Int[Tensor, "chunk k"]:
        """Return the positions of the first k items of each ranking, from 1 to all of them."""
        if self._best is None or self._best.shape[1] < k:
            self._best = self._find_first(k)
        return self._best[:, :k]

    def _find_first(self, k: int) -> Int[Tensor, "chunk k"]:
        rows, width = self.scores.shape
        if k == width:
            return _order(self.scores)
        last = self.scores.topk(k, dim=1).values[:, -1:]
        row, item = (self.scores >= last).nonzero(as_tuple=True)
        if len(item) > rows * k:
            item = self._without_late_ties(row, item, last, k)
        items = item.view(rows, k)
        return items.gather(1, _order(self.scores.gather(1, items)))

    def ranks(self, items: Int[Tensor, "chunk items"]) -> Int[Tensor, "chunk items"]:
        """Return the rank of items in their row's ranking, from 1.

        Args:
            items: Gallery positions, any number per row.
        """
        if self.scores.device.type != "cpu":
            # An accelerator sorts fast, and looks up single ties slowly.
            return _ranks(_order(self.scores)).gather(1, items) + 1
        return _count_better(self.scores, items) + 1

    def better_and_equal(
        self, items: Int[Tensor, "chunk items"]
    ) -> tuple[Int[Tensor, "chunk items"], Int[Tensor, "chunk items"]]:
        """Count the candidates with a higher score than items of their row, and those with the same score."""
        own = self.scores.gather(1, items)
        if items.shape[1] <= _FEW_ITEMS:
            counts = [((self.scores > x).sum(1), (self.scores == x).sum(1)) for x in own.split(1, dim=1)]
            better, equal = zip(*counts, strict=True)
            return torch.stack(better, 1), torch.stack(equal, 1)
        rising = self.scores.sort(dim=1).values
        below, not_above = torch.searchsorted(rising, own), torch.searchsorted(rising, own, right=True)
        return rising.shape[1] - not_above, not_above - below

    def _without_late_ties(
        self, row: Int[Tensor, " found"], item: Int[Tensor, " found"], last: Float[Tensor, "chunk 1"], k: int
    ) -> Int[Tensor, " kept"]:
        """Keep k items per row: of those that tie for the last ranks the first ones."""
        counts = row.bincount(minlength=len(last))
        kept = list(item.split(counts.tolist()))
        for at in (counts > k).nonzero().flatten().tolist():
            scores = self.scores[at, kept[at]]
            better, tied = kept[at][scores > last[at]], kept[at][scores == last[at]]
            kept[at] = torch.cat([better, tied[: k - len(better)]]).sort().values
        return torch.cat(kept)


def rank_chunks(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    exclude: Sequence[Sequence[int]] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    fused: FusedQueries | None = None,
) -> Iterator[RankedChunk]:
    """Rank the whole gallery for each query, a few queries at a time.

    Args:
        queries: Embeddings of the queries, of any float type.
        gallery: Embeddings of the gallery, of any float type.
        exclude: For each query the gallery positions that are no candidates; they come behind all candidates, in
            gallery order.
        chunk_bytes: Bound on what is held at once, 8 bytes per score: the scores and about as much working memory.
            Ranks on an accelerator temporarily need about four times that. At least one query's scores are held.
        fused: If given, `queries` are its first embeddings, and scores are combined with those of the second.

    Returns:
        An iterator over chunks that cover the queries in order. Arguments are checked immediately, not at the first
        chunk.

    Raises:
        ConfigError: If the budget is out of range.
        DataError: If the gallery is empty, an exclusion is not a gallery position, or an embedding contains nan or
            infinity or is so large that a score might.
    """
    excluded = check_exclusions(len(queries), len(gallery), exclude)
    chunks = blocks(len(queries), len(gallery), chunk_bytes)
    if len(queries) and not (_longest(queries) * _longest(gallery) < torch.finfo(torch.float32).max):
        raise DataError(not_finite(queries, gallery))
    return _ranked(queries, gallery, excluded, chunks, fused)


def _longest(embeddings: Float[Tensor, "rows dim"]) -> float:
    """Return a bound on the norms, so that a product of two bounds every score; nan if an embedding is not finite."""
    largest = max(float(part.abs().max()) for part in embeddings.detach().split(4096))
    return largest * math.sqrt(embeddings.shape[1])


def _ranked(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    excluded: list[list[int]] | None,
    chunks: Sequence[slice],
    fused: FusedQueries | None,
) -> Iterator[RankedChunk]:
    if not chunks:
        return
    # Reused for each chunk, since allocating that much memory is slow.
    buffer = torch.empty(max(rows.stop - rows.start for rows in chunks), len(gallery), device=queries.device)
    chunk: RankedChunk | None = None
    for rows in chunks:
        if chunk is not None:
            chunk.close()
        count = rows.stop - rows.start
        scores = buffer[:count]
        _fill(scores, queries, gallery, rows)
        if fused is not None and fused.texts is not None:
            other = torch.empty_like(scores)
            _fill(other, fused.texts, gallery, rows)
            scores.copy_(fused.combine(scores, other, torch.ones_like(scores, dtype=torch.bool))).add_(0.0)
        out = [[] for _ in range(count)] if excluded is None else excluded[rows]
        pairs = [(row, item) for row, items in enumerate(out) for item in items]
        if pairs:
            row, item = torch.tensor(pairs, device=scores.device).unbind(1)
            scores[row, item] = -torch.inf
        sizes = torch.tensor([len(items) for items in out], dtype=torch.int64, device=scores.device)
        chunk = RankedChunk(rows, len(gallery) - sizes, scores)
        yield chunk


def _fill(
    scores: Float32[Tensor, "chunk gallery"],
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    rows: slice,
) -> None:
    with torch.no_grad(), full_precision(queries.device):
        for i, j, tile in products(queries, gallery, rows, slice(0, len(gallery))):
            torch.add(tile, 0.0, out=scores[i, j])  # copies, and replaces -0.0 by 0.0


def _count_better(
    scores: Float32[Tensor, "chunk gallery"], items: Int[Tensor, "chunk items"]
) -> Int[Tensor, "chunk items"]:
    """Count in each row the candidates that are ranked before each of some items, with as many threads as torch."""
    better = torch.empty_like(items)
    rows, columns, out = scores.numpy(), items.numpy(), better.numpy()

    def work(part: range) -> None:
        for row in part:
            out[row] = _row_better(rows[row], columns[row])

    threads = min(torch.get_num_threads(), len(rows))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [range(first, len(rows), threads) for first in range(threads)]))
    return better


def _row_better(scores: _Floats, items: _Ints) -> _Ints:
    """Count for one row: candidates of a higher bucket come first, those of the same bucket are compared."""
    bucket = _buckets(scores, min(_BUCKETS, len(scores)))
    counts = np.bincount(bucket)
    own_bucket = bucket[items]
    requested = np.zeros(len(counts), np.bool_)
    requested[own_bucket] = True
    shared = requested[bucket]
    near = scores[shared]
    near.sort()
    counts[requested] = 0
    elsewhere = counts.sum() - counts.cumsum()  # items of higher buckets that are not compared
    own = scores[items]
    order = own.argsort()  # searching in ascending order is faster
    own = own[order]
    not_above = near.searchsorted(own, side="right")
    better = np.empty_like(items)
    better[order] = len(near) - not_above + elsewhere[own_bucket[order]]
    tied = order[(not_above > 1) & (near[not_above - 2] == own)]
    if len(tied) > _FEW_TIES:
        positions = np.flatnonzero(shared)
        ahead = np.empty_like(positions)
        ahead[np.argsort(-scores[positions], kind="stable")] = np.arange(len(positions))
        better[:] = ahead[positions.searchsorted(items)] + elsewhere[own_bucket]
        return better
    for at in tied.tolist():
        better[at] += np.count_nonzero(scores[: items[at]] == scores[items[at]])
    return better


def _buckets(scores: _Floats, most: int) -> _Ints:
    """Number scores from 0 so that a higher score never has a lower number."""
    kept = scores if scores.min() > -np.inf else scores[scores > -np.inf]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 0.0)
    steps = (most - 1) / (high - low) if high > low else 0.0
    if not 0 < steps < _LARGE or high - low > _LARGE:
        return np.zeros(len(scores), np.int64)
    placed = (scores - np.float32(low)) * np.float32(steps)  # each step keeps the order
    numbers: _Ints = np.maximum(placed, 0, out=placed).astype(np.int64)
    return numbers


def _order(scores: Float32[Tensor, "chunk items"]) -> Int[Tensor, "chunk items"]:
    """Return the items best first, ties in their order."""
    order: Tensor = scores.argsort(dim=1, descending=True, stable=True)
    return order


def _ranks(order: Int[Tensor, "chunk items"]) -> Int[Tensor, "chunk items"]:
    """Return the rank of each item in an order, from 0."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)
