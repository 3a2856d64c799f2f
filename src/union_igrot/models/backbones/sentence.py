"""Multimodal models of sentence-transformers (extra `sentence-transformers`) as frozen backbones."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from union_igrot.errors import CheckpointError, ConfigError, first_line
from union_igrot.models.backbones.base import Backbone, Modality, first_pooled, vocabulary_hash
from union_igrot.models.backbones.hf import parse_preprocess
from union_igrot.types import Features, Preprocess

_ANY_SIZE = Preprocess(size=448, mean=(0.0,) * 3, std=(1.0,) * 3, fit="crop", interpolation="bicubic")


@final
class SentenceBackbone(Backbone):
    """A model of sentence-transformers that embeds texts and images.

    It computes embeddings alone, so that an image and a text have one token each, their embedding.

    Images pass the model's own processor. Before that they have the size that it makes of any image; 448 x 448 pixels
    for a model without a fixed size.

    Args:
        network: A `SentenceTransformer`.
        name: Name of the backbone in configurations and saved models.

    Raises:
        ConfigError: If the model does not embed both texts and images.
    """

    def __init__(self, network: Any, name: str) -> None:
        super().__init__()
        if not {"text", "image"} <= set(network.modalities):
            known = ", ".join(map(str, network.modalities))
            raise ConfigError(f"backbone {name!r} embeds {known} (expected text and image); choose a multimodal model")
        self.network, self.name, self.dim = network, name, int(network.get_embedding_dimension())
        own = network.processor.image_processor.to_dict()
        size = (own.get("crop_size") or own.get("size") or {}).get("height")
        try:
            self._own = parse_preprocess(own, int(size or 0), name)
            self.preprocess = replace(self._own, mean=_ANY_SIZE.mean, std=_ANY_SIZE.std)
        except CheckpointError:
            self._own = self.preprocess = _ANY_SIZE
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode images of values in 0..1."""
        pixels = (images * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
        return self._encode([Image.fromarray(one.numpy()) for one in pixels])

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts, without a prompt."""
        return self._encode(list(texts))

    def _encode(self, inputs: list[Any]) -> Features:
        if not inputs:
            return first_pooled(torch.empty(0, 1, self.dim, device=self.device))
        pooled = self.network.encode(
            inputs, batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False, prompt=""
        )
        return first_pooled(pooled.clone()[:, None])  # made in inference mode

    def tune(self, encoders: Collection[Modality]) -> Backbone:
        """Refuse: sentence-transformers computes embeddings without gradients."""
        if encoders:
            raise ConfigError(f"backbone {self.name!r} cannot be tuned; choose model.finetune=none or an hf: model")
        return self.freeze()

    def settings(self) -> dict[str, Any]:
        """Return the modules, the preprocessing and the tokenizer's words."""
        return {
            "kind": "sentence-transformers",
            "modules": [type(module).__name__ for module in self.network],
            "image": asdict(self._own),
            "vocabulary": vocabulary_hash(self.network.tokenizer.get_vocab()),
        }

    def earlier_fingerprint(self, own: str) -> None:
        """Return None: earlier versions had no such backbones."""


def load_sentence(name: str, weights: str | Path | None = None) -> SentenceBackbone:
    """Load `st:<repository>`, from the cache of huggingface_hub if it is there.

    Args:
        name: `st:` and a repository of sentence-transformers.
        weights: A folder that `SentenceTransformer.save` wrote; None for the repository.

    Raises:
        ConfigError: If sentence-transformers is not installed, or the model does not embed both texts and images.
        CheckpointError: If the model cannot be downloaded or read.
    """
    try:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(f'{name} needs a package; pip install "union-igrot[sentence-transformers]"') from None
    source = str(weights or name.removeprefix("st:"))
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        try:
            network = SentenceTransformer(source, device="cpu", trust_remote_code=False, local_files_only=True)
        except OSError:
            if Path(source).is_dir():
                raise
            network = SentenceTransformer(source, device="cpu", trust_remote_code=False)
    except Exception as error:  # its loaders raise nearly anything
        raise CheckpointError(
            f"cannot load {source} by sentence-transformers ({type(error).__name__}: {first_line(error)}); check the "
            "name and the network, or set model.weights to a folder"
        ) from None
    return SentenceBackbone(network, name)
