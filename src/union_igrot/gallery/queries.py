"""What is asked of a gallery: images, text, results that were liked or not; and its embedding.

Knows the model and the forms an image comes in. Does not know any index.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from union_igrot.errors import ConfigError, ImageError
from union_igrot.gallery.ingest.entries import path_as_text
from union_igrot.gallery.results import Hit
from union_igrot.images.decode import as_image
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models.model import IGROTModel
from union_igrot.models.precision import full_precision
from union_igrot.storage.paths import absolute_path

ALPHA: Final = 1.0
"""Weight of the query itself in a refined one."""
BETA: Final = 0.75
"""Weight of the mean of the liked results."""
GAMMA: Final = 0.15
"""Weight of the mean of the disliked results. The three are the values that Manning, Raghavan and Schütze,
Introduction to Information Retrieval (2008), section 9.1.1, call reasonable, for the method of Rocchio, Relevance
feedback in information retrieval (1971)."""
BATCH: Final = 256
"""Queries embedded at once, as in an evaluation."""

_PARTS: Final = ("image", "text", "liked", "disliked", "exclude")


@dataclass(frozen=True)
class Wanted:
    """One query.

    Attributes:
        images: Images, photos or sketches, in any form that `as_image` takes.
        text: What is looked for, or what should be different from the images; None for none.
        liked: Ids of results to come closer to.
        disliked: Ids of results to go away from; never among the answers.
        exclude: Ids that are never among the answers.
    """

    images: tuple[Any, ...] = ()
    text: str | None = None
    liked: tuple[str, ...] = ()
    disliked: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def without(self) -> tuple[str, ...]:
        """Ids that are not among the answers."""
        return tuple(dict.fromkeys((*self.exclude, *self.disliked)))


def wanted_of(given: Mapping[str, Any]) -> Wanted:
    """Read one query.

    Args:
        given: Some of `image` (one image or several), `text`, `liked`, `disliked` and `exclude` (ids, paths
            or hits, one or several).

    Raises:
        ConfigError: Where it has another part, or gives neither image, text nor liked.
    """
    if unknown := [name for name in given if name not in _PARTS]:
        raise ConfigError(f"a query has no {unknown[0]!r}; it has {', '.join(_PARTS)}")
    text = given.get("text")
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"text is {type(text).__name__}; give a text")
    asked = Wanted(
        several(given.get("image")),
        text if text and text.strip() else None,
        *(ids_of(given.get(name)) for name in ("liked", "disliked", "exclude")),
    )
    if not (asked.images or asked.text or asked.liked):
        raise ConfigError("nothing is asked; give an image, a text, both, or liked results")
    if both := set(asked.liked) & set(asked.disliked):
        raise ConfigError(f"{min(both)!r} is liked and disliked; give it on one side")
    return asked


def all_wanted(queries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Wanted]:
    """Read queries.

    Args:
        queries: See `wanted_of`.
        names: What each is called in an error; empty for nothing.

    Raises:
        ConfigError: As `wanted_of`; says which query.
    """
    wanted = []
    for given, name in zip(queries, names, strict=True):
        try:
            wanted.append(wanted_of(given))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}" if name else str(error)) from None
    return wanted


def several(given: object) -> tuple[Any, ...]:
    """Return one thing or several as a tuple; None is none. An array, a tensor and text are one thing."""
    if given is None:
        return ()
    kinds = (str, bytes, bytearray, memoryview, Path, Image.Image, np.ndarray, Tensor, Hit, Mapping)
    single = isinstance(given, kinds)
    if single or not hasattr(given, "__iter__") or hasattr(given, "read"):
        return (given,)
    return tuple(given)


def ids_of(given: object) -> tuple[str, ...]:
    """Return the ids of rows that are named by id, path or hit, one or several.

    Raises:
        ConfigError: Where one is something else.
    """
    return tuple(_id_of(one) for one in several(given))


def _id_of(one: object) -> str:
    if isinstance(one, Hit):
        return one.id
    if isinstance(one, Path):
        return path_id(one)
    if not isinstance(one, str):
        raise ConfigError(f"{one!r} names no image of the gallery; give its id, its path or a hit")
    return one


def path_id(path: str | Path) -> str:
    """Name the row of a file: its absolute path as text."""
    return path_as_text(absolute_path(path))


@torch.inference_mode()
def embed_wanted(
    model: IGROTModel,
    wanted: Sequence[Wanted],
    kept: Mapping[str, Float[Tensor, " dim"]],
    names: Sequence[str],
) -> Float[Tensor, "queries dim"]:
    """Embed queries, refined by what was liked and disliked.

    An image without text is embedded with the null text, as the model was trained; text alone is its own embedding.
    Several images give the normalized mean of their unit embeddings, each with the text.

    Args:
        model: The model.
        wanted: The queries.
        kept: Embeddings of the liked and disliked rows, by id.
        names: What each is called in an error; empty for nothing.

    Returns:
        Unit embeddings, float32, on the CPU.

    Raises:
        ImageError: Where an image cannot be read; says of which query.
    """
    pairs = [(place, image) for place, one in enumerate(wanted) for image in one.images]
    spoken = [place for place, one in enumerate(wanted) if one.text and not one.images]
    mean = torch.zeros(len(wanted), model.backbone.dim)
    for at in range(0, len(pairs), BATCH):
        some = pairs[at : at + BATCH]
        texts = [wanted[place].text for place, _ in some]
        images = _pictures(some, model, names)
        with full_precision(model.device):
            embedded = model.embed_queries(images, texts).float().cpu()
        for (place, _), row in zip(some, embedded, strict=True):
            # A single image's embedding stays as it is, to the last bit as in an evaluation.
            mean[place] += row if len(wanted[place].images) == 1 else normalize(row, dim=-1)
    for at in range(0, len(spoken), BATCH):
        chosen = spoken[at : at + BATCH]
        with full_precision(model.device):
            mean[chosen] = model.embed_queries(None, [wanted[place].text for place in chosen]).float().cpu()
    for place, one in enumerate(wanted):
        if len(one.images) > 1:
            mean[place] = normalize(mean[place], dim=-1)
        if one.liked or one.disliked:
            asked = mean[place] if one.images or one.text else None
            mean[place] = refine(asked, [kept[name] for name in one.liked], [kept[name] for name in one.disliked])
    return mean


def _pictures(
    some: Sequence[tuple[int, Any]], model: IGROTModel, names: Sequence[str]
) -> Float[Tensor, "images 3 size size"]:
    """Decode and preprocess the images of some queries."""
    to_tensor, size = ImageToTensor(model.preprocess), model.preprocess.size

    def ready(numbered: tuple[int, Any]) -> Tensor:
        place, image = numbered
        try:
            return to_tensor(as_image(image, at_least=size))
        except ImageError as error:
            raise ImageError(f"{names[place]}: {error}" if names[place] else str(error)) from error

    if len(some) == 1:
        return ready(some[0])[None]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return torch.stack(list(pool.map(ready, some)))


def refine(
    query: Float[Tensor, " dim"] | None,
    liked: Sequence[Float[Tensor, " dim"]],
    disliked: Sequence[Float[Tensor, " dim"]],
) -> Float[Tensor, " dim"]:
    """Move a query towards results that were liked and away from those that were not.

    Rocchio's method on unit vectors: `ALPHA * query + BETA * mean(liked) - GAMMA * mean(disliked)`, normalized;
    sources at the constants.

    Args:
        query: Unit embedding of the query, or None where there are liked results alone.
        liked: Unit embeddings of results.
        disliked: Unit embeddings of results.

    Returns:
        A unit embedding.
    """
    parts = [] if query is None else [ALPHA * query]
    if liked:
        parts.append(BETA * torch.stack(list(liked)).mean(0))
    if disliked:
        parts.append(-GAMMA * torch.stack(list(disliked)).mean(0))
    return normalize(torch.stack(parts).sum(0), dim=-1)
