"""Open an index by its URI, with the engine of its scheme or suffix; the engine in memory is always there."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Int64

from union_igrot.errors import ConfigError, require_packages
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
from union_igrot.storage.files import absolute_path

MEMORY: Final = "memory:"
"""The URI of an index in memory."""
FORMS: Final = (
    "photos.lance (a folder), s3://bucket/photos.lance (also gs://, az://), milvus://host:19530/collection, or memory:"
)
"""The URIs of the built-in engines."""
ENTRY_POINTS: Final = "union_igrot.engines"
"""Group of entry points by which packages add engines; an entry's name is a scheme or suffix, its value an opener."""


EngineOpener = Callable[..., VectorIndex]
"""A function of `uri` and the keywords `dim`, `metadata` and `create` that opens an index, or creates a missing one."""


def register_engine(name: str, opener: EngineOpener, *, stores: tuple[str, ...] = ()) -> None:
    """Register an engine.

    Args:
        name: What selects the engine: a URI scheme such as `milvus`, or the suffix of a local path such as `.lance`.
        opener: Opens an index, usually the class of the engine.
        stores: Further URI schemes under which the suffix is accepted, such as `s3`.

    Raises:
        ConfigError: If the name is neither a scheme nor a suffix.
    """
    if not re.fullmatch(r"\.\w+|[A-Za-z][A-Za-z0-9+.-]+", name):
        raise ConfigError(f"invalid name of an engine: {name!r} (expected a URI scheme or a suffix such as .lance)")
    _ENGINES[name.lower()] = (opener, stores)


def uri_scheme(uri: str) -> str:
    """Return the scheme of a URI in lower case, empty for a local path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)
    return found.group(1).lower() if found else ""


def local_path(uri: str) -> str | None:
    """Return the absolute path of an index on this machine's disk, or None for any other index."""
    return None if uri_scheme(uri) else absolute_path(uri)


def open_index(
    uri: str, *, dim: int | None = None, metadata: Mapping[str, Any] | None = None, create: bool = False
) -> VectorIndex:
    """Open or create an index.

    Args:
        uri: Its location; see `FORMS`.
        dim: Width of the embeddings; required to create an index, compared with that of an existing one.
        metadata: JSON values to store in a new index. An existing one keeps its own.
        create: Whether to create the index if there is none.

    Raises:
        ConfigError: If no engine is registered for the URI, the engine needs a package that is not installed, there
            is no index and `create` is not set, or the width differs.
        DataError: If the index cannot be read, created or reached.
    """
    index = check_uri(uri)(uri, dim=dim, metadata=metadata, create=create)
    if dim is not None and index.dim != dim:
        index.close()
        raise ConfigError(
            f"{without_password(uri)} holds embeddings of width {index.dim}, not {dim}; open it with the model it was "
            "made with, or make another index"
        )
    return index


def without_password(uri: str) -> str:
    """Return a URI without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def check_uri(uri: str) -> EngineOpener:
    """Return the opener of a URI; a ConfigError if there is none."""
    scheme = uri_scheme(uri)
    suffix = re.search(r"(\.\w+)?/*$", uri).group(1) or ""  # type: ignore[union-attr]  # matches any text
    for name in (scheme, suffix.lower()):
        if name and name not in _ENGINES and (found := list(entry_points(group=ENTRY_POINTS, name=name))):
            register_engine(name, found[0].load())
    if scheme in _ENGINES:
        return _ENGINES[scheme][0]
    opener, stores = _ENGINES.get(suffix.lower(), (None, ()))
    if opener is None or scheme not in ("", *stores):
        raise ConfigError(f"{without_password(uri)!r} is not the name of an index (expected {FORMS})")
    return opener


@final
class MemoryIndex(VectorIndex):
    """Embeddings in memory, with exact search alone; needs no extra package and belongs to one thread."""

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
        kept = list(self._positions.values())  # in the order of first writes: a removed row that is added again is new
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


def _open_memory(uri: str, *, dim: int | None, metadata: Mapping[str, Any] | None, create: bool) -> VectorIndex:
    if uri != MEMORY:
        raise ConfigError(f"{uri!r} is not the name of an index (expected {FORMS})")
    if not create:
        raise ConfigError(f"{uri} cannot be opened again; pass create=True")
    return MemoryIndex(required_dim(uri, dim), metadata)


def _builtin(module: str, name: str, package: str, extra: str) -> EngineOpener:
    """Return an opener that imports an engine, and the package that it needs, when it is used."""

    def opener(uri: str, **options: Any) -> VectorIndex:
        require_packages(without_password(uri), extra, package)
        index: VectorIndex = getattr(importlib.import_module(module), name)(uri, **options)
        return index

    return opener


_open_milvus = _builtin("union_igrot.gallery.engines.milvus", "MilvusIndex", "pymilvus", "milvus")
_ENGINES: Final[dict[str, tuple[EngineOpener, tuple[str, ...]]]] = {
    "memory": (_open_memory, ()),
    ".lance": (_builtin("union_igrot.gallery.engines.lance", "LanceIndex", "lance", "gallery"), ("s3", "gs", "az")),
    "milvus": (_open_milvus, ()),
    "milvus+tls": (_open_milvus, ()),
}
