"""Query heads: features of an image and a text become one query embedding.

Three heads without weights (image, text, sum) and TransAgg's fusion; `Head` is what query and target heads share.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.errors import ConfigError
from union_igrot.types import Features

MaskMode = Literal["exclude", "legacy"]


class Head(nn.Module):
    """A trained module that makes embeddings of a backbone's features.

    Attributes:
        kind: Name of the head in configurations and saved models.
        needs_tokens: Whether the head reads token features, or only pooled ones.
        model_sizes: Options whose values come from the settings of the backbone (group `model`), each with the
            name of that setting.
        options: The keyword arguments that build the same head again.
    """

    kind: str
    needs_tokens: bool = False
    model_sizes: Mapping[str, str] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def check_sizes(**values: int) -> None:
    """Raise ConfigError for the first option below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"invalid value for {name}: {value} (expected an integer >= 1)")


def check_rates(**values: float) -> None:
    """Raise ConfigError for the first rate outside of [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"invalid value for {name}: {value} (expected a rate >= 0 and < 1)")


class QueryHead(Head, ABC):
    """Fuses the features of a batch of images and texts; see `Head` for what a subclass declares."""

    @abstractmethod
    def forward(self, images: Features, texts: Features) -> Float[Tensor, "batch dim"]:
        """Return query embeddings of unit length."""


class ImageFusion(QueryHead):
    """The image alone, a baseline without training."""

    kind = "image"

    def forward(self, images: Features, texts: Features) -> Float[Tensor, "batch dim"]:  # noqa: ARG002 - a baseline
        """Return the image's pooled embedding, of unit length."""
        return F.normalize(images.pooled, dim=-1)


class TextFusion(QueryHead):
    """The text alone, a baseline without training."""

    kind = "text"

    def forward(self, images: Features, texts: Features) -> Float[Tensor, "batch dim"]:  # noqa: ARG002 - a baseline
        """Return the text's pooled embedding, of unit length."""
        return F.normalize(texts.pooled, dim=-1)


class SumFusion(QueryHead):
    """The normalized sum of both unit embeddings, a baseline without training."""

    kind = "sum"

    def forward(self, images: Features, texts: Features) -> Float[Tensor, "batch dim"]:
        """Return the normalized sum of the normalized embeddings."""
        return F.normalize(F.normalize(images.pooled, dim=-1) + F.normalize(texts.pooled, dim=-1), dim=-1)


class FusionLayer(nn.Module):
    """A pre-norm transformer encoder layer with an additive attention bias.

    Equal to torch's `TransformerEncoderLayer(norm_first=True, activation="gelu")`, with the same parameter names,
    but never on torch's fused inference path, which turns an additive mask into an excluding one. Computes only the
    requested rows.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        bias: Float[Tensor, "batch length"],
        rows: Int[Tensor, "batch rows"] | None = None,
    ) -> Float[Tensor, "batch out dim"]:
        """Attend from `rows` (None: all) to every token; `bias` is added to the logits of the keys."""
        kept = x if rows is None else x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        kept = kept + self.dropout(self._attend(self.norm1(kept), self.norm1(x), bias))
        inner = self.dropout(F.gelu(self.linear1(self.norm2(kept))))
        result: Tensor = kept + self.dropout(self.linear2(inner))
        return result

    def _attend(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        attention = self.self_attn
        width, heads = attention.embed_dim, attention.num_heads
        assert attention.in_proj_weight is not None
        assert attention.in_proj_bias is not None
        weights, biases = (
            attention.in_proj_weight.split([width, 2 * width]),
            attention.in_proj_bias.split([width, 2 * width]),
        )
        q = F.linear(queries, weights[0], biases[0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = F.linear(keys, weights[1], biases[1]).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        drop = attention.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, bias[:, None, None, :].to(q.dtype), dropout_p=drop)
        result: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return result


class TransAggFusion(QueryHead):
    """TransAgg's query head: token fusion and three learned weights.

    The tokens `[text ; separator ; image]` pass a transformer encoder. The outputs at the pooled tokens of image and
    text give a fused embedding `f`, and `f` gives weights `w`; the query is `normalize(w0 text + w1 f + w2 image)`.
    After Liu et al., "Zero-shot Composed Text-Image Retrieval" (BMVC 2023) and its published code, parameter names
    included.

    Args:
        width: Width of the joint space.
        layers: Encoder layers.
        heads: Attention heads; must divide `width`.
        feedforward: Inner width of the layers (2048 in the reference at every `width`).
        dropout: Dropout rate, at least 0 and below 1.
        mask: Treatment of padding. `exclude` keeps it out of attention; `legacy` adds 1 to its logits, as the
            reference does in training, here in training and evaluation alike.
        start: Initial weights. `balanced` gives `w = (1, 1, 1)` for every query, `reference` torch's random defaults.

    Raises:
        ConfigError: If a value is out of range, or `heads` does not divide `width`.
    """

    kind = "transagg"
    needs_tokens = True
    model_sizes = {"feedforward": "feedforward"}  # noqa: RUF012 - read only

    def __init__(
        self,
        width: int,
        layers: int = 2,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        mask: MaskMode = "exclude",
        start: Literal["balanced", "reference"] = "balanced",
    ) -> None:
        check_sizes(width=width, layers=layers, heads=heads, feedforward=feedforward)
        check_rates(dropout=dropout)
        if width % heads:
            fitting = [count for count in range(1, width + 1) if width % count == 0]
            raise ConfigError(
                f"invalid value for fusion.heads: {heads} (expected a divisor of the backbone's width {width}: "
                f"{', '.join(map(str, fitting))})"
            )
        super().__init__(layers=layers, heads=heads, feedforward=feedforward, dropout=dropout, mask=mask, start=start)
        self.mask: MaskMode = mask
        stack = nn.ModuleList(FusionLayer(width, heads, feedforward, dropout) for _ in range(layers))
        self.fusion = nn.ModuleDict({"layers": stack})  # the reference's parameter names
        self.sep_token = nn.Parameter(torch.randn(1, 1, width))
        self.combiner_layer = nn.Linear(2 * width, 8 * width)
        self.output_layer = nn.Linear(8 * width, width)
        self.weighted_layer = nn.Linear(width, 3)
        self.dropout = nn.Dropout(dropout)
        if start == "balanced":
            nn.init.zeros_(self.weighted_layer.weight)
            nn.init.ones_(self.weighted_layer.bias)

    def forward(self, images: Features, texts: Features) -> Float[Tensor, "batch dim"]:
        """Return query embeddings of unit length.

        Raises:
            ValueError: If images or texts have no token features.
        """
        if images.tokens is None or texts.tokens is None or images.pooled_at is None or texts.pooled_at is None:
            raise ValueError("TransAgg needs token features; got pooled embeddings only")
        separator = self.sep_token.expand(images.pooled.shape[0], 1, -1)
        x = torch.cat([texts.tokens, separator, images.tokens], dim=1)
        at = texts.tokens.shape[1] + 1
        rows = torch.stack([images.pooled_at + at, texts.pooled_at], dim=1)
        bias = self._bias(x, images.mask, texts.mask)
        *first, last = self.fusion["layers"].children()
        for layer in first:
            x = layer(x, bias)
        x = last(x, bias, rows)  # only two rows are read
        inner = self.dropout(F.relu(self.combiner_layer(x.flatten(1))))
        fused = self.output_layer(inner)
        w = self.weighted_layer(fused)
        mixed = w[:, :1] * texts.pooled + w[:, 1:2] * fused + w[:, 2:] * images.pooled
        return F.normalize(mixed, dim=-1)

    def _bias(
        self, x: Tensor, image_mask: Bool[Tensor, "batch image"] | None, text_mask: Bool[Tensor, "batch text"] | None
    ) -> Float[Tensor, "batch length"]:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if text_mask is not None:
            real[:, : text_mask.shape[1]] = text_mask
        if image_mask is not None:
            real[:, -image_mask.shape[1] :] = image_mask
        padding = 1.0 if self.mask == "legacy" else float("-inf")
        return torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device).masked_fill_(~real, padding)


@final
class VisionProjector(nn.Module):
    """A residual network of two layers on each image vector, pooled and tokens alike.

    `x + W2 gelu(W1 norm(x))`; `W2` and its bias start at zero, so that training begins at the plain features. One
    projector serves queries and targets (the row `+ VisionProjector` of UNION's results, whose layout was not
    published).

    Args:
        width: Width of the joint space.
        hidden: Inner width; None for twice `width`.

    Attributes:
        kind: Name of the projector in configurations and saved models.
        options: The keyword arguments that build the same projector again.
    """

    kind = "mlp"

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * width if hidden is None else hidden
        check_sizes(hidden=hidden)
        self.options: dict[str, Any] = {"hidden": hidden}
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, images: Features) -> Features:
        """Project pooled and token features; mask and pooled position stay."""
        tokens = None if images.tokens is None else self.project(images.tokens)
        return Features(self.project(images.pooled), tokens, images.mask, images.pooled_at)

    def project(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Project vectors."""
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result
