"""Galleries that the page searches: the interface, and an index with a model."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image

from union_igrot.demo.uploads import KEPT_SIDE, decode_thumbnail, encode_thumbnail
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.engines.base import ColumnValue
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.results import THUMBNAIL, file_of
from union_igrot.images.decode import open_image
from union_igrot.models.model import IGROTModel

SAMPLE_POOL: Final = 20_000
"""Rows from which the images of the start page are sampled."""
_SKETCH_SCALES: Final = {"tiny": 0.55}
"""Relative size of the drawings that a backbone was trained on."""
_INTERNAL_COLUMNS: Final = {THUMBNAIL, "hash", "size", "mtime", "width", "height", "source"}
"""Columns that are not shown."""

Columns = Mapping[str, ColumnValue]


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
        model: Name of the model on the page.
        hint: A hint on supported queries, or an empty string.
        warning: A limit of the model for this gallery, or an empty string.
        example: An example filter.
        sketch_scale: Relative size to which sketches are reduced; see `uploads.draw_strokes`.
        pixelated: Whether images are shown without smoothing.
    """

    name: str
    gallery: str
    model: str = ""
    hint: str = ""
    warning: str = ""
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
    def sample(self, count: int, seed: int) -> list[DisplayedImage]:
        """Return some images to start from; deterministic in `seed`."""

    @abstractmethod
    def item(self, name: str) -> DisplayedImage:
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


class GalleryBackend(SearchBackend):
    """A gallery of files, in memory, on disk or on a server.

    Args:
        gallery: The gallery; not empty.
        title: Its name on the page.
        name: Name of the method on the page; by default the gallery and the model.
    """

    example = "width >= 1000"
    thumbnails = True
    """Whether the index holds thumbnails."""

    def __init__(self, gallery: Gallery, title: str, name: str = "") -> None:
        self.gallery, self.model = title, model_name(gallery.model)
        self.name = name or f"{title}: {self.model}"
        self.sketch_scale = _SKETCH_SCALES.get(gallery.model.backbone.name, 1.0)
        if gallery.model.backbone.name == "tiny" and self.thumbnails:
            self.warning = "The bundled model only knows generated shapes; its results on photographs are arbitrary."
        self._gallery, self._rows = gallery, gallery.index
        self._pool: list[str] = []

    def __len__(self) -> int:
        return len(self._gallery)

    @property
    def columns(self) -> Sequence[str]:
        """See `SearchBackend`."""
        return ["id", *(name for name, kind in self._rows.columns.items() if kind != "bytes")]

    def search(self, request: SearchRequest, skip: int, count: int) -> list[DisplayedImage]:
        """See `SearchBackend`."""
        if marked := [*request.liked, *request.disliked]:
            try:
                self._rows.fetch(marked)
            except DataError:
                raise DataError(f"{self.gallery} no longer contains all marked images; clear the marks.") from None
        try:
            found = self._gallery.search(
                request.image,
                request.text,
                skip + count,
                request.where,
                liked=request.liked,
                disliked=request.disliked,
                exclude=request.exclude,
                thumbnails=self.thumbnails,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("where=", "Filter ", 1)) from None
        return [self._show(hit.id, hit.columns, hit.jpeg, hit.score) for hit in found[skip:]]

    def sample(self, count: int, seed: int) -> list[DisplayedImage]:
        """See `SearchBackend`."""
        for fresh in (False, True):
            if fresh or not self._pool:
                self._pool = self._read_ids()
            chosen = random.Random(seed).sample(self._pool, min(count, len(self._pool)))
            with suppress(DataError):  # an image was removed meanwhile; read the ids again
                return self._items(chosen)
        raise DataError(f"{self.gallery} is being changed; try again in a moment.")

    def item(self, name: str) -> DisplayedImage:
        """See `SearchBackend`."""
        return self._items([name])[0]

    def image(self, name: str) -> Image.Image:
        """See `SearchBackend`. Falls back to the thumbnail if there is no readable file."""
        columns = self._fetch([name])[0]  # raises for a name that is not in the index, so that no other file is opened
        return self._decode(name, columns)

    def _show(self, name: str, columns: Columns, jpeg: bytes | None, score: float | None = None) -> DisplayedImage:
        """Return a row as shown on the page."""
        shown = {key: str(value) for key, value in columns.items() if key not in _INTERNAL_COLUMNS}
        details = {key: value for key, value in shown.items() if columns[key] is not None}
        small = encode_thumbnail(Image.new("RGB", (8, 8), "grey")) if jpeg is None else jpeg
        return DisplayedImage(name, Path(name).name or name, small, score, name, details)

    def _decode(self, name: str, columns: Columns) -> Image.Image:
        """Decode the image of a row."""
        if (path := file_of(name)) is not None:
            with suppress(ImageError):
                return open_image(path, at_least=KEPT_SIDE)
        small = _thumbnail(columns)
        if small is None:
            raise ImageError(f"{Path(name).name} cannot be opened, and the index has no thumbnail of it.")
        return decode_thumbnail(small)

    def _read_ids(self) -> list[str]:
        found: list[str] = []
        for batch in self._rows.scan(["id"]):
            found += [str(name) for name in batch["id"]]
            if len(found) >= SAMPLE_POOL:
                break
        return found

    def _fetch(self, names: Sequence[str]) -> list[Columns]:
        found = self._rows.fetch(names).columns if names else {}
        return [{column: values[place] for column, values in found.items()} for place in range(len(names))]

    def _items(self, names: Sequence[str]) -> list[DisplayedImage]:
        rows = self._fetch(names)
        return [self._show(name, row, _thumbnail(row)) for name, row in zip(names, rows, strict=True)]


def open_backend(uri: str, checkpoint: str | None = None, device: str = "auto") -> GalleryBackend:
    """Open an index for the page.

    Args:
        uri: The index.
        checkpoint: The model; by default the one that the index was made with.
        device: Device of the model; see `Gallery.open`.

    Raises:
        UnionError: If it cannot be opened, was made with another model, or is empty.
    """
    gallery = Gallery.open(uri, checkpoint, create=False, device=device)
    if not len(gallery):
        gallery.close()
        raise DataError(f"{uri} contains no images; add some with union-index")
    return GalleryBackend(gallery, Path(gallery.uri).name)


def model_name(model: IGROTModel) -> str:
    """Return the names of a model's backbone and heads, such as `tiny, transagg + union`."""
    return f"{model.backbone.name}, {model.fusion.kind} + {model.target.kind}"


def _thumbnail(columns: Columns) -> bytes | None:
    jpeg = columns.get(THUMBNAIL)
    return jpeg if isinstance(jpeg, bytes) else None
