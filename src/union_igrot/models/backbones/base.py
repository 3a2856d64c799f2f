"""The contract of a vision-language model: images and texts to features in one space.

Frozen by construction: evaluation mode survives `train()`, no parameter asks for a
gradient, unless an encoder is named to be tuned. Does not know heads, losses, files of
annotations or caches.
"""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from union_igrot.types import Features, Preprocess

Modality = Literal["image", "text"]
"""The two encoders of a backbone."""


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
        preprocess: How an image becomes this model's input.
        tuned_encoders: The encoders whose weights are being trained; none but after `tune`.
    """

    name: str
    dim: int
    preprocess: Preprocess
    tuned_encoders: frozenset[Modality] = frozenset()

    def __repr__(self) -> str:
        size = self.preprocess.size
        return f"{type(self).__name__}({self.name}, dim={self.dim}, image_size={size}, device={self.device})"

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images.

        Returns:
            Pooled and token features in the joint space, not normalized; the mask is all True.
        """

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; an empty string is the null text.

        Returns:
            Pooled and token features in the joint space, not normalized; the mask is
            False after the end of each text, by position.
        """

    def architecture(self) -> dict[str, Any]:
        """Say in plain values how the model is built, weights and words aside; empty where its name says it."""
        return {}

    def save_tokenizer(self, folder: Path) -> None:
        """Write what texts are cut by into a folder; nothing where it is part of the code."""

    def freeze(self) -> "Backbone":
        """Fix every weight and stay in evaluation mode. Call at the end of a constructor."""
        self.requires_grad_(requires_grad=False)
        self.tuned_encoders = frozenset()
        return self.train(mode=False)

    def tune(self, sides: Collection[Modality]) -> "Backbone":
        """Let the weights of encoders be trained, until `freeze`.

        The weights of an encoder are those that its features depend on; what a pretraining
        alone needed (a logit scale, layers of cross-attention) stays fixed.

        Args:
            sides: `image`, `text`, or both.
        """
        self.freeze()
        named = list(self.parameters())
        chosen: set[int] = set()
        self.requires_grad_(requires_grad=True)
        with torch.inference_mode(mode=False), torch.enable_grad():
            for side in sides:
                seen = self._probe(side)
                outputs = [out.sum() for out in (seen.pooled, seen.tokens) if out is not None]
                told: Sequence[Tensor | None] = torch.autograd.grad(outputs, named, allow_unused=True)
                chosen |= {id(weight) for weight, gradient in zip(named, told, strict=True) if gradient is not None}
        self.freeze()
        for weight in named:
            weight.requires_grad_(id(weight) in chosen)
        self.tuned_encoders = frozenset(sides)
        return self

    def _probe(self, side: Modality) -> Features:
        size = self.preprocess.size
        if side == "image":
            return self.encode_image(torch.zeros(1, 3, size, size, device=self.device))
        return self.encode_text(["a"])

    def checkpoint_activations(self) -> "Backbone":
        """Compute each layer anew in the backward pass instead of keeping what it saw: less memory, more time."""
        for layer in list(_layers(self)):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        return self

    def train(self, mode: bool = True) -> "Backbone":  # noqa: ARG002 - the mode is refused on purpose
        """Stay in evaluation mode whatever is asked, also while tuned: dropout and statistics stay off."""
        return super().train(mode=False)

    def fingerprint(self) -> str:
        """Return a hash of the exact weights and of the preprocessing."""
        return f"{weights_hash(self.state_dict())}-{self.preprocess.fingerprint()}"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    """Return the layers of each stack; of a stack of stages that are mostly stacks themselves, the inner ones."""
    for child in part.children():
        if _is_stack(child) and not any(map(_is_stage, child.children())):
            yield from child.children()
        else:
            yield from _layers(child)


def _is_stack(part: nn.Module) -> bool:
    """Tell whether a module lists layers of one kind."""
    listed = isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1
    return listed and len({type(layer) for layer in part.children()}) == 1


def _is_stage(layer: nn.Module) -> bool:
    inner = max((_size(part) for part in layer.modules() if _is_stack(part)), default=0)
    return 2 * inner > _size(layer)


def _size(part: nn.Module) -> int:
    return sum(weight.numel() for weight in part.parameters())
