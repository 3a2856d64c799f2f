"""Random filters, each with a slow evaluation in the three-valued logic of SQL."""

import re

from hypothesis import strategies as st

TEXTS = [
    "",
    "dog",
    "Dog",
    "dogs",
    "it's",
    'say "hi"',
    "50%",
    "a_b",
    "a\\b",
    "two\nlines",
    "пёс",
    "犬",
    "\U0001f436",
    "zz",
]
ROWS = [
    {
        "id": f"album {i % 3}/{TEXTS[i % len(TEXTS)]}{i}",
        "class": None if i % 5 == 0 else TEXTS[(i * 3) % len(TEXTS)],
        "year": None if i % 7 == 0 else [2019, 2020, 2021, -3, 0, 2**60, -(2**62)][i % 6],
        "size": None if i % 4 == 0 else [0.5, 2.0, 2020.0, -1.25, 1e-300, 3.7e200, 0.0][i % 7],
        "flag": [True, False, None][i % 3],
        "taken by": None if i % 6 else ["Ann", "Bo"][i % 2],
        "thumb": None if i % 2 else b"\x00\xff" * i,
    }
    for i in range(60)
]
KINDS = {"class": "str", "year": "int", "size": "float", "flag": "bool", "taken by": "str", "thumb": "bytes"}
COMPARE = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def name(column):
    return f'"{column}"' if " " in column else column


def literal(value):
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value).lower()


def like(value, pattern):
    """Match character by character."""
    tokens = re.findall(r"\\.|.", pattern, re.DOTALL)

    def match(text, rest):
        if not rest:
            return not text
        if rest[0] == "%":
            return any(match(text[i:], rest[1:]) for i in range(len(text) + 1))
        char = rest[0][1:] if len(rest[0]) == 2 else rest[0]
        return bool(text) and (rest[0] == "_" or text[0] == char) and match(text[1:], rest[1:])

    return match(value, tokens)


def constants(column):
    numbers = st.sampled_from([2019, 2020, 2020.5, -3, 0, 1e-300, 2.0, 2**60, 2**70, -1e30, 0.5]) | st.floats(
        allow_nan=False, allow_infinity=False
    )
    return {
        "str": st.sampled_from(TEXTS) | st.text(max_size=3),
        "int": numbers,
        "float": numbers,
        "bool": st.booleans(),
    }[KINDS.get(column, "str")]


def escaped(text):
    return re.sub(r"([%_\\])", r"\\\1", text)


@st.composite
def column_test(draw, prefixes_only):
    """A test of one column."""
    column = draw(st.sampled_from([*KINDS, "id"]))
    kind = KINDS.get(column, "str")
    shapes = [null_test]
    if kind != "bytes":
        shapes += [comparison, in_test]
    if kind in ("str", "int", "float"):
        shapes.append(between_test)
    if kind == "str":
        shapes.append(like_test)
    if kind == "bool":
        shapes.append(bare_column)
    text, holds, also_of_none = draw(st.sampled_from(shapes))(draw, column, prefixes_only)
    return text, lambda row: None if row[column] is None and not also_of_none else holds(row[column])


def null_test(draw, column, _):
    word = draw(st.sampled_from(["null", "not null"]))
    return f"{name(column)} is {word}", lambda value: (value is None) is (word == "null"), True


def bare_column(draw, column, _):
    return name(column), lambda value: value, False


def in_test(draw, column, _):
    word, values = draw(st.sampled_from(["in", "not in"])), draw(st.lists(constants(column), min_size=1, max_size=4))
    text = f"{name(column)} {word} ({', '.join(map(literal, values))})"
    return text, lambda value: (value in values) is (word == "in"), False


def between_test(draw, column, _):
    word, low, high = (
        draw(st.sampled_from(["between", "not between"])),
        draw(constants(column)),
        draw(constants(column)),
    )
    text = f"{name(column)} {word} {literal(low)} and {literal(high)}"
    return text, lambda value: (low <= value <= high) is (word == "between"), False


def like_test(draw, column, prefixes_only):
    word, pieces = draw(st.sampled_from(["like", "not like"])), st.sampled_from(TEXTS).map(escaped)
    anything = st.lists(st.sampled_from(["%", "_", "%%"]) | pieces, max_size=4)
    pattern = "".join(draw(st.tuples(pieces, st.sampled_from(["", "%"])) if prefixes_only else anything))
    return f"{name(column)} {word} {literal(pattern)}", lambda value: like(value, pattern) is (word == "like"), False


def comparison(draw, column, _):
    ops = ["=", "!=", "<>"] if KINDS.get(column) == "bool" else list(COMPARE)
    op, constant = draw(st.sampled_from(ops)), draw(constants(column))
    if draw(st.booleans()):
        return f"{literal(constant)} {op} {name(column)}", lambda value: COMPARE[op](constant, value), False
    return f"{name(column)} {op} {literal(constant)}", lambda value: COMPARE[op](value, constant), False


def negated(case):
    text, holds = case
    return f"not ({text})", lambda row: None if holds(row) is None else not holds(row)


def joined(word, left, right):
    def holds(row):
        a, b = left[1](row), right[1](row)
        decisive = word == "or"
        if a is decisive or b is decisive:
            return decisive
        return None if a is None or b is None else not decisive

    return f"({left[0]}) {word} ({right[0]})", holds


def filters(prefixes_only=False):
    """Return filters as text, each with a function that evaluates a row to true, false or None."""
    return st.recursive(
        column_test(prefixes_only),
        lambda inner: inner.map(negated) | st.builds(joined, st.sampled_from(["and", "or"]), inner, inner),
        max_leaves=5,
    )
