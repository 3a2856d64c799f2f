"""Heads by name, and every mistake as one clear line."""

import pytest

from union_igrot.errors import ConfigError
from union_igrot.models.heads.factory import QUERY_HEADS, TARGET_HEADS, build_query_head, build_target_head
from union_igrot.models.heads.query import ImageFusion, SumFusion, TextFusion, TransAggFusion
from union_igrot.models.heads.target import FrozenTarget, SharedTarget, SumTarget, UnionTarget


def test_names_build_their_heads():
    assert {"image": ImageFusion, "text": TextFusion, "sum": SumFusion, "transagg": TransAggFusion} == QUERY_HEADS
    assert {"frozen": FrozenTarget, "sum": SumTarget, "union": UnionTarget, "shared": SharedTarget} == TARGET_HEADS
    for kind, made in QUERY_HEADS.items():
        assert type(build_query_head(kind, 16)) is made
    for kind, made in TARGET_HEADS.items():
        assert type(build_target_head(kind, 16)) is made


@pytest.mark.parametrize(
    ("build", "kind", "options"),
    [
        (build_query_head, "image", {}),
        (
            build_query_head,
            "transagg",
            {"layers": 1, "heads": 2, "mask": "legacy", "dropout": 0.0, "start": "reference"},
        ),
        (build_target_head, "sum", {"form": "inference"}),
        (build_target_head, "union", {"layers": 2, "heads": 3, "feedforward": 8, "start": "reference"}),
    ],
)
def test_options_are_kept_and_build_the_same_again(build, kind, options):
    made = build(kind, 16, **options)
    assert options.items() <= made.options.items()
    again = build(kind, 16, **made.options)
    assert again.options == made.options
    assert {n: x.shape for n, x in again.state_dict().items()} == {n: x.shape for n, x in made.state_dict().items()}


@pytest.mark.parametrize(
    ("build", "kind", "width", "options", "words"),
    [
        (build_query_head, "concat", 16, {}, ["'concat'", "image, text, sum, transagg"]),
        (build_target_head, "original", 16, {}, ["'original'", "frozen, sum, union, shared"]),
        (build_query_head, "image", 16, {"layers": 2}, ["does not take layers", "no option"]),
        (build_target_head, "union", 16, {"mask": "x", "depth": 1}, ["depth, mask", "layers, heads, feedforward"]),
        (
            build_query_head,
            "transagg",
            16,
            {"heads": 5},
            ["'transagg'", "width 16", "fusion.heads one of 1, 2, 4, 8, 16"],
        ),
        (build_query_head, "transagg", 16, {"heads": 0}, ["heads is 0", "at least 1"]),
        (build_query_head, "transagg", 16, {"heads": "2"}, ["heads is '2'", "whole number"]),
        (build_query_head, "transagg", 16, {"layers": 0}, ["layers is 0", "at least 1"]),
        (build_query_head, "transagg", 16, {"layers": True}, ["layers is True", "whole number"]),
        (build_query_head, "transagg", 16, {"dropout": 1.5}, ["dropout is 1.5", "below 1"]),
        (build_query_head, "transagg", 16, {"dropout": None}, ["dropout is None", "rate"]),
        (build_query_head, "transagg", 16, {"mask": "include"}, ["mask is 'include'", "exclude, legacy"]),
        (build_query_head, "transagg", 16, {"start": "zero"}, ["start is 'zero'", "balanced, reference"]),
        (build_query_head, "transagg", 0, {}, ["width is 0", "at least 1"]),
        (build_target_head, "sum", 16, {"form": "max"}, ["form is 'max'", "normalised, training, inference"]),
        (build_target_head, "union", 16, {"encoder_dropout": -0.1}, ["encoder_dropout is -0.1", "at least 0"]),
        (build_target_head, "union", 16, {"start": "text"}, ["start is 'text'", "image, reference"]),
    ],
)
def test_mistakes_are_one_line_with_what_is_allowed(build, kind, width, options, words):
    with pytest.raises(ConfigError) as error:
        build(kind, width, **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
