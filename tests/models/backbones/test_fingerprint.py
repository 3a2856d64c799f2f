"""What changes features changes the fingerprint, and nothing else does."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from small_backbones import write_notes
from union_igrot.models.backbones.base import without_settings
from union_igrot.models.backbones.open_clip import OpenClipBackbone, load_open_clip
from union_igrot.models.factory import build_backbone
from union_igrot.types import Preprocess

pytestmark = pytest.mark.slow

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 20, "width": 16, "heads": 2, "layers": 1, "vocab_size": 49408},
}
PREPROCESS = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return OpenClipBackbone(CONFIG, PREPROCESS, "mine").network.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"quick_gelu": True},
        {"vision_cfg": {"head_width": 8}},
        {"text_cfg": {"heads": 4}},
        {"text_cfg": {"norm_kwargs": {"eps": 1e-3}}},
        {"text_cfg": {"pool_type": "last"}},
    ],
    ids=str,
)
def test_settings_of_open_clip_count_although_the_weights_are_equal(state, changes):
    plain = OpenClipBackbone(CONFIG, PREPROCESS, "mine", state)
    merged = {key: {**x, **changes.get(key, {})} if isinstance(x, dict) else x for key, x in CONFIG.items()}
    changed = OpenClipBackbone(merged | {k: v for k, v in changes.items() if k == "quick_gelu"}, PREPROCESS, "x", state)
    assert not changed.encode_text(["a dog"]).pooled.equal(plain.encode_text(["a dog"]).pooled) or not torch.equal(
        *(one.encode_image(torch.ones(1, 3, 32, 32)).pooled for one in (plain, changed))
    )
    assert changed.fingerprint() != plain.fingerprint()
    assert without_settings(changed.fingerprint()) == without_settings(plain.fingerprint())


def test_values_that_are_the_defaults_do_not_count(state):
    text = {**CONFIG["text_cfg"], "pad_id": 0, "embed_cls": False, "output_tokens": True}
    vision = {**CONFIG["vision_cfg"], "mlp_ratio": 4.0, "timm_model_pretrained": True}
    written = OpenClipBackbone({**CONFIG, "vision_cfg": vision, "text_cfg": text}, PREPROCESS, "other name", state)
    assert written.fingerprint() == OpenClipBackbone(CONFIG, PREPROCESS, "mine", state).fingerprint()


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "num_attention_heads", 4),
        ("text_config", "layer_norm_eps", 1e-3),
        (None, "transformers_version", "4.1.0"),
        ("vision_config", "attention_dropout", 0.5),
    ],
)
def test_settings_of_transformers_count_if_features_change(clip_folder, tmp_path, tower, key, value):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (config if tower is None else config[tower])[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    plain, changed = (build_backbone("hf:a/b", place) for place in (clip_folder, folder))
    same_features = all(
        torch.equal(*(one(backbone) for backbone in (plain, changed)))
        for one in (
            lambda backbone: backbone.encode_text(["a dog"]).pooled,
            lambda backbone: backbone.encode_image(torch.ones(1, 3, 32, 32)).pooled,
        )
    )
    assert same_features == (key in ("transformers_version", "attention_dropout"))
    assert (changed.fingerprint() == plain.fingerprint()) == same_features


@pytest.mark.parametrize("change", ["words", "case", "preprocessing"])
def test_tokenizer_and_preprocessing_count(clip_folder, tmp_path, change):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if change == "words":
        words = tokenizer["model"]["vocab"]
        words["dog"], words["cats"] = words["cats"], words["dog"]
    if change == "case":
        tokenizer["normalizer"] = None
    if change == "preprocessing":
        write_notes(folder, resample=2)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    AutoTokenizer.from_pretrained(folder)
    plain, changed = (build_backbone("hf:a/b", place).fingerprint() for place in (clip_folder, folder))
    assert changed != plain


def test_fingerprints_of_earlier_versions_count_if_they_prove_the_settings(clip_folder, open_clip_folder):
    tiny = build_backbone("tiny")
    assert tiny.matches(without_settings(tiny.fingerprint()))
    for backbone in (build_backbone("hf:a/b", clip_folder), load_open_clip("open_clip:mine", open_clip_folder)):
        assert backbone.matches(backbone.fingerprint())
        assert not backbone.matches(without_settings(backbone.fingerprint()))  # weights of one's own, any settings
    named = build_backbone(f"hf:{clip_folder}")
    assert named.matches(without_settings(named.fingerprint()))
