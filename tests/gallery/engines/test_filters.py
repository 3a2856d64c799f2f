"""The filter language: what it reads, what it refuses, and what it means."""

import pytest
import torch
from filter_cases import KINDS, ROWS, filters, joined, negated
from hypothesis import given, settings

from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.filters import Every, Some, lance_text, milvus_text, parse_filter, passing, pattern
from union_igrot.gallery.engines.memory import MemoryIndex

COLUMNS = {"id": "str", **KINDS}


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
def test_a_filter_is_written_for_each_engine(text, lance, milvus):
    condition = parse_filter(text, COLUMNS)
    assert lance_text(condition) == lance
    assert milvus_text(condition) == milvus


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("clas = 'dog'", "no column 'clas'; there are class, flag, id, size, taken by, year"),
        ("class = 5", "'class' holds text and cannot be tested with = 5"),
        ('class = "dog"', '"dog" stands where a constant is expected; text stands in single quotes'),
        ("class = dog", "dog stands where a constant is expected"),
        ("class = null", "write: is null"),
        ("class in ('a', null)", "write: is null"),
        ("class = 'dog", "a quote may be left open"),
        ("case = 'dog'", 'case is a word of SQL, and as a name stands in double quotes: "case"'),
        ("year = 1 and select = 'case'", 'select is a word of SQL, and as a name stands in double quotes: "select"'),
        ("nonsense =", "something is missing here$"),
        ("class = '\ud800'", "holds half a letter"),
        ("class =", "line 1, character 7"),
        ("class = 'dog' cat", r"character 17 \(near 'cat'\)"),
        ("(year = 1", r"Expecting \)"),
        ("year like '2%'", "'year' holds whole numbers and cannot be tested with like"),
        ("year + 1 = 2", r"year \+ 1 stands where a column's name"),
        ("upper(class) = 'DOG'", r"UPPER\(class\) stands where a column's name"),
        ("class = upper('dog')", "stands where a constant"),
        ("photos.class = 'dog'", 'quote a name that is no single word: "my name"'),
        ("flag < true", "'flag' holds true and false"),
        ("flag is true", "is not part of the language"),
        ("year", "'year' holds whole numbers"),
        ("true", "is not part of the language"),
        ("thumb = 'x'", "only: is null, is not null"),
        ("size = 1e999", "too large"),
        ("size = " + "9" * 400, "too large"),
        ("class in ()", "is not part of the language"),
        ("class in (select name from users)", "is not part of the language"),
        ("class = 'a'; drop table x", r"near|not part of the language"),
        ("exists(select 1)", "is not part of the language"),
        ("class ilike 'dog'", "is not part of the language"),
        ("class like 'a\\b'", "a backslash stands before neither"),
        ("class like 'a' escape 'b'", "is not part of the language"),
        ("(" * 5000 + "year = 1" + ")" * 5000, "too many brackets"),
        (" or ".join(["year = 1"] * 1001), "more than 1000 tests"),
    ],
)
def test_what_is_not_of_the_language_is_one_line_that_names_it(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_filter(text, COLUMNS)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("where=")
    assert len(str(caught.value)) < 600


def test_like_beyond_a_beginning_is_refused_for_an_old_milvus():
    milvus_text(parse_filter("class like 'do%' and class not like 'dog'", COLUMNS), patterns=False)
    with pytest.raises(ConfigError, match=r"needs Milvus 2\.4"):
        milvus_text(parse_filter("class like '%og'", COLUMNS), patterns=False)


@pytest.mark.parametrize(("last", "following"), [("a", "b"), ("\ud7ff", "\ue000"), ("x\U0010ffff", "y")])
def test_a_beginning_ends_before_the_next_text(last, following):
    assert f'< "{following}"' in milvus_text(parse_filter(f"id like '{last}%'", COLUMNS))


def test_a_pattern_is_taken_apart():
    assert pattern("a\\%_b%%") == ["a%", "", "b", None, None]
    assert pattern("") == []


def test_many_parts_are_read_without_recursion():
    text = " or ".join(f"year = {n}" for n in range(1000))
    condition = parse_filter(text, COLUMNS)
    assert isinstance(condition, Some)
    assert len(condition.parts) == 1000
    assert isinstance(parse_filter("year = 1 and (size = 2 and flag)", COLUMNS), Every)


@pytest.fixture(scope="module")
def filled():
    index = MemoryIndex(2)
    columns = {name: [row[name] for row in ROWS] for name in KINDS}
    index.upsert(Rows([row["id"] for row in ROWS], torch.ones(len(ROWS), 2), columns))
    return index


def test_the_meaning_is_that_of_sql(filled):
    @settings(max_examples=80, deadline=None)
    @given(filters())
    def agrees(case):
        text, holds = case
        condition = parse_filter(text, COLUMNS)
        assert passing(condition, filled._values).tolist() == [holds(row) is True for row in ROWS], text
        lance_text(condition)
        milvus_text(condition)

    agrees()


def test_the_slow_meaning_is_itself_three_valued():
    unknown, yes, no = ("u", lambda _: None), ("y", lambda _: True), ("n", lambda _: False)
    assert joined("or", unknown, yes)[1]({}) is True
    assert joined("and", unknown, yes)[1]({}) is None
    assert joined("and", unknown, no)[1]({}) is False
    assert negated(unknown)[1]({}) is None


@pytest.mark.parametrize(
    "text", ["class like 'a' is null", "class not like 'a' escape 'b'", "year between symmetric 3 and 1"]
)
def test_parts_that_change_the_meaning_are_not_passed_over(text):
    with pytest.raises(ConfigError, match=r"is not part of the language|stands where"):
        parse_filter(text, COLUMNS)
