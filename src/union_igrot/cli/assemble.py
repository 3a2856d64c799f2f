"""From a checked configuration to built parts: backbone, model, extractor.

Fills numbers into constructors and nothing else. Does not know training or evaluation.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from union_igrot.features.extractor import FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.devices import TrainerConfig
from union_igrot.models.factory import build_backbone, build_projector, build_query_head, build_target_head
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import chosen_limit, default_root
from union_igrot.storage.paths import expand_user
from union_igrot.training.processes import Processes


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain values."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return values


def new_model(config: DictConfig, card: dict[str, Any]) -> IGROTModel:
    """Build a model with heads at their start; torch's seed decides their weights."""
    backbone = build_backbone(config.model.name, config.model.weights)
    sizes, width = plain(config.model), backbone.dim
    return IGROTModel(
        backbone,
        build_query_head(width=width, sizes=sizes, **plain(config.fusion)),
        build_target_head(width=width, sizes=sizes, **plain(config.target)),
        card,
        build_projector(config.model.projector, width),
    )


def machine(config: DictConfig, processes: Processes) -> TrainerConfig:
    """Say where a training runs: as configured, or over the processes that were started for it."""
    where = config.strategy
    devices, nodes = where.devices, where.nodes
    if processes.world > 1:
        devices, nodes = processes.per_machine, processes.world // processes.per_machine
    return TrainerConfig(where.accelerator, devices, nodes, where.name, config.precision.trainer)


def extractor(config: DictConfig, backbone: Backbone, *, shown: bool = True) -> FeatureExtractor:
    """Open the feature store of a backbone; progress is shown where the configuration and `shown` say so."""
    root = default_root() if config.cache_dir is None else expand_user(config.cache_dir)
    options = config.features
    limit = chosen_limit(config.cache_limit)
    store = FeatureStore.for_backbone(backbone, root, dtype=options.dtype, precision=options.precision, limit=limit)
    return FeatureExtractor(
        backbone,
        store,
        batch_size=options.batch_size,
        workers=options.workers,
        precision=options.precision,
        progress=config.progress and shown,
    )
