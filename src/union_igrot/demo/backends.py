"""The interface between the page and a gallery that is searched with a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from PIL import Image

from union_igrot.models.model import IGROTModel

_SKETCH_SCALES: Final = {"tiny": 0.55}
"""Relative size of the drawings that a backbone was trained on."""


@dataclass(frozen=True, slots=True)
class DisplayedImage:
    """A gallery image on the page.

    Attributes:
        id: Unique in its gallery.
        title: Title on the page.
        thumbnail: A small PNG or JPEG.
        score: Cosine similarity to the query, -1..1; None without a query.
        path: Its file, or None.
        details: Further columns to show, by name.
    """

    id: str
    title: str
    thumbnail: bytes
    score: float | None = None
    path: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A query to a backend.

    Attributes:
        image: The reference photo or the sketch, or None.
        text: Modification text, or a text query without an image; None for none.
        where: A filter on the gallery's columns; None for none.
        liked: Ids of images to move towards.
        disliked: Ids of images to move away from; never among the results.
        exclude: Further ids to leave out of the results.
    """

    image: Image.Image | None = None
    text: str | None = None
    where: str | None = None
    liked: Sequence[str] = ()
    disliked: Sequence[str] = ()
    exclude: Sequence[str] = ()


class SearchBackend(ABC):
    """A gallery and a model that searches it. Used by one thread at a time.

    Attributes:
        name: Name of the method on the page.
        gallery: Name of the gallery on the page.
        hint: A hint on supported queries, or an empty string.
        example: An example filter.
        sketch_scale: Relative size to which sketches are reduced; see `uploads.draw_strokes`.
        pixelated: Whether images are shown without smoothing.
    """

    name: str
    gallery: str
    hint: str = ""
    example: str = ""
    sketch_scale: float = 1.0
    pixelated: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that filters can use."""
        return ()

    @abstractmethod
    def search(self, request: SearchRequest, skip: int, count: int) -> list[DisplayedImage]:
        """Return the best results, best first.

        Args:
            request: The query.
            skip: Number of results to skip (previous pages).
            count: Number of results, at least 1; fewer are returned if there are no more.

        Raises:
            ConfigError: If the filter is invalid.
            DataError: If a liked or disliked image is not in the gallery.
        """

    @abstractmethod
    def some(self, count: int, sample_seed: int) -> list[DisplayedImage]:
        """Return some images to start from; deterministic in `sample_seed`."""

    @abstractmethod
    def answer(self, name: str) -> DisplayedImage:
        """Return one image by its id.

        Raises:
            DataError: If it is not in the gallery.
        """

    @abstractmethod
    def image(self, name: str) -> Image.Image:
        """Decode one image by its id at full size.

        Raises:
            DataError: If it is not in the gallery.
            ImageError: If it cannot be decoded any more.
        """


def sketch_scale(model: IGROTModel) -> float:
    """Return the relative size of sketches for a model, which handles larger drawings than it was trained on poorly."""
    return _SKETCH_SCALES.get(model.backbone.name, 1.0)


def heads_name(model: IGROTModel) -> str:
    """Return the names of a model's heads, such as `transagg + union`."""
    return f"{model.fusion.kind} + {model.target.kind}"
