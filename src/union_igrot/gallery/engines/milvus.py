"""An index on a Milvus server or cluster.

The collection has typed fields for id, position in the order and embedding; all other columns are in its dynamic field,
so that new columns do not change its schema. Milvus differs from the other engines:

- A write is sent in requests of a few megabytes, each of which is visible as a whole or not at all.
- The position in the order is the writer's clock in nanoseconds; rows of one position are ordered by id.
- The columns of a row take at most 64 KiB, and a search returns at most 16,384 rows.
- Up to `AUTO_EXACT` rows the server compares a query with all rows, also for `ann`. Above, `optimize` builds an
  inverted file once; nobody can search until it is built and loaded.
- The server merges its segments and drops removed rows by itself. `optimize` does not request it, since the result
  would have to be indexed again.
- Exact search requests a few more rows than needed and scores them here, so that order and ties are those of
  `exact_topk`. With an inverted file, it first waits seconds for the server to index the latest writes: until then,
  Milvus searches them approximately in any case.
- To see the latest writes, Milvus waits for its next tick, a fifth of a second. The first read after a write of this
  process requests that, and one read every five seconds: others may miss writes of other processes of that time.
"""

import base64
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, final
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from jaxtyping import Float32
from pymilvus import DataType, MilvusClient, MilvusException
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.ranking import exact_topk
from union_igrot.gallery.engines.base import (
    AUTO_EXACT,
    SCAN_BATCH,
    ColumnBatch,
    ColumnValue,
    IndexHits,
    Queries,
    Rows,
    VectorIndex,
    dump_metadata,
    required_dim,
)
from union_igrot.gallery.engines.factory import without_password
from union_igrot.gallery.engines.filters import ColumnKind, Comparison, Condition, Constant, like_parts

PORT: Final = 19530
MAX_ID_BYTES: Final = 65_535
MAX_ROW_BYTES: Final = 65_536  # limit of a row's columns as JSON
MAX_HITS: Final = 16_384  # limit of the rows of a search
REQUEST_BYTES: Final = 8 * 2**20  # size of a write request; servers accept 64 MiB
NLIST: Final = 1024  # partitions of the inverted file in each of Milvus' segments, of some 250,000 rows of width 512
PROBES: Final = 64  # partitions searched by `ann`
FILTERED_PROBES: Final = 256  # partitions searched by `ann` with a filter, whose hits are in more of them
SPARE: Final = 4  # the partitions searched hold at least this many times k rows

_METADATA: Final = "union.card"
_KIND: Final = "union.kind."
_IDS_PER_REQUEST: Final = 512
_EXTRA_CANDIDATES: Final = 16
_TIMEOUT_SECONDS: Final = 60.0
_FRESH_SECONDS: Final = 5.0
_UNINDEXED: Final = 1024  # rows below which Milvus does not index a segment, but searches it exactly
_RESPONSE_BYTES: Final = 32 * 2**20
_TOLERANCE: Final = 1e-5  # largest difference between the server's score and ours, relative to the largest score

ColumnKinds = Mapping[str, ColumnKind | None]  # columns to read and their kinds, None if unknown
FoundRows = tuple[list[dict[str, Any]], Tensor]  # rows found for a query, best first, and their scores

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each refused call with a traceback


@final
class MilvusIndex(VectorIndex):
    """Embeddings in a Milvus collection. See `open_index` for arguments and errors."""

    def __init__(self, uri: str, *, dim: int | None, metadata: Mapping[str, Any] | None, create: bool) -> None:
        address, self._name, user, password = parse_address(uri)
        self.uri = without_password(uri)
        self._last_position = 0
        self._fresh = -_FRESH_SECONDS
        with self._errors():
            self._client = MilvusClient(address, user=user, password=password, timeout=_TIMEOUT_SECONDS)
            self._full_like = parse_version(self._client.get_server_version()) >= (2, 4)
            if not self._client.has_collection(self._name):
                if not create:
                    raise ConfigError(f"there is no index {self.uri}; make one with union-index, or check the name")
                self._create(dim, metadata)
            described = self._describe()
            if _METADATA not in described["properties"]:
                raise ConfigError(
                    f"{self.uri} is a Milvus collection but not an index of union-igrot; choose another name"
                )
            if not self._client.list_indexes(self._name):  # a process was killed while it replaced them
                self._create_index()
            self._client.load_collection(self._name)
        self.metadata = json.loads(described["properties"][_METADATA])
        self.dim = next(int(field["params"]["dim"]) for field in described["fields"] if field["name"] == "vector")

    def __len__(self) -> int:
        with self._errors():
            return self._count("row >= 0")

    @property
    def columns(self) -> Mapping[str, ColumnKind]:
        """See `VectorIndex`."""
        with self._errors():
            properties = self._describe()["properties"]
        return {key.removeprefix(_KIND): kind for key, kind in sorted(properties.items()) if key.startswith(_KIND)}

    def _upsert(self, rows: Rows, new: Mapping[str, ColumnKind]) -> None:
        entities = list(to_entities(rows))
        if new:
            self._client.alter_collection_properties(self._name, {_KIND + name: kind for name, kind in new.items()})
        known = {one["id"]: one["row"] for one in self._find_ids(rows.ids, ["id", "row"], "Strong")}
        for entity in entities:
            self._last_position = max(time.time_ns(), self._last_position + 1)
            entity["row"] = known.get(entity["id"], self._last_position)
        self._fresh = -_FRESH_SECONDS
        for request in split_requests(entities, self.dim):
            self._client.upsert(self._name, request)

    def _delete(self, ids: Sequence[str]) -> int:
        existing = [one["id"] for one in self._find_ids(ids, ["id"], "Strong")]
        self._fresh = -_FRESH_SECONDS
        for at in range(0, len(existing), _IDS_PER_REQUEST):
            self._client.delete(self._name, filter=ids_filter(existing[at : at + _IDS_PER_REQUEST]))
        return len(existing)

    def _fetch(self, ids: Sequence[str]) -> Rows:
        columns = self.columns
        found = self._find_ids(ids, ["id", "vector", *map(dynamic_key, columns)], self._consistency())
        vectors = stack_vectors([one["vector"] for one in found], self.dim)
        return Rows([one["id"] for one in found], vectors, _read_columns(found, columns))

    def _scan(self, columns: Sequence[str], condition: Condition | None) -> Iterator[ColumnBatch]:
        text = self._filter_text(condition)
        found: list[tuple[int, str]] = []
        level, after = self._consistency(), ""
        while page := self._page(text, after, level):
            found += [(one["row"], one["id"]) for one in page]
            level, after = "Session", max(one["id"] for one in page)
        return self._batches([name for _, name in sorted(found)], self._with_kinds(columns))

    def _batches(self, ids: Sequence[str], columns: ColumnKinds) -> Iterator[ColumnBatch]:
        fields = [dynamic_key(name) for name in columns if name != "id"]
        for at in range(0, len(ids), _IDS_PER_REQUEST):
            some = ids[at : at + _IDS_PER_REQUEST]
            found = {one["id"]: one for one in self._find_ids(some, ["id", *fields], "Session")}
            yield _read_columns([found[name] for name in some if name in found], columns)

    def _page(self, text: str, after: str, level: str) -> list[dict[str, Any]]:
        """Read the first rows behind an id; the client's own iterator does not escape quotes."""
        parts = [part for part in (f"id > {_constant(after)}", text) if part]
        return list(
            self._client.query(
                self._name,
                filter=" and ".join(parts),
                output_fields=["id", "row"],
                limit=SCAN_BATCH,
                reduce_stop_for_best="True",
                consistency_level=level,
            )
        )

    def auto_mode(self) -> Literal["exact", "ann"]:
        """See `VectorIndex`."""
        with self._errors():
            flat = self._index()["index_type"] == "FLAT"
            return "exact" if flat and self._stored() <= AUTO_EXACT else "ann"

    def _exact(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:
        if self._index()["index_type"] != "FLAT":
            self._wait_for_index()
        return self._in_steps(self._exact_step, queries, k, condition, columns)

    def _ann(self, queries: Queries, k: int, condition: Condition | None, columns: Sequence[str]) -> list[IndexHits]:
        return self._in_steps(self._ann_step, queries, k, condition, columns)

    def _in_steps(
        self,
        search: Callable[[Tensor, int, str, list[str]], Iterator[FoundRows]],
        queries: Tensor,
        k: int,
        condition: Condition | None,
        columns: Sequence[str],
    ) -> list[IndexHits]:
        """Search for so many queries at once that a response stays below its limit."""
        text, kinds = self._filter_text(condition), self._with_kinds(columns)
        if k > MAX_HITS and self._count(text or "row >= 0") > MAX_HITS:
            raise ConfigError(f"invalid value for k: {k} (Milvus returns at most {MAX_HITS:,} rows); use a filter")
        k, fields = min(k, MAX_HITS), ["row", *(dynamic_key(name) for name in columns if name != "id")]
        step = max(1, _RESPONSE_BYTES // ((k + _EXTRA_CANDIDATES) * (4 * self.dim + 1024)))
        found = [hits for some in queries.split(step) for hits in search(some, k, text, fields)]
        return [IndexHits([one["id"] for one in rows], x, _read_columns(rows, kinds)) for rows, x in found]

    def _exact_step(
        self, queries: Tensor, k: int, text: str, fields: list[str], requested: int = 0
    ) -> Iterator[FoundRows]:
        """Request enough candidates that no other row can be among the best, and score them here."""
        requested = min(requested or k + _EXTRA_CANDIDATES, MAX_HITS)
        results = self._request(queries, requested, text, ["vector", *fields], NLIST)
        for query, found in zip(queries, results, strict=True):
            found.sort(key=lambda one: (one["row"], one["id"]))
            vectors = stack_vectors([one["vector"] for one in found], self.dim)
            if not found:
                yield [], torch.empty(0)
                continue
            best = exact_topk(query[None], vectors, min(k, len(found)))
            tolerance = _TOLERANCE * float(vectors.norm(dim=1).max() * query.norm())
            last = min(one["distance"] for one in found)
            if len(found) == requested < MAX_HITS and last >= float(best.scores[0, -1]) - tolerance:
                yield from self._exact_step(query[None], k, text, fields, 4 * requested)
            else:
                yield [found[i] for i in best.positions[0].tolist()], best.scores[0]

    def _ann_step(self, queries: Tensor, k: int, text: str, fields: list[str]) -> Iterator[FoundRows]:
        probes = FILTERED_PROBES if text else PROBES
        if SPARE * k * NLIST > AUTO_EXACT * probes:  # a smaller collection has no inverted file
            probes = min(NLIST, max(probes, -(-SPARE * k * NLIST // max(1, self._stored()))))
        for found in self._request(queries, k, text, fields, probes):
            found.sort(key=lambda one: (-one["distance"], one["row"], one["id"]))
            yield found, torch.tensor([one["distance"] for one in found], dtype=torch.float32)

    def _request(
        self, queries: Tensor, limit: int, text: str, fields: list[str], probes: int
    ) -> list[list[dict[str, Any]]]:
        results = self._client.search(
            self._name,
            data=list(queries.numpy()),
            limit=limit,
            filter=text,
            output_fields=fields,
            search_params={"metric_type": "IP", "params": {"nprobe": probes}},
            consistency_level=self._consistency(),
        )
        return [[{"id": hit["id"], "distance": hit["distance"], **hit["entity"]} for hit in hits] for hits in results]

    def optimize(self) -> None:
        """See `VectorIndex`."""
        with self._errors():
            self._client.flush(self._name)
            if self._stored() > AUTO_EXACT and self._index()["index_type"] == "FLAT":
                self._client.release_collection(self._name)
                self._client.drop_index(self._name, "vector")
                self._create_index()
                self._client.load_collection(self._name)
            if self._index()["index_type"] != "FLAT":
                self._wait_for_index()

    def close(self) -> None:
        """See `VectorIndex`."""
        self._client.close()

    def _consistency(self) -> str:
        """Return the consistency level of the next read; see the module's docstring."""
        now = time.monotonic()
        if now - self._fresh < _FRESH_SECONDS:
            return "Session"
        self._fresh = now
        return "Strong"

    def _wait_for_index(self) -> None:
        """Have the server index all writes in the inverted file; a flat index never reports that it is loaded."""
        end = time.monotonic() + 10 * _TIMEOUT_SECONDS
        self._client.flush(self._name)
        while time.monotonic() < end:
            loaded = {one.segment_id: one for one in self._client.list_loaded_segments(self._name)}
            written = [one for one in self._client.list_persistent_segments(self._name) if one.num_rows]
            if all(one.segment_id in loaded for one in written) and all(
                one.index_name or one.num_rows < _UNINDEXED for one in loaded.values()
            ):
                return
            time.sleep(0.2)
        raise DataError(f"{self.uri}: the server is still building its index; try again later")

    def _index(self) -> dict[str, Any]:
        return dict(self._client.describe_index(self._name, "vector"))

    def _stored(self) -> int:
        """Return about how many rows there are, without waiting."""
        return int(self._client.get_collection_stats(self._name)["row_count"])

    def _create_index(self) -> None:
        self._client.create_index(self._name, self._index_params(self._stored()))

    def _index_params(self, rows: int) -> Any:
        index = self._client.prepare_index_params()
        if rows <= AUTO_EXACT:
            index.add_index("vector", index_type="FLAT", metric_type="IP")
        else:
            index.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params={"nlist": NLIST})
        return index

    def _find_ids(self, ids: Sequence[str], fields: list[str], level: str) -> list[dict[str, Any]]:
        """Read the rows that exist, in any order."""
        found: list[dict[str, Any]] = []
        for at in range(0, len(ids), _IDS_PER_REQUEST):
            found += self._client.query(
                self._name,
                filter=ids_filter(ids[at : at + _IDS_PER_REQUEST]),
                output_fields=fields,
                consistency_level="Session" if at else level,
            )
        return found

    def _with_kinds(self, columns: Sequence[str]) -> ColumnKinds:
        kinds = self.columns if columns else {}
        return {name: kinds.get(name) for name in columns}

    def _filter_text(self, condition: Condition | None) -> str:
        return "" if condition is None else filter_text(condition, self._full_like)

    def _count(self, text: str) -> int:
        (found,) = self._client.query(self._name, text, ["count(*)"], consistency_level="Strong")
        return int(found["count(*)"])

    def _describe(self) -> dict[str, Any]:
        described = self._client.describe_collection(self._name)
        return {**described, "properties": dict(described.get("properties") or {})}

    def _create(self, dim: int | None, metadata: Mapping[str, Any] | None) -> None:
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        schema.add_field("row", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=required_dim(self.uri, dim))
        try:
            self._client.create_collection(
                self._name,
                schema=schema,
                index_params=self._index_params(0),
                consistency_level="Strong",
                properties={_METADATA: dump_metadata(metadata)},
            )
        except MilvusException:
            if not self._client.has_collection(self._name):  # else another process created it meanwhile
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the server into a DataError of one line."""
        try:
            yield
        except MilvusException as error:
            text = " ".join(str(error.message).split())[:300]
            raise DataError(f"{self.uri}: {text}; check that the server is reachable and healthy") from error


def filter_text(condition: Condition, full_like: bool = True) -> str:
    """Write a filter in Milvus' language, for columns in the dynamic field.

    A row without a value has no key there, and the result of a comparison with it differs by operator: so each
    comparison that would be true for it is joined with one that is not.
    Without `full_like` (Milvus before 2.4), a `like` of anything but a prefix is a ConfigError.
    """
    if not isinstance(condition, Comparison):
        joint = f" {condition.op} "
        return "(" + joint.join(filter_text(part, full_like) for part in condition.parts) + ")"
    name = "id" if condition.column == "id" else f'$meta["{dynamic_key(condition.column)}"]'
    op = condition.op
    if op in ("is null", "is not null"):
        exists = _exists_text(condition, name)
        return exists if op == "is not null" else f"(not {exists})"
    if op in ("in", "not in"):
        text = f"({name} in [{', '.join(_constant(value) for value in condition.values)}])"
    elif op in ("like", "not like"):
        text = _like_text(name, str(condition.values[0]), full_like)
    else:
        text = f"({name} {'==' if op == '=' else op} {_constant(condition.values[0])})"
    if op == "!=":
        return f"({_exists_text(condition, name)} and {text})"
    return f"({_exists_text(condition, name)} and (not {text}))" if op.startswith("not ") else text


def _exists_text(test: Comparison, name: str) -> str:
    """Write a test for rows with a value; Milvus 2.3 does not join `exists` with other tests."""
    if name == "id":
        return "(row >= 0)"
    if test.kind in ("int", "float"):
        return f"({name} >= 0 or {name} < 0)"
    return f"({name} in [true, false])" if test.kind == "bool" else f'({name} >= "")'


def _like_text(name: str, text: str, full_like: bool) -> str:
    parts = like_parts(text)
    if not parts or (len(parts) == 1 and parts[0]):
        return f"({name} == {_constant(parts[0] or '' if parts else '')})"
    if len(parts) == 2 and parts[0] and parts[1] is None:
        return _prefix_text(name, parts[0])
    if all(part is None for part in parts):
        return f'({name} >= "")'
    if not full_like:
        raise ConfigError(
            f"like {text!r} needs Milvus 2.4 or later, this server only compares prefixes: like 'beginning%'"
        )
    return f"({name} like {_constant(text)})"


def _prefix_text(name: str, prefix: str) -> str:
    """Compare with the next string behind the prefix: exact on every version, and served by a sorted index."""
    least = f"{name} >= {_constant(prefix)}"
    stem = prefix.rstrip(chr(0x10FFFF))
    if not stem:
        return f"({least})"
    following = 0xE000 if ord(stem[-1]) == 0xD7FF else ord(stem[-1]) + 1  # surrogates are not characters
    return f"({least} and {name} < {_constant(stem[:-1] + chr(following))})"


def _constant(value: Constant) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value).lower()


def ids_filter(ids: Sequence[str]) -> str:
    """Write a filter for rows by id; the client's own does not escape quotes."""
    return "id in " + json.dumps(list(ids), ensure_ascii=False)


def dynamic_key(column: str) -> str:
    """Return the key of a column in the dynamic field, which is never a word of Milvus."""
    return f"c_{column}" if re.fullmatch("[A-Za-z0-9_]+", column) else f"x_{column.encode().hex()}"


def parse_address(uri: str) -> tuple[str, str, str, str]:
    """Parse a URI into the server's address, the collection, user and password."""
    parts = urlsplit(uri)
    name = parts.path.removeprefix("/")
    try:
        port = parts.port or PORT
    except ValueError:
        port = 0
    if not parts.hostname or not port or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(
            "invalid Milvus URI (expected milvus://[user:password@]host[:19530]/collection, or milvus+tls:// with "
            "encryption; the collection of letters, digits and '_')"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    protocol = "https" if parts.scheme == "milvus+tls" else "http"
    return f"{protocol}://{host}:{port}", name, unquote(parts.username or ""), unquote(parts.password or "")


def parse_version(text: str) -> tuple[int, ...]:
    """Parse a server's version; an unreadable one is earlier than all."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def to_entities(rows: Rows) -> Iterator[dict[str, Any]]:
    """Convert rows for Milvus: None has no key, bytes are text. A row that exceeds the limits is a DataError."""
    for i, name in enumerate(rows.ids):
        if len(name.encode()) > MAX_ID_BYTES:
            raise DataError(f"the id {name[:40]!r}... is too long for Milvus (at most {MAX_ID_BYTES:,} bytes)")
        values = {dynamic_key(key): column[i] for key, column in rows.columns.items() if column[i] is not None}
        encoded = {
            key: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for key, value in values.items()
        }
        if (size := len(json.dumps(encoded, ensure_ascii=False).encode())) >= MAX_ROW_BYTES:
            raise DataError(
                f"the columns of {name!r} take {size:,} bytes, too many for Milvus (limit {MAX_ROW_BYTES:,} per row); "
                "use smaller thumbnails"
            )
        yield {"id": name, "vector": rows.vectors[i].numpy(), **encoded}


def split_requests(entities: Sequence[dict[str, Any]], dim: int) -> Iterator[list[dict[str, Any]]]:
    """Split rows into requests of about `REQUEST_BYTES`."""
    request: list[dict[str, Any]] = []
    size = 0
    for entity in entities:
        takes = 4 * dim + 1024 + sum(len(value) for value in entity.values() if isinstance(value, str))
        if request and size + takes > REQUEST_BYTES:
            yield request
            request, size = [], 0
        request.append(entity)
        size += takes
    if request:
        yield request


def stack_vectors(found: Sequence[Sequence[float]], dim: int) -> Float32[Tensor, "rows dim"]:
    """Stack embeddings as Milvus returns them."""
    return torch.from_numpy(np.asarray(found, dtype=np.float32).reshape(-1, dim))


def _read_columns(found: Sequence[Mapping[str, Any]], columns: ColumnKinds) -> dict[str, list[ColumnValue]]:
    def read(column: str, kind: ColumnKind | None) -> list[ColumnValue]:
        values = [one.get("id" if column == "id" else dynamic_key(column)) for one in found]
        if kind == "bytes":
            return [None if value is None else base64.b64decode(value) for value in values]
        return [float(value) if kind == "float" and value is not None else value for value in values]

    return {name: read(name, kind) for name, kind in columns.items()}
