"""Exact search: every query against every gallery item, in chunks; first results, and the ranks of given items.

Average precision over a whole gallery needs the ranks of the relevant items, not the order of all others. So the
scores of a query are sorted without their positions, and only items that tie are looked up.

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
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int
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

_SCORE_BYTES = 8
"""Memory of a score, and of the work with it."""


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
        chunk_bytes: Bound on the scores held at once, 8 bytes each. At least one query's scores are held.

    Returns:
        Positions (int64) and scores (float32), best first; the module docstring states the guarantees for their order.

    Raises:
        ConfigError: If k or the budget is out of range. Lists are never silently shortened or padded.
        DataError: If the gallery is empty, an exclusion is not a gallery position, or
            an embedding holds nan or infinity.
    """
    excluded = check_exclusions(len(queries), len(gallery), exclude)
    most = _candidates(len(gallery), excluded)
    if not 1 <= k <= most:
        size = f"the gallery has {len(gallery)} items and a query excludes up to {len(gallery) - most} of them"
        raise ConfigError(f"invalid value for k: {k} (expected 1 to {most}; {size})")
    positions = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    for chunk in _ranked(queries, gallery, excluded, blocks(len(queries), len(gallery), chunk_bytes), None):
        best = chunk.first(k)
        positions[chunk.queries], scores[chunk.queries] = best, chunk.scores.gather(1, best)
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


def blocks(n_queries: int, width: int, chunk_bytes: int = CHUNK_BYTES) -> list[slice]:
    """Divide the queries into blocks whose scores with `width` items fit the budget."""
    step = max(1, check_count("chunk_bytes", chunk_bytes) // _SCORE_BYTES // width)
    if step > TILE[0]:
        step = step // TILE[0] * TILE[0]
    return [slice(begin, min(begin + step, n_queries)) for begin in range(0, n_queries, step)]


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
"""Number of tied items per row above which one stable sort is cheaper than single lookups."""
_FEW_ITEMS = 4
"""Number of items per row up to which their scores are compared one by one, instead of sorting all."""


@final
class RankedChunk:
    """Rankings of a few queries over the whole gallery; ties in gallery order.

    Valid until the next chunk is requested, which reuses its memory.

    Attributes:
        queries: Which queries these are.
    """

    def __init__(self, queries: slice, scores: Float32[Tensor, "chunk gallery"]) -> None:
        self.queries = queries
        self._scores: Tensor | None = scores

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
        rows, width = self.scores.shape
        if k == width:
            return _order(self.scores)
        last = self.scores.topk(k, dim=1).values[:, -1:]
        kept = self.scores >= last
        late = (kept.sum(1) > k).nonzero()[:, 0]
        if len(late):  # of those that tie for the last ranks, the first ones
            some, level = self.scores[late], self.scores[late] == last[late]
            places = k - (some > last[late]).sum(1, keepdim=True)
            kept[late] &= ~level | (level.cumsum(1, dtype=torch.int32) <= places)
        items = kept.nonzero()[:, 1].view(rows, k)
        return items.gather(1, _order(self.scores.gather(1, items)))

    def ranks(self, items: Int[Tensor, "chunk items"]) -> Int[Tensor, "chunk items"]:
        """Return the rank of items in their row's ranking, from 1.

        Args:
            items: Gallery positions, any number per row.
        """
        own = self.scores.gather(1, items)
        better, equal = better_and_equal(self.scores, own)
        tied = (equal > 1).nonzero()
        if len(tied) > (_FEW_TIES * len(items) if self.scores.device.type == "cpu" else 0):
            order = _order(self.scores)
            ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
            return torch.empty_like(order).scatter_(1, order, ranks).gather(1, items) + 1
        for row, at in tied.tolist():
            better[row, at] += (self.scores[row, : items[row, at]] == own[row, at]).sum()
        return better + 1


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
        chunk = RankedChunk(rows, scores)
        yield chunk


def _fill(
    scores: Float32[Tensor, "chunk gallery"],
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    rows: slice,
) -> None:
    """Compute the scores of some queries with all items, tile by tile."""
    # All tiles share this memory, so nothing is allocated in between.
    buffer = torch.empty(min(TILE[0], len(queries)), min(TILE[1], len(gallery)), device=queries.device)
    total = torch.zeros((), device=queries.device)
    with torch.no_grad(), full_precision(queries.device):
        for i, q in _tiles(rows, len(queries), TILE[0]):
            some = queries[q].float()
            for j, g in _tiles(slice(0, len(gallery)), len(gallery), TILE[1]):
                torch.mm(some, gallery[g].float().T, out=buffer)
                tile = buffer[i.start - q.start : i.stop - q.start, j.start - g.start : j.stop - g.start]
                # Copies, and replaces -0.0 by 0.0.
                torch.add(tile, 0.0, out=scores[i.start - rows.start : i.stop - rows.start, j])
                total += tile.sum()
    if not total.isfinite():
        raise DataError(not_finite(queries, gallery))


def better_and_equal(
    scores: Float32[Tensor, "chunk gallery"], own: Float32[Tensor, "chunk items"]
) -> tuple[Int[Tensor, "chunk items"], Int[Tensor, "chunk items"]]:
    """Count in each row of scores those that are higher than each of some scores, and those that are the same."""
    if 0 < own.shape[1] <= _FEW_ITEMS:
        better = [(scores > x).sum(1) for x in own.split(1, dim=1)]
        equal = [(scores == x).sum(1) for x in own.split(1, dim=1)]
        return torch.stack(better, 1), torch.stack(equal, 1)
    rising = scores.sort(dim=1).values if scores.device.type != "cpu" else torch.from_numpy(_sorted(scores.numpy()))
    below, not_above = torch.searchsorted(rising, own), torch.searchsorted(rising, own, right=True)
    return rising.shape[1] - not_above, not_above - below


def _sorted(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sort each row, with as many threads as torch; NumPy sorts several times as fast."""
    rising, threads = scores.copy(), torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.ndarray.sort, np.array_split(rising, threads)))
    return rising


def _order(scores: Float32[Tensor, "chunk items"]) -> Int[Tensor, "chunk items"]:
    """Return the items best first, ties in their order."""
    order: Tensor = scores.argsort(dim=1, descending=True, stable=True)
    return order
