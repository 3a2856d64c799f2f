"""Search images with an image: one model for composed and sketch-based retrieval.

Holds the version and the public names, imported when first used. Imports nothing heavy
itself.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, tuple[str, str]] = {
    "Benchmark": ("types", "Benchmark"),
    "Encoder": ("encode", "Encoder"),
    "FeatureStore": ("store.features", "FeatureStore"),
    "Features": ("types", "Features"),
    "Gallery": ("gallery.gallery", "Gallery"),
    "GalleryItem": ("types", "GalleryItem"),
    "IGROTModel": ("model", "IGROTModel"),
    "Preprocess": ("types", "Preprocess"),
    "Protocol": ("types", "Protocol"),
    "Query": ("types", "Query"),
    "UnionError": ("errors", "UnionError"),
    "compose": ("config", "compose"),
    "evaluate_benchmark": ("evaluate", "evaluate"),
    "folder_benchmark": ("data.folder", "folder_benchmark"),
    "folder_training": ("data.folder", "folder_training"),
    "load": ("model", "load_model"),
    "load_benchmark": ("data.registry", "load_benchmark"),
    "load_reference_checkpoint": ("reference", "load_reference_checkpoint"),
    "load_training": ("data.registry", "load_training"),
    "picture_batch": ("data.transforms", "picture_batch"),
    "rank": ("index.exact", "exact_topk"),
    "shapes_cir": ("data.shapes", "shapes_cir"),
    "shapes_sbir": ("data.shapes", "shapes_sbir"),
    "shapes_training": ("data.shapes", "shapes_training"),
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        room, inner = _PUBLIC[name]
        return getattr(import_module(f"union_igrot.{room}"), inner)
    raise AttributeError(f"module 'union_igrot' has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
