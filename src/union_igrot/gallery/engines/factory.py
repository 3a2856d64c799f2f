"""Open an index by its URI.

Knows which engine a URI means and what has to be installed for it. Does not know how the
engines work, and imports none but the one that is meant.
"""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, Final

from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.base import VectorIndex

FORMS: Final = (
    "photos.lance (a folder), s3://bucket/photos.lance (also gs://, az://), milvus://host:19530/collection, or memory:"
)
"""What an index can be called."""

_STORES: Final = ("s3", "gs", "az")


def open_index(
    uri: str, *, dim: int | None = None, metadata: Mapping[str, Any] | None = None, create: bool = False
) -> VectorIndex:
    """Open an index, or make it.

    Args:
        uri: Where it lies; see `FORMS`.
        dim: Width of the embeddings; needed where it is made, compared where it is there.
        metadata: What to keep with it where it is made: JSON values. One that is there keeps its own.
        create: Whether to make it where there is none.

    Raises:
        ConfigError: Where the URI has no known form, what the engine needs is not installed,
            there is no index and none is to be made, or its width is another.
        DataError: Where it cannot be read, made or reached.
    """
    scheme = found.group(1).lower() if (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)) else ""
    if uri == "memory:":
        from union_igrot.gallery.engines.memory import MemoryIndex  # noqa: PLC0415 - engines are imported when they are meant

        if not create:
            raise ConfigError("memory: holds nothing that could be opened; make one, with create=True")
        return MemoryIndex(_given(uri, dim), metadata)
    shown = without_password(uri)
    if scheme in ("milvus", "milvus+tls"):
        _installed("pymilvus", "milvus", shown)
        from union_igrot.gallery.engines.milvus import MilvusIndex  # noqa: PLC0415

        opened: VectorIndex = MilvusIndex(uri, dim=dim, metadata=metadata, create=create)
    elif scheme in ("", *_STORES) and uri.rstrip("/").endswith(".lance"):
        _installed("lance", "gallery", uri)
        from union_igrot.gallery.engines.lance import LanceIndex  # noqa: PLC0415

        opened = LanceIndex(uri, dim=dim, metadata=metadata, create=create)
    else:
        raise ConfigError(f"{shown!r} is not the name of an index; give {FORMS}")
    if dim is not None and opened.dim != dim:
        opened.close()
        raise ConfigError(
            f"{shown} holds embeddings of width {opened.dim}, not {dim}; open it with the model it was made with, "
            "or make another index"
        )
    return opened


def without_password(uri: str) -> str:
    """Return a URI as it may be shown: without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _given(uri: str, dim: int | None) -> int:
    if dim is None:
        raise ConfigError(f"{uri} has to be made: give dim, the width of the embeddings")
    return dim


def _installed(module: str, extra: str, uri: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f'{uri} needs a package that is not installed; pip install "union-igrot[{extra}]"')
