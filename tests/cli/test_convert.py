"""`union-convert`: the authors' files become models that load by themselves and embed the same."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_reference import TEXTS, golden_images, golden_state
from test_reference_blip import blip_state, tiny_blip, words_file

import union_igrot
from union_igrot.cli.convert import main as convert
from union_igrot.models.reference import load_reference_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("authors") / "authors.pth"
    torch.save(golden_state("mini"), path)
    return path


@torch.no_grad()
def equal(one, other, texts=TEXTS):
    images, targets = golden_images("mini")
    assert one.embed_queries(images, list(texts)).equal(other.embed_queries(images, list(texts)))
    assert one.embed_gallery(targets).equal(other.embed_gallery(targets))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", ["union", "sum_reference"])
def test_a_converted_model_loads_by_itself_and_embeds_the_same(mini, tmp_path, target, capsys):
    folder = tmp_path / "converted"
    if target == "sum_reference":  # also in half precision, as OpenAI's weights are
        torch.save({key: x.half() for key, x in golden_state("mini").items()}, tmp_path / "authors.pth")
        mini = tmp_path / "authors.pth"
    convert([f"checkpoint={mini}", "model=base", f"target={target}", "mask=legacy", f"output_dir={folder}"])
    printed = capsys.readouterr().out
    assert f'union_igrot.load("{folder}")' in printed
    assert "images of 32" in printed
    expected = load_reference_checkpoint(mini, target=target.removesuffix("_reference"), mask="legacy")
    converted = union_igrot.load(folder)
    assert converted.describe() == expected.describe()
    assert converted.tuned
    equal(converted, expected)
    assert files(folder) == {"README.md", "model.json", "heads.safetensors", "backbone.safetensors"}
    notes = json.loads((folder / "model.json").read_text())
    assert notes["backbone_weights"]["file"] == "backbone.safetensors"
    assert notes["card"]["source"] == "authors.pth"
    assert str(tmp_path) not in (folder / "model.json").read_text()
    card = (folder / "README.md").read_text()
    assert "- **converted from**: authors.pth" in card
    assert notes["heads"] in card


def test_transagg_checkpoints_have_no_target_head(mini, tmp_path, refused):
    state = {key: x for key, x in golden_state("mini").items() if not key.startswith(("t5_layers", "union_weighted"))}
    path = tmp_path / "transagg.pth"
    torch.save({key.replace("model.", "pretrained_model.", 1): x for key, x in state.items()}, path)
    assert "choose target=frozen" in refused(convert, f"checkpoint={path}", f"output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
    convert([f"checkpoint={path}", "target=frozen", "half=true", f"output_dir={tmp_path / 'out'}"])
    assert union_igrot.load(tmp_path / "out").target.kind == "frozen"
    assert load_file(tmp_path / "out" / "backbone.safetensors")["visual.proj"].dtype == torch.float16


@torch.no_grad()
def test_a_blip_includes_its_tokenizer(tmp_path):
    torch.save(blip_state(tiny_blip()), tmp_path / "blip.pth")
    words, folder = words_file(tmp_path), tmp_path / "out"
    convert([f"checkpoint={tmp_path / 'blip.pth'}", "model=blip", f"tokenizer={words}", f"output_dir={folder}"])
    expected = load_reference_checkpoint(tmp_path / "blip.pth", model="blip", tokenizer=words)
    words.unlink()
    converted = union_igrot.load(folder)
    assert converted.fingerprint() == expected.fingerprint()
    equal(converted, expected, ["make it", None, "", "redder"])
    assert "tokenizer/tokenizer_config.json" in files(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["checkpoint=nowhere.pth"], "checkpoint: nowhere.pth (expected an existing file"),
        (["model=blip"], "holds a CLIP, but model='blip'"),
        (["model=tiny"], "not OpenCLIP's"),
        (["target=shared"], "expected target=frozen, sum or union"),
        (["target=residual"], "no target=residual (expected target=frozen, sum or union)"),
        (["mask=none"], "mask: none (expected exclude or legacy"),
        (["model.weights=taken"], "model.weights"),
        (["output_dir=taken"], "output_dir taken is not an empty folder; give a new one"),
        (["text_heads=0"], "text_heads: 0"),
    ],
)
def test_an_error_is_one_line(mini, tmp_path, monkeypatch, refused, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    given = {argument.partition("=")[0] for argument in change}
    usual = [f"checkpoint={mini}", "output_dir=out"]
    line = refused(convert, *(one for one in usual if one.partition("=")[0] not in given), *change)
    assert line.startswith("union-convert: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_missing_and_unknown_tensors_are_listed_in_one_line(tmp_path, refused):
    state = golden_state("mini")
    del state["model.ln_final.bias"]
    torch.save(state | {"model.visual.extra": torch.zeros(1)}, tmp_path / "odd.pth")
    line = refused(convert, f"checkpoint={tmp_path / 'odd.pth'}", f"output_dir={tmp_path / 'out'}")
    assert "missing [ln_final.bias]" in line
    assert "not known [visual.extra]" in line
