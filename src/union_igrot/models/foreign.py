"""Models that are not available here: of their embeddings only a name and the width are known."""

import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn, final

import torch
from torch import Tensor, nn

from union_igrot.errors import ConfigError
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.model import IGROTModel, baseline
from union_igrot.types import Preprocess

FOREIGN: Final = "foreign:"
"""Prefix of their checkpoints, `foreign:NAME/WIDTH`."""


@final
class ForeignBackbone(Backbone):
    """Stands for such a model; it cannot embed anything."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.name, self.dim, self.preprocess = name, dim, Preprocess(32, (0.5,) * 3, (0.5,) * 3, "squash")
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # on a device, as those of other backbones

    def settings(self) -> dict[str, Any]:
        """Return its name, which makes its fingerprint."""
        return {"name": self.name}

    def encode_image(self, images: Tensor) -> NoReturn:
        """Raise a ConfigError."""
        self._refuse(images)

    def encode_text(self, texts: Sequence[str]) -> NoReturn:
        """Raise a ConfigError."""
        self._refuse(texts)

    def _refuse(self, _: object) -> NoReturn:
        name = self.name.removeprefix(FOREIGN).rpartition("/")[0]
        raise ConfigError(
            f"the embeddings of this index are those of {name}, which is not available here; search with vector= or "
            "liked=, and add images with vectors="
        )


def foreign_model(checkpoint: str) -> IGROTModel:
    """Return a model in name only, for an index of embeddings from elsewhere.

    Args:
        checkpoint: `foreign:NAME/WIDTH`.

    Raises:
        ConfigError: If it has another form.
    """
    if (found := re.fullmatch(f"{FOREIGN}.+/([1-9][0-9]{{0,5}})", checkpoint)) is None:
        raise ConfigError(f"invalid checkpoint: {checkpoint} (expected {FOREIGN}NAME/WIDTH)")
    return baseline(ForeignBackbone(checkpoint, int(found[1])), "image")
