"""Heads by name, and every mistake as one clear line."""

import pytest

from union_igrot.errors import ConfigError
from union_igrot.models.heads.factory import FUSIONS, TARGETS, build_fusion, build_target
from union_igrot.models.heads.query import ImageFusion, SumFusion, TextFusion, TransAggFusion
from union_igrot.models.heads.target import FrozenTarget, SharedTarget, SumTarget, UnionTarget


def test_names_build_their_heads():
    assert {"image": ImageFusion, "text": TextFusion, "sum": SumFusion, "transagg": TransAggFusion} == FUSIONS
    assert {"frozen": FrozenTarget, "sum": SumTarget, "union": UnionTarget, "shared": SharedTarget} == TARGETS
    for kind, made in FUSIONS.items():
        assert type(build_fusion(kind, 16)) is made
    for kind, made in TARGETS.items():
        assert type(build_target(kind, 16)) is made


@pytest.mark.parametrize(
    ("build", "kind", "options"),
    [
        (build_fusion, "image", {}),
        (build_fusion, "transagg", {"layers": 1, "heads": 2, "mask": "legacy", "dropout": 0.0, "start": "reference"}),
        (build_target, "sum", {"form": "inference"}),
        (build_target, "union", {"layers": 2, "heads": 3, "feedforward": 8, "start": "reference"}),
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
        (build_fusion, "concat", 16, {}, ["'concat'", "image, text, sum, transagg"]),
        (build_target, "original", 16, {}, ["'original'", "frozen, sum, union, shared"]),
        (build_fusion, "image", 16, {"layers": 2}, ["does not take layers", "no option"]),
        (build_target, "union", 16, {"mask": "x", "depth": 1}, ["depth, mask", "layers, heads, feedforward"]),
        (build_fusion, "transagg", 16, {"heads": 5}, ["'transagg'", "width 16", "fusion.heads one of 1, 2, 4, 8, 16"]),
        (build_fusion, "transagg", 16, {"heads": 0}, ["heads is 0", "at least 1"]),
        (build_fusion, "transagg", 16, {"heads": "2"}, ["heads is '2'", "whole number"]),
        (build_fusion, "transagg", 16, {"layers": 0}, ["layers is 0", "at least 1"]),
        (build_fusion, "transagg", 16, {"layers": True}, ["layers is True", "whole number"]),
        (build_fusion, "transagg", 16, {"dropout": 1.5}, ["dropout is 1.5", "below 1"]),
        (build_fusion, "transagg", 16, {"dropout": None}, ["dropout is None", "rate"]),
        (build_fusion, "transagg", 16, {"mask": "include"}, ["mask is 'include'", "exclude, legacy"]),
        (build_fusion, "transagg", 16, {"start": "zero"}, ["start is 'zero'", "balanced, reference"]),
        (build_fusion, "transagg", 0, {}, ["width is 0", "at least 1"]),
        (build_target, "sum", 16, {"form": "max"}, ["form is 'max'", "normalised, training, inference"]),
        (build_target, "union", 16, {"encoder_dropout": -0.1}, ["encoder_dropout is -0.1", "at least 0"]),
        (build_target, "union", 16, {"start": "text"}, ["start is 'text'", "image, reference"]),
    ],
)
def test_mistakes_are_one_line_with_what_is_allowed(build, kind, width, options, words):
    with pytest.raises(ConfigError) as error:
        build(kind, width, **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
