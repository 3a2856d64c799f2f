"""The filter language: parsing, errors, translation and evaluation."""

import importlib

import pytest
import torch
from filter_cases import KINDS, ROWS, filters, like
from hypothesis import given, settings, strategies as st

from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.engines.filters import Joined, like_matcher, matching, parse_filter

COLUMNS = {"id": "str", **KINDS}


def dialect(engine):
    pytest.importorskip({"lance": "lance", "milvus": "pymilvus"}[engine])
    return importlib.import_module(f"union_igrot.gallery.engines.{engine}").filter_text


@pytest.mark.parametrize(
    ("text", "lance", "milvus"),
    [
        (
            "class = 'dog' and year > 2020",
            "((`class` = 'dog') AND (`year` > 2020))",
            '(($meta["c_class"] == "dog") and ($meta["c_year"] > 2020))',
        ),
        (
            "NOT (year BETWEEN 1.5 AND 3 OR flag)",
            "(((`year` < 2) OR (`year` > 3)) AND (`flag` IS NOT NULL AND `flag` != true))",
            '((($meta["c_year"] < 2) or ($meta["c_year"] > 3)) and '
            '(($meta["c_flag"] in [true, false]) and ($meta["c_flag"] != true)))',
        ),
        (
            "\"taken by\" not in ('it''s', 'x\n')",
            "(`taken by` IS NOT NULL AND `taken by` NOT IN ('it''s', 'x\n'))",
            '(($meta["x_74616b656e206279"] >= "") and (not ($meta["x_74616b656e206279"] in ["it\'s", "x\\n"])))',
        ),
        ("id like 'a/50\\%%'", "(`id` LIKE 'a/50\\%%')", '(id >= "a/50%" and id < "a/50&")'),
        ("class like '%x_'", "(`class` LIKE '%x_')", '($meta["c_class"] like "%x_")'),
        ("class like '%'", "(`class` LIKE '%')", '($meta["c_class"] >= "")'),
        (
            "size <> 5",
            "(`size` IS NOT NULL AND `size` != 5.0)",
            '(($meta["c_size"] >= 0 or $meta["c_size"] < 0) and ($meta["c_size"] != 5.0))',
        ),
        ("year in (1, 2.5)", "(`year` IN (1))", '($meta["c_year"] in [1])'),
        ("year = 2.5", "false", '($meta["c_year"] in [])'),
        ("year < 1e30", "(`year` IS NOT NULL)", '($meta["c_year"] >= 0 or $meta["c_year"] < 0)'),
        ("year > -(-2)", "(`year` > 2)", '($meta["c_year"] > 2)'),
        ("thumb is null", "(`thumb` IS NULL)", '(not ($meta["c_thumb"] >= ""))'),
        ("id is not null", "(`id` IS NOT NULL)", "(row >= 0)"),
    ],
)
def test_filters_are_translated_for_each_engine(text, lance, milvus):
    condition = parse_filter(text, COLUMNS)
    assert dialect("lance")(condition) == lance
    assert dialect("milvus")(condition) == milvus


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("clas = 'dog'", "no column 'clas' .available: class, flag, id, size, taken by, year"),
        ("class = 5", "'class' holds text, which = 5 does not fit"),
        ('class = "dog"', 'instead of "dog".*single quotes'),
        ("class = dog", "expected a constant instead of dog"),
        ("class = null", "write: is null"),
        ("class in ('a', null)", "write: is null"),
        ("class = 'dog", "a quote may be left open"),
        ("case = 'dog'", 'case is a keyword of SQL.*"case"'),
        ("year = 1 and select = 'case'", 'select is a keyword of SQL.*"select"'),
        ("nonsense =", "something is missing here$"),
        ("class = '\ud800'", "not valid Unicode"),
        ("class =", "line 1, character 7"),
        ("class = 'dog' cat", r"character 17 \(near 'cat'\)"),
        ("(year = 1", r"Expecting \)"),
        ("year like '2%'", "'year' holds integers, which like"),
        ("year + 1 = 2", r"year \+ 1 is not supported"),
        ("upper(class) = 'DOG'", r"UPPER\(class\) is not supported"),
        ("class = upper('dog')", "expected a constant"),
        ("photos.class = 'dog'", 'quote a name that is not a single word: "my name"'),
        ("flag < true", "'flag' holds booleans"),
        ("flag is true", "is not supported"),
        ("year", "'year' holds integers"),
        ("true", "is not supported"),
        ("thumb = 'x'", "only: is null, is not null"),
        ("size = 1e999", "too large"),
        ("size = " + "9" * 400, "too large"),
        ("class in ()", "is not supported"),
        ("class in (select name from users)", "is not supported"),
        ("class = 'a'; drop table x", r"near|not part of the language"),
        ("exists(select 1)", "is not supported"),
        ("class ilike 'dog'", "ILIKE 'dog' is not supported .expected =, .* like .*no functions"),
        ("class like 'a' is null", "is not supported"),
        ("class not like 'a' escape 'b'", "is not supported"),
        ("year between symmetric 3 and 1", "is not supported"),
        ("class like 'a\\b'", "a backslash precedes neither"),
        ("class like 'a' escape 'b'", "is not supported"),
        ("(" * 5000 + "year = 1" + ")" * 5000, "too many nested"),
        (" or ".join(["year = 1"] * 1001), "more than 1000 comparisons"),
    ],
)
def test_invalid_filters_are_one_line_errors(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_filter(text, COLUMNS)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("where=")
    assert len(str(caught.value)) < 600


def test_an_old_milvus_supports_prefixes_only():
    milvus_text = dialect("milvus")
    milvus_text(parse_filter("class like 'do%' and class not like 'dog'", COLUMNS), False)
    with pytest.raises(ConfigError, match=r"needs Milvus 2\.4"):
        milvus_text(parse_filter("class like '%og'", COLUMNS), False)


@pytest.mark.parametrize(("last", "following"), [("a", "b"), ("\ud7ff", "\ue000"), ("x\U0010ffff", "y")])
def test_a_prefix_ends_before_the_next_string(last, following):
    assert f'< "{following}"' in dialect("milvus")(parse_filter(f"id like '{last}%'", COLUMNS))


def test_many_parts_are_parsed_without_recursion():
    text = " or ".join(f"year = {n}" for n in range(1000))
    condition = parse_filter(text, COLUMNS)
    assert isinstance(condition, Joined)
    assert condition.op == "or"
    assert len(condition.parts) == 1000
    assert parse_filter("year = 1 and (size = 2 and flag)", COLUMNS).op == "and"


@pytest.fixture(scope="module")
def filled():
    index = MemoryIndex(2)
    columns = {name: [row[name] for row in ROWS] for name in KINDS}
    index.upsert(Rows([row["id"] for row in ROWS], torch.ones(len(ROWS), 2), columns))
    return index


@pytest.mark.slow
def test_filters_follow_sql(filled):
    dialects = [dialect(one) for one in ("lance", "milvus")]

    @settings(max_examples=60, deadline=None)
    @given(filters())
    def agrees(case):
        text, holds = case
        condition = parse_filter(text, COLUMNS)
        assert matching(condition, filled._column).tolist() == [holds(row) is True for row in ROWS], text
        for write in dialects:
            write(condition)

    agrees()


def test_like_ends_for_any_pattern():
    """A plain regular expression of these patterns would try all ways to divide the text, for hours."""
    for pattern in ("%_" * 250 + "b", "%a" * 250 + "b%a", "%_a%__" * 80 + "b_", "_" * 499 + "%b"):
        assert not like_matcher(pattern)("b" + "a" * 20_000)
        assert like_matcher(pattern.replace("b", "a"))("a" * 20_000)


@settings(max_examples=60, deadline=None)
@given(st.text("ab_%", max_size=12), st.text("%_ab", max_size=8))
def test_like_agrees_with_a_slow_matcher(text, pattern):
    assert like_matcher(pattern)(text) is like(text, pattern)
