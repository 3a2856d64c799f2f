"""A backbone's own weights, written and built again without the files of its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import KINDS, TEXTS, pixels

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models.checkpoint import (
    BACKBONE_FILE as FILE,
    TOKENIZER_FOLDER,
    load_backbone_weights,
    remove_backbone,
    restore_backbone,
    save_backbone,
)
from union_igrot.models.factory import build_backbone


@pytest.fixture(params=KINDS)
def backbone(request):
    """A backbone whose weights are not those of its name."""
    name, fixture, *_ = KINDS[request.param]
    made = build_backbone(name, None if fixture is None else request.getfixturevalue(fixture))
    generator = torch.Generator().manual_seed(3)
    for x in made.parameters():
        x.data += 0.1 * x.data.std(correction=0) * torch.randn(x.shape, generator=generator)
    return made


@pytest.mark.slow
@torch.no_grad()
def test_a_backbone_is_built_again_from_its_own_files_alone(backbone, tmp_path):
    fingerprint, saved = save_backbone(backbone, tmp_path)
    assert fingerprint == backbone.fingerprint()
    saved = json.loads(json.dumps(saved))
    assert str(tmp_path) not in json.dumps(saved)
    again = restore_backbone(backbone.name, saved, tmp_path)
    assert again.fingerprint() == fingerprint
    assert (again.name, again.dim, again.preprocess) == (backbone.name, backbone.dim, backbone.preprocess)
    images = pixels(backbone)
    for found, expected in (
        (again.encode_image(images), backbone.encode_image(images)),
        (again.encode_text(TEXTS), backbone.encode_text(TEXTS)),
    ):
        torch.testing.assert_close(found.tokens, expected.tokens)
        assert found.pooled_at.equal(expected.pooled_at)
        assert found.mask.equal(expected.mask)
    # And once more, from what was built so.
    assert save_backbone(again, tmp_path)[1] == save_backbone(backbone, tmp_path)[1]
    remove_backbone(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_weights_have_the_fingerprint_that_they_are_read_with(tmp_path):
    backbone = build_backbone("tiny")
    backbone.network.text_norm.weight.data += 1e-5  # what is shipped has 16 bits already
    fingerprint, saved = save_backbone(backbone, tmp_path, half=True)
    assert fingerprint != backbone.fingerprint()
    assert {x.dtype for x in load_file(tmp_path / FILE).values() if x.is_floating_point()} == {torch.float16}
    assert restore_backbone("tiny", saved, tmp_path).fingerprint() == fingerprint


def test_the_file_serves_as_weights_of_its_name(tmp_path):
    backbone = build_backbone("tiny")
    save_backbone(backbone, tmp_path)
    assert build_backbone("tiny", tmp_path / FILE).fingerprint() == backbone.fingerprint()


def test_weights_of_two_names_are_written_once_each(tmp_path):
    backbone = build_backbone("tiny")
    backbone.network.twin = backbone.network.text_norm.weight
    save_backbone(backbone, tmp_path)
    state = load_file(tmp_path / FILE)
    assert state["twin"].equal(state["text_norm.weight"])


def test_writing_again_leaves_no_tokenizer_of_another(tmp_path, clip_folder):
    words = build_backbone("hf:some/clip", clip_folder)
    save_backbone(words, tmp_path)
    assert (tmp_path / TOKENIZER_FOLDER).is_dir()
    save_backbone(build_backbone("tiny"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_missing_and_damaged_files_are_named(tmp_path, clip_folder):
    backbone = build_backbone("hf:some/clip", clip_folder)
    _, saved = save_backbone(backbone, tmp_path)
    for change in ({"kind": "magic"}, {"config": None}, {"preprocess": {"size": 3}}):
        with pytest.raises(CheckpointError, match=r"does not describe how to build its .*copy the model again"):
            restore_backbone("hf:some/clip", saved | change, tmp_path)
    shutil.rmtree(tmp_path / TOKENIZER_FOLDER)
    with pytest.raises(CheckpointError, match="tokenizer files"):
        restore_backbone("hf:some/clip", saved, tmp_path)
    state = load_file(tmp_path / FILE)
    state.pop("text_projection.weight")
    save_file(state, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"missing \[network\.text_projection\.weight\]"):
        load_backbone_weights(backbone, tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match="is not a file"):
        load_backbone_weights(backbone, tmp_path)
    with pytest.raises(ConfigError, match="unknown backbone 'magic'"):
        restore_backbone("magic", {}, tmp_path)
