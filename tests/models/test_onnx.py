"""Models in ONNX Runtime embed as in torch; in 8 bits nearly so."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from exported_models import assert_exported_equals, needs_onnx, untyped
from indexing_world import QUIET
from union_igrot.cli.train import main
from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.ingest.entries import Listing
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.models import onnx
from union_igrot.models.model import load

TEXTS = ["a red dog", "", "two cars and a house at night", "blue", "in green"]


@needs_onnx
@pytest.mark.slow
def test_exported_towers_and_heads_embed_as_in_torch(tmp_path):
    model = load("tiny-union")
    files = assert_exported_equals(model, tmp_path, TEXTS)
    described = json.loads((tmp_path / "onnx.json").read_text())
    assert list(described["files"]) == files == ["gallery.onnx", "text.onnx", "query.onnx"]
    assert described["model"] == model.describe()


@needs_onnx
@pytest.mark.slow
@untyped()
def test_eight_bits_are_exported_once_and_near(tmp_path, monkeypatch):
    monkeypatch.setenv("UNION_CACHE", str(tmp_path))
    model = load("tiny")
    images = torch.randn(9, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = onnx.open_gallery_session(model, "int8")(images)
    monkeypatch.setattr(onnx, "export_onnx", None)
    torch.testing.assert_close(onnx.open_gallery_session(model, "int8")(images), found)
    with torch.no_grad():
        cosine = (found * torch.nn.functional.normalize(model.embed_gallery(images), dim=-1)).sum(1)
    assert 0.99 < cosine.min() < 0.999999


def test_without_the_packages_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "union-igrot\[onnx\]"'):
        onnx.export_onnx(load("tiny"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stored", "given"), [(None, "int8"), ("int8", "bf16-mixed"), ("int8", "onnx")])
def test_rows_in_eight_bits_and_others_are_not_mixed(stored, given):
    index = MemoryIndex(128, {} if stored is None else {"precision": stored})
    with pytest.raises(CheckpointError, match=f"made with precision={stored or 'fp32'}, not {given};"):
        ingest_images(index, load("tiny"), Listing("here", []), replace(QUIET, precision=given))


@pytest.mark.slow
def test_training_has_no_eight_bits(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["precision=int8"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == (
        "union-train: precision=int8 is for union-index; choose fp32, bf16 or fp16"
    )
