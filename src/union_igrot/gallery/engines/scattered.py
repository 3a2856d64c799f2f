"""Exact search over rows that lie scattered over several matrices.

Knows matrices and where in them each row lies. Does not know what a row is, nor who keeps
the matrices.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from union_igrot.evaluation import exact
from union_igrot.types import Ranking

OFFSET: Final = 0xFFFFFFFF
"""The bits of a place that are a row's number in its matrix; those above are the matrix'."""
_GATHERED_TILES: Final = 4
_ALIGNED: Final = 64


def scattered_topk(
    queries: Float32[Tensor, "queries dim"],
    parts: Sequence[Float32[Tensor, "... dim"]],
    places: Int64[np.ndarray, " rows"],
    k: int,
) -> Ranking:
    """Find the k best rows for each query, as `exact_topk` would over the rows put in order.

    Scores and order are the same to the last bit: rows are scored in the same tiles, whether
    they lie one behind the other, and are used where they are, or have to be brought together.

    Args:
        queries: Embeddings.
        parts: Matrices of embeddings.
        places: For each row the number of its matrix, times 2**32, plus its number there.
        k: How many answers; at most as many as there are rows.

    Returns:
        Positions in `places`, and scores.
    """
    best = Ranking(torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0))
    for rows in _stretches(places):
        vectors = _gathered(parts, places[rows])
        found = exact.exact_topk(queries, vectors, min(k, len(vectors)))
        scores = torch.cat([best.scores, found.scores], dim=1)
        positions = torch.cat([best.positions, found.positions + rows.start], dim=1)
        # Stable: of equal scores the earlier stretch, which is the earlier row, stays in front.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        best = Ranking(positions.gather(1, order)[:, :k], scores[:, :k])
    return best


def _stretches(places: Int64[np.ndarray, " rows"]) -> Iterator[slice]:
    """Cut the rows between tiles, into stretches that lie together and others of a few tiles.

    The last whole tile and the shorter rest stay together: the rest's products reach back.
    """
    tile = exact.TILE[1]
    starts = np.arange(0, max(len(places) - tile, 0) + 1, tile)
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    broken = np.zeros(len(starts), dtype=bool)
    inside = breaks[(breaks % tile != 0) | (breaks > starts[-1])]
    broken[np.minimum(inside // tile, len(starts) - 1)] = True
    at_start = np.isin(starts, breaks)
    begin, first = 0, 0
    for i in range(1, len(starts)):
        joined = broken[i] == broken[first] and (i - first < _GATHERED_TILES if broken[i] else not at_start[i])
        if not joined:
            yield slice(begin, int(starts[i]))
            begin, first = int(starts[i]), i
    yield slice(begin, len(places))


def _gathered(
    parts: Sequence[Float32[Tensor, "... dim"]], places: Int64[np.ndarray, " rows"]
) -> Float32[Tensor, "rows dim"]:
    """Return rows as one matrix: a view where they lie together, else a copy.

    A matrix product may add in another order where its numbers are not aligned as they were.
    """
    part, offset = places >> 32, places & OFFSET
    if (np.diff(places) == 1).all():
        view = parts[int(part[0])][int(offset[0]) : int(offset[-1]) + 1]
        return view if view.data_ptr() % _ALIGNED == 0 else view.clone()
    together = torch.empty(len(places), parts[0].shape[1])
    for number in np.unique(part).tolist():
        of_part = torch.from_numpy(part == number)
        together[of_part] = parts[number][torch.from_numpy(offset)[of_part]]
    return together
