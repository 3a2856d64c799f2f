"""Where the index of a test lies, for each engine: in memory, a folder, a bucket of an object store, a server.

The last two where a nox session has started one (`nox -s objectstore`, `nox -s milvus`). Does not know what is tested.
"""

import os
import uuid
from dataclasses import dataclass, field

import pytest

import toy_engine  # noqa: F401 - registers its engine
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.factory import open_index

SERVER = os.environ.get("UNION_MILVUS", "").rstrip("/")
BUCKET = os.environ.get("UNION_BUCKET", "").rstrip("/")
ENGINES = [
    "memory",
    "lance",
    "toy",
    pytest.param(
        "milvus",
        marks=[
            pytest.mark.skipif(not SERVER, reason="no Milvus server: nox -s milvus starts one, or set UNION_MILVUS"),
            pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
        ],
    ),
    pytest.param(
        "bucket",
        marks=pytest.mark.skipif(
            not BUCKET, reason="no object store: nox -s objectstore starts one, or set UNION_BUCKET"
        ),
    ),
]
FAR = [engine for engine in ENGINES if not isinstance(engine, str)]
"""Those that another program serves."""


@dataclass
class Place:
    """Where a test's index lies, whatever the engine."""

    kind: str
    uri: str
    opened: list[VectorIndex] = field(default_factory=list)

    def make(self, dim: int, metadata: dict | None = None) -> VectorIndex:
        self.opened.append(open_index(self.uri, dim=dim, metadata=metadata, create=True))
        return self.opened[-1]

    def again(self) -> VectorIndex:
        """What another program would see now."""
        if self.kind == "memory":
            return self.opened[-1]
        self.opened.append(open_index(self.uri))
        return self.opened[-1]


def place_of(kind: str, folder: object) -> Place:
    if kind == "lance":
        pytest.importorskip("lance", reason='the extra "gallery" is not installed')
        return Place(kind, f"{folder}/photos.lance")
    if kind == "toy":
        return Place(kind, f"toy:{uuid.uuid4().hex}")
    if kind == "bucket":
        pytest.importorskip("lance", reason='the extra "gallery" is not installed')
        return Place(kind, f"{BUCKET}/{uuid.uuid4().hex}/photos.lance")
    if kind == "milvus":
        pytest.importorskip("pymilvus", reason='the extra "milvus" is not installed')
        return Place(kind, f"{SERVER}/test_{uuid.uuid4().hex}")
    return Place(kind, "memory:")


def clear(place: Place) -> None:
    for index in place.opened:
        index.close()
    if place.kind == "milvus" and place.opened:
        with place.again() as index:
            index._client.drop_collection(index._name)
