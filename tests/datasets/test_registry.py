"""Declarations of benchmarks: names, options, those of other packages, and the prompts word for word."""

import inspect
from importlib.metadata import EntryPoint

import official
import pytest
from PIL import Image

from union_igrot.datasets import (
    BenchmarkDeclaration,
    BenchmarkOption,
    load_benchmark,
    load_training,
    register_benchmark,
    registry,
)
from union_igrot.datasets.builtin import BUILTIN, CIRR
from union_igrot.datasets.registry import benchmark_names, find_benchmark
from union_igrot.errors import ConfigError, ImageError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query


def read_colors(folder, split, *, side, limit, prompt):
    """Read a benchmark of another package: gallery and queries are the images of a folder."""
    text = COLORS.find_prompt(prompt).text({"side": side})
    names = [f"{split}/{number}.png" for number in range(limit)]
    images = [folder.image("here", name) for name in names]
    gallery = [GalleryItem(name, image) for name, image in zip(names, images, strict=True)]
    queries = [Query(name, image, text, (name,)) for name, image in zip(names, images, strict=True)]
    return Benchmark(f"colors_{side}", split, "cir", queries, gallery, Protocol(prompt=prompt or "default"))


COLORS = BenchmarkDeclaration(
    name="colors",
    reader=read_colors,
    splits=("test", "train"),
    options=(
        BenchmarkOption("side", str, choices=("left", "right"), is_part=True),
        BenchmarkOption("limit", int, 4, minimum=1),
    ),
    prompts={"default": "the {side} one".format_map},
    prompt_fields=("side",),
    trainable=True,
    source="the shop on the corner",
)


@pytest.fixture
def colors(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    register_benchmark(COLORS)
    for split in COLORS.splits:
        (tmp_path / split).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / split / f"{number}.png")
    return tmp_path


def test_a_registered_benchmark_is_loaded(colors):
    benchmark = load_benchmark("colors", colors, side="left", limit=3)
    assert (benchmark.name, len(benchmark.queries)) == ("colors_left", 3)
    assert benchmark.queries[0].text == "the left one"
    assert len(load_training("colors", colors, side="right").triplets) == 4
    with pytest.raises(ConfigError, match="missing option of colors: side"):
        load_benchmark("colors", colors)
    with pytest.raises(ConfigError, match=r"limit of colors: 0 .*>= 1"):
        load_benchmark("colors", colors, side="left", limit=0)
    with pytest.raises(ConfigError, match=r"'colours' \(expected one of .*quickdraw.*colors\); did you mean colors"):
        load_benchmark("colours", colors)
    (colors / "test/1.png").unlink()
    with pytest.raises(ImageError, match=r"test/1\.png.*1 of 4 images"):
        load_benchmark("colors", colors, side="left")


def test_entry_points_are_imported_when_needed(monkeypatch):
    points = [
        EntryPoint("colors", f"{__name__}:COLORS", registry.ENTRY_POINTS),
        EntryPoint("broken", "no_such_package:it", registry.ENTRY_POINTS),
        EntryPoint("other", f"{__name__}:COLORS", registry.ENTRY_POINTS),
        EntryPoint("cirr", "no_such_package:it", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry, "entry_points_of", lambda _: {point.name: point for point in points})
    assert benchmark_names()[-3:] == ("colors", "broken", "other")
    assert "broken" not in benchmark_names(trainable=True)
    assert find_benchmark("colors") is COLORS
    assert find_benchmark("cirr") is CIRR
    with pytest.raises(ConfigError, match=r"cannot import no_such_package:it .*ModuleNotFoundError"):
        find_benchmark("broken")
    with pytest.raises(ConfigError, match="not a BenchmarkDeclaration named other"):
        find_benchmark("other")


def test_names_are_unique_and_declarations_are_valid(colors):
    register_benchmark(COLORS)  # again
    for name in ("cirr", "shapes", "colors"):
        with pytest.raises(ConfigError, match="taken"):
            register_benchmark(BenchmarkDeclaration(name=name, reader=read_colors, splits=("val",)))
    with pytest.raises(ConfigError, match="'a b'"):
        BenchmarkDeclaration(name="a b", reader=read_colors, splits=("val",))
    with pytest.raises(ConfigError, match="'train' among them"):
        BenchmarkDeclaration(name="a", reader=read_colors, splits=("val",), trainable=True)


@pytest.mark.parametrize("declaration", BUILTIN, ids=lambda one: one.name)
def test_readers_take_the_declared_options(declaration):
    takes = inspect.signature(declaration.import_reader()).parameters
    assert list(takes)[:2] == ["folder", "split"]
    assert set(list(takes)[2:]) == {option.name for option in declaration.all_options}
    assert find_benchmark(declaration.name) is declaration


def test_split_option_and_preset(tmp_path):
    assert set(benchmark_names()) == set(official.WRITERS)
    official.cirr(tmp_path, splits=("val",))
    with pytest.raises(ConfigError, match=r"'nope' .*one of fashioniq, cirr, circo"):
        load_benchmark("nope", "/")
    with pytest.raises(ConfigError, match=r"'circo' .*one of fashioniq, cirr, lasco, llavasco, training_sketchy"):
        load_training("circo", "/")
    with pytest.raises(ConfigError, match=r"split of cirr: 'dev' .*one of val, train, test1"):
        load_benchmark("cirr", tmp_path, split="dev")
    with pytest.raises(ConfigError, match=r"option of cirr: 'stride' .*one of targets, prompt, preset"):
        load_benchmark("cirr", tmp_path, stride=2)
    with pytest.raises(ConfigError, match="prompt of cirr: 3 "):
        load_benchmark("cirr", tmp_path, prompt=3)
    with pytest.raises(ConfigError, match=r"stride of llavasco: True .*an integer >= 1"):
        load_benchmark("llavasco", tmp_path, stride=True)
    with pytest.raises(ConfigError, match=r"preset of cirr: 'mine' .*one of official, union_reference"):
        load_benchmark("cirr", tmp_path, preset="mine")


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
    prompts = {name: list(find_benchmark(name).prompts) for name in benchmark_names()}
    worded = {name: given for name, given in prompts.items() if "union" in given}
    assert {given[0] for given in worded.values()} == {"union"}
    assert {"fashioniq", "cirr", "circo", "lasco", "llavasco", "dtin", "sketchy", "tuberlin", "quickdraw"} <= set(
        worded
    )


@pytest.mark.parametrize(
    "prompt", ["", "nope", "{nope}", "{caption.upper}", "{caption!r}", "{caption:>99}", "{", "{}", "{0}"]
)
def test_an_unknown_prompt_names_what_is_allowed(prompt):
    with pytest.raises(ConfigError, match=r"expected one of union, clip4cir, .*\{caption\}"):
        template("cirr", prompt)


def test_the_target_caption_is_no_field():
    with pytest.raises(ConfigError, match="unknown field"):
        template("llavasco", "add {llava_target_caption}")
