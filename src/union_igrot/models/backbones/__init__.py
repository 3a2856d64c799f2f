"""Frozen vision-language models with one interface, `Backbone`."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.models.backbones.base import Backbone as Backbone

__getattr__, __dir__ = lazy_exports(__name__, __file__)
