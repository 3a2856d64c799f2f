"""The model, its backbones and heads, saved models, and the checkpoints of the reference."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.models.backbones.base import Backbone as Backbone
    from union_igrot.models.checkpoint import resolve_checkpoint as resolve_checkpoint
    from union_igrot.models.factory import (
        build_backbone as build_backbone,
        build_query_head as build_query_head,
        build_target_head as build_target_head,
    )
    from union_igrot.models.heads.query import QueryHead as QueryHead
    from union_igrot.models.heads.target import TargetHead as TargetHead
    from union_igrot.models.model import IGROTModel as IGROTModel, baseline as baseline, load as load
    from union_igrot.models.reference import load_reference_checkpoint as load_reference_checkpoint
    from union_igrot.models.registry import (
        register_backbone as register_backbone,
        register_query_head as register_query_head,
        register_target_head as register_target_head,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
