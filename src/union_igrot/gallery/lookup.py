"""Rows that people name: by their id, by the path of their file; and the embeddings of those that were judged.

Knows indexes. Does not know models or images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.filters import match_any
from union_igrot.gallery.queries import Wanted, path_id

_AT_ONCE: Final = 500
"""Ids in one filter."""


def rows_named(index: VectorIndex, names: Sequence[str], *, gone: bool = False) -> tuple[str, ...]:
    """Return the ids of rows that are named as people do.

    Args:
        index: The index.
        names: Ids, or paths of files from where one stands.
        gone: Whether files that are not there any more may be meant; else only names of files are looked up.

    Returns:
        The ids; what is neither stays as it is.
    """
    unsure = {
        name: whole
        for name in names
        if (whole := path_id(name)) != name and (gone or os.path.exists(whole))  # noqa: PTH110 - Path's raises for long names
    }
    there: set[str] = set()
    asked = [*unsure, *unsure.values()]
    for at in range(0, len(asked), _AT_ONCE):
        for batch in index.scan(["id"], match_any("id", asked[at : at + _AT_ONCE])):
            there.update(str(one) for one in batch["id"])
    return tuple(unsure[name] if name not in there and unsure.get(name) in there else name for name in names)


def named_rows(index: VectorIndex, wanted: Sequence[Wanted]) -> list[Wanted]:
    """Return queries with the ids of the rows that they name."""
    parts = [name for one in wanted for name in (*one.liked, *one.disliked, *one.exclude)]
    named = dict(zip(parts, rows_named(index, parts), strict=True))

    def ids(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(named[name] for name in names)

    return [replace(one, liked=ids(one.liked), disliked=ids(one.disliked), exclude=ids(one.exclude)) for one in wanted]


def judged_rows(
    index: VectorIndex, wanted: Sequence[Wanted], names: Sequence[str], uri: str
) -> Mapping[str, Float[Tensor, " dim"]]:
    """Read the embeddings of what was liked and disliked.

    Args:
        index: The index.
        wanted: The queries.
        names: What they are called in an error.
        uri: What the index is called there.

    Raises:
        DataError: Where one is not there; says of which query.
    """
    judged = list(dict.fromkeys(name for one in wanted for name in (*one.liked, *one.disliked)))
    if not judged:
        return {}
    try:
        rows = index.fetch(judged)
    except DataError:
        for one, called in zip(wanted, names, strict=True):
            for name in (*one.liked, *one.disliked):
                if not rows_there(index, name):
                    where = f"{called}: " if called else ""
                    raise DataError(f"{where}{name!r} is not in {uri}; name an image of it, or leave it out") from None
        raise
    return dict(zip(rows.ids, rows.vectors, strict=True))


def rows_there(index: VectorIndex, name: str) -> bool:
    """Whether a row is there."""
    return any(batch["id"] for batch in index.scan(["id"], match_any("id", [name])))
