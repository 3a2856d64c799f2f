"""What may be written and asked, the same for every engine.

Knows rows, queries and cards. Does not know where they are kept.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.base import Rows, Value
from union_igrot.gallery.engines.filter_language import Kind

RESERVED: Final = ("id", "row", "vector")
"""Names that a column cannot have, as engines keep something of their own there."""

_INT64: Final = 2**63
_KINDS: Final[tuple[tuple[type, Kind], ...]] = (
    (bool, "bool"),  # a bool is an int too
    (int, "int"),
    (float, "float"),
    (str, "str"),
    (bytes, "bytes"),
)


def fitted(rows: Rows, dim: int, kinds: Mapping[str, Kind]) -> tuple[Rows, dict[str, Kind]]:
    """Check rows and bring them into one form.

    Args:
        rows: What a caller gave.
        dim: Width of the index.
        kinds: The columns it has.

    Returns:
        The rows, their vectors float32 on the CPU, whole numbers in a column of numbers made
        floats, columns without any value left out; and the kinds of the columns that are new.

    Raises:
        DataError: Where ids, vectors or columns cannot be kept.
    """
    check_ids(rows.ids)
    if len(set(rows.ids)) != len(rows.ids):
        twice = max(rows.ids, key=Counter(rows.ids).__getitem__)
        raise DataError(f"the id {twice!r} stands twice among {len(rows.ids)} rows; give each row once")
    if rows.vectors.shape != (len(rows.ids), dim):
        given = "x".join(str(size) for size in rows.vectors.shape)
        raise DataError(f"vectors of shape {given} for {len(rows.ids)} rows of an index of width {dim}")
    vectors = rows.vectors.detach().to("cpu", torch.float32).contiguous()
    wrong = (~vectors.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise DataError(f"the vector of {rows.ids[wrong[0]]!r} holds nan or infinity; encode it again")
    new: dict[str, Kind] = {}
    columns: dict[str, Sequence[Value]] = {}
    for name, values in rows.columns.items():
        if len(values) != len(rows.ids):
            raise DataError(f"the column {name!r} has {len(values)} values for {len(rows.ids)} rows; give one each")
        kind = _kind_of(name, values, kinds.get(name))
        if kind is not None:
            if name not in kinds:
                _check_name(name)
                new[name] = kind
            columns[name] = [None if value is None else _FORMS[kind](name, value) for value in values]
    return Rows(list(rows.ids), vectors, columns), new


def check_ids(ids: Sequence[str]) -> None:
    """Refuse ids that cannot be kept.

    Raises:
        DataError: Where one is no text, empty, or holds what is no Unicode text (a path's odd bytes).
    """
    if isinstance(ids, str):
        raise DataError(f"ids are a list of texts; got the text {ids!r}")
    for one in ids:
        if not isinstance(one, str):
            raise DataError(f"the id {one!r} is {type(one).__name__}; give a text")
        if not one:
            raise DataError("an id is empty; give each row a name")
        _check_text("the id", one)


def fitted_queries(queries: Float[Tensor, "queries dim"], dim: int, k: int) -> Float32[Tensor, "queries dim"]:
    """Check a search, and bring its queries to float32 on the CPU.

    Raises:
        ConfigError: Where k is not at least 1.
        DataError: Where the queries' width is another, or one is not finite.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; ask for at least 1 answer")
    if queries.ndim != 2 or queries.shape[1] != dim:
        given = "x".join(str(size) for size in queries.shape)
        raise DataError(f"queries of shape {given} for an index of width {dim}; was it made by another model?")
    if not queries.isfinite().all():
        raise DataError("a query holds nan or infinity; encode it again")
    return queries.detach().to("cpu", torch.float32)


def written_card(card: Mapping[str, Any] | None) -> str:
    """Write a card as JSON.

    Raises:
        ConfigError: Where it holds what JSON cannot.
    """
    try:
        return json.dumps(dict(card or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the card cannot be kept as JSON ({error})") from None


def _kind_of(name: str, values: Sequence[Value], kept: Kind | None) -> Kind | None:
    """Find what a column holds; None where no value says it."""
    found = {_kind(name, value) for value in values if value is not None}
    kind = kept or ("float" if found == {"int", "float"} else next(iter(found), None))
    allowed = {"int", "float"} if kind == "float" else {kind}
    if found - allowed:
        held = f"holds {kind}" if kept else f"holds {kind} in one row"
        raise DataError(f"the column {name!r} {held} and cannot hold {', '.join(sorted(found - allowed))}")
    return kind


def _kind(name: str, value: object) -> Kind:
    for kind, called in _KINDS:
        if isinstance(value, kind):
            return called
    raise DataError(
        f"the column {name!r} holds a {type(value).__name__}; give str, int, float, bool, bytes or None "
        "(.item() makes one of a numpy number)"
    )


def _check_name(name: str) -> None:
    _check_text("the column's name", name)
    if not name or name in RESERVED or name.startswith("_") or not name.isprintable() or set(name) & set('."`\\'):
        raise DataError(
            f"a column cannot be called {name!r}: not {', '.join(RESERVED)}, no '_' in front, and no dot, quote, "
            "backquote, backslash or control character; rename it"
        )


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} {text!r} is no valid Unicode text; rename it") from None


def _text(name: str, value: Any) -> str:
    _check_text(f"in the column {name!r}", value)
    return str(value)


def _whole(name: str, value: Any) -> int:
    if not -_INT64 < value < _INT64:
        raise DataError(f"the column {name!r} holds {value}, which is beyond 64 bits; give it as text")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not math.isfinite(value):
        raise DataError(f"the column {name!r} holds {value}; give None where there is no number")
    return float(value) + 0.0  # engines do not agree on whether -0.0 equals 0.0


_FORMS: Final[Mapping[Kind, Callable[[str, Any], Value]]] = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": lambda _, value: bool(value),
    "bytes": lambda _, value: bytes(value),
}
