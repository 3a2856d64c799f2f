"""Exact search: every query against every item, in chunks; the truth for other indexes.

Knows embeddings, exclusions and a memory budget. Does not know what was embedded, nor
which answers are right. Whole rankings are in `index.ranks`.

What is guaranteed of the order, with `TILE` the fixed shape of the products below:

- Scores are float32 products, whatever the inputs' type, autocast or the precision set
  for matmuls, and equal scores are ordered by gallery position. -0.0 equals 0.0.
- The result does not depend on `chunk_bytes`, and the first k are the first of any larger
  k and of the whole ranking, to the last bit: a score is always computed in the same tile
  of the same shape. Chunks only decide how many tiles are kept at once.
- Items with equal embeddings get equal scores, and so stand in gallery order, wherever the
  matmul treats the columns of a tile alike. BLAS libraries do (seen with MKL) but do not
  promise it. Where every partial sum is exact, as with small whole numbers, it is certain.
- A query asked with others may differ in a score's last bit from the same query asked
  alone, as a matmul of another shape may add in another order.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.models.precision import full_precision
from union_igrot.types import Ranking

TILE = (128, 2048)
"""Queries and items in one product, whose result stays in a core's cache until it is used."""
CHUNK_BYTES = 128 * 2**20
"""Default bound of the scores held at once."""

_KEY_BYTES = 8
_LOW = 0xFFFFFFFF
_LAST = 0x7FFFFFFF
"""Upper half of an excluded item's key, behind every score."""


def exact_topk(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    k: int,
    exclude: Sequence[Sequence[int]] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Ranking:
    """Find the k best answers to each query by dot product.

    Runs on the device that the tensors are on. Of unit vectors the scores are cosines;
    nothing is normalized here.

    Args:
        queries: Embeddings of the queries, of any float type.
        gallery: Embeddings of the gallery, of any float type.
        k: How many answers, from 1 to the number of candidates of every query.
        exclude: For each query the gallery positions that are never an answer to it.
        chunk_bytes: Bound of the scores held at once, 8 bytes each. At least one query's
            scores with one tile are held.

    Returns:
        Positions (int64) and scores (float32), best first; see this file's opening for
        what is guaranteed of their order.

    Raises:
        ConfigError: Where k or the budget is out of range. A list is never made shorter
            than k, or filled up, in silence.
        DataError: Where the gallery is empty, an exclusion is not a gallery position, or
            an embedding holds nan or infinity.
    """
    excluded = checked_exclusions(len(queries), len(gallery), exclude)
    _check_k(k, len(gallery), excluded)
    # Strips as wide as a block of queries allows: fewer, larger partial selections.
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


def checked_exclusions(
    n_queries: int, n_gallery: int, exclude: Sequence[Sequence[int]] | None
) -> list[list[int]] | None:
    """Refuse what cannot be ranked, and give each query's exclusions sorted, each once."""
    if not n_gallery:
        raise DataError("the gallery holds no embedding; add images to it first")
    if exclude is None:
        return None
    if len(exclude) != n_queries:
        raise DataError(f"exclusions are given for {len(exclude)} of {n_queries} queries; give one list a query")
    excluded = [sorted(set(one)) for one in exclude]
    for query, one in enumerate(excluded):
        if one and not 0 <= one[0] <= one[-1] < n_gallery:
            wrong = one[0] if one[0] < 0 else one[-1]
            raise DataError(
                f"query {query} excludes position {wrong} of a gallery of {n_gallery}; give positions from 0"
            )
    return excluded


def _check_k(k: int, n_gallery: int, excluded: list[list[int]] | None) -> None:
    most = n_gallery - max((len(one) for one in excluded or ()), default=0)
    if not 1 <= k <= most:
        left = f"{n_gallery} items, of which a query excludes up to {n_gallery - most}"
        raise ConfigError(f"k is {k} for a gallery of {left}; choose k from 1 to {most}")


def _budget(chunk_bytes: int) -> int:
    """Return the number of scores that may be held at once."""
    if chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes is {chunk_bytes}; give a budget in bytes, such as {CHUNK_BYTES}")
    return chunk_bytes // _KEY_BYTES


def _whole_tiles(wanted: int, tile: int, most: int) -> int:
    """Round down to whole tiles, at least one, at most all."""
    return min(most, max(tile, wanted // tile * tile))


def blocks(n_queries: int, width: int, chunk_bytes: int = CHUNK_BYTES) -> list[slice]:
    """Cut the queries into blocks whose scores with `width` items fit the budget."""
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

    A key's upper 32 bits rise as the score falls, its lower 32 bits are the position. So
    keys are all different and their order is the ranking, ties included: neither the
    sort nor the selection has to be stable.
    """
    keys = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.int64, device=queries.device)
    positions = torch.arange(columns.start, columns.stop, device=queries.device)
    total = torch.zeros((), device=queries.device)
    with torch.no_grad(), full_precision(queries.device):
        for i, j, tile in products(queries, gallery, rows, columns):
            total += tile.sum()
            torch.add(positions[j], _rising(tile), alpha=1 << 32, out=keys[i, j])
    if not total.isfinite():
        raise DataError(not_finite(queries, gallery))
    if excluded is not None:
        _put_last(keys, positions, excluded[rows])
    return keys


def products(
    queries: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"], rows: slice, columns: slice
) -> Iterator[tuple[slice, slice, Float32[Tensor, "_ _"]]]:
    """Return the scores of some queries with some items, tile by tile; without gradients, under `full_precision`.

    Yields:
        Which rows and columns these are, counted from the first wanted ones, and their
        scores, which are overwritten by the next.
    """
    # One place for all tiles: each is computed in the same memory, and nothing is allocated between.
    room = torch.empty(min(TILE[0], len(queries)), min(TILE[1], len(gallery)), device=queries.device)
    for i, q in _tiles(rows, len(queries), TILE[0]):
        some = queries[q].float()
        for j, g in _tiles(columns, len(gallery), TILE[1]):
            torch.mm(some, gallery[g].float().T, out=room)
            tile = room[i.start - q.start : i.stop - q.start, j.start - g.start : j.stop - g.start]
            yield (
                slice(i.start - rows.start, i.stop - rows.start),
                slice(j.start - columns.start, j.stop - columns.start),
                tile,
            )


def _tiles(wanted: slice, length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a range along the fixed grid: each part, and the whole tile that covers it.

    Every tile has the same size: the last one reaches back instead of being shorter.
    """
    begin = wanted.start
    while begin < wanted.stop:
        grid = begin // size * size
        end = min(grid + size, wanted.stop)
        origin = max(0, min(grid, length - size))
        yield slice(begin, end), slice(origin, min(origin + size, length))
        begin = end


def _rising(scores: Float32[Tensor, "rows columns"]) -> Int64[Tensor, "rows columns"]:
    """Map scores to whole numbers of 32 bits that rise as the scores fall, equal for equal.

    The bits of a positive float32 rise with it; those of a negative one fall, and are
    turned. Taking from 0 gives -0.0 the bits of 0.0.
    """
    bits = (0.0 - scores).view(torch.int32)
    return (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).to(torch.int64)


def _scores_of(keys: Int64[Tensor, "rows columns"]) -> Float32[Tensor, "rows columns"]:
    """Undo `_rising`."""
    bits = (keys >> 32).to(torch.int32)
    return 0.0 - (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)


def _put_last(
    keys: Int64[Tensor, "rows columns"], positions: Int64[Tensor, " columns"], excluded: list[list[int]]
) -> None:
    """Return excluded items keys behind all others, still different from each other."""
    first, last = int(positions[0]), int(positions[-1])
    pairs = [(i, p - first) for i, one in enumerate(excluded) for p in one if first <= p <= last]
    if pairs:
        i, j = torch.tensor(pairs, device=keys.device).unbind(1)
        keys[i, j] = (_LAST << 32) + positions[j]


def not_finite(queries: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"]) -> str:
    """Say which embeddings cannot be ranked."""
    found = []
    for name, part in (("queries", queries), ("gallery", gallery)):
        wrong = (~part.isfinite()).any(1).nonzero().flatten().tolist()
        if wrong:
            found.append(f"{len(wrong)} of the {name} (first at position {wrong[0]})")
    what = " and ".join(found) or "products too large for float32, so some"
    return f"{what} hold nan or infinity; encode them again, in a wider type if they overflow"
