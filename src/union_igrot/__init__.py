"""Search images with an image: one model for composed and sketch-based retrieval.

Holds the version and the public names, imported when first used. Imports nothing heavy
itself.
"""

from union_igrot._lazy import lazy_exports

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Benchmark": "types",
        "Encoder": "features.extractor",
        "FeatureStore": "features.store",
        "Features": "types",
        "Gallery": "gallery.gallery",
        "GalleryItem": "types",
        "IGROTModel": "models.model",
        "Preprocess": "types",
        "Protocol": "types",
        "Query": "types",
        "UnionError": "errors",
        "compose": "cli.config",
        "evaluate_benchmark": "evaluation.evaluate:evaluate",
        "folder_benchmark": "datasets.folder",
        "folder_training": "datasets.folder",
        "image_batch": "images.transforms",
        "load": "models.model",
        "load_benchmark": "datasets.loading",
        "load_reference_checkpoint": "models.reference",
        "load_training": "datasets.loading",
        "rank": "evaluation.exact",
        "shapes_cir": "synthetic.shapes",
        "shapes_sbir": "synthetic.shapes",
        "shapes_training": "synthetic.shapes",
    },
)
