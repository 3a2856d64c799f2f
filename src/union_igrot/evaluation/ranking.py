"""Exact search: every query against every gallery item, in chunks; first results, and the ranks of given items.

Average precision over a whole gallery needs the ranks of the relevant items, not the order of all others. So the
scores of a query are counted in narrow buckets, and only those that share a bucket with a requested item are sorted.

Guarantees for the order, with `TILE` the fixed shape of the products below:

- Scores are float32 products, whatever the inputs' type, autocast or the precision set for matmuls, and equal scores
  are ordered by gallery position. -0.0 equals 0.0.
- The result does not depend on `chunk_bytes`, and the first k are the first of any larger k and of the whole ranking,
  to the last bit: a score is always computed in the same tile of the same shape. Chunks only decide how many tiles are
  held at once.
- Items with equal embeddings get equal scores, and therefore come in gallery order, if the matmul treats the columns
  of a tile alike. BLAS libraries do (observed with MKL) but do not promise it. It is certain if every partial sum is
  exact, as with small integers.
- The score of a query among others may differ in its last bit from the score of the same query alone, since a matmul
  of another shape may add in another order.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from union_igrot.errors import ConfigError, DataError, check_count, names_arguments
from union_igrot.evaluation.fusion import FusedQueries
from union_igrot.models.devices import full_precision
from union_igrot.types import Ranking

TILE = (128, 2048)
"""Queries and items of one product, whose result stays in a core's cache until it is used."""
CHUNK_BYTES = 128 * 2**20
"""Default bound on the scores held at once."""

_KEY_BYTES = 8
_LOW = 0xFFFFFFFF
_LAST = 0x7FFFFFFF
"""Upper half of an excluded item's key, behind every score."""


@names_arguments
def rank(
    queries: Tensor | NDArray[Any],
    gallery: Tensor | NDArray[Any],
    k: int = 10,
    exclude: Sequence[Sequence[int]] | None = None,
) -> Ranking:
    """Rank a gallery for each query by exact search.

    Args:
        queries: Query embeddings, one per row, or a single one: a tensor or an array. Their order and that of the
            gallery is that of the positions in the result.
        gallery: Gallery embeddings, one per row.
        k: Number of results per query; fewer if a query has fewer candidates.
        exclude: For each query the gallery positions to leave out.

    Returns:
        Gallery positions and scores (dot products) of the first k, best first.

    Raises:
        ConfigError: If k is not an integer from 1.
        DataError: If the embeddings have the wrong type or shape or contain nan or infinity, or an exclusion is not a
            gallery position.
    """
    rows, items = _embeddings("queries", queries), _embeddings("gallery", gallery)
    if rows.shape[1] != items.shape[1]:
        raise DataError(
            f"queries and gallery have {rows.shape[1]} and {items.shape[1]} dimensions; encode both with the same model"
        )
    excluded = check_exclusions(len(rows), len(items), exclude)
    return exact_topk(rows, items, min(check_count("k", k), _candidates(len(items), excluded)), excluded)


def _embeddings(name: str, given: object) -> Tensor:
    """Return embeddings as a tensor of one row per item."""
    found = torch.from_numpy(given) if isinstance(given, np.ndarray) and given.dtype.kind == "f" else given
    if not isinstance(found, Tensor | np.ndarray):
        raise DataError(f"invalid type for {name}: {type(found).__name__} (expected a tensor or an array)")
    if not (isinstance(found, Tensor) and found.is_floating_point()):
        raise DataError(f"invalid dtype for {name}: {found.dtype} (expected floating point)")
    if found.ndim != 2 and (name, found.ndim) != ("queries", 1):
        raise DataError(f"invalid shape for {name}: {tuple(found.shape)} (expected (items, dim))")
    return found if found.ndim == 2 else found[None]


def exact_topk(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    k: int,
    exclude: Sequence[Sequence[int]] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Ranking:
    """Find the k gallery items with the largest dot product for each query.

    Runs on the device of the tensors. The scores of unit vectors are cosines; nothing is normalized here.

    Args:
        queries: Embeddings of the queries, of any float type.
        gallery: Embeddings of the gallery, of any float type.
        k: Number of results, from 1 to the smallest number of candidates of a query.
        exclude: For each query the gallery positions that are no candidates.
        chunk_bytes: Bound on the scores held at once, 8 bytes each. At least one query's scores with one tile are
            held.

    Returns:
        Positions (int64) and scores (float32), best first; the module docstring states the guarantees for their order.

    Raises:
        ConfigError: If k or the budget is out of range. Lists are never silently shortened or padded.
        DataError: If the gallery is empty, an exclusion is not a gallery position, or
            an embedding holds nan or infinity.
    """
    excluded = check_exclusions(len(queries), len(gallery), exclude)
    _check_k(k, len(gallery), excluded)
    # Strips as wide as a block of queries allows, for fewer and larger partial selections.
    span = _whole_tiles(_budget(chunk_bytes) // TILE[0], TILE[1], len(gallery))
    positions = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    for rows in blocks(len(queries), span, chunk_bytes):
        best = torch.empty(rows.stop - rows.start, 0, dtype=torch.int64, device=queries.device)
        for begin in range(0, len(gallery), span):
            keys = _keys(queries, gallery, rows, slice(begin, min(begin + span, len(gallery))), excluded)
            found = keys.topk(min(k, keys.shape[1]), dim=1, largest=False).values
            best = torch.cat([best, found], dim=1).sort(dim=1).values[:, :k]
        positions[rows] = best & _LOW
        scores[rows] = _scores_of(best)
    return Ranking(positions=positions, scores=scores)


def check_exclusions(n_queries: int, n_gallery: int, exclude: Sequence[Sequence[int]] | None) -> list[list[int]] | None:
    """Return each query's exclusions sorted and without repetitions, after checking them."""
    if not n_gallery:
        raise DataError("the gallery is empty; add images to it first")
    if exclude is None:
        return None
    if len(exclude) != n_queries:
        raise DataError(
            f"there are {len(exclude)} lists of exclusions for {n_queries} queries; pass one list per query"
        )
    try:
        excluded = [sorted({index(position) for position in one}) for one in exclude]
    except TypeError:
        raise DataError(f"invalid exclusions: {exclude!r} (expected a list of gallery positions per query)") from None
    for query, one in enumerate(excluded):
        if one and not 0 <= one[0] <= one[-1] < n_gallery:
            wrong = one[0] if one[0] < 0 else one[-1]
            raise DataError(
                f"query {query} excludes position {wrong}, but the gallery has {n_gallery} items "
                f"(expected 0 to {n_gallery - 1})"
            )
    return excluded


def _candidates(n_gallery: int, excluded: list[list[int]] | None) -> int:
    """Return the smallest number of candidates of a query."""
    return n_gallery - max((len(one) for one in excluded or ()), default=0)


def _check_k(k: int, n_gallery: int, excluded: list[list[int]] | None) -> None:
    most = _candidates(n_gallery, excluded)
    if not 1 <= k <= most:
        size = f"the gallery has {n_gallery} items and a query excludes up to {n_gallery - most} of them"
        raise ConfigError(f"invalid value for k: {k} (expected 1 to {most}; {size})")


def _budget(chunk_bytes: int) -> int:
    """Return the number of scores that may be held at once."""
    if chunk_bytes < 1:
        raise ConfigError(
            f"invalid value for chunk_bytes: {chunk_bytes} (expected an integer >= 1, such as {CHUNK_BYTES})"
        )
    return chunk_bytes // _KEY_BYTES


def _whole_tiles(length: int, tile: int, most: int) -> int:
    """Round down to whole tiles, at least one, at most all."""
    return min(most, max(tile, length // tile * tile))


def blocks(n_queries: int, width: int, chunk_bytes: int = CHUNK_BYTES) -> list[slice]:
    """Divide the queries into blocks whose scores with `width` items fit the budget."""
    step = max(1, _budget(chunk_bytes) // width)
    if step > TILE[0]:
        step = step // TILE[0] * TILE[0]
    return [slice(begin, min(begin + step, n_queries)) for begin in range(0, n_queries, step)]


def _keys(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    rows: slice,
    columns: slice,
    excluded: list[list[int]] | None,
) -> Int64[Tensor, "rows columns"]:
    """Score some queries with some items and pack each score with its position.

    A key's upper 32 bits rise as the score falls, its lower 32 bits are the position. So all keys differ and their
    order is the ranking, ties included: neither the sort nor the selection has to be stable.
    """
    keys = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.int64, device=queries.device)
    positions = torch.arange(columns.start, columns.stop, device=queries.device)
    total = torch.zeros((), device=queries.device)
    with torch.no_grad(), full_precision(queries.device):
        for i, j, tile in products(queries, gallery, rows, columns):
            total += tile.sum()
            torch.add(positions[j], _as_rising_integers(tile), alpha=1 << 32, out=keys[i, j])
    if not total.isfinite():
        raise DataError(not_finite(queries, gallery))
    if excluded is not None:
        _put_last(keys, positions, excluded[rows])
    return keys


def products(
    queries: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"], rows: slice, columns: slice
) -> Iterator[tuple[slice, slice, Float32[Tensor, "_ _"]]]:
    """Compute the scores of some queries with some items tile by tile; call it under `full_precision` and `no_grad`.

    Yields:
        Rows and columns of the tile, relative to the requested ones, and its scores, which the next tile overwrites.
    """
    # All tiles share this memory, so nothing is allocated in between.
    buffer = torch.empty(min(TILE[0], len(queries)), min(TILE[1], len(gallery)), device=queries.device)
    for i, q in _tiles(rows, len(queries), TILE[0]):
        some = queries[q].float()
        for j, g in _tiles(columns, len(gallery), TILE[1]):
            torch.mm(some, gallery[g].float().T, out=buffer)
            tile = buffer[i.start - q.start : i.stop - q.start, j.start - g.start : j.stop - g.start]
            yield (
                slice(i.start - rows.start, i.stop - rows.start),
                slice(j.start - columns.start, j.stop - columns.start),
                tile,
            )


def _tiles(rows: slice, length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Divide a range along the fixed grid into parts, each with the whole tile that covers it.

    Every tile has the same size: the last one overlaps its predecessor instead of being shorter.
    """
    begin = rows.start
    while begin < rows.stop:
        grid = begin // size * size
        end = min(grid + size, rows.stop)
        origin = max(0, min(grid, length - size))
        yield slice(begin, end), slice(origin, min(origin + size, length))
        begin = end


def _as_rising_integers(scores: Float32[Tensor, "rows columns"]) -> Int64[Tensor, "rows columns"]:
    """Map scores to 32-bit integers that rise as the scores fall; equal scores get equal integers.

    The bits of a positive float32 rise with it; those of a negative one fall and are inverted. Subtracting from 0 maps
    -0.0 to 0.0.
    """
    bits = (0.0 - scores).view(torch.int32)
    return (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).to(torch.int64)


def _scores_of(keys: Int64[Tensor, "rows columns"]) -> Float32[Tensor, "rows columns"]:
    """Invert `_as_rising_integers`."""
    bits = (keys >> 32).to(torch.int32)
    return 0.0 - (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)


def _put_last(
    keys: Int64[Tensor, "rows columns"], positions: Int64[Tensor, " columns"], excluded: list[list[int]]
) -> None:
    """Set the keys of excluded items behind all others, still different from each other."""
    first, last = int(positions[0]), int(positions[-1])
    pairs = [(i, p - first) for i, one in enumerate(excluded) for p in one if first <= p <= last]
    if pairs:
        i, j = torch.tensor(pairs, device=keys.device).unbind(1)
        keys[i, j] = (_LAST << 32) + positions[j]


def not_finite(queries: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"]) -> str:
    """Return an error message that names the embeddings with nan or infinity."""
    found = []
    for name, part in (("queries", queries), ("gallery", gallery)):
        wrong = (~part.isfinite()).any(1).nonzero().flatten().tolist()
        if wrong:
            found.append(f"{len(wrong)} of the {name} (first at position {wrong[0]})")
    what = " and ".join(found) or "products too large for float32, so some scores"
    return f"{what} contain nan or infinity; encode them again, in a wider type if they overflow"


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
