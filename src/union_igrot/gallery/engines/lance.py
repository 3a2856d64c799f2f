"""An index in a Lance table (LanceDB's format): a folder, or the same on an object store.

Every write is one transaction, so that readers see whole versions while others write, and a
killed writer leaves the version before. Several processes may write: the later of two that
clash is done again on what the earlier left. Object stores are found through the environment
variables of their own tools.

Knows Lance tables. Does not know what the vectors stand for.
"""

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar, final

os.environ.setdefault("LANCE_LOG", "error")  # read at the import: its advice on small indexes is not for our users

import lance
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines import lance_ann
from union_igrot.gallery.engines.base import (
    AUTO_EXACT,
    ColumnValue,
    IndexHits,
    Rows,
    SearchMode,
    VectorIndex,
    dump_metadata,
    validate_ids,
    validate_queries,
    validate_rows,
)
from union_igrot.gallery.engines.filters import ColumnKind, lance_text, parse_filter
from union_igrot.gallery.engines.mapped import InUse, Layout, folder_of
from union_igrot.gallery.engines.memory import BATCH, NO_ANN, missing
from union_igrot.gallery.engines.scattered import scattered_topk

_CARD: Final = b"union-igrot"
_PRIMARY: Final = {b"lance-schema:unenforced-primary-key": b"true"}
"""Makes Lance refuse the later of two writers who add one id at once."""
_KINDS: Final[Mapping[ColumnKind, pa.DataType]] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
}
_PATIENCE: Final = 120.0
"""Seconds for which a write that clashes with others' is tried again."""
_KEPT: Final = timedelta(hours=1)
"""How long versions that may still be read are kept by `optimize`."""
_FRAGMENTS: Final = 128
_FRAGMENT_ROWS: Final = 2**17
_LOOKED_UP: Final = 1000
"""Ids in one filter."""

Done = TypeVar("Done")
log: Final = logging.getLogger("union_igrot.index")


@final
class LanceIndex(VectorIndex):
    """Embeddings in a Lance table. See `open_index` for arguments and errors."""

    def __init__(self, uri: str, *, dim: int | None, metadata: Mapping[str, Any] | None, create: bool) -> None:
        self.uri = uri
        with self._told():
            table = _opened(uri)
            if table is None and create:
                table = self._made(dim, metadata)
        if table is None:
            raise ConfigError(f"there is no index {uri}; make one (union-index), or check the name")
        kept = (table.schema.metadata or {}).get(_CARD)
        if kept is None:
            raise ConfigError(f"{uri} is a Lance table, but no index made here; give another name")
        self.metadata = json.loads(kept)
        self.dim = table.schema.field("vector").type.list_size
        self._table: Any = table
        self._folder = folder_of(uri)
        self._layout: tuple[int, Layout] | None = None
        self._in_use: InUse | None = None
        self._writes = 0

    def __len__(self) -> int:
        with self._told():
            return int(self._latest().count_rows())

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        """See `VectorIndex`."""
        with self._told():
            return _columns_of(self._latest())

    def upsert(self, rows: Rows) -> None:
        """See `VectorIndex`."""
        validate_rows(rows, self.dim, self.columns)
        if rows.ids:
            self._written(lambda table: self._upserted(table, rows))
            self._writes += 1
            if self._writes % _FRAGMENTS == 0:
                self._compact(_FRAGMENT_ROWS)

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorIndex`."""
        validate_ids(ids)
        if not ids:
            return 0
        given = pa.table({"id": pa.array(dict.fromkeys(ids), pa.string())})

        def deleted(table: Any) -> int:
            merge = table.merge_insert("id").when_matched_delete().conflict_retries(0)
            return int(merge.execute(given)["num_deleted_rows"])

        return self._written(deleted)

    def fetch(self, ids: Sequence[str]) -> Rows:
        """See `VectorIndex`."""
        validate_ids(ids)
        with self._told():
            table = self._latest()
            names = list(_columns_of(table))
            found = _looked_up(table, ids, ["id", "vector", *names])
        at = {one: i for i, one in enumerate(found["id"].to_pylist())}
        absent = [one for one in ids if one not in at]
        if absent:
            raise DataError(missing(absent, self.uri))
        order = [at[one] for one in ids]
        vectors = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        taken = found.select(names).take(pa.array(order, pa.int64()))
        return Rows(list(ids), torch.from_numpy(vectors[np.array(order, dtype=np.int64)]), taken.to_pydict())

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[Mapping[str, Sequence[ColumnValue]]]:
        """See `VectorIndex`."""
        with self._told():
            table, layout = self._laid_out()
            offsets = layout.offsets if where is None else layout.offsets[layout.chosen(self._filter(table, where))]
        return self._batches(table, offsets, columns)

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
        with self._told():
            table = self._latest()
            chosen = None if where is None else self._filter(table, where)
            built = lance_ann.built(table) if mode != "exact" else None
            if mode == "ann" and built is None:
                raise ConfigError(f"{self.uri}: {NO_ANN} yet; optimize builds it, or ask with exact or auto")
            if built is None or (mode == "auto" and table.count_rows() <= AUTO_EXACT):
                return self._exact(queries, k, chosen, columns)
            return self._approximate(table, queries, k, chosen, columns)

    def optimize(self) -> None:
        """See `VectorIndex`."""
        self._compact(None)
        self._written(lance_ann.renew)
        self._compact(None)  # of rows that are in one part of the index now
        with self._told():
            self._latest().cleanup_old_versions(_KEPT, error_if_tagged_old_versions=False)

    def close(self) -> None:
        """See `VectorIndex`."""
        self._layout = self._in_use = None

    def _exact(self, queries: Tensor, k: int, chosen: str | None, columns: Sequence[str]) -> list[IndexHits]:
        table, layout = self._laid_out()
        rows = np.arange(len(layout.places)) if chosen is None else np.flatnonzero(layout.chosen(chosen))
        if not len(rows):
            return [_nothing(columns) for _ in queries]
        places = layout.places if chosen is None else layout.places[rows]
        found = scattered_topk(queries, layout.parts(), places, min(k, len(rows)))
        offsets = layout.offsets[rows[found.positions.numpy()]]
        unique, at = np.unique(offsets, return_inverse=True)
        read_once = _taken(table, unique, ["id", *columns])
        return [_hits(read_once, one, scores, columns) for one, scores in zip(at, found.scores, strict=True)]

    def _approximate(
        self, table: Any, queries: Tensor, k: int, chosen: str | None, columns: Sequence[str]
    ) -> list[IndexHits]:
        names = list(_columns_of(table))
        wanted = ["id", "row", "_distance", *dict.fromkeys(name for name in columns if name in names)]
        hits = []
        for query in queries:
            found = lance_ann.nearest(table, query, k, chosen, wanted)
            scores = 1.0 - found["_distance"].to_numpy().astype(np.float64)
            order = np.lexsort((found["row"].to_numpy(), -scores))
            read_once = {name: found[name].to_pylist() for name in found.column_names}
            hits.append(_hits(read_once, order, torch.from_numpy(scores[order]).float(), columns))
        return hits

    def _batches(
        self, table: Any, offsets: Int64[np.ndarray, " rows"], columns: Sequence[str]
    ) -> Iterator[Mapping[str, Sequence[ColumnValue]]]:
        for at in range(0, len(offsets), BATCH):
            with self._told():
                batch = _taken(table, offsets[at : at + BATCH], columns)
            yield batch

    def _upserted(self, table: Any, rows: Rows) -> None:
        rows, new = validate_rows(rows, self.dim, _columns_of(table))
        if new:
            table.add_columns(pa.schema([pa.field(name, _KINDS[kind]) for name, kind in new.items()]))
        known = _looked_up(table, rows.ids, ["id", "row"])
        first_written = dict(zip(known["id"].to_pylist(), known["row"].to_pylist(), strict=True))
        serials = [first_written.get(one, (table.version << 32) + i) for i, one in enumerate(rows.ids)]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors.numpy().ravel()), self.dim)
        columns = [
            pa.array(rows.columns.get(name, [None] * len(serials)), _KINDS[kind])
            for name, kind in _columns_of(table).items()
        ]
        given = pa.Table.from_arrays(
            [pa.array(rows.ids, pa.string()), pa.array(serials, pa.int64()), vectors, *columns], schema=table.schema
        )
        merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.conflict_retries(0).execute(given)

    def _written(self, write: Callable[[Any], Done]) -> Done:
        """Do a write on the latest version, and again where another writer was faster."""
        end, tries = time.monotonic() + _PATIENCE, 0
        with self._told():
            while True:
                try:
                    return write(self._latest())
                except OSError as error:
                    if not _clashed(error) or time.monotonic() > end:
                        raise
                tries += 1
                time.sleep(random.uniform(0, min(1.0, 0.01 * 2**tries)))

    def _compact(self, rows: int | None) -> None:
        """Make few files of many; where other writers are always faster, they are left for next time."""
        end = time.monotonic() + _PATIENCE / 4
        with self._told():
            while time.monotonic() < end:
                try:
                    self._latest().optimize.compact_files(target_rows_per_fragment=rows)
                    return
                except OSError as error:
                    if not _clashed(error):
                        raise
                time.sleep(random.uniform(0, 0.2))
        log.warning("%s: its files are not yet brought together, as others are writing", self.uri)

    def _latest(self) -> Any:
        """Return the newest version; what was given before stays as it is."""
        latest = self._table.latest_version
        if latest != self._table.version:
            self._table = self._table.checkout_version(latest)
        return self._table.checkout_version(latest)

    def _laid_out(self) -> tuple[Any, Layout]:
        table = self._latest()
        self._in_use = self._in_use or InUse(self._folder)
        if self._layout is None or self._layout[0] != table.version:
            self._layout = (table.version, Layout(table, self.dim, self._folder))
        return table, self._layout[1]

    def _filter(self, table: Any, where: str) -> str:
        return lance_text(parse_filter(where, {"id": "str", **_columns_of(table)}))

    def _made(self, dim: int | None, metadata: Mapping[str, Any] | None) -> Any:
        if dim is None or dim < 1:
            raise ConfigError(f"{self.uri} has to be made: give dim, the width of the embeddings")
        fields = [
            pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
        ]
        schema = pa.schema(fields, metadata={_CARD: dump_metadata(metadata)})
        try:
            return lance.write_dataset(schema.empty_table(), self.uri, mode="create")
        except OSError:
            made = _opened(self.uri)  # by another process, meanwhile
            if made is None:
                raise
            return made

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what Lance could not do."""
        try:
            yield
        except BaseException as error:
            # What Rust did not foresee, such as an AWS_ENDPOINT that is no address, is no Exception.
            panicked = type(error).__name__ == "PanicException"
            told = isinstance(error, OSError | ValueError | RuntimeError | pa.ArrowException) or panicked
            if not told or isinstance(error, UnicodeError):
                raise
            said = re.sub(r"(, )?\S*\.rs:\d+(:\d+)?|LanceError\(\w+\): ", "", " ".join(str(error).split()))
            raise DataError(f"{self.uri}: {said[:300]}") from error


def _opened(uri: str) -> Any:
    if Path(uri).is_file():
        raise ConfigError(f"{uri} is a file; an index is a folder")
    try:
        return lance.dataset(uri)
    except (ValueError, FileNotFoundError) as error:
        if "not found" not in str(error):
            raise
        return None


def _columns_of(table: Any) -> dict[str, ColumnKind]:
    kinds: dict[pa.DataType, ColumnKind] = {kept: kind for kind, kept in _KINDS.items()}
    return {field.name: kinds[field.type] for field in table.schema if field.name not in ("id", "row", "vector")}


def _looked_up(table: Any, ids: Sequence[str], columns: Sequence[str]) -> Any:
    """Read rows by id, in any order."""
    found = []
    for at in range(0, max(len(ids), 1), _LOOKED_UP):
        listed = ", ".join("'" + one.replace("'", "''") + "'" for one in ids[at : at + _LOOKED_UP])
        text = f"id IN ({listed})" if listed else "false"
        found.append(table.scanner(columns=list(columns), filter=text).to_table())
    return pa.concat_tables(found)


def _taken(table: Any, offsets: Int64[np.ndarray, " rows"], columns: Sequence[str]) -> dict[str, list[ColumnValue]]:
    """Read columns of some rows; None for columns that are not there."""
    there = [name for name in dict.fromkeys(columns) if name == "id" or name in _columns_of(table)]
    found = table.take(pa.array(offsets, pa.uint64()), columns=there).to_pydict() if there else {}
    return {name: found.get(name, [None] * len(offsets)) for name in columns}


def _hits(
    read_once: Mapping[str, Sequence[ColumnValue]],
    rows: Int64[np.ndarray, " rows"],
    scores: Tensor,
    columns: Sequence[str],
) -> IndexHits:
    chosen = rows.tolist()
    absent: list[ColumnValue] = [None] * len(read_once["id"])
    values = {name: [read_once.get(name, absent)[i] for i in chosen] for name in columns}
    return IndexHits([str(read_once["id"][i]) for i in chosen], scores, values)


def _nothing(columns: Sequence[str]) -> IndexHits:
    return IndexHits([], torch.empty(0), {name: [] for name in columns})


def _clashed(error: OSError) -> bool:
    """Whether a write failed because another one came first."""
    said = str(error).lower()
    return "conflict" in said or "concurrent writers" in said
