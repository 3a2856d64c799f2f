"""`VectorIndex`: rows of embeddings with columns that are written, removed and searched, whatever the engine."""

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError, check_choice, check_count
from union_igrot.evaluation import ranking
from union_igrot.gallery.engines.filters import ColumnKind, Condition, parse_filter
from union_igrot.types import Ranking

ColumnValue = str | int | float | bool | bytes | None
"""A value of a column."""
Queries = Float32[Tensor, "queries dim"]
"""Embeddings of queries."""
ColumnBatch = Mapping[str, Sequence[ColumnValue]]
"""Columns of some rows by name, one value per row."""
SearchMode = Literal["exact", "ann", "auto"]
"""Exact search, approximate search, or a choice by size, which is exact up to `AUTO_EXACT` rows."""
AUTO_EXACT: Final = 200_000
"""Rows up to which `auto` is exact, at tens of milliseconds per query."""
SCAN_BATCH: Final = 4096
"""Rows in a batch of `scan`."""
RESERVED: Final = ("id", "row", "vector")
"""Column names that engines use themselves."""

IndexT = TypeVar("IndexT", bound="VectorIndex")
_GATHERED_TILES: Final = 4
_INT64: Final = 2**63
_KINDS: Final[tuple[tuple[type, ColumnKind], ...]] = (
    (bool, "bool"),  # a bool is an int too
    (int, "int"),
    (float, "float"),
    (str, "str"),
    (bytes, "bytes"),
)


@dataclass(frozen=True)
class Rows:
    """Some rows of an index.

    Attributes:
        ids: Unique in an index.
        vectors: Embeddings, float32.
        columns: Further values by column name, one per row. An index has every column of which it ever got a value;
            rows without one hold None.
    """

    ids: Sequence[str]
    vectors: Float[Tensor, "rows dim"]
    columns: ColumnBatch


@dataclass(frozen=True)
class IndexHits:
    """The rows found for one query, best first.

    Attributes:
        ids: Fewer than k if fewer rows pass the filter.
        scores: Dot products of query and rows, float32.
        columns: The requested columns of these rows.
    """

    ids: Sequence[str]
    scores: Float[Tensor, " found"]
    columns: ColumnBatch

    @classmethod
    def empty(cls, columns: Sequence[str]) -> "IndexHits":
        """Return the result of a query without hits."""
        return cls([], torch.empty(0), {name: [] for name in columns})

    @classmethod
    def of_rows(
        cls,
        data: ColumnBatch,
        rows: Int64[np.ndarray, " found"],
        scores: Float32[Tensor, " found"],
        columns: Sequence[str],
    ) -> "IndexHits":
        """Return some rows of a batch with `id`; columns that it lacks are None."""
        chosen = rows.tolist()
        values = {name: [data[name][i] if name in data else None for i in chosen] for name in columns}
        return cls([str(data["id"][i]) for i in chosen], scores, values)


class VectorIndex(ABC):
    """The index of a gallery. One row is one image.

    A write that returned is visible to every later reader, even if the process is killed afterwards (except in
    memory). A write that did not return is visible as a whole or not at all (on Milvus, whole requests of it may be
    visible). Writers in several processes do not block each other; if two write the same id, the last one wins.
    Failures of the engine, such as a full disk or an unreachable server, are a DataError.

    A new engine implements the abstract methods, whose arguments are validated, and is made known by
    `factory.register_engine`.

    Attributes:
        uri: The location of the index, as the user wrote it.
        dim: Width of the embeddings.
        metadata: JSON values stored when the index was created: the model's fingerprint and description.
    """

    uri: str
    dim: int
    metadata: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, ColumnKind]:
        """The kind of each column, `id` excluded."""

    @abstractmethod
    def _upsert(self, rows: Rows, new: Mapping[str, ColumnKind]) -> None:
        """Write at least one row, and create the new columns."""

    @abstractmethod
    def _delete(self, ids: Sequence[str]) -> int:
        """Remove rows by distinct ids, at least one."""

    @abstractmethod
    def _fetch(self, ids: Sequence[str]) -> Rows:
        """Return those rows of distinct ids that exist, in any order, with all columns."""

    @abstractmethod
    def _scan(self, columns: Sequence[str], condition: Condition | None) -> Iterator[ColumnBatch]:
        """Read columns of the rows that pass, as they are at the call."""

    @abstractmethod
    def _exact(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:
        """Search by comparing each query with all rows that pass."""

    def _ann(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:  # noqa: ARG002
        """Search with the approximate index; an engine without one keeps this error."""
        raise ConfigError(f"{self.uri}: there is no approximate index; search with exact or auto")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the engine into a DataError of one line, around all methods above."""
        yield

    def auto_mode(self) -> Literal["exact", "ann"]:
        """Return the mode that `auto` currently selects."""
        return "exact"

    @abstractmethod
    def optimize(self) -> None:
        """Build or update the approximate index and compact the storage; searches go on meanwhile."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing open
        """Release files and connections."""

    def upsert(self, rows: Rows) -> None:
        """Write rows; an existing row of the same id is replaced as a whole and keeps its position in the order.

        Raises:
            DataError: If ids repeat, widths differ, a number is not finite, a column holds values of another kind
                than before, or its name is not allowed.
        """
        rows, new = validate_rows(rows, self.dim, self.columns)
        if rows.ids:
            with self._errors():
                self._upsert(rows, new)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove rows and return how many existed."""
        validate_ids(ids)
        with self._errors():
            return self._delete(list(dict.fromkeys(ids))) if ids else 0

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Read rows in the order of the ids; a DataError names those that do not exist."""
        validate_ids(ids)
        with self._errors():
            found = self._fetch(list(dict.fromkeys(ids)))
        position = {name: i for i, name in enumerate(found.ids)}
        if absent := [name for name in ids if name not in position]:
            shown = ", ".join(map(repr, absent[:3])) + (", ..." if len(absent) > 3 else "")
            raise DataError(f"{len(absent)} rows are not in {self.uri}: {shown}; scan(['id']) lists the ids")
        order = [position[name] for name in ids]
        columns = {name: [values[i] for i in order] for name, values in found.columns.items()}
        return Rows(list(ids), found.vectors[order], columns)

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[ColumnBatch]:
        """Read columns of all rows in batches, in the order in which the rows were first written.

        Later writes are not seen (on Milvus, they may be).

        Args:
            columns: Column names; `id` for the ids. An unknown column is all None.
            where: A filter; see `gallery.engines.filters`.

        Raises:
            ConfigError: If the filter is invalid.
        """
        with self._errors():
            return self._guarded(self._scan(columns, self._condition(where)))

    def _guarded(self, batches: Iterator[ColumnBatch]) -> Iterator[ColumnBatch]:
        with self._errors():
            yield from batches

    def search(
        self,
        queries: Float[Tensor, "queries dim"],
        k: int,
        *,
        where: str | None = None,
        mode: SearchMode = "auto",
        columns: Sequence[str] = (),
    ) -> list[IndexHits]:
        """Find the k rows of largest dot product for each query.

        Equal scores of an exact search are ordered by first write.

        Args:
            queries: Embeddings.
            k: Number of hits, at least 1.
            where: A filter that is applied before ranking; see `gallery.engines.filters`.
            mode: `exact`, `ann` (approximate) or `auto`.
            columns: Columns to read of the rows found, as in `scan`.

        Returns:
            One result per query, empty if no row passes the filter.

        Raises:
            ConfigError: If k, the mode or the filter is invalid, there is no approximate index for `ann`, or the
                index is too large for `exact`.
            DataError: If the queries have another width or are not finite.
        """
        check_choice("mode", mode, get_args(SearchMode))
        check_count("k", k)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise DataError(
                f"invalid shape of queries: {_shape(queries)} (index of width {self.dim}); embed them with its model"
            )
        if not queries.isfinite().all():
            raise DataError("a query holds nan or infinity; encode it again")
        condition, queries = self._condition(where), queries.detach().to("cpu", torch.float32)
        if not len(queries):
            return []
        with self._errors():
            search = self._ann if (self.auto_mode() if mode == "auto" else mode) == "ann" else self._exact
            return search(queries, k, condition, columns)

    def _condition(self, where: str | None) -> Condition | None:
        return None if where is None else parse_filter(where, {"id": "str", **self.columns})

    def __enter__(self: IndexT) -> IndexT:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r}, dim {self.dim})"


def topk_of_rows(
    queries: Queries,
    vectors: Float32[Tensor, "all dim"],
    rows: Int64[np.ndarray, " rows"] | None,
    k: int,
) -> Ranking:
    """Find the k best of some rows of a matrix: `exact_topk(queries, vectors[rows], k)`, without the full copy.

    Rows are copied a few tiles at a time. Scores equal those of the full copy to the last bit, since each piece starts
    on the grid of tiles, and the last one, whose final tile reaches back, holds a whole tile.

    Returns positions in `rows`, and scores.
    """
    if rows is None:
        return ranking.exact_topk(queries, vectors, k)
    tile = ranking.TILE[1]
    starts = range(0, max(1, len(rows) - tile + 1), _GATHERED_TILES * tile)
    positions, scores = torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0)
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        piece = vectors[torch.from_numpy(rows[start:end])]
        found = ranking.exact_topk(queries, piece, min(k, len(piece)))
        positions = torch.cat([positions, found.positions + start], dim=1)
        # The sort is stable: of equal scores, the earlier row stays in front.
        scores, order = torch.cat([scores, found.scores], dim=1).sort(dim=1, descending=True, stable=True)
        positions, scores = positions.gather(1, order)[:, :k], scores[:, :k]
    return Ranking(positions, scores)


def rank_rows(
    queries: Queries,
    vectors: Float32[Tensor, "all dim"],
    rows: Int64[np.ndarray, " rows"] | None,
    k: int,
    columns: Sequence[str],
    read: Callable[[Int64[np.ndarray, " found"], Sequence[str]], ColumnBatch],
) -> list[IndexHits]:
    """Search some rows of a matrix, given by increasing numbers, or all; `read` returns columns of row numbers."""
    count = len(vectors) if rows is None else len(rows)
    if not count:
        return [IndexHits.empty(columns) for _ in queries]
    found = topk_of_rows(queries, vectors, rows, min(k, count))
    positions = found.positions.numpy()
    numbers, inverse = np.unique(positions if rows is None else rows[positions], return_inverse=True)
    data, chosen = read(numbers, ["id", *columns]), inverse.reshape(positions.shape)
    return [IndexHits.of_rows(data, at, scores, columns) for at, scores in zip(chosen, found.scores, strict=True)]


def validate_rows(rows: Rows, dim: int, kinds: Mapping[str, ColumnKind]) -> tuple[Rows, dict[str, ColumnKind]]:
    """Check rows for an index with columns of some kinds, and normalize their values.

    Returns the rows, with vectors in float32 on the CPU, integers in a float column as floats, and without columns that
    hold no value; and the kinds of the new columns. What cannot be stored is a DataError.
    """
    validate_ids(rows.ids)
    if len(set(rows.ids)) != len(rows.ids):
        repeated = max(rows.ids, key=Counter(rows.ids).__getitem__)
        raise DataError(f"the id {repeated!r} is repeated among {len(rows.ids)} rows; pass each row once")
    if rows.vectors.shape != (len(rows.ids), dim):
        raise DataError(
            f"invalid shape of vectors: {_shape(rows.vectors)} (expected {len(rows.ids)}x{dim}: rows x index width)"
        )
    vectors = rows.vectors.detach().to("cpu", torch.float32).contiguous()
    wrong = (~vectors.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise DataError(f"the vector of {rows.ids[wrong[0]]!r} holds nan or infinity; encode it again")
    new: dict[str, ColumnKind] = {}
    columns: dict[str, Sequence[ColumnValue]] = {}
    for name, values in rows.columns.items():
        if len(values) != len(rows.ids):
            raise DataError(f"the column {name!r} has {len(values)} values for {len(rows.ids)} rows")
        kind = _column_kind(name, values, kinds.get(name))
        if kind is not None:
            if name not in kinds:
                _check_name(name)
                new[name] = kind
            columns[name] = [None if value is None else _normalize_value(name, kind, value) for value in values]
    return Rows(list(rows.ids), vectors, columns), new


def validate_ids(ids: Sequence[str]) -> None:
    """Raise a DataError if an id is not a string, empty, or not valid Unicode, as undecodable bytes of a path."""
    if isinstance(ids, str):
        raise DataError(f"invalid ids: {ids!r} (expected a list of strings)")
    for name in ids:
        if not isinstance(name, str):
            raise DataError(f"invalid id: {name!r} (expected a string, not {type(name).__name__})")
        if not name:
            raise DataError("an id is empty (expected a name for each row)")
        _check_unicode("the id", name)


def dump_metadata(metadata: Mapping[str, Any] | None) -> str:
    """Serialize metadata as JSON; other values are a ConfigError."""
    try:
        return json.dumps(dict(metadata or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the metadata cannot be stored as JSON ({error})") from None


def required_dim(uri: str, dim: int | None) -> int:
    """Return the width of an index to create; a missing or invalid one is a ConfigError."""
    if dim is None or dim < 1:
        raise ConfigError(f"cannot create {uri}: dim is {dim} (expected the width of the embeddings)")
    return dim


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _column_kind(name: str, values: Sequence[ColumnValue], existing: ColumnKind | None) -> ColumnKind | None:
    """Return the kind of a column, or None if all values are None."""
    found = {_value_kind(name, value) for value in values if value is not None}
    kind = existing or ("float" if found == {"int", "float"} else next(iter(found), None))
    allowed = {"int", "float"} if kind == "float" else {kind}
    if found - allowed:
        held = f"holds {kind}" if existing else f"holds {kind} in one row"
        raise DataError(f"the column {name!r} {held} and cannot hold {', '.join(sorted(found - allowed))}")
    return kind


def _value_kind(name: str, value: object) -> ColumnKind:
    for python_type, kind in _KINDS:
        if isinstance(value, python_type):
            return kind
    raise DataError(
        f"invalid value in the column {name!r}: {type(value).__name__} (expected str, int, float, bool, bytes or None; "
        ".item() converts a numpy scalar)"
    )


def _check_name(name: str) -> None:
    _check_unicode("the column name", name)
    if not name or name in RESERVED or name.startswith("_") or not name.isprintable() or set(name) & set('."`\\'):
        raise DataError(
            f"invalid column name: {name!r} (not {', '.join(RESERVED)}, no leading '_', and no dot, quote, backquote, "
            "backslash or control character); rename it"
        )


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} {text!r} is not valid Unicode; rename it") from None


def _normalize_value(name: str, kind: ColumnKind, value: Any) -> ColumnValue:
    match kind:
        case "str":
            _check_unicode(f"in the column {name!r}", value)
            return str(value)
        case "int" if not -_INT64 < value < _INT64:
            raise DataError(f"the column {name!r} holds {value}, which exceeds 64 bits; pass it as text")
        case "int":
            return int(value)
        case "float" if not math.isfinite(value):
            raise DataError(f"the column {name!r} holds {value}; pass None for a missing number")
        case "float":
            return float(value) + 0.0  # engines do not agree on whether -0.0 equals 0.0
        case _:
            return bool(value) if kind == "bool" else bytes(value)
