"""One fixture for tests that every engine has to pass."""

import os
import uuid
from dataclasses import dataclass, field

import pytest

from union_igrot.index.base import VectorIndex
from union_igrot.index.open import open_index

SERVER = os.environ.get("UNION_MILVUS", "").rstrip("/")
ENGINES = [
    "memory",
    "lance",
    pytest.param(
        "milvus",
        marks=[
            pytest.mark.skipif(not SERVER, reason="no Milvus server: nox -s milvus starts one, or set UNION_MILVUS"),
            pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
        ],
    ),
]


@dataclass
class Place:
    """Where a test's index lies, whatever the engine."""

    kind: str
    uri: str
    opened: list[VectorIndex] = field(default_factory=list)

    def make(self, dim: int, card: dict | None = None) -> VectorIndex:
        self.opened.append(open_index(self.uri, dim=dim, card=card, create=True))
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


@pytest.fixture(params=ENGINES)
def place(request, tmp_path):
    found = place_of(request.param, tmp_path)
    yield found
    clear(found)
