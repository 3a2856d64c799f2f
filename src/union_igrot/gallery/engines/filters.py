"""The filter language of all engines: a small part of SQL, read into tests of single columns.

::

    class = 'dog' and year > 2020
    "taken by" in ('Ann', 'Bo') or not (size between 1 and 2.5 or path like 'cats/%')

A column stands on one side of `=`, `!=`, `<>`, `<`, `<=`, `>`, `>=` and a constant on the
other; further `in (...)`, `between ... and ...`, `like`, `is null`, each also with `not`;
a column of truth values stands alone too. `and`, `or`, `not` and parentheses as in SQL, and
so is None: a test of it is neither true nor false, and only rows whose filter is true pass.
Text stands in single quotes, a quote in it twice; a column's name in double quotes where it
is no single word. Names and text are compared as they are written, `like` too: `%` is any
text, `_` one character, and a backslash takes either, or itself, by the letter.

Reading is sqlglot's. Knows columns' kinds; does not know rows, nor how an engine filters.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from union_igrot.errors import ConfigError

ColumnKind = Literal["str", "int", "float", "bool", "bytes"]
"""What a column holds besides None."""
_WORDS: Final = frozenset(("and", "or", "not", "in", "between", "like", "is", "null", "true", "false", "escape"))
Constant = str | int | float | bool
Op = Literal["=", "!=", "<", "<=", ">", ">=", "in", "not in", "like", "not like", "is null", "is not null"]

_NEGATED: Final[Mapping[Op, Op]] = {
    "=": "!=",
    "!=": "=",
    "<": ">=",
    "<=": ">",
    ">": "<=",
    ">=": "<",
    "in": "not in",
    "not in": "in",
    "like": "not like",
    "not like": "like",
    "is null": "is not null",
    "is not null": "is null",
}
_TURNED: Final[Mapping[Op, Op]] = {"=": "=", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_MOST_TESTS: Final = 1000
_NAMES: Final = {
    "str": "text",
    "int": "whole numbers",
    "float": "numbers",
    "bool": "true and false",
    "bytes": "bytes",
}
_INT64: Final = 2**63


@dataclass(frozen=True, slots=True)
class Comparison:
    """One column against constants; not true where the column is None, but for `is null`.

    Attributes:
        column: Its name.
        op: What is tested; there is no `not` in front of a test.
        values: The constants: none for `is null`, any number for `in`, else one. An `in` of
            none is never true, and a `not in` has some.
        kind: What the column holds; given by `fit`.
    """

    column: str
    op: Op
    values: tuple[Constant, ...] = ()
    kind: ColumnKind = "str"


@dataclass(frozen=True, slots=True)
class Every:
    """True where all parts are."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class Some:
    """True where at least one part is."""

    parts: tuple["Condition", ...]


Condition = Comparison | Every | Some
"""A filter without `not`; as each test says itself what it is for None, true is all that has to be followed."""


def match_any(column: str, values: Iterable[str]) -> str:
    """Write the filter that takes rows whose column holds one of some texts; at least one."""
    return f"{column} in ({', '.join(chr(39) + value.replace(chr(39), 2 * chr(39)) + chr(39) for value in values)})"


def parse_filter(text: str, kinds: Mapping[str, ColumnKind]) -> Condition:
    """Read a filter.

    Args:
        text: The filter.
        kinds: The columns there are, and what each holds.

    Returns:
        The condition, its constants as the columns need them.

    Raises:
        ConfigError: Where it is not of the language, names another column, or compares a
            column with what it cannot hold; the message names the place.
    """
    shown = repr(text if len(text) <= 200 else f"{text[:197]}...")
    try:
        text.encode()
        return _fit(_parse(text), kinds)
    except ConfigError as error:
        raise ConfigError(f"where={shown}: {error}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"where={shown}: holds half a letter; type it again") from None
    except RecursionError:
        raise ConfigError(f"where={shown}: too many brackets within each other; use fewer") from None


@lru_cache(maxsize=256)  # one filter is asked with many queries
def _parse(text: str) -> Condition:
    from sqlglot import exp, parse_one  # noqa: PLC0415 - only where a filter is given
    from sqlglot.errors import ParseError, TokenError  # noqa: PLC0415

    if not text.strip():
        raise ConfigError("is empty; write such as class = 'dog' and year > 2020")
    log = logging.getLogger("sqlglot")
    before = log.disabled
    log.disabled = True  # it tells of commands that begin like the filter
    try:
        return _condition(parse_one(text, into=exp.Condition), negated=False)
    except ParseError as error:
        advice = _advice(text)
        if not error.errors:
            raise ConfigError(f"cannot be read{advice}") from None
        place = error.errors[0]
        what = str(place["description"])
        what = "something is missing here" if what.startswith("Required keyword") else what
        at = f"line {place['line']}, character {place['col']}"
        raise ConfigError(f"cannot be read at {at} (near {place['highlight']!r}): {what}{advice}") from None
    except TokenError:
        raise ConfigError("cannot be read; a quote may be left open") from None
    except ValueError as error:  # of names that are none
        raise ConfigError(f"cannot be read ({error})") from None
    finally:
        log.disabled = before


def _advice(text: str) -> str:
    """Say how a name is written that means something else in SQL, where there is one outside of quotes."""
    from sqlglot import exp, parse_one  # noqa: PLC0415
    from sqlglot.errors import ParseError, TokenError  # noqa: PLC0415

    for word in re.findall(r"[a-z_]\w*", re.sub(r"'[^']*'|\"[^\"]*\"", " ", text), re.IGNORECASE):
        if word.lower() not in _WORDS:
            try:
                parse_one(f"{word} = 1", into=exp.Condition)
            except (ParseError, TokenError):
                return f'; {word} is a word of SQL, and as a name stands in double quotes: "{word}"'
    return ""


def _condition(node: Any, negated: bool) -> Condition:
    """Turn a parsed expression, or its opposite, into tests."""
    from sqlglot import exp  # noqa: PLC0415

    while isinstance(node, exp.Paren | exp.Not):
        _has_only(node, "this")
        negated ^= isinstance(node, exp.Not)
        node = node.this
    _has_only(node, "this", "expression", "expressions", "low", "high", "negate")
    if isinstance(node, exp.And | exp.Or):
        parts = tuple(_condition(part, negated) for part in node.flatten())
        return Every(parts) if isinstance(node, exp.And) is not negated else Some(parts)
    if isinstance(node, exp.Between):
        ends = (("<", "low"), (">", "high")) if negated else ((">=", "low"), ("<=", "high"))
        tests = tuple(Comparison(_column(node.this), op, (_constant(node.args[end]),)) for op, end in ends)  # type: ignore[arg-type]
        return Some(tests) if negated else Every(tests)
    test = _test(node)
    return Comparison(test.column, _NEGATED[test.op], test.values) if negated else test


def _test(node: Any) -> Comparison:
    from sqlglot import exp  # noqa: PLC0415

    compared: dict[type, Op] = {exp.EQ: "=", exp.NEQ: "!=", exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">="}
    if type(node) in compared:
        op = compared[type(node)]
        if isinstance(node.expression, exp.Column) and not isinstance(node.this, exp.Column):
            return Comparison(_column(node.expression), _TURNED[op], (_constant(node.this),))
        return Comparison(_column(node.this), op, (_constant(node.expression),))
    if isinstance(node, exp.In) and node.expressions:
        return Comparison(_column(node.this), "in", tuple(_constant(one) for one in node.expressions))
    if isinstance(node, exp.Like):
        op = "not like" if node.args.get("negate") else "like"
        return Comparison(_column(node.this), op, (_constant(node.expression),))
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return Comparison(_column(node.this), "is null")
    if isinstance(node, exp.Column):
        return Comparison(_column(node), "=", (True,))
    raise _unknown(node)


def _has_only(node: Any, *names: str) -> None:
    """Refuse a node with a further part: it would mean something else without."""
    if any(part for name, part in node.args.items() if name not in names):
        raise _unknown(node)


def _column(node: Any) -> str:
    from sqlglot import exp  # noqa: PLC0415

    if not isinstance(node, exp.Column) or not isinstance(node.this, exp.Identifier) or len(node.parts) != 1:
        raise ConfigError(
            f'{_shown(node)} stands where a column\'s name is expected; quote a name that is no single word: "my name"'
        )
    return str(node.this.this)


def _constant(node: Any) -> Constant:
    from sqlglot import exp  # noqa: PLC0415

    if isinstance(node, exp.Null):
        raise ConfigError("nothing equals null; write: is null")
    if isinstance(node, exp.Boolean):
        return bool(node.this)
    if isinstance(node, exp.Literal) and node.is_string:
        return str(node.this)
    sign, number = 1, node
    while isinstance(number, exp.Neg | exp.Paren):
        sign = -sign if isinstance(number, exp.Neg) else sign
        number = number.this
    if isinstance(number, exp.Literal) and not number.is_string:
        return sign * _number(str(number.this))
    advice = "; text stands in single quotes" if isinstance(node, exp.Column) else ""
    raise ConfigError(f"{_shown(node)} stands where a constant is expected{advice}")


def _number(text: str) -> int | float:
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{text} is not a number") from None
    if not math.isfinite(number):
        raise ConfigError(f"{text[:20]} is too large")
    return int(text) if text.isdecimal() else number


def _unknown(node: Any) -> ConfigError:
    return ConfigError(
        f"{_shown(node)} is not part of the language; it has =, !=, <, <=, >, >=, in, between, like and is null "
        "on a column and constants, joined by and, or, not"
    )


def _shown(node: Any) -> str:
    """Show a part of the filter, short and on one line."""
    text = " ".join(str(node.sql()).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fit(condition: Condition, kinds: Mapping[str, ColumnKind]) -> Condition:
    """Check tests against the columns there are, and give constants the columns' kinds."""
    count = 0

    def fit(one: Condition) -> Condition:
        nonlocal count
        if isinstance(one, Every | Some):
            return type(one)(tuple(fit(part) for part in one.parts))
        count += 1
        if count > _MOST_TESTS:
            raise ConfigError(f"has more than {_MOST_TESTS} tests; write: in (...)")
        if one.column not in kinds:
            there = ", ".join(sorted(name for name, kind in kinds.items() if kind != "bytes"))
            raise ConfigError(f"there is no column {one.column!r}; there are {there}")
        return _FITTED[kinds[one.column]](one)

    return fit(condition)


def _refused(test: Comparison, kind: ColumnKind, also: str = "") -> ConfigError:
    given = f" {test.values[0]!r}" if test.values else ""
    return ConfigError(f"{test.column!r} holds {_NAMES[kind]} and cannot be tested with {test.op}{given}{also}")


def _fit_text(test: Comparison) -> Comparison:
    if not all(isinstance(value, str) for value in test.values):
        raise _refused(test, "str", "; text stands in single quotes")
    if test.op in ("like", "not like"):
        pattern(str(test.values[0]))
    return Comparison(test.column, test.op, test.values, "str")


def _fit_truth(test: Comparison) -> Comparison:
    allowed = test.op in ("=", "!=", "in", "not in", "is null", "is not null")
    if not allowed or not all(isinstance(value, bool) for value in test.values):
        raise _refused(test, "bool")
    return Comparison(test.column, test.op, test.values, "bool")


def _fit_bytes(test: Comparison) -> Comparison:
    if test.values:
        raise _refused(test, "bytes", "; only: is null, is not null")
    return Comparison(test.column, test.op, (), "bytes")


def _fit_number(test: Comparison) -> Comparison:
    numbers = _numbers(test, "float")
    try:
        return Comparison(test.column, test.op, tuple(float(number) + 0.0 for number in numbers), "float")
    except OverflowError:
        raise _refused(test, "float", ": too large") from None


def _fit_whole(test: Comparison) -> Comparison:
    """Make constants whole numbers of 64 bits; what lies between or beyond them moves the bound."""
    numbers = _numbers(test, "int")
    if test.op in ("=", "in", "!=", "not in"):
        values = tuple(int(n) for n in numbers if n == int(n) and -_INT64 < n < _INT64)
        if len(values) == len(numbers):
            return Comparison(test.column, test.op, values, "int")
        if test.op in ("=", "in"):
            return Comparison(test.column, "in", values, "int")
        return Comparison(test.column, "not in" if values else "is not null", values, "int")
    if not numbers:
        return Comparison(test.column, test.op, (), "int")
    below: dict[Op, Callable[[float], int]] = {"<": math.ceil, ">=": math.ceil, "<=": math.floor, ">": math.floor}
    bound = below[test.op](numbers[0])
    if -_INT64 < bound < _INT64:
        return Comparison(test.column, test.op, (bound,), "int")
    always = (bound > 0) is (test.op in ("<", "<="))
    return Comparison(test.column, "is not null" if always else "in", (), "int")


def _numbers(test: Comparison, kind: ColumnKind) -> list[int | float]:
    numbers = [value for value in test.values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(test.values) or test.op in ("like", "not like"):
        raise _refused(test, kind)
    return numbers


_FITTED: Final[Mapping[ColumnKind, Callable[[Comparison], Comparison]]] = {
    "str": _fit_text,
    "int": _fit_whole,
    "float": _fit_number,
    "bool": _fit_truth,
    "bytes": _fit_bytes,
}


def pattern(text: str) -> list[str | None]:
    """Take a pattern of `like` apart.

    Returns:
        Text to find by the letter, `""` for one character (`_`) and None for any text (`%`).

    Raises:
        ConfigError: Where a backslash stands before anything else than `%`, `_` or itself.
    """
    parts: list[str | None] = []
    letters = iter(text)
    for letter in letters:
        if letter == "%":
            parts.append(None)
        elif letter == "_":
            parts.append("")
        else:
            if letter == "\\":
                letter = next(letters, "")  # noqa: PLW2901
                if not letter or letter not in "%_\\":
                    raise ConfigError(f"in like {text!r} a backslash stands before neither %, _ nor a backslash")
            if parts and parts[-1]:
                parts[-1] += letter
            else:
                parts.append(letter)
    return parts


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
