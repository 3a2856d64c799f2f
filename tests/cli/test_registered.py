"""Registered backbones, benchmarks and heads are options of the commands, in sweeps too."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from small_runs import SMALL_DATA, rows_of
from small_world import LinearBackbone
from union_igrot.cli.command import help_text
from union_igrot.cli.config import compose
from union_igrot.cli.eval import main as evaluate
from union_igrot.datasets import registry
from union_igrot.datasets.registry import BenchmarkDeclaration, BenchmarkOption, register_benchmark
from union_igrot.errors import ConfigError
from union_igrot.models import TargetHead, register_backbone, register_target_head, registry as models
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

pytestmark = pytest.mark.slow


def read_theirs(folder, split, side):
    items = tuple(GalleryItem(path.stem, path) for path in sorted(folder.root.glob("*.png")))
    queries = tuple(Query(f"q{item.id}", item.image, None, (item.id,)) for item in items)
    return Benchmark(f"theirs_{side}", split, "sbir", queries, items, Protocol(metrics=("R@1",), primary="R@1"))


THEIRS = BenchmarkDeclaration(
    name="theirs",
    reader=read_theirs,
    splits=("val",),
    options=(BenchmarkOption("side", str, choices=("left", "right"), is_part=True, help="side of the images"),),
    summary="Images of theirs.",
)


@pytest.fixture(autouse=True)
def registered(tmp_path, monkeypatch):
    """A backbone, a benchmark and a head of another package, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    for names in (registry._registered, models.BACKBONES._registered, models.TARGET_HEADS._registered):
        for name in list(names):
            monkeypatch.delitem(names, name)
    register_benchmark(THEIRS)

    @register_backbone("linear")
    def build(*_):
        return LinearBackbone()

    @register_target_head
    class Scaled(TargetHead):
        kind = "scaled"

        def __init__(self, weight: float = 0.9, null: bool = True) -> None:
            super().__init__(weight=weight, null=null)
            self.weight = weight

        def forward(self, images, null, fuse):
            del fuse
            return F.normalize(self.weight * images.pooled + (1 - self.weight) * null.pooled, dim=-1)

    (tmp_path / "images").mkdir()
    torch.manual_seed(0)
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / "images" / f"{name}.png")
    yield
    for names in (registry._registered, models.BACKBONES._registered, models.TARGET_HEADS._registered):
        names.clear()


def test_their_settings_are_validated_and_described():
    config = compose("eval", ["model=linear", "data=theirs", "data.root=images"])
    assert (config.model.name, config.data.side, config.data.split) == ("linear", "all", "val")
    assert compose("train", ["model.name=linear"]).model.name == "linear"
    with pytest.raises(ConfigError, match=r"data.side: lft .*left, right or all; did you mean left"):
        compose("eval", ["data=theirs", "data.side=lft"])
    with pytest.raises(ConfigError, match=r"model=linea \(did you mean linear"):
        compose("eval", ["model=linea"])
    with pytest.raises(ConfigError, match=r"model.name: linea .*blip.*linear"):
        compose("train", ["model.name=linea"])
    shown = " ".join(help_text("train", "data").split())
    assert "Images of theirs." in shown
    assert "side of the images: left, right, or all with their mean" in shown
    assert "linear" in help_text("train", "model")


def test_options_of_their_heads_are_left_to_the_head():
    config = compose("train", ["target=scaled", "target.weight=0.5", "target.null=false"])
    assert config.target == {"kind": "scaled", "weight": 0.5, "null": False}
    with pytest.raises(ConfigError, match=r"fusion\.kind: other"):
        compose("train", ["fusion.kind=other"])


def test_a_command_evaluates_them(tmp_path):
    words = ["model=linear", "data=theirs", "data.root=images", "output_dir=out", "cache_dir=cache"]
    evaluate([*words, "features.workers=0", "progress=false"])
    rows = rows_of(tmp_path / "out")
    assert {row["benchmark"] for row in rows} == {"theirs_left", "theirs_right", "theirs_mean"}
    assert all(row["metrics"]["R@1"] == 100 for row in rows if row["method"] == "image")


def test_a_sweep_evaluates_them(tmp_path, capsys):
    words = ["model=tiny,linear", "data=theirs", "data.root=images", "data.side=left,right", "cache_dir=cache"]
    evaluate(["-m", *words, "features.workers=0", "progress=false"])
    assert "4 of 4 jobs done" in capsys.readouterr().out
    found = [json.loads(path.read_text()) for path in tmp_path.glob("multirun/eval/*/*/*/results.json")]
    assert sorted({row["benchmark"] for rows in found for row in rows}) == ["theirs_left", "theirs_right"]
    assert not any(SMALL_DATA[0] in path.read_text() for path in tmp_path.glob("multirun/**/config.yaml"))
