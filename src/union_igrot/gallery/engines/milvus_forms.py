"""Addresses, rows and filters in the form in which Milvus takes and gives them.

Knows Milvus' limits. Asks no server.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import numpy as np
from jaxtyping import Float32

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.base import ColumnValue, Rows
from union_igrot.gallery.engines.filters import ColumnKind, milvus_key

PORT: Final = 19530
ID_BYTES: Final = 65_535
"""The longest id."""
ROW_BYTES: Final = 65_536
"""What a row's columns take at most, as JSON."""
ASKED_BYTES: Final = 8 * 2**20
"""Size of a request; servers take 64 MiB."""


def address_of(uri: str) -> tuple[str, str, str, str]:
    """Take a URI apart.

    Returns:
        The server's address, the collection, user and password.

    Raises:
        ConfigError: Where it has another form.
    """
    parts = urlsplit(uri)
    name = parts.path.removeprefix("/")
    try:
        port = parts.port or PORT
    except ValueError:
        port = 0
    if not parts.hostname or not port or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(
            "a Milvus index is called milvus://[user:password@]host[:19530]/collection (milvus+tls:// with "
            "encryption), the collection of letters, digits and '_'"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    web = "https" if parts.scheme == "milvus+tls" else "http"
    return f"{web}://{host}:{port}", name, unquote(parts.username or ""), unquote(parts.password or "")


def version_of(text: str) -> tuple[int, ...]:
    """Read a server's version; one that cannot be read is earlier than all."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def named(ids: Sequence[str]) -> str:
    """Write a filter for rows by id; the client's own does not escape quotes."""
    return "id in " + json.dumps(list(ids), ensure_ascii=False)


def entities_of(rows: Rows) -> Iterator[dict[str, Any]]:
    """Return rows as Milvus takes them: what is None has no key, bytes are text.

    Raises:
        DataError: Where a row is larger than Milvus takes.
    """
    for i, one in enumerate(rows.ids):
        if len(one.encode()) > ID_BYTES:
            raise DataError(f"the id {one[:40]!r}... takes more than {ID_BYTES:,} bytes, and Milvus no more")
        given = {milvus_key(name): values[i] for name, values in rows.columns.items() if values[i] is not None}
        kept = {
            key: base64.b64encode(value).decode() if isinstance(value, bytes) else value for key, value in given.items()
        }
        if (size := len(json.dumps(kept, ensure_ascii=False).encode())) >= ROW_BYTES:
            raise DataError(
                f"the columns of {one!r} take {size:,} bytes, and Milvus keeps {ROW_BYTES:,} a row; "
                "make thumbnails smaller"
            )
        yield {"id": one, "vector": rows.vectors[i].numpy(), **kept}


def values_of(found: Sequence[Mapping[str, Any]], column: str, kind: ColumnKind | None) -> list[ColumnValue]:
    """Take a column from rows as Milvus gave them."""
    kept = [one.get("id" if column == "id" else milvus_key(column)) for one in found]
    if kind == "bytes":
        return [None if value is None else base64.b64decode(value) for value in kept]
    return [float(value) if kind == "float" and value is not None else value for value in kept]


def requests_of(entities: Sequence[dict[str, Any]], dim: int) -> Iterator[list[dict[str, Any]]]:
    """Cut rows into requests that a server takes."""
    request: list[dict[str, Any]] = []
    size = 0
    for entity in entities:
        takes = 4 * dim + 1024 + sum(len(value) for value in entity.values() if isinstance(value, str))
        if request and size + takes > ASKED_BYTES:
            yield request
            request, size = [], 0
        request.append(entity)
        size += takes
    if request:
        yield request


def vectors_of(found: Sequence[Sequence[float]], dim: int) -> Float32[np.ndarray, "rows dim"]:
    """Bring embeddings, as Milvus gave them, into one array."""
    return np.asarray(found, dtype=np.float32).reshape(-1, dim)
