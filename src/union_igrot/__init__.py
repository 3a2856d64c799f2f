"""Search images with an image: one model for composed and sketch-based retrieval.

Holds the version and the public names, imported when first used. Imports nothing
heavy itself.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "Benchmark": "union_igrot.types",
    "Features": "union_igrot.types",
    "GalleryItem": "union_igrot.types",
    "Preprocess": "union_igrot.types",
    "Protocol": "union_igrot.types",
    "Query": "union_igrot.types",
    "UnionError": "union_igrot.errors",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'union_igrot' has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
