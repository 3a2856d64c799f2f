"""Engines that hold the index of a gallery, behind the interface `VectorIndex`."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.gallery.engines.base import (
        IndexHits as IndexHits,
        Rows as Rows,
        VectorIndex as VectorIndex,
        topk_of_rows as topk_of_rows,
    )
    from union_igrot.gallery.engines.factory import open_index as open_index, register_engine as register_engine
    from union_igrot.gallery.engines.filters import matching as matching, parse_filter as parse_filter

__getattr__, __dir__ = lazy_exports(__name__, __file__)
