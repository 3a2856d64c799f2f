"""Indexes for tests of every engine: in memory, in a folder, in a bucket of an object store, on a server.

The last two run if `nox -s objectstore` or `nox -s milvus` has started one.
"""

import os
import uuid
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn.functional import normalize

import toy_engine  # noqa: F401 - registers its engine
from union_igrot.gallery.engines.base import Rows, VectorIndex
from union_igrot.gallery.engines.factory import open_index

SERVER = os.environ.get("UNION_MILVUS", "").rstrip("/")
BUCKET = os.environ.get("UNION_BUCKET", "").rstrip("/")
MILVUS = pytest.param(
    "milvus",
    marks=[
        pytest.mark.skipif(not SERVER, reason="no Milvus server: nox -s milvus starts one, or set UNION_MILVUS"),
        pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    ],
)
REMOTE = [
    MILVUS,
    pytest.param(
        "bucket",
        marks=pytest.mark.skipif(
            not BUCKET, reason="no object store: nox -s objectstore starts one, or set UNION_BUCKET"
        ),
    ),
]
ENGINES = ["memory", "lance", "toy", *REMOTE]


@dataclass
class IndexLocation:
    """Where the index of a test is, and the handles that were opened on it."""

    engine: str
    uri: str
    opened: list[VectorIndex] = field(default_factory=list)

    def create(self, dim: int, metadata: dict | None = None) -> VectorIndex:
        self.opened.append(open_index(self.uri, dim=dim, metadata=metadata, create=True))
        return self.opened[-1]

    def reopen(self) -> VectorIndex:
        """Open the index as another process would; one in memory cannot be opened twice."""
        if self.engine != "memory":
            self.opened.append(open_index(self.uri))
        return self.opened[-1]

    def remove(self) -> None:
        for index in self.opened:
            index.close()
        if self.engine == "milvus" and self.opened:
            with self.reopen() as index:
                index._client.drop_collection(index._name)


def new_location(engine: str, folder: object) -> IndexLocation:
    package = {"lance": "lance", "bucket": "lance", "milvus": "pymilvus"}.get(engine)
    if package is not None:
        pytest.importorskip(package, reason=f"the extra of {engine} is not installed")
    name = uuid.uuid4().hex
    uris = {
        "memory": "memory:",
        "toy": f"toy:{name}",
        "lance": f"{folder}/photos.lance",
        "bucket": f"{BUCKET}/{name}/photos.lance",
        "milvus": f"{SERVER}/test_{name}",
    }
    return IndexLocation(engine, uris[engine])


def random_rows(ids, dim=4, seed=0, **columns) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(list(ids), normalize(torch.randn(len(ids), dim, generator=generator), dim=-1), columns)


def read_column(index: VectorIndex, name: str, where: str | None = None) -> list:
    return [value for batch in index.scan([name], where) for value in batch[name]]
