"""Query heads, target heads and the vision projector."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.models.heads.query import QueryHead as QueryHead, VisionProjector as VisionProjector
    from union_igrot.models.heads.target import TargetHead as TargetHead

__getattr__, __dir__ = lazy_exports(__name__, __file__)
