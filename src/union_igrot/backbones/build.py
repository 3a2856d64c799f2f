"""Backbones by name, for configurations and saved models.

Knows which file builds which name. Does not know a configuration's layout.
"""

from pathlib import Path

from union_igrot.backbones.base import Backbone
from union_igrot.errors import ConfigError

ALLOWED = "tiny"


def build_backbone(name: str, weights: str | Path | None = None) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: `tiny`, the embedded default.
        weights: A file to load instead of the default weights.

    Raises:
        ConfigError: Where the name is not known.
        CheckpointError: Where the weights cannot be loaded.
    """
    if name == "tiny":
        from union_igrot.backbones.tiny import TinyBackbone  # noqa: PLC0415 - only what is used is imported

        return TinyBackbone(None if weights is None else Path(weights))
    raise ConfigError(f"backbone {name!r} does not exist; choose {ALLOWED}")
