"""What a search found: images with scores, shown by notebooks as images.

Knows rows of an index. Does not know how they were found.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final, overload

from PIL import Image

from union_igrot.gallery.display import hits_html
from union_igrot.gallery.engines.base import ColumnValue, IndexHits

THUMBNAIL: Final = "thumbnail"
"""The column that holds a small JPEG."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One image that was found.

    Attributes:
        id: What it is called: its path, or the id it was given.
        score: Cosine similarity to the query, -1..1.
        columns: What is kept beside it: `hash`, `size`, `mtime`, `width`, `height`, `source` and the user's own.
        jpeg: A small JPEG of it; None where none was asked for.
    """

    id: str
    score: float
    columns: Mapping[str, ColumnValue] = field(hash=False)  # so that hits can stand in sets
    jpeg: bytes | None = field(default=None, repr=False)

    @property
    def path(self) -> Path | None:
        """The file, where it is one and can be seen; None for bytes in memory and members of tar files."""
        return file_of(self.id)

    @property
    def thumbnail(self) -> Image.Image | None:
        """The small image, 160 pixels at most; None where none was asked for."""
        return None if self.jpeg is None else Image.open(io.BytesIO(self.jpeg))


@final
class SearchResult(Sequence[Hit]):
    """The answers to one query, best first: a sequence of `Hit`, which a notebook shows as images."""

    def __init__(self, hits: Sequence[Hit]) -> None:
        self._hits = tuple(hits)

    @property
    def ids(self) -> list[str]:
        """What was found, best first."""
        return [hit.id for hit in self._hits]

    @property
    def scores(self) -> list[float]:
        """Cosine similarities, not increasing."""
        return [hit.score for hit in self._hits]

    def __len__(self) -> int:
        return len(self._hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._hits)

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> "SearchResult": ...
    def __getitem__(self, place: int | slice) -> "Hit | SearchResult":
        return SearchResult(self._hits[place]) if isinstance(place, slice) else self._hits[place]

    def __repr__(self) -> str:
        lines = [f"{rank:>4}  {hit.score:7.4f}  {hit.id}" for rank, hit in enumerate(self._hits, 1)]
        return "\n".join([f"{len(lines)} answers", *lines])

    def _repr_html_(self) -> str:
        return hits_html(self._hits)


def file_of(name: str) -> Path | None:
    """Return the file that a row is named after, where it can be seen.

    Files are indexed under their absolute paths; any other name is no file's, even if one of that name lies about.
    """
    there = Path(name).is_absolute() and os.path.isfile(name)  # noqa: PTH113 - Path's raises for a closed folder
    return Path(name) if there else None


def search_result(found: IndexHits, k: int, without: Sequence[str]) -> SearchResult:
    """Take the first k rows found, some left out."""
    gone = set(without)
    images = found.columns.get(THUMBNAIL)
    others = {name: values for name, values in found.columns.items() if name != THUMBNAIL}
    hits = []
    for place, (name, score) in enumerate(zip(found.ids, found.scores.tolist(), strict=True)):
        if name in gone:
            continue
        jpeg = None if images is None else images[place]
        columns = {column: values[place] for column, values in others.items()}
        hits.append(Hit(name, score, columns, jpeg if isinstance(jpeg, bytes) else None))
    return SearchResult(hits[:k])
