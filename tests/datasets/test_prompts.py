"""Each repository's wording of a query, letter for letter."""

import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.datasets.registry import benchmark_names, find_benchmark
from union_igrot.errors import ConfigError, UnionError


def template(benchmark, prompt):
    return find_benchmark(benchmark).find_prompt(prompt).text


TWO = {"c1": "is Shiny, and silver.", "c2": "fit & flare?"}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("union", "is Shiny, and silver. and fit & flare?"),
        ("magiclens", "is Shiny, and silver. and fit & flare?"),
        ("clip4cir", "Is shiny, and silver and fit & flare"),
        ("sprc", "is shiny, and silver and fit & flare"),
        (
            "searle",
            (
                "a photo of $ that is Shiny, and silver. and fit & flare?",
                "a photo of $ that fit & flare? and is Shiny, and silver.",
            ),
        ),
        ("searle_swapped", "a photo of $ that fit & flare? and is Shiny, and silver."),
        ("pic2word", "a photo of * , fit & flare? and is Shiny, and silver."),
        ("covr", "is shiny, and silver and fit & flare?"),
    ],
)
def test_fashioniq(prompt, text):
    assert template("fashioniq", prompt)(TWO) == text


def test_covr_keeps_thirty_words():
    text = template("cirr", "covr")({"caption": "A(B) #c  d~e: " + "word " * 40})
    assert text.split(" ")[:5] == ["a", "b", "c", "d", "e"]
    assert len(text.split(" ")) == 30


@pytest.mark.parametrize(
    ("benchmark", "prompt", "text"),
    [
        ("cirr", "union", "find a photo that show Three"),
        ("cirr", "clip4cir", "Show Three"),
        ("cirr", "transagg", "show three"),
        ("cirr", "searle", "a photo of $ that Show Three"),
        ("cirr", "pic2word", "a photo of * , Show Three"),
        ("circo", "union", "a girl but has two"),
        ("circo", "magiclens", "find A girl but Has two"),
        ("circo", "searle", "a photo of $ that Has two"),
        ("circo", "covr", "Has two"),
        ("genecis", "clip", "red"),
        ("lasco", "union", "Now Red"),
        ("llavasco", "union", "Has two"),
        ("llavasco", "union_llava", "Has two with A cat."),
        ("dtin", "union", "the similar image with toy style"),
        ("dtin", "magiclens", "find this object in toy"),
        ("dtin", "pic2word", "a toy of *"),
        ("sketchy", "union", "a real image of sketch"),
        ("training_sketchy", "union", "a real image of sketch"),
        ("tuberlin", "union", ""),
        ("quickdraw", "union", ""),
        ("quickdraw", "a photo of a {class}", "a photo of a bell"),
        ("circo", "{shared_concept}: {{{relative_caption}}}", "A girl: {Has two}"),
        ("tuberlin", "a real image of sketch", "a real image of sketch"),
    ],
)
def test_wording(benchmark, prompt, text):
    fields = {"caption": "Show Three", "shared_concept": "A girl", "relative_caption": "Has two", "condition": "red"}
    fields |= {"query_text": "Now Red", "llava_target_caption": "A cat.", "domain": "toy", "class": "bell"}
    wanted = text.replace("show Three", "show three") if prompt == "union" else text
    assert template(benchmark, prompt)(fields) == wanted


def test_the_authors_wording_is_the_default():
    assert {find_benchmark(name).find_prompt().name for name in benchmark_names() if name != "genecis"} == {"union"}


@pytest.mark.parametrize(
    "prompt", ["", "nope", "{nope}", "{caption.upper}", "{caption!r}", "{caption:>99}", "{", "{}", "{0}"]
)
def test_an_unknown_prompt_names_what_is_allowed(prompt):
    with pytest.raises(ConfigError, match=r"expected one of union, clip4cir, .*\{caption\}"):
        template("cirr", prompt)


def test_the_target_caption_is_no_field():
    with pytest.raises(ConfigError, match="unknown field"):
        template("llavasco", "add {llava_target_caption}")


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=12), st.text(max_size=12))
def test_any_prompt_and_caption(prompt, caption):
    try:
        word = template("cirr", prompt)
    except UnionError:
        return
    assert isinstance(word({"caption": caption}), str)
