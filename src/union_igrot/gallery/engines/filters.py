"""The filter language of all engines: a small part of SQL, parsed into comparisons of single columns.

::

    class = 'dog' and year > 2020
    "taken by" in ('Ann', 'Bo') or not (size between 1 and 2.5 or path like 'cats/%')

`=`, `!=`, `<>`, `<`, `<=`, `>` and `>=` compare a column with a constant, on either side. There are also `in (...)`,
`between ... and ...`, `like` and `is null`, each with `not`; a boolean column may be used alone. `and`, `or`, `not` and
parentheses are those of SQL, and so is null: a comparison with it is neither true nor false, and only rows whose filter
is true pass. Strings have single quotes, doubled inside; column names that are not single words have double quotes.
Names and strings are case-sensitive, also in `like`: `%` matches any text, `_` one character, and a backslash escapes
both, and itself.

`matching` evaluates a condition; each engine translates it into its own language.
"""

import fnmatch
import glob
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool
from sqlglot import exp, parse_one
from sqlglot.errors import ParseError, TokenError

from union_igrot.errors import ConfigError

ColumnKind = Literal["str", "int", "float", "bool", "bytes"]
"""What a column holds besides None."""
Constant = str | int | float | bool
Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in", "not in", "like", "not like", "is null", "is not null"]

_WORDS: Final = frozenset(("and", "or", "not", "in", "between", "like", "is", "null", "true", "false", "escape"))
# An operator, its negation, the one with exchanged sides, its function, and its class in the parsed text.
_COMPARISONS: Final[tuple[tuple[Operator, Operator, Operator, Callable[[Any, Any], bool], type], ...]] = (
    ("=", "!=", "=", eq, exp.EQ),
    ("!=", "=", "!=", ne, exp.NEQ),
    ("<", ">=", ">", lt, exp.LT),
    ("<=", ">", ">=", le, exp.LTE),
    (">", "<=", "<", gt, exp.GT),
    (">=", "<", "<=", ge, exp.GTE),
)
_COMPARE: Final = {op: compare for op, _, _, compare, _ in _COMPARISONS}
_PARSED: Final = {node: op for op, *_, node in _COMPARISONS}
_SWAPPED: Final = {op: swapped for op, _, swapped, _, _ in _COMPARISONS}
_NEGATED: Final[Mapping[Operator, Operator]] = {
    **{op: negated for op, negated, *_ in _COMPARISONS},
    **{"in": "not in", "like": "not like", "not like": "like", "is null": "is not null"},
}
_ENDS: Final[tuple[tuple[Operator, str], ...]] = ((">=", "low"), ("<=", "high"))
_MAX_COMPARISONS: Final = 1000
_KIND_NAMES: Final = {"str": "text", "int": "integers", "float": "numbers", "bool": "booleans", "bytes": "bytes"}
_INT64: Final = 2**63


@dataclass(frozen=True, slots=True)
class Comparison:
    """One column compared with constants; never true if the column is None, except for `is null`."""

    column: str  # its name
    op: Operator  # the operator; negation is part of it
    # The constants: none for `is null`, any number for `in`, one otherwise. An `in` without values is never true; a
    # `not in` has values.
    values: tuple[Constant, ...] = ()
    kind: ColumnKind = "str"  # what the column holds


@dataclass(frozen=True, slots=True)
class Joined:
    """True if all parts are true, or at least one."""

    op: Literal["and", "or"]
    parts: tuple["Condition", ...]


Condition = Comparison | Joined
"""A filter without `not`. As each comparison defines its own result for None, two-valued logic is sufficient."""


def match_any(column: str, values: Iterable[str]) -> str:
    """Write the filter for rows whose column equals one of some strings, at least one."""
    return f"{column} in ({', '.join(quote(value) for value in values)})"


def quote(text: str) -> str:
    """Write a string constant as in SQL."""
    return "'" + text.replace("'", "''") + "'"


def parse_filter(text: str, kinds: Mapping[str, ColumnKind]) -> Condition:
    """Parse a filter.

    Raises:
        ConfigError: If the filter is not in the language, names an unknown column, or compares a column with a
            constant of another kind; the message names the position.
    """
    if not isinstance(text, str):
        raise ConfigError(f"invalid value for where: {text!r} (expected text such as width >= 100)")
    shown = repr(text if len(text) <= 200 else f"{text[:197]}...")
    try:
        text.encode()
        return _convert(_parse(text), kinds)
    except ConfigError as error:
        raise ConfigError(f"where={shown}: {error}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"where={shown}: not valid Unicode") from None
    except RecursionError:
        raise ConfigError(f"where={shown}: too many nested parentheses") from None


def matching(condition: Condition, column: Callable[[str], Sequence[Any]]) -> Bool[np.ndarray, " rows"]:
    """Return whether each row passes a condition; `column` returns the values of a column by its name."""
    if not isinstance(condition, Comparison):
        join = np.logical_and if condition.op == "and" else np.logical_or
        return np.asarray(join.reduce([matching(part, column) for part in condition.parts]), dtype=bool)
    values, passes = column(condition.column), _predicate(condition)
    on_none = condition.op == "is null"
    return np.fromiter((on_none if value is None else passes(value) for value in values), bool, len(values))


def _predicate(test: Comparison) -> Callable[[Any], bool]:
    """Return the comparison as a function of a value that is not None."""
    negated = test.op.startswith("not ")
    if test.op in ("is null", "is not null"):
        return lambda _: test.op == "is not null"
    if test.op in ("in", "not in"):
        listed = frozenset(test.values)
        return lambda value: (value in listed) is not negated
    if test.op in ("like", "not like"):
        matches = like_matcher(str(test.values[0]))
        return lambda value: matches(value) is not negated
    compare, constant = _COMPARE[test.op], test.values[0]
    return lambda value: compare(value, constant)


def like_matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test of texts for a pattern of `like`; fast for any pattern, as `fnmatch` tries no place twice."""
    wildcards = {None: "*", "": "?"}
    parts = [wildcards[part] if not part else glob.escape(part) for part in like_parts(pattern)]
    matched = re.compile(fnmatch.translate("".join(parts))).match
    return lambda text: matched(text) is not None


def like_parts(text: str) -> list[str | None]:
    """Split a pattern of `like` into literal text, `""` for one character (`_`), and None for any text (`%`)."""
    parts: list[str | None] = []
    for token in re.findall(r"\\.?|.", text, re.DOTALL):
        if token == "%":
            parts.append(None)
        elif token == "_":
            parts.append("")
        elif token[0] == "\\" and token[1:] not in ("%", "_", "\\"):
            raise ConfigError(f"in like {text!r} a backslash precedes neither %, _ nor a backslash")
        elif parts and parts[-1]:
            parts[-1] += token[-1]
        else:
            parts.append(token[-1])
    return parts


@lru_cache(maxsize=256)  # a filter is often used for many searches
def _parse(text: str) -> Condition:
    if not text.strip():
        raise ConfigError("is empty (expected such as class = 'dog' and year > 2020)")
    log = logging.getLogger("sqlglot")
    before = log.disabled
    log.disabled = True  # it warns of filters that begin like a command
    try:
        return _condition(parse_one(text, into=exp.Condition), negated=False)
    except ParseError as error:
        advice = _keyword_advice(text)
        if not error.errors:
            raise ConfigError(f"cannot be parsed{advice}") from None
        first = error.errors[0]
        what = str(first["description"])
        what = "something is missing here" if what.startswith("Required keyword") else what
        at = f"line {first['line']}, character {first['col']}"
        raise ConfigError(f"cannot be parsed at {at} (near {first['highlight']!r}): {what}{advice}") from None
    except TokenError:
        raise ConfigError("cannot be parsed; a quote may be left open") from None
    except ValueError as error:  # of invalid names
        raise ConfigError(f"cannot be parsed ({error})") from None
    finally:
        log.disabled = before


def _keyword_advice(text: str) -> str:
    """Return advice on quoting if a word outside of quotes is a keyword of SQL."""
    for word in re.findall(r"[a-z_]\w*", re.sub(r"'[^']*'|\"[^\"]*\"", " ", text), re.IGNORECASE):
        if word.lower() not in _WORDS:
            try:
                parse_one(f"{word} = 1", into=exp.Condition)
            except (ParseError, TokenError):
                return f'; {word} is a keyword of SQL, quote it as a column name: "{word}"'
    return ""


def _condition(node: Any, negated: bool) -> Condition:
    """Convert a parsed expression, or its negation."""
    while isinstance(node, exp.Paren | exp.Not):
        _check_only(node, "this")
        negated ^= isinstance(node, exp.Not)
        node = node.this
    _check_only(node, "this", "expression", "expressions", "low", "high", "negate")
    if isinstance(node, exp.And | exp.Or):
        parts = tuple(_condition(part, negated) for part in node.flatten())
        return Joined("and" if isinstance(node, exp.And) is not negated else "or", parts)
    if isinstance(node, exp.Between):
        low, high = (Comparison(_column(node.this), op, (_constant(node.args[end]),)) for op, end in _ENDS)
        return Joined("or", (_negate(low), _negate(high))) if negated else Joined("and", (low, high))
    return _negate(_comparison(node)) if negated else _comparison(node)


def _negate(test: Comparison) -> Comparison:
    return replace(test, op=_NEGATED[test.op])


def _comparison(node: Any) -> Comparison:
    if (op := _PARSED.get(type(node))) is not None:
        left, right = node.this, node.expression
        if isinstance(right, exp.Column) and not isinstance(left, exp.Column):
            left, right, op = right, left, _SWAPPED[op]
        return Comparison(_column(left), op, (_constant(right),))
    if isinstance(node, exp.In) and node.expressions:
        return Comparison(_column(node.this), "in", tuple(_constant(one) for one in node.expressions))
    if isinstance(node, exp.Like):
        op = "not like" if node.args.get("negate") else "like"
        return Comparison(_column(node.this), op, (_constant(node.expression),))
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return Comparison(_column(node.this), "is null")
    if isinstance(node, exp.Column):
        return Comparison(_column(node), "=", (True,))
    raise _unsupported(node)


def _check_only(node: Any, *names: str) -> None:
    """Raise if a node has further parts, without which its meaning would differ."""
    if any(part for name, part in node.args.items() if name not in names):
        raise _unsupported(node)


def _column(node: Any) -> str:
    if isinstance(node, exp.Func | exp.Binary):
        raise _unsupported(node)
    if not isinstance(node, exp.Column) or not isinstance(node.this, exp.Identifier) or len(node.parts) != 1:
        raise ConfigError(
            f'expected a column name instead of {_shown(node)}; quote a name that is not a single word: "my name"'
        )
    return str(node.this.this)


def _constant(node: Any) -> Constant:
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
        return sign * _parse_number(str(number.this))
    advice = "; quote strings with single quotes" if isinstance(node, exp.Column) else ""
    raise ConfigError(f"expected a constant instead of {_shown(node)}{advice}")


def _parse_number(text: str) -> int | float:
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{text} is not a number") from None
    if not math.isfinite(number):
        raise ConfigError(f"{text[:20]} is too large")
    return int(text) if text.isdecimal() else number


def _unsupported(node: Any) -> ConfigError:
    return ConfigError(
        f"{_shown(node)} is not supported (expected =, !=, <, <=, >, >=, in, between, like and is null on a column and "
        "constants, joined by and, or, not; there are no functions and no arithmetic)"
    )


def _shown(node: Any) -> str:
    text = " ".join(str(node.sql()).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _convert(condition: Condition, kinds: Mapping[str, ColumnKind]) -> Condition:
    """Check comparisons against the existing columns, and convert constants to the columns' kinds."""
    count = 0

    def convert(one: Condition) -> Condition:
        nonlocal count
        if not isinstance(one, Comparison):
            return Joined(one.op, tuple(convert(part) for part in one.parts))
        count += 1
        if count > _MAX_COMPARISONS:
            raise ConfigError(f"has more than {_MAX_COMPARISONS} comparisons; write: in (...)")
        if one.column not in kinds:
            known = ", ".join(sorted(name for name, kind in kinds.items() if kind != "bytes"))
            raise ConfigError(f"there is no column {one.column!r} (available: {known})")
        kind = kinds[one.column]
        return _convert_int(one) if kind == "int" else _convert_comparison(one, kind)

    return convert(condition)


def _convert_comparison(test: Comparison, kind: ColumnKind) -> Comparison:
    values: tuple[Constant, ...] = test.values
    if kind == "str":
        if not all(isinstance(value, str) for value in values):
            raise _mismatch(test, kind, "; quote strings with single quotes")
        if test.op in ("like", "not like"):
            like_parts(str(values[0]))
    elif kind == "bool":
        if test.op in ("<", "<=", ">", ">=", "like", "not like") or not all(isinstance(one, bool) for one in values):
            raise _mismatch(test, kind)
    elif kind == "bytes":
        if values:
            raise _mismatch(test, kind, "; only: is null, is not null")
    else:
        try:
            values = tuple(float(number) + 0.0 for number in _numbers(test, kind))
        except OverflowError:
            raise _mismatch(test, kind, ": too large") from None
    return Comparison(test.column, test.op, values, kind)


def _convert_int(test: Comparison) -> Comparison:
    """Convert constants to integers of 64 bits; a bound between or beyond them is moved."""
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
    bound = math.ceil(numbers[0]) if test.op in ("<", ">=") else math.floor(numbers[0])
    if -_INT64 < bound < _INT64:
        return Comparison(test.column, test.op, (bound,), "int")
    always = (bound > 0) is (test.op in ("<", "<="))
    return Comparison(test.column, "is not null" if always else "in", (), "int")


def _numbers(test: Comparison, kind: ColumnKind) -> list[int | float]:
    numbers = [value for value in test.values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(test.values) or test.op in ("like", "not like"):
        raise _mismatch(test, kind)
    return numbers


def _mismatch(test: Comparison, kind: ColumnKind, advice: str = "") -> ConfigError:
    constant = f" {test.values[0]!r}" if test.values else ""
    return ConfigError(f"{test.column!r} holds {_KIND_NAMES[kind]}, which {test.op}{constant} does not fit{advice}")
