"""The interface of a gallery's index: rows of embeddings with columns, written, removed and searched.

One row is one image. Engines differ in where the rows lie and how many machines hold
them; callers see this class alone. Does not know models, images or folders, nor what an
embedding stands for.
"""

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.filters import ColumnKind

ColumnValue = str | int | float | bool | bytes | None
"""What a column may hold."""
SearchMode = Literal["exact", "ann", "auto"]
"""Exact search, approximate search, or what fits the size, which is exact up to `AUTO_EXACT` rows."""
AUTO_EXACT = 200_000
"""Rows up to which `auto` searches exactly where the engine has the choice, in tens of milliseconds a query."""

Own = TypeVar("Own", bound="VectorIndex")


@dataclass(frozen=True)
class Rows:
    """Some rows of an index.

    Attributes:
        ids: What each row is called; unique in an index.
        vectors: Their embeddings, float32.
        columns: Further values by column name, one a row. An index has every column in which
            it ever took a value; a row without one holds None there.
    """

    ids: Sequence[str]
    vectors: Float[Tensor, "rows dim"]
    columns: Mapping[str, Sequence[ColumnValue]]


@dataclass(frozen=True)
class IndexHits:
    """The answers to one query, best first.

    Attributes:
        ids: The rows found; fewer than asked for where fewer rows pass the filter.
        scores: Dot product of query and row, float32.
        columns: The asked-for columns of the rows found.
    """

    ids: Sequence[str]
    scores: Float[Tensor, " found"]
    columns: Mapping[str, Sequence[ColumnValue]]


class VectorIndex(ABC):
    """A gallery's embeddings on some engine.

    A write that returned is there for every later reader, also after the process was killed
    (but for the in-memory engine), and one that did not return is there whole or not at all
    (on Milvus, whole requests of it may be there). Writers in several processes do not wait
    for each other; of two that write one id at once, one is the later. What an engine cannot
    do in time or at all, as when a disk is full or a server away, is a DataError.

    Attributes:
        uri: Where the index lies, as the user gave it.
        dim: Width of the embeddings.
        metadata: What was stored with the index when it was made: the model's fingerprint and
            whatever else its maker wanted kept; JSON values.
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
        """Name the columns, `id` aside, and what each holds besides None."""

    @abstractmethod
    def upsert(self, rows: Rows) -> None:
        """Write rows; one whose id is there is replaced whole and keeps its place in the order.

        Raises:
            DataError: Where ids repeat, widths differ, a number is not finite, a column holds
                values of another type than before, or has a name that an engine cannot keep.
        """

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove rows; give how many of them were there."""

    @abstractmethod
    def fetch(self, ids: Sequence[str]) -> Rows:
        """Read rows in the order of the ids.

        Raises:
            DataError: Naming the ids that are not there.
        """

    @abstractmethod
    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[Mapping[str, Sequence[ColumnValue]]]:
        """Read columns of all rows in batches, in the order the rows were first written.

        What is written after the call is not seen (but on Milvus, which may show it).

        Args:
            columns: Their names; `id` gives the ids. One that no row has is all None.
            where: A filter; see `index.where`.

        Raises:
            ConfigError: Where the filter is not valid.
        """

    @abstractmethod
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

        Equal scores of an exact search stand in the order in which rows were first written.

        Args:
            queries: Embeddings.
            k: How many answers, at least 1.
            where: A filter that rows must pass, applied before ranking; see `index.where`.
            mode: Exact, approximate, or as fits the size.
            columns: Which columns to read of the rows found, as in `scan`.

        Returns:
            One answer a query; empty ones where no row passes.

        Raises:
            ConfigError: Where k or the filter is not valid, or `ann` is asked for and there
                is no approximate index.
            DataError: Where the queries' width is another, or one is not finite.
        """

    @abstractmethod
    def optimize(self) -> None:
        """Build or renew the approximate index and tidy the storage; searching goes on meanwhile."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing open
        """Let go of files and connections."""

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


RESERVED: Final = ("id", "row", "vector")
"""Names that a column cannot have, as engines keep something of their own there."""

_INT64: Final = 2**63
_KINDS: Final[tuple[tuple[type, ColumnKind], ...]] = (
    (bool, "bool"),  # a bool is an int too
    (int, "int"),
    (float, "float"),
    (str, "str"),
    (bytes, "bytes"),
)


def validate_rows(rows: Rows, dim: int, kinds: Mapping[str, ColumnKind]) -> tuple[Rows, dict[str, ColumnKind]]:
    """Check rows and bring them into one form.

    Args:
        rows: What a caller gave.
        dim: Width of the index.
        kinds: The columns it has.

    Returns:
        The rows, their vectors float32 on the CPU, whole numbers in a column of numbers made
        floats, columns without any value left out; and the kinds of the columns that are new.

    Raises:
        DataError: Where ids, vectors or columns cannot be kept.
    """
    validate_ids(rows.ids)
    if len(set(rows.ids)) != len(rows.ids):
        twice = max(rows.ids, key=Counter(rows.ids).__getitem__)
        raise DataError(f"the id {twice!r} stands twice among {len(rows.ids)} rows; give each row once")
    if rows.vectors.shape != (len(rows.ids), dim):
        given = "x".join(str(size) for size in rows.vectors.shape)
        raise DataError(f"vectors of shape {given} for {len(rows.ids)} rows of an index of width {dim}")
    vectors = rows.vectors.detach().to("cpu", torch.float32).contiguous()
    wrong = (~vectors.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise DataError(f"the vector of {rows.ids[wrong[0]]!r} holds nan or infinity; encode it again")
    new: dict[str, ColumnKind] = {}
    columns: dict[str, Sequence[ColumnValue]] = {}
    for name, values in rows.columns.items():
        if len(values) != len(rows.ids):
            raise DataError(f"the column {name!r} has {len(values)} values for {len(rows.ids)} rows; give one each")
        kind = _kind_of(name, values, kinds.get(name))
        if kind is not None:
            if name not in kinds:
                _check_name(name)
                new[name] = kind
            columns[name] = [None if value is None else _FORMS[kind](name, value) for value in values]
    return Rows(list(rows.ids), vectors, columns), new


def validate_ids(ids: Sequence[str]) -> None:
    """Refuse ids that cannot be kept.

    Raises:
        DataError: Where one is no text, empty, or holds what is no Unicode text (a path's odd bytes).
    """
    if isinstance(ids, str):
        raise DataError(f"ids are a list of texts; got the text {ids!r}")
    for one in ids:
        if not isinstance(one, str):
            raise DataError(f"the id {one!r} is {type(one).__name__}; give a text")
        if not one:
            raise DataError("an id is empty; give each row a name")
        _check_text("the id", one)


def validate_queries(queries: Float[Tensor, "queries dim"], dim: int, k: int) -> Float32[Tensor, "queries dim"]:
    """Check a search, and bring its queries to float32 on the CPU.

    Raises:
        ConfigError: Where k is not at least 1.
        DataError: Where the queries' width is another, or one is not finite.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; ask for at least 1 answer")
    if queries.ndim != 2 or queries.shape[1] != dim:
        given = "x".join(str(size) for size in queries.shape)
        raise DataError(f"queries of shape {given} for an index of width {dim}; was it made by another model?")
    if not queries.isfinite().all():
        raise DataError("a query holds nan or infinity; encode it again")
    return queries.detach().to("cpu", torch.float32)


def dump_metadata(metadata: Mapping[str, Any] | None) -> str:
    """Serialize metadata as JSON.

    Raises:
        ConfigError: Where it holds what JSON cannot.
    """
    try:
        return json.dumps(dict(metadata or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the metadata cannot be kept as JSON ({error})") from None


def _kind_of(name: str, values: Sequence[ColumnValue], kept: ColumnKind | None) -> ColumnKind | None:
    """Find what a column holds; None where no value says it."""
    found = {_kind(name, value) for value in values if value is not None}
    kind = kept or ("float" if found == {"int", "float"} else next(iter(found), None))
    allowed = {"int", "float"} if kind == "float" else {kind}
    if found - allowed:
        held = f"holds {kind}" if kept else f"holds {kind} in one row"
        raise DataError(f"the column {name!r} {held} and cannot hold {', '.join(sorted(found - allowed))}")
    return kind


def _kind(name: str, value: object) -> ColumnKind:
    for kind, called in _KINDS:
        if isinstance(value, kind):
            return called
    raise DataError(
        f"the column {name!r} holds a {type(value).__name__}; give str, int, float, bool, bytes or None "
        "(.item() makes one of a numpy number)"
    )


def _check_name(name: str) -> None:
    _check_text("the column's name", name)
    if not name or name in RESERVED or name.startswith("_") or not name.isprintable() or set(name) & set('."`\\'):
        raise DataError(
            f"a column cannot be called {name!r}: not {', '.join(RESERVED)}, no '_' in front, and no dot, quote, "
            "backquote, backslash or control character; rename it"
        )


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} {text!r} is no valid Unicode text; rename it") from None


def _text(name: str, value: Any) -> str:
    _check_text(f"in the column {name!r}", value)
    return str(value)


def _whole(name: str, value: Any) -> int:
    if not -_INT64 < value < _INT64:
        raise DataError(f"the column {name!r} holds {value}, which is beyond 64 bits; give it as text")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not math.isfinite(value):
        raise DataError(f"the column {name!r} holds {value}; give None where there is no number")
    return float(value) + 0.0  # engines do not agree on whether -0.0 equals 0.0


_FORMS: Final[Mapping[ColumnKind, Callable[[str, Any], ColumnValue]]] = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": lambda _, value: bool(value),
    "bytes": lambda _, value: bytes(value),
}
