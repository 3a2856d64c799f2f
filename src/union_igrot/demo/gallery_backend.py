"""A `Gallery` as a backend of the demo."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from PIL import Image

from union_igrot.demo.backends import DisplayedImage, SearchBackend, SearchRequest, heads_name, sketch_scale
from union_igrot.demo.uploads import KEPT_SIDE, decode_thumbnail, encode_thumbnail
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.engines.base import ColumnValue, VectorIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.results import THUMBNAIL, file_of
from union_igrot.images.decode import open_image

SAMPLE_POOL: Final = 20_000
"""Rows from which the images of the start page are sampled."""
_INTERNAL_COLUMNS: Final = {THUMBNAIL, "hash", "size", "mtime", "width", "height", "source"}
"""Columns that are not shown."""

Columns = Mapping[str, ColumnValue]


class ItemRenderer(ABC):
    """How rows of an index are shown on the page.

    Attributes:
        title: Name of the gallery.
        hint: A hint on supported queries, or an empty string.
        example: An example filter.
        pixelated: Whether images are shown without smoothing.
        thumbnails: Whether the index holds thumbnails.
    """

    title: str
    hint: str = ""
    example: str = ""
    pixelated: bool = False
    thumbnails: bool = True

    @abstractmethod
    def answer(self, name: str, columns: Columns, jpeg: bytes | None, score: float | None = None) -> DisplayedImage:
        """Return a row as shown on the page."""

    @abstractmethod
    def image(self, name: str, columns: Columns) -> Image.Image:
        """Decode the image of a row at full size.

        Raises:
            ImageError: If it cannot be decoded any more.
        """


@final
class FileItems(ItemRenderer):
    """Files indexed by `union-index`.

    Args:
        title: Name of the gallery.
    """

    example = "width >= 1000"

    def __init__(self, title: str) -> None:
        self.title = title

    def answer(self, name: str, columns: Columns, jpeg: bytes | None, score: float | None = None) -> DisplayedImage:
        """See `ItemRenderer`."""
        said = {
            column: str(value)
            for column, value in columns.items()
            if column not in _INTERNAL_COLUMNS and value is not None
        }
        small = encode_thumbnail(Image.new("RGB", (8, 8), "grey")) if jpeg is None else jpeg
        return DisplayedImage(name, Path(name).name or name, small, score, name, said)

    def image(self, name: str, columns: Columns) -> Image.Image:
        """See `ItemRenderer`. Falls back to the thumbnail if there is no readable file."""
        if (path := file_of(name)) is not None:
            with suppress(ImageError):
                return open_image(path, at_least=KEPT_SIDE)
        small = _small(columns)
        if small is None:
            raise ImageError(f"{Path(name).name} cannot be opened, and the index has no thumbnail of it.")
        return decode_thumbnail(small)


@final
class GalleryBackend(SearchBackend):
    """A gallery in memory, on disk or on a server.

    Args:
        gallery: The gallery.
        rows: Its index, to read single rows.
        renderer: How its rows are shown.
        name: Name of the method on the page; by default the gallery and the model's heads.
    """

    def __init__(self, gallery: Gallery, rows: VectorIndex, renderer: ItemRenderer, name: str = "") -> None:
        self.gallery, self.hint, self.example, self.pixelated = (
            renderer.title,
            renderer.hint,
            renderer.example,
            renderer.pixelated,
        )
        self.sketch_scale = sketch_scale(gallery.model)
        self.name = name or f"{renderer.title}: {heads_name(gallery.model)}"
        self._gallery, self._rows, self._album = gallery, rows, renderer
        self._pool: list[str] = []

    def __len__(self) -> int:
        return len(self._gallery)

    @property
    def columns(self) -> Sequence[str]:
        """See `SearchBackend`."""
        return ["id", *(name for name, kind in self._rows.columns.items() if kind != "bytes")]

    def search(self, request: SearchRequest, skip: int, count: int) -> list[DisplayedImage]:
        """See `SearchBackend`."""
        marked = [*request.liked, *request.disliked]
        if marked:
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
                thumbnails=self._album.thumbnails,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("where=", "Filter ", 1)) from None
        return [self._album.answer(hit.id, hit.columns, hit.jpeg, hit.score) for hit in found[skip:]]

    def some(self, count: int, sample_seed: int) -> list[DisplayedImage]:
        """See `SearchBackend`."""
        for fresh in (False, True):
            if fresh or not self._pool:
                self._pool = self._some_ids()
            chosen = random.Random(sample_seed).sample(self._pool, min(count, len(self._pool)))
            with suppress(DataError):  # an image that was removed since: its name is forgotten with the others
                return self._answers(chosen)
        raise DataError(f"{self.gallery} is being changed; try again in a moment.")

    def answer(self, name: str) -> DisplayedImage:
        """See `SearchBackend`."""
        (one,) = self._answers([name])
        return one

    def image(self, name: str) -> Image.Image:
        """See `SearchBackend`."""
        return self._album.image(name, self._row(name))  # the row first: nothing is opened that is not in the index

    def _some_ids(self) -> list[str]:
        found: list[str] = []
        for batch in self._rows.scan(["id"]):
            found += [str(name) for name in batch["id"]]
            if len(found) >= SAMPLE_POOL:
                break
        return found

    def _answers(self, names: Sequence[str]) -> list[DisplayedImage]:
        if not names:
            return []
        found = self._rows.fetch(names).columns
        rows = [{column: values[place] for column, values in found.items()} for place in range(len(names))]
        return [self._album.answer(name, row, _small(row)) for name, row in zip(names, rows, strict=True)]

    def _row(self, name: str) -> Columns:
        return {column: values[0] for column, values in self._rows.fetch([name]).columns.items()}


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
    return GalleryBackend(gallery, gallery.index, FileItems(Path(gallery.uri).name))


def _small(columns: Columns) -> bytes | None:
    jpeg = columns.get(THUMBNAIL)
    return jpeg if isinstance(jpeg, bytes) else None
