"""Search images with an image: one model for composed and sketch-based retrieval.

Holds the version and the public names, imported when first used. Imports nothing heavy
itself.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, tuple[str, str]] = {
    "Benchmark": ("types", "Benchmark"),
    "Encoder": ("features.extractor", "Encoder"),
    "FeatureStore": ("features.store", "FeatureStore"),
    "Features": ("types", "Features"),
    "Gallery": ("gallery.gallery", "Gallery"),
    "GalleryItem": ("types", "GalleryItem"),
    "IGROTModel": ("models.model", "IGROTModel"),
    "Preprocess": ("types", "Preprocess"),
    "Protocol": ("types", "Protocol"),
    "Query": ("types", "Query"),
    "UnionError": ("errors", "UnionError"),
    "compose": ("cli.config", "compose"),
    "evaluate_benchmark": ("evaluation.evaluate", "evaluate"),
    "folder_benchmark": ("datasets.folder", "folder_benchmark"),
    "folder_training": ("datasets.folder", "folder_training"),
    "load": ("models.model", "load"),
    "load_benchmark": ("datasets.registry", "load_benchmark"),
    "load_reference_checkpoint": ("models.reference", "load_reference_checkpoint"),
    "load_training": ("datasets.registry", "load_training"),
    "image_batch": ("images.transforms", "image_batch"),
    "rank": ("evaluation.exact", "rank"),
    "shapes_cir": ("synthetic.shapes", "shapes_cir"),
    "shapes_sbir": ("synthetic.shapes", "shapes_sbir"),
    "shapes_training": ("synthetic.shapes", "shapes_training"),
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        room, inner = _PUBLIC[name]
        return getattr(import_module(f"union_igrot.{room}"), inner)
    raise AttributeError(f"module 'union_igrot' has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
