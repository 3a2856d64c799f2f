"""A gallery and its model as something to search: of files that were indexed, or of pictures held elsewhere.

Knows galleries and the rows of their index. Does not know pages, turns or users.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from PIL import Image

from union_igrot.demo.engines import Answer, Engine, Question, method, sketch_room
from union_igrot.demo.pictures import KEPT_SIDE, decoded, encoded
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.engines.base import Value, VectorIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.results import THUMBNAIL, file_of
from union_igrot.images.decode import open_image

POOL: Final = 20_000
"""Rows among which the pictures to start from are chosen."""
_UNSAID: Final = {THUMBNAIL, "hash", "size", "mtime", "width", "height", "source"}
"""Columns that indexing writes for itself."""

Columns = Mapping[str, Value]


class Album(ABC):
    """What the pictures of a gallery look like on the page.

    Attributes:
        title: What the gallery is called.
        hint: A sentence on what can be asked, or an empty one.
        example: A filter to show as an example.
        pixelated: Whether its pictures are so small that they are shown with their pixels' edges.
        thumbnails: Whether the index keeps the small pictures.
    """

    title: str
    hint: str = ""
    example: str = ""
    pixelated: bool = False
    thumbnails: bool = True

    @abstractmethod
    def answer(self, name: str, columns: Columns, jpeg: bytes | None, score: float | None = None) -> Answer:
        """Show a row by its id, its columns and its thumbnail."""

    @abstractmethod
    def picture(self, name: str, columns: Columns) -> Image.Image:
        """Open a row's picture in full.

        Raises:
            ImageError: Where it cannot be opened any more.
        """


@final
class Files(Album):
    """Files that `union-index` put into an index.

    Args:
        title: What the gallery is called.
    """

    example = "width >= 1000"

    def __init__(self, title: str) -> None:
        self.title = title

    def answer(self, name: str, columns: Columns, jpeg: bytes | None, score: float | None = None) -> Answer:
        """See `Album`."""
        said = {column: str(value) for column, value in columns.items() if column not in _UNSAID and value is not None}
        small = encoded(Image.new("RGB", (8, 8), "grey")) if jpeg is None else jpeg
        return Answer(name, Path(name).name or name, small, score, name, said)

    def picture(self, name: str, columns: Columns) -> Image.Image:
        """See `Album`. Where it is no file, or the file is gone or broken, the thumbnail stands for it."""
        if (path := file_of(name)) is not None:
            with suppress(ImageError):
                return open_image(path, at_least=KEPT_SIDE)
        small = _small(columns)
        if small is None:
            raise ImageError(f"{Path(name).name} cannot be opened, and the index keeps no small picture of it.")
        return decoded(small)


@final
class GalleryEngine(Engine):
    """A gallery in memory, on disk or on a server.

    Args:
        gallery: Searches.
        rows: The same index, for reading single rows.
        album: How its pictures are shown.
        name: What its method is called on the page; the gallery and the model's heads where empty.
    """

    def __init__(self, gallery: Gallery, rows: VectorIndex, album: Album, name: str = "") -> None:
        self.gallery, self.hint, self.example, self.pixelated = album.title, album.hint, album.example, album.pixelated
        self.sketch_room = sketch_room(gallery.model)
        self.name = name or f"{album.title}: {method(gallery.model)}"
        self._gallery, self._rows, self._album = gallery, rows, album
        self._pool: list[str] = []

    def __len__(self) -> int:
        return len(self._gallery)

    @property
    def columns(self) -> Sequence[str]:
        """See `Engine`."""
        return ["id", *(name for name, kind in self._rows.columns.items() if kind != "bytes")]

    def search(self, question: Question, skip: int, count: int) -> list[Answer]:
        """See `Engine`."""
        marked = [*question.liked, *question.disliked]
        if marked:
            try:
                self._rows.fetch(marked)
            except DataError:
                raise DataError(
                    f"{self.gallery} does not hold every picture that is marked; clear the marks."
                ) from None
        try:
            found = self._gallery.search(
                question.picture,
                question.text,
                skip + count,
                question.where,
                liked=question.liked,
                disliked=question.disliked,
                exclude=question.exclude,
                thumbnails=self._album.thumbnails,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("where=", "Filter ", 1)) from None
        return [self._album.answer(hit.id, hit.columns, hit.jpeg, hit.score) for hit in found[skip:]]

    def some(self, count: int, deal: int) -> list[Answer]:
        """See `Engine`."""
        for fresh in (False, True):
            if fresh or not self._pool:
                self._pool = self._some_ids()
            chosen = random.Random(deal).sample(self._pool, min(count, len(self._pool)))
            with suppress(DataError):  # a picture that was removed since: its name is forgotten with the others
                return self._answers(chosen)
        raise DataError(f"{self.gallery} is being changed; try again in a moment.")

    def answer(self, name: str) -> Answer:
        """See `Engine`."""
        (one,) = self._answers([name])
        return one

    def picture(self, name: str) -> Image.Image:
        """See `Engine`."""
        return self._album.picture(name, self._row(name))  # first the row: no name is opened that the index lacks

    def _some_ids(self) -> list[str]:
        found: list[str] = []
        for batch in self._rows.scan(["id"]):
            found += [str(name) for name in batch["id"]]
            if len(found) >= POOL:
                break
        return found

    def _answers(self, names: Sequence[str]) -> list[Answer]:
        if not names:
            return []
        found = self._rows.fetch(names).columns
        rows = [{column: values[place] for column, values in found.items()} for place in range(len(names))]
        return [self._album.answer(name, row, _small(row)) for name, row in zip(names, rows, strict=True)]

    def _row(self, name: str) -> Columns:
        return {column: values[0] for column, values in self._rows.fetch([name]).columns.items()}


def open_engine(uri: str, checkpoint: str | None = None, device: str = "auto") -> GalleryEngine:
    """Open a gallery of files for the page.

    Args:
        uri: Its index.
        checkpoint: The model to search it with; the one it was made with where None.
        device: What embeds the queries; see `Gallery.open`.

    Raises:
        UnionError: Where it cannot be opened, was made with another model, or is empty.
    """
    gallery = Gallery.open(uri, checkpoint, create=False, device=device)
    if not len(gallery):
        gallery.close()
        raise DataError(f"{uri} holds no picture; add some with union-index")
    return GalleryEngine(gallery, gallery.index, Files(Path(gallery.uri).name))


def _small(columns: Columns) -> bytes | None:
    jpeg = columns.get(THUMBNAIL)
    return jpeg if isinstance(jpeg, bytes) else None
