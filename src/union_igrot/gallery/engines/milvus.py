"""An index on a Milvus server or cluster: a collection, the calls as with the other engines.

The collection has typed fields for id, place in the order and embedding; all further columns
lie in its dynamic field, so that new ones need no change of it. What Milvus does not do as
the other engines do:

- A write goes out in requests of a few megabytes. Each is there whole or not at all, several
  are not one.
- The place in the order is the writer's clock, in nanoseconds; of rows written in the same
  one, the smaller id comes first.
- A row's columns take 64 KiB together at most, and an answer has 16,384 rows at most.
- Up to `AUTO_EXACT` rows the server compares a query with all of them, also under `ann`. When
  `optimize` finds more it gives the collection an inverted file instead, once; while that is
  built and loaded, nobody can search.
- The server brings its segments together and drops removed rows by itself; `optimize` does not
  ask for it, since what is indexed then would have to be indexed again.
- Exact search takes a few more answers from the server than wanted and scores those again
  here, so that order and ties are those of `exact_topk`. With an inverted file it first has
  the server finish the index of what was written last, which takes seconds: until then Milvus
  searches that approximately, whatever it is asked for.
- To see what has just been written, Milvus waits for its next tick, a fifth of a second. The
  first read after a write made here asks for that, and one in five seconds: reads may miss what
  others wrote within the last.

Knows Milvus. Does not know what the vectors stand for.
"""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from jaxtyping import Float
from pymilvus import DataType, MilvusClient, MilvusException
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.exact import exact_topk
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
from union_igrot.gallery.engines.filters import ColumnKind, milvus_key, milvus_text, parse_filter
from union_igrot.gallery.engines.memory import BATCH, missing
from union_igrot.gallery.engines.milvus_forms import (
    ID_BYTES,
    address_of,
    entities_of,
    named,
    requests_of,
    values_of,
    vectors_of,
    version_of,
)

NLIST: Final = 1024
"""Partitions of the inverted file in each of Milvus' segments, of some 250,000 rows of width 512."""
PROBES: Final = 64
"""Partitions searched by `ann`."""
FILTERED_PROBES: Final = 256
"""Partitions searched by `ann` under a filter, whose answers lie in more of them."""
SPARE: Final = 4
"""Times as many rows as are asked for lie in the partitions searched, at least."""
MOST: Final = 16_384
"""Rows that Milvus gives in one answer."""

_CARD: Final = "union.metadata"
_KIND: Final = "union.kind."
_LOOKED_UP: Final = 512
_MORE: Final = 16
_SECONDS: Final = 60.0
_FRESH: Final = 5.0
_UNINDEXED: Final = 1024
"""Rows below which Milvus does not index a segment, and searches it exactly."""
_ANSWERED_BYTES: Final = 32 * 2**20
_EDGE: Final = 1e-5
"""How far apart the server's score and ours may lie, relative to the largest."""

Wanted = Mapping[str, ColumnKind | None]
"""Columns to read, and what each holds."""

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each refused call with a traceback


@final
class MilvusIndex(VectorIndex):
    """Embeddings in a Milvus collection. See `open_index` for arguments and errors."""

    def __init__(self, uri: str, *, dim: int | None, metadata: Mapping[str, Any] | None, create: bool) -> None:
        address, self._name, user, password = address_of(uri)
        self.uri = re.sub(r"//[^/@]*@", "//", uri)
        self._last = 0
        self._fresh = -_FRESH
        with self._told():
            self._client = MilvusClient(address, user=user, password=password, timeout=_SECONDS)
            self._patterns = version_of(self._client.get_server_version()) >= (2, 4)
            if not self._client.has_collection(self._name):
                if not create:
                    raise ConfigError(f"there is no index {self.uri}; make one (union-index), or check the name")
                self._make(dim, metadata)
            kept = self._described()
            if _CARD not in kept["properties"]:
                raise ConfigError(f"{self.uri} is a Milvus collection, but no index made here; give another name")
            if not self._client.list_indexes(self._name):  # who made them anew was killed
                self._build()
            self._client.load_collection(self._name)
        self.metadata = json.loads(kept["properties"][_CARD])
        self.dim = next(int(field["params"]["dim"]) for field in kept["fields"] if field["name"] == "vector")

    def __len__(self) -> int:
        with self._told():
            return self._count("row >= 0")

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        """See `VectorIndex`."""
        with self._told():
            kept = self._described()["properties"]
        return {key.removeprefix(_KIND): kind for key, kind in sorted(kept.items()) if key.startswith(_KIND)}

    def upsert(self, rows: Rows) -> None:
        """See `VectorIndex`."""
        rows, new = validate_rows(rows, self.dim, self.columns)
        entities = list(entities_of(rows))
        with self._told():
            if new:
                self._client.alter_collection_properties(self._name, {_KIND + name: kind for name, kind in new.items()})
            known = {one["id"]: one["row"] for one in self._looked_up(rows.ids, ["id", "row"], "Strong")}
            for entity in entities:
                self._last = max(time.time_ns(), self._last + 1)
                entity["row"] = known.get(entity["id"], self._last)
            self._fresh = -_FRESH
            for request in requests_of(entities, self.dim):
                self._client.upsert(self._name, request)

    def delete(self, ids: Sequence[str]) -> int:
        """See `VectorIndex`."""
        validate_ids(ids)
        with self._told():
            there = [one["id"] for one in self._looked_up(list(dict.fromkeys(ids)), ["id"], "Strong")]
            self._fresh = -_FRESH
            for at in range(0, len(there), _LOOKED_UP):
                self._client.delete(self._name, filter=named(there[at : at + _LOOKED_UP]))
        return len(there)

    def fetch(self, ids: Sequence[str]) -> Rows:
        """See `VectorIndex`."""
        validate_ids(ids)
        columns = self.columns
        with self._told():
            found = self._looked_up(ids, ["id", "vector", *map(milvus_key, columns)], self._level())
        by_id = {one["id"]: one for one in found}
        absent = [one for one in ids if one not in by_id]
        if absent:
            raise DataError(missing(absent, self.uri))
        chosen = [by_id[one] for one in ids]
        vectors = torch.from_numpy(vectors_of([one["vector"] for one in chosen], self.dim))
        return Rows(list(ids), vectors, _values(chosen, columns))

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[Mapping[str, Sequence[ColumnValue]]]:
        """See `VectorIndex`."""
        text = self._filter(where)
        found: list[tuple[int, str]] = []
        with self._told():
            level, after = self._level(), ""
            while page := self._page(text, after, level):
                found += [(one["row"], one["id"]) for one in page]
                level, after = "Session", max(one["id"] for one in page)
        return self._batches([one for _, one in sorted(found)], self._wanted(columns))

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
        text = self._filter(where)
        fields = ["row", *(milvus_key(name) for name in columns if name != "id")]
        wanted, hits = self._wanted(columns), list[IndexHits]()
        with self._told():
            if k > MOST and self._count(text or "row >= 0") > MOST:
                raise ConfigError(f"k is {k}, and Milvus gives {MOST:,} answers at most; ask for fewer, or filter")
            flat = self._index()["index_type"] == "FLAT"
            if mode == "auto":
                mode = "exact" if flat and self._stored() <= AUTO_EXACT else "ann"
            if mode == "exact" and not flat:
                self._finish()
            ask = self._exact if mode == "exact" else self._approximate
            step = max(1, _ANSWERED_BYTES // ((min(k, MOST) + _MORE) * (4 * self.dim + 1024)))
            for some in queries.split(step) if len(queries) else ():
                hits += ask(some, min(k, MOST), text, fields, wanted)
        return hits

    def optimize(self) -> None:
        """See `VectorIndex`."""
        with self._told():
            self._client.flush(self._name)
            if self._stored() > AUTO_EXACT and self._index()["index_type"] == "FLAT":
                self._client.release_collection(self._name)
                self._client.drop_index(self._name, "vector")
                self._build()
                self._client.load_collection(self._name)
            if self._index()["index_type"] != "FLAT":
                self._finish()

    def close(self) -> None:
        """See `VectorIndex`."""
        self._client.close()

    def _exact(self, queries: Tensor, k: int, text: str, fields: list[str], columns: Wanted) -> list[IndexHits]:
        """Take so many candidates that none left out can be among the best, and score them here."""
        limit = min(k + _MORE, MOST)
        hits = []
        for query, first in zip(queries, self._asked(queries, limit, text, ["vector", *fields], NLIST), strict=True):
            found, taken = first, limit
            while True:
                if not found:
                    hits.append(IndexHits([], torch.empty(0), {name: [] for name in columns}))
                    break
                found.sort(key=lambda one: (one["row"], one["id"]))
                vectors = torch.from_numpy(vectors_of([one["vector"] for one in found], self.dim))
                best = exact_topk(query[None], vectors, min(k, len(found)))
                edge = _EDGE * float(vectors.norm(dim=1).max() * query.norm())
                last = min(one["distance"] for one in found)
                if len(found) < taken or taken == MOST or last < float(best.scores[0, -1]) - edge:
                    chosen = [found[i] for i in best.positions[0].tolist()]
                    hits.append(IndexHits([one["id"] for one in chosen], best.scores[0], _values(chosen, columns)))
                    break
                taken = min(4 * taken, MOST)
                (found,) = self._asked(query[None], taken, text, ["vector", *fields], NLIST)
        return hits

    def _approximate(self, queries: Tensor, k: int, text: str, fields: list[str], columns: Wanted) -> list[IndexHits]:
        hits, probes = [], FILTERED_PROBES if text else PROBES
        if SPARE * k * NLIST > AUTO_EXACT * probes:  # a smaller collection has no inverted file
            probes = min(NLIST, max(probes, -(-SPARE * k * NLIST // max(1, self._stored()))))
        for found in self._asked(queries, k, text, fields, probes):
            found.sort(key=lambda one: (-one["distance"], one["row"], one["id"]))
            scores = torch.tensor([one["distance"] for one in found], dtype=torch.float32)
            hits.append(IndexHits([one["id"] for one in found], scores, _values(found, columns)))
        return hits

    def _asked(
        self, queries: Tensor, limit: int, text: str, fields: list[str], probes: int
    ) -> list[list[dict[str, Any]]]:
        answers = self._client.search(
            self._name,
            data=list(queries.numpy()),
            limit=limit,
            filter=text,
            output_fields=fields,
            search_params={"metric_type": "IP", "params": {"nprobe": probes}},
            consistency_level=self._level(),
        )
        return [[{"id": hit["id"], "distance": hit["distance"], **hit["entity"]} for hit in hits] for hits in answers]

    def _level(self) -> str:
        """Return mode fresh an answer has to be; see this file's opening."""
        now = time.monotonic()
        if now - self._fresh < _FRESH:
            return "Session"
        self._fresh = now
        return "Strong"

    def _finish(self) -> None:
        """Have the server write out what it took and index it, and wait until that is what it searches.

        For an inverted file alone: of a flat index the server never says that it is loaded.
        """
        end = time.monotonic() + 10 * _SECONDS
        self._client.flush(self._name)
        while time.monotonic() < end:
            loaded = {one.segment_id: one for one in self._client.list_loaded_segments(self._name)}
            written = [one for one in self._client.list_persistent_segments(self._name) if one.num_rows]
            if all(one.segment_id in loaded for one in written) and all(
                one.index_name or one.num_rows < _UNINDEXED for one in loaded.values()
            ):
                return
            time.sleep(0.2)
        raise DataError(f"{self.uri}: the server is still building its index; it goes on by itself, ask again later")

    def _index(self) -> dict[str, Any]:
        return dict(self._client.describe_index(self._name, "vector"))

    def _stored(self) -> int:
        """Return about mode many rows there are, at once."""
        return int(self._client.get_collection_stats(self._name)["row_count"])

    def _build(self) -> None:
        self._client.create_index(self._name, self._kind(self._stored()))

    def _kind(self, rows: int) -> Any:
        index = self._client.prepare_index_params()
        if rows <= AUTO_EXACT:
            index.add_index("vector", index_type="FLAT", metric_type="IP")
        else:
            index.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params={"nlist": NLIST})
        return index

    def _batches(self, ids: Sequence[str], columns: Wanted) -> Iterator[Mapping[str, Sequence[ColumnValue]]]:
        fields = [milvus_key(name) for name in columns if name != "id"]
        for at in range(0, len(ids), _LOOKED_UP):
            some = ids[at : at + _LOOKED_UP]
            with self._told():
                found = {one["id"]: one for one in self._looked_up(some, ["id", *fields], "Session")}
            yield _values([found[one] for one in some if one in found], columns)

    def _page(self, text: str, after: str, level: str) -> list[dict[str, Any]]:
        """Read the first rows behind an id; the client's own iterator does not escape quotes."""
        parts = [part for part in (f"id > {json.dumps(after, ensure_ascii=False)}", text) if part]
        return list(
            self._client.query(
                self._name,
                filter=" and ".join(parts),
                output_fields=["id", "row"],
                limit=BATCH,
                reduce_stop_for_best="True",
                consistency_level=level,
            )
        )

    def _looked_up(self, ids: Sequence[str], fields: list[str], level: str) -> list[dict[str, Any]]:
        """Read rows by id, in any order; those that are not there are left out."""
        found: list[dict[str, Any]] = []
        for at in range(0, len(ids), _LOOKED_UP):
            found += self._client.query(
                self._name,
                filter=named(ids[at : at + _LOOKED_UP]),
                output_fields=fields,
                consistency_level="Session" if at else level,
            )
        return found

    def _wanted(self, columns: Sequence[str]) -> Wanted:
        kinds = self.columns if columns else {}
        return {name: kinds.get(name) for name in columns}

    def _filter(self, where: str | None) -> str:
        if where is None:
            return ""
        return milvus_text(parse_filter(where, {"id": "str", **self.columns}), self._patterns)

    def _count(self, text: str) -> int:
        (found,) = self._client.query(self._name, text, ["count(*)"], consistency_level="Strong")
        return int(found["count(*)"])

    def _described(self) -> dict[str, Any]:
        found = self._client.describe_collection(self._name)
        return {**found, "properties": dict(found.get("properties") or {})}

    def _make(self, dim: int | None, metadata: Mapping[str, Any] | None) -> None:
        if dim is None or dim < 1:
            raise ConfigError(f"{self.uri} has to be made: give dim, the width of the embeddings")
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=ID_BYTES)
        schema.add_field("row", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        properties = {_CARD: dump_metadata(metadata)}
        try:
            self._client.create_collection(
                self._name, schema=schema, index_params=self._kind(0), consistency_level="Strong", properties=properties
            )
        except MilvusException:
            if not self._client.has_collection(self._name):  # else another process made it, meanwhile
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what the server could not do."""
        try:
            yield
        except MilvusException as error:
            said = " ".join(str(error.message).split())[:300]
            raise DataError(f"{self.uri}: {said}; is the server there, and is it well?") from error


def _values(found: Sequence[Mapping[str, Any]], columns: Wanted) -> dict[str, list[ColumnValue]]:
    return {name: values_of(found, name, kind) for name, kind in columns.items()}
