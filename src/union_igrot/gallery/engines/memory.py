"""An index in memory, with exact search alone; needs no extra package and belongs to one thread."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64

from union_igrot.gallery.engines.base import (
    SCAN_BATCH,
    ColumnBatch,
    ColumnValue,
    IndexHits,
    Queries,
    Rows,
    VectorIndex,
    rank_rows,
    required_dim,
)
from union_igrot.gallery.engines.filters import ColumnKind, Condition, matching


@final
class MemoryIndex(VectorIndex):
    """Embeddings in memory."""

    def __init__(self, dim: int, metadata: Mapping[str, Any] | None = None, uri: str = "memory:") -> None:
        self.uri, self.dim, self.metadata = uri, required_dim(uri, dim), dict(metadata or {})
        self._kinds: dict[str, ColumnKind] = {}
        self._ids: list[str] = []
        """In the order of first writes; removed rows stay until `optimize`, which every scan and search calls."""
        self._vectors = torch.empty(0, dim)
        """At least as many rows as ids."""
        self._columns: dict[str, list[ColumnValue]] = {}
        self._positions: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        """See `VectorIndex`."""
        return dict(self._kinds)

    def _upsert(self, rows: Rows, new: Mapping[str, ColumnKind]) -> None:
        self._kinds |= new
        added = [name for name in rows.ids if name not in self._positions]
        self._positions |= {name: i for i, name in enumerate(added, len(self._ids))}
        used = len(self._ids)
        self._ids += added
        if len(self._ids) > len(self._vectors):
            room = max(len(self._ids), 2 * used) - used
            self._vectors = torch.cat([self._vectors[:used], torch.empty(room, self.dim)])
        for name in self._kinds:
            column = self._columns.setdefault(name, [])
            column += [None] * (len(self._ids) - len(column))
        positions = [self._positions[name] for name in rows.ids]
        self._vectors[positions] = rows.vectors
        for name, column in self._columns.items():
            for i, value in zip(positions, rows.columns.get(name, [None] * len(positions)), strict=True):
                column[i] = value

    def _delete(self, ids: Sequence[str]) -> int:
        return sum(self._positions.pop(name, None) is not None for name in ids)

    def _fetch(self, ids: Sequence[str]) -> Rows:
        found = {name: self._positions[name] for name in ids if name in self._positions}
        positions = list(found.values())
        return Rows(list(found), self._vectors[positions], self._read(positions, list(self._columns)))

    def _scan(self, columns: Sequence[str], condition: Condition | None) -> Iterator[ColumnBatch]:
        rows = self._matching(condition)
        found = self._read(range(len(self)) if rows is None else rows.tolist(), columns)
        starts = range(0, len(self) if rows is None else len(rows), SCAN_BATCH)
        return ({name: values[at : at + SCAN_BATCH] for name, values in found.items()} for at in starts)

    def _exact(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:
        rows = self._matching(condition)
        return rank_rows(queries, self._vectors[: len(self)], rows, k, columns, self._read)

    def _matching(self, condition: Condition | None) -> Int64[np.ndarray, " rows"] | None:
        self.optimize()
        return None if condition is None else np.flatnonzero(matching(condition, self._column))

    def optimize(self) -> None:
        """Drop removed rows."""
        if len(self._positions) == len(self._ids):
            return
        kept = list(
            self._positions.values()
        )  # in the order of first writes, as a removed row that is written again is new
        self._ids = list(self._positions)
        self._vectors = self._vectors[kept]
        self._columns = {name: [column[i] for i in kept] for name, column in self._columns.items()}
        self._positions = {name: i for i, name in enumerate(self._ids)}

    def _column(self, name: str) -> Sequence[ColumnValue]:
        return self._ids if name == "id" else self._columns[name]

    def _read(
        self, rows: Sequence[int] | Int64[np.ndarray, " rows"], columns: Sequence[str]
    ) -> dict[str, list[ColumnValue]]:
        known = {name: self._column(name) for name in columns if name == "id" or name in self._columns}
        return {name: [known[name][i] for i in rows] if name in known else [None] * len(rows) for name in columns}
