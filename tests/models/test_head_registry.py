"""Backbones and heads by name: options checked, foreign ones registered, one clear line for a mistake."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from small_world import DIM, LinearBackbone
from union_igrot.errors import CheckpointError, ConfigError, UnionError
from union_igrot.models import registry
from union_igrot.models.factory import build_backbone, build_query_head, build_target_head
from union_igrot.models.heads.query import QueryHead
from union_igrot.models.heads.target import TargetHead
from union_igrot.models.model import IGROTModel, load
from union_igrot.models.registry import (
    BACKBONES,
    QUERY_HEADS,
    TARGET_HEADS,
    names_backbone,
    register_backbone,
    register_query_head,
    register_target_head,
)
from union_igrot.training.losses import InfoNCE


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch):
    for known in (BACKBONES, QUERY_HEADS, TARGET_HEADS):
        monkeypatch.setattr(known, "_registered", {})


@pytest.mark.parametrize(("known", "build"), [(QUERY_HEADS, build_query_head), (TARGET_HEADS, build_target_head)])
def test_every_builtin_name_builds_its_head(known, build):
    for kind in known.builtin:
        assert build(kind, 16).kind == kind


@pytest.mark.parametrize(
    ("build", "kind", "options"),
    [
        (build_query_head, "image", {}),
        (
            build_query_head,
            "transagg",
            {"layers": 1, "heads": 2, "mask": "legacy", "dropout": 0.0},
        ),
        (build_target_head, "sum", {"form": "inference"}),
        (build_target_head, "union", {"layers": 2, "heads": 3, "feedforward": 8, "start": "reference"}),
        (build_target_head, "residual", {"hidden": 24}),
    ],
)
def test_options_are_kept_and_build_the_same_again(build, kind, options):
    made = build(kind, 16, **options)
    assert options.items() <= made.options.items()
    again = build(kind, 16, **made.options)
    assert again.options == made.options
    assert {n: x.shape for n, x in again.state_dict().items()} == {n: x.shape for n, x in made.state_dict().items()}


@pytest.mark.parametrize(
    ("build", "kind", "width", "options", "parts"),
    [
        (build_query_head, "transag", 16, {}, ["did you mean transagg?", "image, text, sum, transagg"]),
        (build_target_head, "original", 16, {}, ["'original'", "frozen, residual, sum, union, shared"]),
        (build_query_head, "image", 16, {"layers": 2}, ["layers", "options: none"]),
        (build_target_head, "union", 16, {"mask": "x", "depth": 1}, ["depth, mask", "layers, heads, feedforward"]),
        (build_query_head, "transagg", 16, {"heads": 5}, ["fusion.heads", "width 16: 1, 2, 4, 8, 16"]),
        (build_query_head, "transagg", 16, {"heads": 0}, ["heads", "0", ">= 1"]),
        (build_query_head, "transagg", 16, {"heads": "2"}, ["heads", "'2'", "an integer"]),
        (build_query_head, "transagg", 16, {"layers": True}, ["layers", "True", "an integer"]),
        (build_query_head, "transagg", 16, {"dropout": 1.5}, ["dropout", "1.5", "< 1"]),
        (build_query_head, "transagg", 16, {"dropout": None}, ["dropout", "None", "a number"]),
        (build_query_head, "transagg", 16, {"mask": "include"}, ["mask", "'include'", "exclude or legacy"]),
        (build_query_head, "transagg", 0, {}, ["width", "0", ">= 1"]),
        (build_target_head, "sum", 16, {"form": "max"}, ["form", "'max'", "normalised, training or inference"]),
        (build_target_head, "residual", 16, {"hidden": 0}, ["hidden", "0", ">= 1"]),
        (build_target_head, "union", 16, {"encoder_dropout": -0.1}, ["encoder_dropout", "-0.1", ">= 0"]),
    ],
)
def test_mistakes_are_one_line_with_what_is_allowed(build, kind, width, options, parts):
    with pytest.raises(ConfigError) as error:
        build(kind, width, **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in parts), str(error.value)


def test_a_head_takes_its_sizes_from_the_backbones_settings():
    sizes = {"name": "tiny", "feedforward": 24, "union_heads": 3}
    assert build_query_head("transagg", 16, sizes).options["feedforward"] == 24
    assert build_target_head("union", 16, sizes, layers=1).options["heads"] == 3
    assert build_target_head("union", 16, sizes, heads=1).options["heads"] == 1
    assert build_query_head("sum", 16, sizes).options == {}


class ScaledTarget(TargetHead):
    """A head of another package."""

    kind = "scaled"

    def __init__(self, width: int, temperature: float = 2.0, bias: bool = True, note: str | None = None) -> None:
        super().__init__(temperature=temperature, bias=bias, note=note)
        self.layer = torch.nn.Linear(width, width, bias=bias)

    def forward(self, images, null, fuse):  # noqa: ARG002
        return F.normalize(images.pooled + self.layer(images.pooled) / self.options["temperature"], dim=-1)


def test_a_foreign_head_is_built_trained_saved_and_loaded(tmp_path):
    register_target_head(ScaledTarget)
    head = build_target_head("scaled", DIM, temperature=3.0, bias=False)
    assert head.options == {"temperature": 3.0, "bias": False, "note": None}
    for wrong in ({"bias": 1}, {"temperature": "2"}, {"note": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build_target_head("scaled", DIM, **wrong)
    model = IGROTModel(LinearBackbone(), build_query_head("sum", DIM), head)
    images, texts = torch.randn(4, 3, 8, 8), ["red", None, "blue square", ""]
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 0.1)
    before = head.layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        InfoNCE(scale=1.0)(model.embed_queries(images, texts), model.embed_gallery(images), torch.arange(4)).backward()
        optimizer.step()
    assert not head.layer.weight.equal(before)
    again = IGROTModel.load(model.eval().save(tmp_path), LinearBackbone())
    assert again.target.options == head.options
    assert again.embed_gallery(images).equal(model.embed_gallery(images))


def test_heads_and_backbones_come_from_entry_points_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "foreign_heads", SimpleNamespace(ScaledTarget=ScaledTarget))
    places = {"scaled": "foreign_heads:ScaledTarget", "gone": "no_such_package:Head"}
    group = {name: EntryPoint(name, place, TARGET_HEADS.group) for name, place in places.items()}
    monkeypatch.setattr(registry, "entry_points_of", lambda name: group if name == TARGET_HEADS.group else {})
    assert build_target_head("scaled", DIM).options["bias"] is True
    assert {"scaled", "gone"} < set(TARGET_HEADS.names())
    with pytest.raises(ConfigError, match="cannot import target head 'gone'"):
        build_target_head("gone", DIM)


def test_a_foreign_backbone_and_query_head_are_known_by_name(tmp_path):
    @register_backbone("linear")
    def build(name, weights):
        assert (name, weights) == ("linear", None)
        return LinearBackbone()

    @register_query_head
    class Half(QueryHead):
        kind = "half"

        def forward(self, images, texts):
            return F.normalize(images.pooled + texts.pooled / 2, dim=-1)

    assert registry.is_backbone("linear")
    assert type(build_backbone("linear")) is LinearBackbone
    # A saved model finds both by their names.
    folder = IGROTModel(build("linear", None), Half(), build_target_head("frozen", DIM)).save(tmp_path)
    assert type(IGROTModel.load(folder).fusion) is Half
    with pytest.raises(ConfigError, match="built in"):
        register_backbone("base")(build)
    QUERY_HEADS.register("wrong", int)
    with pytest.raises(ConfigError, match="expected a subclass of QueryHead"):
        build_query_head("wrong", DIM)


@pytest.mark.slow
def test_names_are_known_without_torch_and_t5_is_imported_for_union_alone(tmp_path):
    model = IGROTModel(build_backbone("tiny"), build_query_head("sum", 128), build_target_head("frozen", 128))
    code = (
        "import sys; from union_igrot.models.registry import QUERY_HEADS, is_backbone; is_backbone('base')\n"
        "print('torch' in sys.modules, *QUERY_HEADS.names())\n"
        "from union_igrot.models.model import load; load(sys.argv[1])\n"
        "print(any(name.startswith('transformers.models.t5') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model.save(tmp_path))], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["False image text sum transagg", "False"]


def test_an_unknown_backbone_is_an_error_that_names_the_known():
    with pytest.raises(UnionError, match=r"did you mean large.*tiny, photos, base.*open_clip:"):
        build_backbone("larg")


def test_only_a_folder_with_a_model_hides_a_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base" / "model").mkdir(parents=True)
    assert names_backbone("base")
    (tmp_path / "base" / "model" / "model.json").write_text("{}")
    assert not names_backbone("base")
    assert not names_backbone("tiny")
    with pytest.raises(CheckpointError, match="base"):
        load("base")
