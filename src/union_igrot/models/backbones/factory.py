"""Backbones by name, for configurations and saved models.

Knows which file builds which name. Does not know a configuration's layout.
"""

from pathlib import Path

from union_igrot.errors import ConfigError
from union_igrot.models.backbones.base import Backbone
from union_igrot.storage.paths import expand_user

NAMES = ("tiny", "base", "large", "openclip_h", "blip", "siglip2")
"""Short names of backbones."""
ALLOWED = f"{', '.join(NAMES)}, open_clip:<architecture>/<tag> or hf:<repository>"


def is_backbone(name: str) -> bool:
    """Whether a name is one of a backbone, in its form at least; `tiny` means the embedded model, heads and all."""
    return name != "tiny" and (name in NAMES or name.startswith(("open_clip:", "hf:")))


def build_backbone(name: str, weights: str | Path | None = None) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: `tiny`, the embedded default; `base` (OpenAI's CLIP ViT-B/32), `large` (ViT-L/14),
            `openclip_h`, `open_clip:<architecture>/<tag>`; `blip`, `siglip2`, `hf:<repository>`.
        weights: A file or folder to load instead of the default weights, which are shipped
            (`tiny`) or downloaded on first use (all others).

    Raises:
        ConfigError: Where the name is not known.
        CheckpointError: Where the weights cannot be loaded.
    """
    # Only what is used is imported: OpenCLIP and transformers take seconds.
    path = None if weights is None else expand_user(weights)
    if name == "tiny":
        from union_igrot.models.backbones.tiny import TinyBackbone  # noqa: PLC0415

        return TinyBackbone(path)
    if name in ("base", "large", "openclip_h") or name.startswith("open_clip:"):
        from union_igrot.models.backbones.open_clip import load_open_clip  # noqa: PLC0415

        return load_open_clip(name, path)
    if name in ("blip", "siglip2") or name.startswith("hf:"):
        from union_igrot.models.backbones.hf import load_hf  # noqa: PLC0415

        return load_hf(name, path)
    raise ConfigError(f"backbone {name!r} does not exist; choose {ALLOWED}")
