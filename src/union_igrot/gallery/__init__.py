"""Galleries of your own images: indexed with a model, and searched with images, sketches and text."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.gallery.engines import open_index as open_index, register_engine as register_engine
    from union_igrot.gallery.gallery import Gallery as Gallery
    from union_igrot.gallery.ingest.report import IngestOptions as IngestOptions, IngestReport as IngestReport
    from union_igrot.gallery.results import Hit as Hit, SearchResult as SearchResult

__getattr__, __dir__ = lazy_exports(__name__, __file__)
