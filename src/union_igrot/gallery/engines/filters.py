"""A filter in three forms: evaluated on arrays, and as text for Lance and for Milvus.

Knows conditions as `index.where` reads them. Does not know who asks, nor any engine's calls.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.filter_language import Comparison, Condition, Constant, Every, pattern


class Values(NamedTuple):
    """One column of some rows.

    Attributes:
        values: What stands there; anything of the right type where it is None.
        known: Where it is not None.
    """

    values: Shaped[np.ndarray, " rows"]
    known: Bool[np.ndarray, " rows"]


def passing(condition: Condition, column: Callable[[str], Values]) -> Bool[np.ndarray, " rows"]:
    """Find the rows that pass a filter.

    Args:
        condition: The filter.
        column: Gives a column by its name.
    """
    if not isinstance(condition, Comparison):
        join = np.logical_and if isinstance(condition, Every) else np.logical_or
        return np.asarray(join.reduce([passing(part, column) for part in condition.parts]), dtype=bool)
    values, known = column(condition.column)
    if condition.op == "is null":
        return np.asarray(~known)
    if condition.op == "is not null":
        return known
    return np.asarray(known & _holds(condition, values))


def _holds(test: Comparison, values: Shaped[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    if test.op in ("in", "not in"):
        wanted = set(test.values)
        return np.fromiter(((value in wanted) is (test.op == "in") for value in values.tolist()), bool, len(values))
    if test.op in ("like", "not like"):
        found = _regex(str(test.values[0])).fullmatch
        return np.fromiter(((found(value) is not None) is (test.op == "like") for value in values), bool, len(values))
    compare = {
        "=": np.equal,
        "!=": np.not_equal,
        "<": np.less,
        "<=": np.less_equal,
        ">": np.greater,
        ">=": np.greater_equal,
    }[test.op]
    constant = np.array(test.values[0], dtype=values.dtype)
    return np.asarray(compare(values, constant), dtype=bool)


def _regex(text: str) -> re.Pattern[str]:
    parts = (".*" if part is None else re.escape(part) if part else "." for part in pattern(text))
    return re.compile("".join(parts), re.DOTALL)


def lance_text(condition: Condition) -> str:
    """Write a filter in Lance's SQL."""
    if not isinstance(condition, Comparison):
        joint = " AND " if isinstance(condition, Every) else " OR "
        return "(" + joint.join(lance_text(part) for part in condition.parts) + ")"
    name = f"`{condition.column}`"
    if not condition.values:
        return "false" if condition.op == "in" else f"({name} {condition.op.upper()})"
    constants = [_lance_constant(value) for value in condition.values]
    inside = f"({', '.join(constants)})" if condition.op in ("in", "not in") else constants[0]
    text = f"{name} {condition.op.upper()} {inside}"
    # Lance makes of "not in (a) or not in (b)" what is true of every row, those without a value too.
    return f"({name} IS NOT NULL AND {text})" if condition.op in ("!=", "not in", "not like") else f"({text})"


def _lance_constant(value: Constant) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value).lower()


def milvus_text(condition: Condition, patterns: bool = True) -> str:
    """Write a filter in Milvus' language, for columns kept in the dynamic field.

    A row without a value has no key there, and what Milvus answers for it differs by the
    test: so each test that would be true of it is joined with one that is not.

    Args:
        condition: The filter.
        patterns: Whether the server knows `like` beyond a beginning of the text, as Milvus
            does from 2.4 on.

    Raises:
        ConfigError: Where the server cannot evaluate a `like`.
    """
    if not isinstance(condition, Comparison):
        joint = " and " if isinstance(condition, Every) else " or "
        return "(" + joint.join(milvus_text(part, patterns) for part in condition.parts) + ")"
    name = "id" if condition.column == "id" else f'$meta["{milvus_key(condition.column)}"]'
    op = condition.op
    if op in ("is null", "is not null"):
        there = _milvus_there(condition, name)
        return there if op == "is not null" else f"(not {there})"
    if op in ("in", "not in"):
        inside = ", ".join(_milvus_constant(value) for value in condition.values)
        text = f"({name} in [{inside}])"
    elif op in ("like", "not like"):
        text = _milvus_like(name, str(condition.values[0]), patterns)
    else:
        text = f"({name} {'==' if op == '=' else op} {_milvus_constant(condition.values[0])})"
    if op == "!=":
        return f"({_milvus_there(condition, name)} and {text})"
    return f"({_milvus_there(condition, name)} and (not {text}))" if op.startswith("not ") else text


def milvus_key(column: str) -> str:
    """Return the key of a column in Milvus' dynamic field: a word that Milvus never takes for its own."""
    return f"c_{column}" if re.fullmatch("[A-Za-z0-9_]+", column) else f"x_{column.encode().hex()}"


def _milvus_there(test: Comparison, name: str) -> str:
    """Say that a row has a value; Milvus 2.3 does not join `exists` with other tests."""
    if name == "id":
        return "(row >= 0)"
    if test.kind in ("int", "float"):
        return f"({name} >= 0 or {name} < 0)"
    return f"({name} in [true, false])" if test.kind == "bool" else f'({name} >= "")'


def _milvus_like(name: str, text: str, patterns: bool) -> str:
    parts = pattern(text)
    if not parts or (len(parts) == 1 and parts[0]):
        return f"({name} == {_milvus_constant(parts[0] or '' if parts else '')})"
    if len(parts) == 2 and parts[0] and parts[1] is None:
        return _milvus_beginning(name, parts[0])
    if all(part is None for part in parts):
        return f'({name} >= "")'
    if not patterns:
        raise ConfigError(
            f"like {text!r} needs Milvus 2.4 or later, this server compares beginnings alone: like 'beginning%'"
        )
    return f"({name} like {_milvus_constant(text)})"


def _milvus_beginning(name: str, beginning: str) -> str:
    """Compare with the first text behind all that begin so: exact on every version, and a sorted index can serve it."""
    least = f"{name} >= {_milvus_constant(beginning)}"
    kept = beginning.rstrip(chr(0x10FFFF))
    if not kept:
        return f"({least})"
    following = 0xE000 if ord(kept[-1]) == 0xD7FF else ord(kept[-1]) + 1  # surrogates are no characters
    return f"({least} and {name} < {_milvus_constant(kept[:-1] + chr(following))})"


def _milvus_constant(value: Constant) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value).lower()
