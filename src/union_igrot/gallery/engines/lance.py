"""An index in a Lance table: a local folder, or the same on an object store.

Each write is one transaction: readers see whole versions, and a killed writer leaves the previous one. Several
processes may write; a write that conflicts with another is repeated on the result of the other. Object stores are
configured by the environment variables of their own tools.

Exact search reads the vectors into memory once per version of the table. The approximate index is an inverted file of
about sqrt(rows) partitions. Up to `FLAT_ROWS` rows it holds the vectors; above, where they would double a large table,
it holds RaBitQ codes of a sixth of the size, and the best hits are scored again with the vectors.
"""

import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, final

os.environ.setdefault("LANCE_LOG", "error")  # read at the import: its advice on small indexes is not for our users

import lance
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.base import (
    AUTO_EXACT,
    SCAN_BATCH,
    ColumnBatch,
    IndexHits,
    Queries,
    Rows,
    VectorIndex,
    dump_metadata,
    rank_rows,
    required_dim,
    validate_rows,
)
from union_igrot.gallery.engines.factory import local_path
from union_igrot.gallery.engines.filters import ColumnKind, Comparison, Condition, quote
from union_igrot.storage.sizes import format_size, parse_size

FLAT_ROWS: Final = 500_000  # rows up to which the approximate index holds whole vectors
MIN_PROBES: Final = 32  # partitions searched at least
PROBED_SHARE: Final = 16  # in a large index, one of this many partitions is searched
SPARE: Final = 4  # the partitions searched hold at least this many times k rows
MERGE_RATIO: Final = 2
"""An older part of the approximate index is left alone if it is this many times larger than all newer ones."""
REFINE: Final = 5  # this many times k hits of the codes are scored again
MEMORY_VARIABLE: Final = "UNION_EXACT_MEMORY"
"""Environment variable for the memory that the vectors of exact search may take; half of the machine's by default."""

_METADATA: Final = b"union-igrot"
_PRIMARY_KEY: Final = {b"lance-schema:unenforced-primary-key": b"true"}
"""Makes Lance refuse the second of two writers who add the same id at once."""
_OWN_FIELDS: Final = ("id", "row", "vector")
_TYPES: Final[Mapping[ColumnKind, pa.DataType]] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
}
_RETRY_SECONDS: Final = 120.0
_KEPT: Final = timedelta(hours=1)  # how long `optimize` keeps old versions, which may still be read
_WRITES_PER_COMPACTION: Final = 128
_FRAGMENT_ROWS: Final = 2**17
_IDS_PER_FILTER: Final = 1000
_ANN_NAME: Final = re.compile(r"vector_([a-z_]+)_(\d+)")
_FALLBACK_MEMORY: Final = 8 * 2**30

T = TypeVar("T")
log: Final = logging.getLogger("union_igrot.index")


@final
class LanceIndex(VectorIndex):
    """Embeddings in a Lance table. See `open_index` for arguments and errors."""

    def __init__(self, uri: str, *, dim: int | None, metadata: Mapping[str, Any] | None, create: bool) -> None:
        self.uri = uri
        with self._errors():
            table = _open_table(uri)
            if table is None and create:
                table = self._create(dim, metadata)
        if table is None:
            raise ConfigError(f"there is no index {uri}; make one with union-index, or check the name")
        stored = (table.schema.metadata or {}).get(_METADATA)
        if stored is None:
            raise ConfigError(f"{uri} is a Lance table but not an index of union-igrot; choose another name")
        self.metadata = json.loads(stored)
        self.dim = table.schema.field("vector").type.list_size
        self._table: Any = table
        self._snapshot: _Snapshot | None = None
        self._writes = 0

    def __len__(self) -> int:
        with self._errors():
            return int(self._latest().count_rows())

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        """See `VectorIndex`."""
        with self._errors():
            return _column_kinds(self._latest())

    def _upsert(self, rows: Rows, _: Mapping[str, ColumnKind]) -> None:  # others may have created the new columns
        self._write(lambda table: self._merge_rows(table, rows))
        self._writes += 1
        if self._writes % _WRITES_PER_COMPACTION == 0:
            self._compact(_FRAGMENT_ROWS)

    def _merge_rows(self, table: Any, rows: Rows) -> None:
        rows, new = validate_rows(rows, self.dim, _column_kinds(table))
        if new:
            table.add_columns(pa.schema([pa.field(name, _TYPES[kind]) for name, kind in new.items()]))
        known = _find_ids(table, rows.ids, ["id", "row"])
        positions = dict(zip(known["id"].to_pylist(), known["row"].to_pylist(), strict=True))
        order = [positions.get(name, (table.version << 32) + i) for i, name in enumerate(rows.ids)]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors.numpy().ravel()), self.dim)
        columns = [
            pa.array(rows.columns.get(name, [None] * len(order)), _TYPES[kind])
            for name, kind in _column_kinds(table).items()
        ]
        data = pa.Table.from_arrays(
            [pa.array(rows.ids, pa.string()), pa.array(order, pa.int64()), vectors, *columns], schema=table.schema
        )
        merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.conflict_retries(0).execute(data)

    def _delete(self, ids: Sequence[str]) -> int:
        data = pa.table({"id": pa.array(ids, pa.string())})

        def delete(table: Any) -> int:
            merge = table.merge_insert("id").when_matched_delete().conflict_retries(0)
            return int(merge.execute(data)["num_deleted_rows"])

        return self._write(delete)

    def _fetch(self, ids: Sequence[str]) -> Rows:
        table = self._latest()
        names = list(_column_kinds(table))
        found = _find_ids(table, ids, ["id", "vector", *names])
        vectors = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        return Rows(found["id"].to_pylist(), torch.from_numpy(vectors.copy()), found.select(names).to_pydict())

    def _scan(self, columns: Sequence[str], condition: Condition | None) -> Iterator[ColumnBatch]:
        snapshot = self._current()
        rows = snapshot.matching(condition)
        offsets = snapshot.offsets if rows is None else snapshot.offsets[rows]
        starts = range(0, len(offsets), SCAN_BATCH)
        return (_take(snapshot.table, offsets[at : at + SCAN_BATCH], columns) for at in starts)

    def _exact(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:
        snapshot = self._current()

        def read(rows: Int64[np.ndarray, " found"], names: Sequence[str]) -> ColumnBatch:
            return _take(snapshot.table, snapshot.offsets[rows], names)

        return rank_rows(queries, snapshot.vectors(self.dim), snapshot.matching(condition), k, columns, read)

    def _ann(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:
        table, hits = self._latest(), []
        index, names = ann_index(table), _column_kinds(table)
        if index is None:
            raise ConfigError(
                f"{self.uri}: there is no approximate index yet; optimize() builds it, or search with exact or auto"
            )
        read = ["id", "row", "_distance", *dict.fromkeys(name for name in columns if name in names)]
        for query in queries:
            found = search_ann(table, index, query, k, condition, read)
            scores = 1.0 - found["_distance"].to_numpy().astype(np.float64)
            order = np.lexsort((found["row"].to_numpy(), -scores))
            data = found.to_pydict()
            hits.append(IndexHits.of_rows(data, order, torch.from_numpy(scores[order]).float(), columns))
        return hits

    def auto_mode(self) -> Literal["exact", "ann"]:
        """See `VectorIndex`."""
        with self._errors():
            table = self._latest()
            return "ann" if table.count_rows() > AUTO_EXACT and ann_index(table) is not None else "exact"

    def optimize(self) -> None:
        """See `VectorIndex`."""
        with self._errors():
            self._compact(None)
            self._write(update_ann)
            self._compact(None)  # of rows that are in one part of the approximate index now
            self._latest().cleanup_old_versions(_KEPT, error_if_tagged_old_versions=False)

    def close(self) -> None:
        """See `VectorIndex`."""
        self._snapshot = None

    def _write(self, write: Callable[[Any], T], seconds: float | None = None) -> T:
        """Write to the latest version; again if another writer was faster."""
        end, tries = time.monotonic() + (seconds or _RETRY_SECONDS), 0
        while True:
            try:
                return write(self._latest())
            except OSError as error:
                if not _is_conflict(error) or time.monotonic() > end:
                    raise
            tries += 1
            time.sleep(random.uniform(0, min(1.0, 0.01 * 2**tries)))

    def _compact(self, rows: int | None) -> None:
        """Merge small files, up to a number of rows; left for the next time if other writers are always faster."""
        try:
            self._write(lambda table: table.optimize.compact_files(target_rows_per_fragment=rows), _RETRY_SECONDS / 4)
        except OSError as error:
            if not _is_conflict(error):
                raise
            log.warning("%s: files are not merged yet, as others are writing", self.uri)

    def _latest(self) -> Any:
        """Return the newest version as an object of its own, which later writes do not change."""
        latest = self._table.latest_version
        if latest != self._table.version:
            self._table = self._table.checkout_version(latest)
        return self._table.checkout_version(latest)

    def _current(self) -> "_Snapshot":
        table = self._latest()
        if self._snapshot is None or self._snapshot.table.version != table.version:
            self._snapshot = None  # frees its vectors first
            self._snapshot = _Snapshot(table)
        return self._snapshot

    def _create(self, dim: int | None, metadata: Mapping[str, Any] | None) -> Any:
        fields = [
            pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), required_dim(self.uri, dim)), nullable=False),
        ]
        schema = pa.schema(fields, metadata={_METADATA: dump_metadata(metadata)})
        try:
            return lance.write_dataset(schema.empty_table(), local_path(self.uri) or self.uri, mode="create")
        except OSError:
            table = _open_table(self.uri)  # created by another process meanwhile
            if table is None:
                raise
            return table

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of Lance into a DataError of one line."""
        try:
            yield
        except BaseException as error:
            # A panic of the Rust code, such as for an invalid AWS_ENDPOINT, is not an Exception.
            panicked = type(error).__name__ == "PanicException"
            known = isinstance(error, OSError | ValueError | RuntimeError | pa.ArrowException) or panicked
            if not known or isinstance(error, UnicodeError):
                raise
            text = re.sub(r"(, )?\S*\.rs:\d+(:\d+)?|LanceError\(\w+\): ", "", " ".join(str(error).split()))
            raise DataError(f"{self.uri}: {text[:300]}") from error


@final
class _Snapshot:
    """One version of a table.

    Attributes:
        table: The version.
        offsets: Row numbers of Lance's `take`, in the order in which the rows were first written.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        found = table.scanner(columns=["row"], with_row_address=True, scan_in_order=True).to_table()
        rows = found["row"].to_numpy()
        offsets = np.argsort(rows, kind="stable")
        if (np.diff(rows[offsets]) == 0).any():  # two writers began with one version
            ids = table.scanner(columns=["id"], scan_in_order=True).to_table()["id"].to_pylist()
            offsets = np.array(sorted(range(len(rows)), key=lambda i: (rows[i], ids[i])), dtype=np.int64)
        self.offsets: Int64[np.ndarray, " rows"] = offsets
        self._addresses = found["_rowaddr"].to_numpy()[offsets]
        self._vectors: Float32[Tensor, "rows dim"] | None = None

    def vectors(self, dim: int) -> Float32[Tensor, "rows dim"]:
        """Return all vectors in order, read once; a ConfigError if they exceed the memory for exact search."""
        if self._vectors is None:
            size, limit = 4 * dim * len(self.offsets), exact_memory()
            if size > limit:
                raise ConfigError(
                    f"exact search needs {format_size(size)} of memory for vectors (limit {format_size(limit)}); use "
                    f"search=ann after optimize(), or raise {MEMORY_VARIABLE}"
                )
            vectors = torch.empty(len(self.offsets), dim)
            position = np.empty_like(self.offsets)
            position[self.offsets] = np.arange(len(self.offsets))
            at = 0
            for batch in self.table.scanner(columns=["vector"], scan_in_order=True).to_batches():
                values = batch.column("vector").flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
                vectors.numpy()[position[at : at + len(values)]] = values
                at += len(values)
            self._vectors = vectors
        return self._vectors

    def matching(self, condition: Condition | None) -> Int64[np.ndarray, " found"] | None:
        """Return the positions of the rows that pass a filter, None without one."""
        if condition is None:
            return None
        found = self.table.scanner(columns=[], filter=filter_text(condition), with_row_address=True).to_table()
        return np.flatnonzero(np.isin(self._addresses, found["_rowaddr"].to_numpy()))


def exact_memory() -> int:
    """Return how many bytes the vectors of exact search may take: `UNION_EXACT_MEMORY`, or half of the memory."""
    if setting := os.environ.get(MEMORY_VARIABLE):
        try:
            return parse_size(setting)
        except ConfigError as error:
            raise ConfigError(f"{MEMORY_VARIABLE}: {error}") from None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return _FALLBACK_MEMORY


def filter_text(condition: Condition) -> str:
    """Write a filter in Lance's SQL."""
    if not isinstance(condition, Comparison):
        joint = f" {condition.op.upper()} "
        return "(" + joint.join(filter_text(part) for part in condition.parts) + ")"
    name = f"`{condition.column}`"
    if not condition.values:
        return "false" if condition.op == "in" else f"({name} {condition.op.upper()})"
    constants = [quote(value) if isinstance(value, str) else repr(value).lower() for value in condition.values]
    inside = f"({', '.join(constants)})" if condition.op in ("in", "not in") else constants[0]
    text = f"{name} {condition.op.upper()} {inside}"
    # Lance turns "not in (a) or not in (b)" into what is true for every row, also for rows without a value.
    return f"({name} IS NOT NULL AND {text})" if condition.op in ("!=", "not in", "not like") else f"({text})"


class AnnIndex(NamedTuple):
    """The approximate index of a table."""

    name: str  # its name in Lance
    kind: str  # Lance's type of index
    partitions: int  # their number
    rows: int  # indexed rows; those written later are searched exactly


def ann_index(table: Any) -> AnnIndex | None:
    """Return the approximate index of a table, or None."""
    for index in table.describe_indices():
        if found := _ANN_NAME.fullmatch(index.name):
            return AnnIndex(index.name, found.group(1).upper(), int(found.group(2)), index.num_rows_indexed)
    return None


def update_ann(table: Any) -> None:
    """Build the indexes of a table, or add the rows written since; rebuild those made for a quarter of the rows."""
    rows = table.count_rows()
    if not rows:
        return
    if any(index.name == "id" for index in table.describe_indices()):
        table.optimize.optimize_indices(index_names=["id"])
    else:
        table.create_scalar_index("id", "BTREE", name="id", replace=True)
    old, kind, partitions = ann_index(table), "IVF_FLAT" if rows <= FLAT_ROWS else "IVF_RQ", max(1, math.isqrt(rows))
    if old is not None and old.kind == kind and partitions < 2 * old.partitions:
        if old.rows < rows:
            _extend_ann(table, old.name)
        return
    name = f"vector_{kind.lower()}_{partitions}"
    table.create_index("vector", kind, name=name, metric="dot", num_partitions=partitions, replace=True)
    if old is not None and old.name != name:
        table.drop_index(old.name)


def _extend_ann(table: Any, name: str) -> None:
    """Add new rows to an approximate index.

    Each call adds a part, and data files of rows in different parts are never merged. So the newest parts are merged
    into one as long as the next older part is not much larger than they are together: there are only a few parts, and
    a large one is seldom rewritten.
    """
    index = next(one for one in table.describe_indices() if one.name == name)
    rows = {fragment.fragment_id: fragment.physical_rows for fragment in table.get_fragments()}
    oldest_first = sorted(index.segments, key=lambda part: part.dataset_version_at_last_update)
    sizes = [sum(rows.get(one, 0) for one in part.fragment_ids) for part in oldest_first]
    newer, merged = sum(rows.values()) - sum(sizes), 0
    while sizes and sizes[-1] <= MERGE_RATIO * newer:
        newer += sizes.pop()
        merged += 1
    table.optimize.optimize_indices(index_names=[name], num_indices_to_merge=merged)


def search_ann(
    table: Any, index: AnnIndex, query: Float32[Tensor, " dim"], k: int, condition: Condition | None, columns: list[str]
) -> Any:
    """Find about the k rows of largest dot product; rows that are not indexed yet are scored too.

    A filter is applied first. The fewer rows pass it, the more partitions hold hits; Lance then searches on until the
    hits are settled.
    """
    text = None if condition is None else filter_text(condition)
    enough = math.ceil(SPARE * k * index.partitions / max(1, index.rows))
    probes = min(index.partitions, max(MIN_PROBES, index.partitions // PROBED_SHARE, enough))
    nearest = {
        "column": "vector",
        "q": query.numpy(),
        "k": k,
        "metric": "dot",
        "minimum_nprobes": probes,
        "maximum_nprobes": probes if text is None else None,
        "refine_factor": None if index.kind == "IVF_FLAT" else REFINE,
    }

    def search() -> Any:
        scanner = table.scanner(
            columns=columns, nearest=nearest, filter=text, prefilter=True, disable_scoring_autoprojection=True
        )
        return scanner.to_table()

    found = search()
    if text is None and probes < index.partitions and len(found) < min(k, table.count_rows()):
        nearest["minimum_nprobes"] = nearest["maximum_nprobes"] = index.partitions  # some were nearly empty
        found = search()
    return found


def _open_table(uri: str) -> Any:
    if Path(uri).is_file():
        raise ConfigError(f"{uri} is a file (expected a folder)")
    try:
        return lance.dataset(local_path(uri) or uri)  # absolute: Lance would take `a:` for a scheme
    except (ValueError, FileNotFoundError) as error:
        if "not found" not in str(error):
            raise
        return None


def _column_kinds(table: Any) -> dict[str, ColumnKind]:
    kinds: dict[pa.DataType, ColumnKind] = {arrow: kind for kind, arrow in _TYPES.items()}
    return {field.name: kinds[field.type] for field in table.schema if field.name not in _OWN_FIELDS}


def _find_ids(table: Any, ids: Sequence[str], columns: Sequence[str]) -> Any:
    """Read the rows that exist, in any order."""
    found = []
    for at in range(0, max(len(ids), 1), _IDS_PER_FILTER):
        listed = ", ".join(map(quote, ids[at : at + _IDS_PER_FILTER]))
        text = f"id IN ({listed})" if listed else "false"
        found.append(table.scanner(columns=list(columns), filter=text).to_table())
    return pa.concat_tables(found)


def _take(table: Any, offsets: Int64[np.ndarray, " rows"], columns: Sequence[str]) -> ColumnBatch:
    """Read columns of some rows; unknown columns are None."""
    kinds = _column_kinds(table)
    existing = [name for name in dict.fromkeys(columns) if name == "id" or name in kinds]
    found = table.take(pa.array(offsets, pa.uint64()), columns=existing).to_pydict() if existing else {}
    return {name: found.get(name, [None] * len(offsets)) for name in columns}


def _is_conflict(error: OSError) -> bool:
    """Whether a write failed because another one came first."""
    text = str(error).lower()
    return "conflict" in text or "concurrent writers" in text
