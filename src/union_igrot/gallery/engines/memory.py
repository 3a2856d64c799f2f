"""An index in memory: exact search alone, and the truth that the other engines are held against.

Needs nothing beyond the core. Knows rows of arrays. Is not kept anywhere, and belongs to
one thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.base import (
    ColumnValue,
    IndexHits,
    Rows,
    SearchMode,
    VectorIndex,
    validate_ids,
    validate_queries,
    validate_rows,
)
from union_igrot.gallery.engines.filters import ColumnKind, Values, parse_filter, passing
from union_igrot.gallery.engines.scattered import scattered_topk

BATCH: Final = 4096
"""Rows in a batch of `scan`."""
NO_ANN: Final = "there is no approximate index here"

_DTYPES: Final[Mapping[ColumnKind, type]] = {
    "str": object,
    "bytes": object,
    "int": np.int64,
    "float": np.float64,
    "bool": np.bool_,
}
_BLANK: Final[Mapping[ColumnKind, ColumnValue]] = {"str": "", "bytes": b"", "int": 0, "float": 0.0, "bool": False}
_ROOM: Final = 16


@final
class MemoryIndex(VectorIndex):
    """Embeddings in memory.

    Args:
        dim: Width of the embeddings.
        metadata: What to keep with them.
        uri: What it is called.
    """

    def __init__(self, dim: int, metadata: Mapping[str, Any] | None = None, uri: str = "memory:") -> None:
        if dim < 1:
            raise ConfigError(f"dim is {dim}; give the width of the embeddings")
        self.uri, self.dim, self.metadata = uri, dim, dict(metadata or {})
        self._kinds: dict[str, ColumnKind] = {}
        self._slots: dict[str, int] = {}
        """Where each row lies; rows lie in the order in which they were first written."""
        self._used = 0
        self._vectors = torch.empty(_ROOM, dim)
        self._ids = np.full(_ROOM, "", dtype=object)
        self._there = np.zeros(_ROOM, dtype=bool)
        """Whether a row lies there that was not removed."""
        self._columns: dict[str, Values] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        """See `VectorIndex`."""
        return dict(self._kinds)

    def upsert(self, rows: Rows) -> None:
        """See `VectorIndex`."""
        rows, new = validate_rows(rows, self.dim, self._kinds)
        self._make_room(sum(one not in self._slots for one in rows.ids))
        for name, kind in new.items():
            self._columns[name] = _blank(kind, len(self._vectors))
            self._kinds[name] = kind
        for one in rows.ids:
            if one not in self._slots:
                self._slots[one] = self._used
                self._ids[self._used] = one
                self._there[self._used] = True
                self._used += 1
        places = np.array([self._slots[one] for one in rows.ids], dtype=np.int64)
        self._vectors[torch.from_numpy(places)] = rows.vectors
        for name, column in self._columns.items():
            given = rows.columns.get(name, [None] * len(places))
            column.known[places] = [value is not None for value in given]
            blank = _BLANK[self._kinds[name]]
            for place, value in zip(places.tolist(), given, strict=True):
                column.values[place] = blank if value is None else value

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorIndex`."""
        validate_ids(ids)
        gone = [self._slots.pop(one) for one in dict.fromkeys(ids) if one in self._slots]
        self._ids[gone] = ""
        self._there[gone] = False
        if self._used > _ROOM and len(self._slots) < self._used // 2:
            self._move(max(_ROOM, len(self._slots)))
        return len(gone)

    def fetch(self, ids: Sequence[str]) -> Rows:
        """See `VectorIndex`."""
        validate_ids(ids)
        absent = [one for one in ids if one not in self._slots]
        if absent:
            raise DataError(missing(absent, self.uri))
        places = np.array([self._slots[one] for one in ids], dtype=np.int64)
        return Rows(list(ids), self._vectors[torch.from_numpy(places)], self._read(places, list(self._columns)))

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[Mapping[str, Sequence[ColumnValue]]]:
        """See `VectorIndex`."""
        places = self._places(where)
        found = self._read(places, columns)
        starts = range(0, len(places), BATCH)
        return ({name: values[at : at + BATCH] for name, values in found.items()} for at in starts)

    def search(
        self,
        queries: Float[Tensor, "queries dim"],
        k: int,
        *,
        where: str | None = None,
        mode: SearchMode = "auto",
        columns: Sequence[str] = (),
    ) -> list[IndexHits]:
        """See `VectorIndex`."""
        queries = validate_queries(queries, self.dim, k)
        if mode == "ann":
            raise ConfigError(f"{self.uri}: {NO_ANN}; ask with exact or auto")
        places = self._places(where)
        if not len(places):
            return [IndexHits([], torch.empty(0), {name: [] for name in columns}) for _ in queries]
        found = scattered_topk(queries, [self._vectors], places, min(k, len(places)))
        hits = []
        for positions, scores in zip(found.positions, found.scores, strict=True):
            chosen = places[positions.numpy()]
            hits.append(IndexHits(self._ids[chosen].tolist(), scores, self._read(chosen, columns)))
        return hits

    def optimize(self) -> None:
        """Return back memory where less than half of it holds rows."""
        if len(self._slots) < len(self._vectors) // 2:
            self._move(max(_ROOM, len(self._slots)))

    def _places(self, where: str | None) -> Int64[np.ndarray, " rows"]:
        """Return where the rows lie that pass a filter, in order."""
        there = self._there[: self._used]
        if where is not None:
            there = there & passing(parse_filter(where, {"id": "str", **self._kinds}), self._values)
        return np.flatnonzero(there)

    def _values(self, name: str) -> Values:
        if name == "id":
            return Values(self._ids[: self._used], self._there[: self._used])
        values, known = self._columns[name]
        return Values(values[: self._used], known[: self._used])

    def _read(self, places: Int64[np.ndarray, " rows"], columns: Sequence[str]) -> dict[str, list[ColumnValue]]:
        found: dict[str, list[ColumnValue]] = {}
        for name in columns:
            if name == "id":
                found[name] = self._ids[places].tolist()
            elif name in self._columns:
                values, known = self._columns[name]
                pairs = zip(values[places].tolist(), known[places].tolist(), strict=True)
                found[name] = [value if there else None for value, there in pairs]
            else:
                found[name] = [None] * len(places)
        return found

    def _make_room(self, more: int) -> None:
        if self._used + more > len(self._vectors):
            self._move(max(2 * len(self._slots), len(self._slots) + more, _ROOM))

    def _move(self, room: int) -> None:
        """Bring the rows together into new arrays."""
        places = self._places(None)
        count = self._used = len(places)
        vectors, self._vectors = self._vectors, torch.empty(room, self.dim)
        torch.index_select(vectors, 0, torch.from_numpy(places), out=self._vectors[:count])
        ids, self._ids = self._ids, np.full(room, "", dtype=object)
        self._ids[:count] = ids[places]
        self._there = np.arange(room) < count
        for name, (values, known) in self._columns.items():
            self._columns[name] = _blank(self._kinds[name], room)
            self._columns[name].values[:count] = values[places]
            self._columns[name].known[:count] = known[places]
        self._slots = dict(zip(self._ids[:count].tolist(), range(count), strict=True))


def missing(absent: Sequence[str], uri: str) -> str:
    """Say which rows are not there."""
    named = ", ".join(repr(one) for one in absent[:3]) + (", ..." if len(absent) > 3 else "")
    return f"{len(absent)} rows are not in {uri}: {named}; scan(['id']) lists what is"


def _blank(kind: ColumnKind, room: int) -> Values:
    return Values(np.full(room, _BLANK[kind], dtype=_DTYPES[kind]), np.zeros(room, dtype=bool))
