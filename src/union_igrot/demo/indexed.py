"""A gallery of the user's own, made by `union-index`, as something to search.

Knows galleries and the rows of their index. Does not know pages, turns or users.
"""

import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from PIL import Image

from union_igrot.data.transforms import open_picture
from union_igrot.demo.engines import Answer, Engine, method, sketch_room
from union_igrot.demo.pictures import KEPT_SIDE, decoded, encoded
from union_igrot.errors import DataError, PictureError
from union_igrot.gallery.answers import THUMBNAIL
from union_igrot.gallery.gallery import Gallery
from union_igrot.index.base import Value, VectorIndex
from union_igrot.index.open import open_index

POOL: Final = 20_000
"""Rows among which the pictures to start from are chosen."""
_UNSAID: Final = {THUMBNAIL, "hash", "size", "mtime", "width", "height", "source"}
"""Columns that indexing writes for itself."""


@final
class GalleryEngine(Engine):
    """A gallery on disk or on a server.

    Args:
        gallery: Searches.
        rows: The same index, for reading single rows.
    """

    def __init__(self, gallery: Gallery, rows: VectorIndex) -> None:
        self.gallery, self.sketch_room = Path(gallery.uri).name, sketch_room(gallery.model)
        self.name = f"{self.gallery}: {method(gallery.model)}"
        self._gallery, self._rows = gallery, rows
        self._pool: list[str] = []

    def __len__(self) -> int:
        return len(self._gallery)

    def search(
        self, picture: Image.Image | None, text: str | None, skip: int, count: int, exclude: str | None
    ) -> list[Answer]:
        """See `Engine`."""
        without = () if exclude is None else (exclude,)
        found = self._gallery.search(picture, text, skip + count, exclude=without)
        return [_answer(hit.id, hit.columns, hit.jpeg, hit.score) for hit in found[skip:]]

    def some(self, count: int, deal: int) -> list[Answer]:
        """See `Engine`."""
        if not self._pool:
            for batch in self._rows.scan(["id"]):
                self._pool += [str(name) for name in batch["id"]]
                if len(self._pool) >= POOL:
                    break
        chosen = random.Random(deal).sample(self._pool, min(count, len(self._pool)))
        return [self.answer(name) for name in chosen] if chosen else []

    def answer(self, name: str) -> Answer:
        """See `Engine`."""
        columns = self._row(name)
        return _answer(name, columns, _small(columns))

    def picture(self, name: str) -> Image.Image:
        """See `Engine`. Where it is no file, or the file is gone or broken, the thumbnail stands for it."""
        small = _small(self._row(name))  # first: no name is opened that the index does not hold
        if Path(name).is_file():
            with suppress(PictureError):
                return open_picture(Path(name), at_least=KEPT_SIDE)
        if small is None:
            raise PictureError(f"{Path(name).name} cannot be opened, and the index keeps no small picture of it.")
        return decoded(small)

    def _row(self, name: str) -> Mapping[str, Value]:
        return {column: values[0] for column, values in self._rows.fetch([name]).columns.items()}


def open_engine(uri: str, checkpoint: str | None = None) -> GalleryEngine:
    """Open a gallery for the page.

    Args:
        uri: Its index.
        checkpoint: The model to search it with; the one it was made with where None.

    Raises:
        UnionError: Where it cannot be opened, was made with another model, or is empty.
    """
    gallery = Gallery.open(uri, checkpoint, create=False)
    if not len(gallery):
        gallery.close()
        raise DataError(f"{uri} holds no picture; add some with union-index")
    return GalleryEngine(gallery, open_index(gallery.uri))


def _small(columns: Mapping[str, Value]) -> bytes | None:
    jpeg = columns.get(THUMBNAIL)
    return jpeg if isinstance(jpeg, bytes) else None


def _answer(name: str, columns: Mapping[str, Value], jpeg: bytes | None, score: float | None = None) -> Answer:
    said = {column: str(value) for column, value in columns.items() if column not in _UNSAID and value is not None}
    small = encoded(Image.new("RGB", (8, 8), "grey")) if jpeg is None else jpeg
    return Answer(name, Path(name).name or name, small, score, name, said)
