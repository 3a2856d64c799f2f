"""The interface of a gallery's index: rows of embeddings with columns, written, removed and searched.

One row is one image. Engines differ in where the rows lie and how many machines hold
them; callers see this class alone. Does not know models, images or folders, nor what an
embedding stands for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor

from union_igrot.gallery.engines.filter_language import Kind

Value = str | int | float | bool | bytes | None
"""What a column may hold."""
How = Literal["exact", "ann", "auto"]
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
    columns: Mapping[str, Sequence[Value]]


@dataclass(frozen=True)
class Hits:
    """The answers to one query, best first.

    Attributes:
        ids: The rows found; fewer than asked for where fewer rows pass the filter.
        scores: Dot product of query and row, float32.
        columns: The asked-for columns of the rows found.
    """

    ids: Sequence[str]
    scores: Float[Tensor, " found"]
    columns: Mapping[str, Sequence[Value]]


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
        card: What was stored with the index when it was made: the model's fingerprint and
            whatever else its maker wanted kept; JSON values.
    """

    uri: str
    dim: int
    card: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Kind]:
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
    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[Mapping[str, Sequence[Value]]]:
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
        how: How = "auto",
        columns: Sequence[str] = (),
    ) -> list[Hits]:
        """Find the k rows of largest dot product for each query.

        Equal scores of an exact search stand in the order in which rows were first written.

        Args:
            queries: Embeddings.
            k: How many answers, at least 1.
            where: A filter that rows must pass, applied before ranking; see `index.where`.
            how: Exact, approximate, or as fits the size.
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
