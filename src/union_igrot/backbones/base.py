"""The contract of a vision-language model: pictures and texts to features in one space.

Frozen by construction: evaluation mode survives `train()`, no parameter asks for a
gradient. Does not know heads, losses, files of annotations or caches.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from union_igrot.types import Features, Preprocess


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes of a state dict, order aside.

    Args:
        state: Tensors by name, on any device.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]


class Backbone(nn.Module, ABC):
    """A frozen vision-language model.

    Attributes:
        name: What the model is called in configurations and saved models.
        dim: Width of the joint space.
        preprocess: How a picture becomes this model's input.
    """

    name: str
    dim: int
    preprocess: Preprocess

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed pictures.

        Returns:
            Pooled and token features in the joint space, not normalised; the mask is all True.
        """

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; an empty string is the null text.

        Returns:
            Pooled and token features in the joint space, not normalised; the mask is
            False after the end of each text, by position.
        """

    def freeze(self) -> "Backbone":
        """Fix every weight and stay in evaluation mode. Call at the end of a constructor."""
        self.requires_grad_(requires_grad=False)
        return self.train(mode=False)

    def train(self, mode: bool = True) -> "Backbone":  # noqa: ARG002 - the mode is refused on purpose
        """Stay in evaluation mode whatever is asked: dropout and statistics stay off."""
        return super().train(mode=False)

    def fingerprint(self) -> str:
        """Give a hash of the exact weights and of the preprocessing."""
        return f"{weights_hash(self.state_dict())}-{self.preprocess.fingerprint()}"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device
