"""Saved models that somebody else wrote: refused in one line, at once, without the memory that they ask for."""

import json
import os
import resource
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_backbones import SMALL, VISION, word_tokenizer
from small_world import LinearBackbone, trainable
from union_igrot.errors import CheckpointError, UnionError
from union_igrot.gallery.metadata import load_checkpoint
from union_igrot.models.backbones.weights import read_state_dict
from union_igrot.models.checkpoint import restore_backbone, save_backbone
from union_igrot.models.factory import build_backbone
from union_igrot.models.model import IGROTModel, load

HUGE = 10**9


@pytest.fixture
def folder(tmp_path):
    return trainable().save(tmp_path / "model")


@pytest.fixture(autouse=True)
def little_memory():
    """No test of this file may need more than 300 MB beyond what is used before it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 300 * 2**20


def refused(folder, message=""):
    with pytest.raises(CheckpointError, match=message) as error:
        IGROTModel.load(folder, LinearBackbone())
    assert "\n" not in str(error.value)
    return str(error.value)


def nested(depth):
    return "[" * depth + "]" * depth


TEXTS = {
    "empty": "",
    "not JSON": "{",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "deep nesting": nested(100_000),
    "deep nesting in a field": '{"backbone": ' + nested(100_000) + "}",
    "a number of 5,000 digits": '{"format": ' + "9" * 5000 + "}",
    "not UTF-8": b'{"backbone": "\xff"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_descriptions_that_are_none_are_refused(folder, text):
    (folder / "model.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, "is not a saved model")


# Field, value, and a part of the message.
CHANGES = [
    ("format", float("inf"), "format in model.json is of type float, not int"),
    ("format", "1", "format in model.json is of type str"),
    ("format", True, "format in model.json is of type bool"),
    ("format", 99, "is in format 99 .*install a later union-igrot"),
    ("backbone", 3, "backbone in model.json is of type int"),
    ("backbone", None, "is not a saved model"),
    ("backbone_fingerprint", ["x"], "backbone_fingerprint in model.json is of type list"),
    ("heads", {}, "heads in model.json is of type dict"),
    ("heads", "0" * 16, "heads.safetensors does not match"),
    ("card", "words", "card in model.json is of type str"),
    ("training_images", "many", "training_images in model.json is of type str"),
    ("backbone_weights", "yes", "backbone_weights in model.json is of type str"),
    ("fusion", None, "fusion"),
    ("fusion", "transagg", "fusion in model.json is of type str"),
    ("fusion", {}, "kind"),
    ("fusion.kind", 7, "kind in model.json is of type int"),
    ("fusion.kind", "magic", "unknown query head 'magic'"),
    ("fusion.layers", HUGE, "fusion.layers in model.json is out of range"),
    ("fusion.layers", 1e30, "fusion.layers in model.json is out of range"),
    ("fusion.layers", -1, "layers"),
    ("fusion.layers", 900, r"describes a model of [\d,]+ weights"),
    ("fusion.feedforward", 10**8, r"describes a model of [\d,]+ weights"),
    ("fusion.feedforward", HUGE, r"describes a model of [\d,]+ weights"),
    ("fusion.feedforward", 10**30, "fusion.feedforward in model.json is out of range"),
    ("fusion.feedforward", 64, "does not fit: of another shape"),
    ("fusion.heads", 0, "heads"),
    ("fusion.dropout", 10**400, "fusion.dropout in model.json is out of range"),
    ("fusion.dropout", float("nan"), "fusion.dropout in model.json is out of range"),
    ("fusion.dropout", "much", "dropout"),
    ("fusion.width", 4, "must not set width"),
    ("fusion.sizes", {}, "must not set sizes"),
    ("fusion.magic", 1, "no option magic"),
    ("target.heads", HUGE, r"describes a model of [\d,]+ weights"),
    ("target.feedforward", HUGE, r"describes a model of [\d,]+ weights"),
    ("target.start", [1] * 2000, "target.start in model.json is out of range"),
    ("projector", {"kind": "mlp", "hidden": HUGE}, r"describes a model of [\d,]+ weights"),
    ("projector", {"kind": "mlp"}, "does not fit: missing"),
    ("projector", {"kind": "../../evil"}, "unknown projector"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value", "message"), CHANGES, ids=[f"{f}-{str(v)[:20]}" for f, v, _ in CHANGES])
def test_descriptions_with_wrong_values_are_refused(folder, field, value, message):
    saved = json.loads((folder / "model.json").read_text())
    head, _, name = field.rpartition(".")
    (saved[head] if head else saved)[name] = value
    (folder / "model.json").write_text(json.dumps(saved))
    refused(folder, message)


@pytest.mark.parametrize("name", ["model.json", "heads.safetensors", "README.md", "training_images.txt"])
def test_named_pipes_are_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name in ("model.json", "heads.safetensors"):
        refused(folder, f"no file .*{name}")
    else:
        assert IGROTModel.load(folder, LinearBackbone()).readme is None or name != "README.md"


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "../x", "hf:" + "a/" * 200, "hf:\0"])
def test_names_that_are_none_are_one_line(name):
    for open_it in (load, load_checkpoint):
        with pytest.raises(UnionError) as error:
            open_it(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [2**33, 2**24 + 1])
def test_a_huge_description_is_not_read(folder, size):
    with (folder / "model.json").open("r+b") as file:
        file.truncate(size)
    refused(folder, "is larger than")


@pytest.mark.parametrize("count", [1, HUGE])
def test_a_huge_list_of_training_images_is_not_read(folder, count):
    saved = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(saved | {"training_images": count}))
    with (folder / "training_images.txt").open("wb") as file:
        file.truncate(2**33)
    refused(folder, f"bytes for {count:,} images")


@pytest.mark.slow
def test_backbones_that_do_not_fit_their_weights_are_refused(tmp_path):
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415 - heavy

    from union_igrot.models.backbones.hf import HFClipBackbone  # noqa: PLC0415
    from union_igrot.types import Preprocess  # noqa: PLC0415

    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 2}
    network = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=48))
    preprocess = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    backbone = HFClipBackbone(network, word_tokenizer("<start>", "<end>", "<end>"), preprocess, "hf:some/clip")
    _, saved = save_backbone(backbone, tmp_path)
    assert restore_backbone("hf:some/clip", saved, tmp_path).fingerprint() == backbone.fingerprint()
    changes = [
        ("text_config", "intermediate_size", HUGE),
        ("text_config", "vocab_size", HUGE),
        ("vision_config", "image_size", HUGE),
        ("vision_config", "hidden_size", 2 * 10**5),
        ("vision_config", "hidden_size", "wide"),
        ("vision_config", "num_attention_heads", 0),
        ("text_config", "max_position_embeddings", HUGE),
    ]
    for part, name, value in changes:
        config = {**saved["config"], part: {**saved["config"][part], name: value}}
        with pytest.raises(UnionError) as error:
            restore_backbone("hf:some/clip", {**saved, "config": config}, tmp_path)
        assert "\n" not in str(error.value)
    for change in ({"size": HUGE}, {"size": -3}, {"mean": [1]}, {"std": [float("inf")] * 3}, {"fit": "stretch"}):
        with pytest.raises(CheckpointError, match="does not describe how to build its"):
            restore_backbone("hf:some/clip", {**saved, "preprocess": {**saved["preprocess"], **change}}, tmp_path)
    os.mkfifo(tmp_path / "tokenizer" / "vocab.json")
    with pytest.raises(CheckpointError, match=r"holds vocab\.json, which is not a file"):
        restore_backbone("hf:some/clip", saved, tmp_path)


def test_a_tuned_model_of_too_many_layers_is_refused_before_its_backbone_is_built(tmp_path):
    model = load("tiny")
    model.tuned = True
    folder = model.save(tmp_path)
    saved = json.loads((folder / "model.json").read_text())
    saved["backbone_weights"] |= {"kind": "open_clip", "config": {"vision_cfg": {"layers": HUGE}}}
    (folder / "model.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"vision_cfg\.layers in model\.json is out of range"):
        load(folder)


def test_compressed_weights_are_refused_before_they_are_unpacked(tmp_path):
    torch.save({"x": torch.zeros(2**22)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "small.pt", "w") as small:
        for member in whole.infolist():
            small.writestr(member.filename, whole.read(member), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "small.pt").stat().st_size < 10**6
    for weights in (tmp_path / "small.pt", tmp_path / "script.pt"):
        if weights.name == "script.pt":
            with zipfile.ZipFile(tmp_path / "small.pt", "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/constants.pkl", b"x")
            (tmp_path / "small.pt").rename(weights)
        with pytest.raises(CheckpointError, match="holds a compressed member"):
            build_backbone("tiny", weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 605143316\n", "is a Git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n<html>", "is a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_pointers_and_pages_in_place_of_weights_are_named(tmp_path, content, message, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.to_sparse,
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "complex", "quantized"],
)
@pytest.mark.filterwarnings("ignore:.*(quantiz|TypedStorage|sparse tensor invariants)")
def test_tensors_without_plain_values_are_refused(tmp_path, change):
    torch.save({"\x1b[2Ja\n" + "b" * 3000: change(torch.ones(4, 4)), "c": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt ") as error:
        read_state_dict(tmp_path / "a.pt")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_heads_that_are_not_finite_load_and_integers_become_floats(folder):
    state = load_file(folder / "heads.safetensors")
    save_file(state | {"fusion.sep_token": state["fusion.sep_token"].to(torch.int8)}, folder / "heads.safetensors")
    refused(folder, "does not match")
