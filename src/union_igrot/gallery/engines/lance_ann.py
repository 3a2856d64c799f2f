"""The approximate index of a Lance table: which one, how it is built and how it is asked.

An inverted file over the square root of the rows' number in partitions. Up to `FLAT_ROWS`
it holds the vectors as they are; above, where they would double a large table, it holds
RaBitQ's codes of them, a sixth of the size, and the best are scored again from the table.

Knows Lance's indexes. Does not know columns besides `id` and `vector`.
"""

import math
import re
from typing import Any, Final, NamedTuple

from jaxtyping import Float32
from torch import Tensor

FLAT_ROWS: Final = 500_000
"""Rows up to which the index holds whole vectors."""
PROBES: Final = 32
"""Partitions searched at least."""
SHARE: Final = 16
"""One partition in so many is searched in a large index."""
SPARE: Final = 4
"""Times as many rows as are asked for lie in the partitions searched, at least."""
LARGER: Final = 2
"""How many times larger than the newer parts together the next older part of an index is left alone."""
REFINE: Final = 5
"""Times as many candidates of the codes are scored again."""

_NAME: Final = re.compile(r"vector_([a-z_]+)_(\d+)")


class Built(NamedTuple):
    """An approximate index.

    Attributes:
        name: What Lance calls it.
        kind: Lance's type of it.
        partitions: How many it has.
        rows: How many rows are in it; those written later are searched exactly.
    """

    name: str
    kind: str
    partitions: int
    rows: int


def built(table: Any) -> Built | None:
    """Return the approximate index of a table, or None."""
    for index in table.describe_indices():
        if found := _NAME.fullmatch(index.name):
            return Built(index.name, found.group(1).upper(), int(found.group(2)), index.num_rows_indexed)
    return None


def renew(table: Any) -> None:
    """Build the indexes of a table, or bring them up to date.

    One that was made for a quarter of the rows or fewer is made anew; else the rows written
    since are put into the partitions there are.
    """
    rows = table.count_rows()
    if not rows:
        return
    if any(index.name == "id" for index in table.describe_indices()):
        table.optimize.optimize_indices(index_names=["id"])
    else:
        table.create_scalar_index("id", "BTREE", name="id", replace=True)
    old, kind, partitions = built(table), "IVF_FLAT" if rows <= FLAT_ROWS else "IVF_RQ", max(1, math.isqrt(rows))
    if old is not None and old.kind == kind and partitions < 2 * old.partitions:
        if old.rows < rows:
            _extend(table, old.name)
        return
    name = f"vector_{kind.lower()}_{partitions}"
    table.create_index("vector", kind, name=name, metric="dot", num_partitions=partitions, replace=True)
    if old is not None and old.name != name:
        table.drop_index(old.name)


def _extend(table: Any, name: str) -> None:
    """Put rows written since into an index.

    Each time makes a part of its own, and data files of rows in different parts are never brought together. So the
    newest parts become one with it, as long as the next older is not much larger than they are together: there are
    never more than a few, and a large one is seldom written anew.
    """
    index = next(one for one in table.describe_indices() if one.name == name)
    rows = {fragment.fragment_id: fragment.physical_rows for fragment in table.get_fragments()}
    oldest_first = sorted(index.segments, key=lambda part: part.dataset_version_at_last_update)
    sizes = [sum(rows.get(one, 0) for one in part.fragment_ids) for part in oldest_first]
    together, merged = sum(rows.values()) - sum(sizes), 0
    while sizes and sizes[-1] <= LARGER * together:
        together += sizes.pop()
        merged += 1
    table.optimize.optimize_indices(index_names=[name], num_indices_to_merge=merged)


def nearest(table: Any, query: Float32[Tensor, " dim"], k: int, filter_text: str | None, columns: list[str]) -> Any:
    """Ask for the k rows of (about) the largest dot product; rows not in the index are scored too.

    A filter is applied first. What passes it lies in more partitions, and the fewer pass the
    more so: Lance then searches on until it finds the answers settled.
    """
    index = built(table)
    assert index is not None
    enough = math.ceil(SPARE * k * index.partitions / max(1, index.rows))
    probes = min(index.partitions, max(PROBES, index.partitions // SHARE, enough))
    asked = {
        "column": "vector",
        "q": query.numpy(),
        "k": k,
        "metric": "dot",
        "minimum_nprobes": probes,
        "maximum_nprobes": probes if filter_text is None else None,
        "refine_factor": None if index.kind == "IVF_FLAT" else REFINE,
    }

    def ask() -> Any:
        scanner = table.scanner(
            columns=columns, nearest=asked, filter=filter_text, prefilter=True, disable_scoring_autoprojection=True
        )
        return scanner.to_table()

    found = ask()
    if filter_text is None and probes < index.partitions and len(found) < min(k, table.count_rows()):
        asked["minimum_nprobes"] = asked["maximum_nprobes"] = index.partitions  # some were nearly empty
        found = ask()
    return found
