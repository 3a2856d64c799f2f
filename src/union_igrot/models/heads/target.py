"""Target heads: how a gallery image is represented.

The image embedding alone or changed by a small network, its sum with the null-text embedding, UNION's learned mixture
of both, and the query head's fusion with the null text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.models.heads.query import Head, VisionProjector, check_rates, check_sizes
from union_igrot.types import Features

Fuse = Callable[[Features, Features], Tensor]


class TargetHead(Head, ABC):
    """Represents gallery images; see `Head` for what a subclass declares."""

    @abstractmethod
    def forward(self, images: Features, null: Features, fuse: Fuse) -> Float[Tensor, "batch dim"]:
        """Return target embeddings.

        Args:
            images: Features of the images.
            null: Features of the empty text, expanded to the batch.
            fuse: The model's query head.
        """


class FrozenTarget(TargetHead):
    """The backbone's image embedding, of unit length (`original` in the reference)."""

    kind = "frozen"

    def forward(self, images: Features, null: Features, fuse: Fuse) -> Float[Tensor, "batch dim"]:  # noqa: ARG002
        """Return the normalized pooled embedding."""
        return F.normalize(images.pooled, dim=-1)


class ResidualTarget(TargetHead):
    """The image embedding plus a small trained network of it: `normalize(x + W2 gelu(W1 norm(x)))`.

    `W2` and its bias start at zero, so that training begins at the plain image embedding. Unlike the vision projector,
    which has the same layers, it changes targets alone.

    Args:
        width: Width of the joint space.
        hidden: Inner width; None for twice `width`.

    Raises:
        ConfigError: If `hidden` is below 1.
    """

    kind = "residual"

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.mlp = VisionProjector(width, hidden)
        self.options = self.mlp.options

    def forward(self, images: Features, null: Features, fuse: Fuse) -> Float[Tensor, "batch dim"]:  # noqa: ARG002
        """Return the normalized sum."""
        return F.normalize(self.mlp(Features(images.pooled)).pooled, dim=-1)


class SumTarget(TargetHead):
    """Image embedding plus null-text embedding.

    Args:
        form: `normalised` sums unit vectors and normalizes the sum. The reference has two other forms: `training`
            leaves the sum of unit vectors as it is (a constant shift of a query's logits), `inference` normalizes
            the sum of the raw vectors.
    """

    kind = "sum"

    def __init__(self, form: Literal["normalised", "training", "inference"] = "normalised") -> None:
        super().__init__(form=form)
        self.form = form

    def forward(self, images: Features, null: Features, fuse: Fuse) -> Float[Tensor, "batch dim"]:  # noqa: ARG002
        """Return the sum in the chosen form."""
        if self.form == "inference":
            return F.normalize(images.pooled + null.pooled, dim=-1)
        total = F.normalize(images.pooled, dim=-1) + F.normalize(null.pooled, dim=-1)
        return F.normalize(total, dim=-1) if self.form == "normalised" else total


class UnionTarget(TargetHead):
    """UNION: a learned mixture of the image embedding and the null-text embedding.

    The two embeddings pass a T5 encoder as a sequence of two tokens. A small network maps both outputs, concatenated,
    to one number `m`; the target is `normalize(m image + (1 - m) null)`, `m` unbounded. After arXiv 2511.22253 and its
    published code, parameter names included; the encoder is that of transformers.

    Args:
        width: Width of the joint space.
        layers: Encoder layers.
        heads: Attention heads, 64 wide each (8 for widths 256 and 512, 12 for 768).
        feedforward: Inner width of the layers.
        dropout: Twice the dropout rate of the small network.
        encoder_dropout: Dropout rate of the encoder.
        start: `image` starts at `m = 1`, the plain image embedding; `reference` at random, near `m = 0`, where all
            targets are nearly the null text.

    Raises:
        ConfigError: If a value is out of range.
    """

    kind = "union"
    model_sizes = {"feedforward": "feedforward", "heads": "union_heads"}  # noqa: RUF012 - read only

    def __init__(
        self,
        width: int,
        layers: int = 4,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        encoder_dropout: float = 0.1,
        start: Literal["image", "reference"] = "image",
    ) -> None:
        from transformers import T5Config  # noqa: PLC0415 - only this head needs T5
        from transformers.models.t5.modeling_t5 import T5Stack  # noqa: PLC0415

        check_sizes(width=width, layers=layers, heads=heads, feedforward=feedforward)
        check_rates(dropout=dropout, encoder_dropout=encoder_dropout)
        super().__init__(
            layers=layers,
            heads=heads,
            feedforward=feedforward,
            dropout=dropout,
            encoder_dropout=encoder_dropout,
            start=start,
        )
        config = T5Config(
            vocab_size=1,
            d_model=width,
            d_kv=64,
            d_ff=feedforward,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=encoder_dropout,
            is_decoder=False,
            use_cache=False,
            eos_token_id=None,
        )
        self.t5_layers = T5Stack(config)
        # Its input tokens are embeddings, so there is no vocabulary.
        del self.t5_layers.embed_tokens
        last = nn.Linear(width, 1)
        self.union_weighted_layer = nn.Sequential(
            nn.Linear(2 * width, 4 * width),
            nn.Dropout(dropout / 2),
            nn.Sigmoid(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout / 2),
            nn.Sigmoid(),
            last,
        )
        if start == "image":
            nn.init.zeros_(last.weight)
            nn.init.ones_(last.bias)

    def weight(self, images: Float[Tensor, "batch dim"], null: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch 1"]:
        """Return the weight `m` of each image embedding, unbounded."""
        tokens = torch.stack([images, null], dim=1)
        encoded = self.t5_layers(inputs_embeds=tokens).last_hidden_state
        m: Tensor = self.union_weighted_layer(encoded.flatten(1))
        return m

    def forward(self, images: Features, null: Features, fuse: Fuse) -> Float[Tensor, "batch dim"]:  # noqa: ARG002
        """Return the normalized mixture."""
        m = self.weight(images.pooled, null.pooled)
        return F.normalize(m * images.pooled + (1 - m) * null.pooled, dim=-1)


class SharedTarget(TargetHead):
    """The query head applied to the image and the null text: one encoder for queries and targets."""

    kind = "shared"
    needs_tokens = True

    def forward(self, images: Features, null: Features, fuse: Fuse) -> Float[Tensor, "batch dim"]:
        """Return the query head's embedding of the image with the empty text."""
        return fuse(images, null)
