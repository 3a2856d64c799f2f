"""Training-free fusions of image and text queries, as baselines: of scores (product, WeiCom) or of embeddings.

- `product`: the product of both cosines (FREEDOM's baseline; i-CIR's code sets negative cosines to 0 first).
- `weicom`: the mean of the normal distribution function of both, standardized over the candidates (billpsomas/rscir).
- `slerp`: spherical interpolation of the embeddings, halfway.
- `basic`: centered embeddings, the image projected on what texts about subjects have and texts about styles have not,
  then the product without negative scores. That is the projection of BASIC (billpsomas/icir) without its query
  expansion, its statistics of other data and its fusion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from union_igrot.errors import ConfigError, DataError, check_choice
from union_igrot.models.model import IGROTModel
from union_igrot.storage.text import read_lines

FUSIONS: Final = ("product", "weicom", "slerp", "basic")
_STYLE_WEIGHT, _COMPONENTS = 0.2, 250  # of BASIC's projection


@dataclass(frozen=True)
class FusedQueries:
    """Queries whose scores are made of two scores, or of one.

    Attributes:
        images: Embeddings that are compared with the gallery first.
        texts: Embeddings that are compared with it second; None if the first scores are all.
        combine: Takes both scores of some queries and which of their entries are candidates; returns the scores.
    """

    images: Float[Tensor, "queries dim"]
    texts: Float[Tensor, "queries dim"] | None = None
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda image, _text, _valid: image


def fuse(
    name: str,
    images: Float[Tensor, "queries dim"],
    texts: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    corpora: Sequence[Float[Tensor, "_ dim"]] = (),
) -> tuple[Tensor | FusedQueries, Float[Tensor, "gallery dim"]]:
    """Return what is ranked by a fusion: queries and gallery.

    Args:
        name: One of `FUSIONS`.
        images: Unit embeddings of the queries' images.
        texts: Unit embeddings of their texts.
        gallery: Unit embeddings of the gallery.
        corpora: For `basic` unit embeddings of texts about subjects and of texts about styles.

    Raises:
        ConfigError: If the corpora are missing.
    """
    if check_choice("fusions", name, FUSIONS) == "product":
        return FusedQueries(images, texts, lambda image, text, _: image * text), gallery
    if name == "weicom":
        return FusedQueries(images, texts, _weighted), gallery
    if name == "slerp":
        angle = (images * texts).sum(1, keepdim=True).clamp(-1, 1).acos()
        share = torch.where(angle < 1e-4, 0.5, (angle / 2).sin() / angle.sin().clamp(min=1e-4))
        return F.normalize(share * (images + texts), dim=-1), gallery
    if len(corpora) != 2:
        raise ConfigError("fusion basic needs corpora: a file of texts about subjects, and one of texts about styles")
    subjects, styles = corpora
    text_mean, image_mean = subjects.mean(0), gallery.mean(0)
    projected = (images - image_mean) @ projection(subjects - text_mean, styles - text_mean)
    combined = FusedQueries(projected, texts - text_mean, lambda image, text, _: image.clamp(min=0) * text.clamp(min=0))
    return combined, gallery - image_mean


def _weighted(
    image: Float[Tensor, "queries items"], text: Float[Tensor, "queries items"], valid: Bool[Tensor, "queries items"]
) -> Float[Tensor, "queries items"]:
    scores: Tensor = (_normal(image, valid) + _normal(text, valid)) / 2
    return scores


def _normal(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the normal distribution function of each query's scores, standardized over its candidates."""
    count = valid.sum(1, keepdim=True)
    mean = scores.where(valid, 0.0).sum(1, keepdim=True) / count
    gaps = (scores - mean).where(valid, 0.0)
    deviation = (gaps.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-12)
    shares: Tensor = torch.special.ndtr(gaps / deviation)
    return shares


def projection(subjects: Float[Tensor, "texts dim"], styles: Float[Tensor, "others dim"]) -> Float[Tensor, "dim dim"]:
    """Return BASIC's projection: the leading directions of the subjects' scatter less that of the styles."""
    scatters = [x.T @ x / max(1, len(x) - 1) for x in (subjects.double(), styles.double())]
    values, vectors = torch.linalg.eigh((1 - _STYLE_WEIGHT) * scatters[0] - _STYLE_WEIGHT * scatters[1])
    kept = vectors[:, values > 1e-9][:, -_COMPONENTS:]
    onto: Tensor = (kept @ kept.T).to(subjects)
    return onto


def embed_corpora(model: IGROTModel, files: Sequence[str | Path]) -> list[Float[Tensor, "_ dim"]]:
    """Return the unit embeddings of the texts of each file, one a line.

    Raises:
        DataError: If a file has fewer than two texts.
    """
    found = []
    for file in files:
        texts = [line.strip() for _, line in read_lines(file)]
        if len(texts) < 2:
            raise DataError(f"{file}: has {len(texts)} texts; write at least two, one a line")
        found.append(model.encode_queries(texts=texts, device=model.device))
    return found
