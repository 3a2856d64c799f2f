"""What the page searches: a gallery with a model behind one small interface.

Does not know how an engine finds its answers, nor pages, turns or users.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from PIL import Image

from union_igrot.models.model import IGROTModel

_SKETCH_SCALES: Final = {"tiny": 0.55}
"""How large drawings were in the sketches that a backbone was made with, as a share of the page."""


@dataclass(frozen=True, slots=True)
class DisplayedImage:
    """One picture on the page.

    Attributes:
        id: Unique in its gallery.
        title: What it is called on the page.
        thumbnail: A small PNG or JPEG of it.
        score: Cosine similarity to the query, -1..1; None where nothing was asked.
        path: Its file, or None where it has none.
        details: Whatever else is known of it, by name.
    """

    id: str
    title: str
    thumbnail: bytes
    score: float | None = None
    path: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What is asked of an engine.

    Attributes:
        picture: The reference photo or the sketch, or None.
        text: What to change, or what to look for where there is no picture; None for none.
        where: A filter on the gallery's columns, see `index.where`; None for none.
        liked: Ids of pictures to come closer to.
        disliked: Ids of pictures to go away from; never among the answers.
        exclude: Ids that are never among the answers either.
    """

    picture: Image.Image | None = None
    text: str | None = None
    where: str | None = None
    liked: Sequence[str] = ()
    disliked: Sequence[str] = ()
    exclude: Sequence[str] = ()


class SearchBackend(ABC):
    """A gallery and a model that searches it. Used by one thread at a time.

    Attributes:
        name: What its method is called on the page.
        gallery: What its gallery is called on the page.
        hint: A sentence on what can be asked, or an empty one.
        example: A filter to show as an example.
        sketch_scale: Share of the page that a sketch's drawing may take; see `pictures.drawn`.
        pixelated: Whether its pictures are so small that they are shown with their pixels' edges.
    """

    name: str
    gallery: str
    hint: str = ""
    example: str = ""
    sketch_scale: float = 1.0
    pixelated: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Give the number of pictures."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that a filter may ask for; none where there is nothing to filter by."""
        return ()

    @abstractmethod
    def search(self, request: SearchRequest, skip: int, count: int) -> list[DisplayedImage]:
        """Find the best answers, best first.

        Args:
            request: What is asked.
            skip: How many of the best are left out, because other pages show them.
            count: How many are wanted, at least 1; fewer are given where there are no more.

        Raises:
            ConfigError: Where the filter is wrong.
            DataError: Where the gallery does not hold a liked or disliked picture.
        """

    @abstractmethod
    def some(self, count: int, sample_seed: int) -> list[DisplayedImage]:
        """Give some pictures to start from; the same ones for the same `sample_seed`."""

    @abstractmethod
    def answer(self, name: str) -> DisplayedImage:
        """Give one picture by its id.

        Raises:
            DataError: Where the gallery does not hold it.
        """

    @abstractmethod
    def picture(self, name: str) -> Image.Image:
        """Open one picture by its id, in full.

        Raises:
            DataError: Where the gallery does not hold it.
            ImageError: Where it cannot be opened any more.
        """


def sketch_scale(model: IGROTModel) -> float:
    """Give the share of the page that a drawing may take for a model: it is lost with larger ones than it knows."""
    return _SKETCH_SCALES.get(model.backbone.name, 1.0)


def heads_name(model: IGROTModel) -> str:
    """Name a model by its heads, such as `transagg + union`."""
    return f"{model.fusion.kind} + {model.target.kind}"
