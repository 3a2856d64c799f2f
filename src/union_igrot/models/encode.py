"""A model behind the `encode` of sentence-transformers, for programs that expect one of its models."""

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import ConfigError
from union_igrot.models.model import IGROTModel


@final
class SentenceEncoder:
    """Encodes texts, images, and images with texts.

    An input is a `str`, which is a text; an image in any form that `encode_queries` takes but a `str`; or a mapping
    with `text`, `image` or both. Images with a text pass the query head. Images alone pass the target head, or the
    query head in `encode_query`.

    Args:
        model: Any model.

    Attributes:
        modalities: What it takes.
        similarity_fn_name: How embeddings are compared.
    """

    modalities = ("text", "image", "message")
    similarity_fn_name = "cosine"

    def __init__(self, model: IGROTModel) -> None:
        self.model = model

    def get_embedding_dimension(self) -> int:
        """Return the width of the joint space."""
        return self.model.backbone.dim

    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def encode_query(self, inputs: object, **options: Any) -> Any:
        """Encode queries; see `encode`."""
        return self.encode(inputs, queries=True, **options)

    def encode_document(self, inputs: object, **options: Any) -> Any:
        """Encode gallery images and texts; see `encode`."""
        return self.encode(inputs, **options)

    def encode(
        self,
        inputs: object,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,  # noqa: ARG002 - they always are
        queries: bool = False,
        **options: Any,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Encode one input, or several in a list.

        Args:
            inputs: See the class.
            batch_size: Inputs per forward pass.
            show_progress_bar: Whether to show a progress bar.
            convert_to_numpy: Whether to return an array; a list of tensors if both are false.
            convert_to_tensor: Whether to return a tensor, on the CPU.
            normalize_embeddings: Embeddings have unit length in any case.
            queries: Whether images alone are queries, too.
            options: Further options of sentence-transformers, which must be None.

        Returns:
            Embeddings [inputs, dim], or [dim] of a single input.

        Raises:
            ConfigError: If an option is not supported, or an input is empty.
            ImageError: If an image cannot be read.
        """
        if given := sorted(name for name, value in options.items() if value is not None):
            raise ConfigError(f"encode has no option {', '.join(given)} for this model; leave it out")
        several = isinstance(inputs, list | tuple)
        pairs = [_as_pair(one) for one in (inputs if isinstance(inputs, list | tuple) else [inputs])]
        groups: dict[str, list[int]] = {}
        for at, (image, text) in enumerate(pairs):
            alone = "image" if not queries else "both"
            groups.setdefault("text" if image is None else alone if text is None else "both", []).append(at)
        embeddings = torch.empty(len(pairs), self.model.backbone.dim)
        for kind, rows in groups.items():
            images, texts = [pairs[at][0] for at in rows], [pairs[at][1] for at in rows]
            shared: dict[str, Any] = {"batch_size": batch_size, "progress": bool(show_progress_bar)}
            embeddings[rows] = (
                self.model.encode_gallery(images, **shared)
                if kind == "image"
                else self.model.encode_queries(None if kind == "text" else images, texts, **shared)
            )
        found = embeddings if several else embeddings[0]
        if convert_to_tensor:
            return found
        return found.numpy() if convert_to_numpy else list(found) if several else found

    def similarity(self, first: Any, second: Any) -> Float[Tensor, "first second"]:
        """Return the cosine of each pair of embeddings."""
        left, right = (torch.atleast_2d(torch.as_tensor(x)) for x in (first, second))
        return torch.nn.functional.normalize(left, dim=-1) @ torch.nn.functional.normalize(right, dim=-1).T


def _as_pair(one: object) -> tuple[Any, str | None]:
    """Return the image and the text of an input."""
    if isinstance(one, str):
        return None, one
    if not isinstance(one, Mapping):
        return one, None
    if (unknown := sorted(set(one) - {"text", "image"})) or not any(one.get(name) is not None for name in one):
        raise ConfigError(f"invalid input {unknown or dict(one)} (expected text, image or both); leave the rest out")
    return one.get("image"), one.get("text")
