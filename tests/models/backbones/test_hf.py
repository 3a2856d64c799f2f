import io
import json
import shutil

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, canonicalize_text
from PIL import Image
from torch.nn import functional as F
from transformers import BlipForImageTextRetrieval, CLIPImageProcessor, CLIPModel, SiglipModel

from small_backbones import write_notes
from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models.backbones import base, hf
from union_igrot.models.backbones.hf import canonicalize, load_hf, load_tokenizer
from union_igrot.models.factory import build_backbone
from union_igrot.types import Preprocess

TEXTS = ["make it red", "a small dog ! two cats", ""]


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_blip_returns_its_own_retrieval_scores(blip_folder, images):
    backbone = load_hf("blip", blip_folder)
    network = BlipForImageTextRetrieval.from_pretrained(blip_folder).eval()
    ids = backbone.tokenizer(TEXTS, padding="max_length", max_length=35, return_tensors="pt")
    scores = network(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=images, use_itm_head=False
    )
    image, text = backbone.encode_image(images), backbone.encode_text(TEXTS)
    close(F.normalize(image.pooled, dim=-1) @ F.normalize(text.pooled, dim=-1).T, scores.itm_score)
    assert text.tokens.shape == (3, 35, 24)
    assert text.mask.sum(1).tolist() == [5, 8, 2]
    names = list(backbone.state_dict())
    assert not [name for name in names if "crossattention" in name or "itm_head" in name]


@torch.no_grad()
def test_siglip_returns_its_own_embeddings(siglip_folder, images):
    backbone = load_hf("siglip2", siglip_folder)
    network = SiglipModel.from_pretrained(siglip_folder).eval()
    texts = ["make it red", "a small dog two cats", ""]
    ids = backbone.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    image, text = backbone.encode_image(images), backbone.encode_text(["Make it RED!", "a small_dog;  two cats.", " ?"])
    close(image.pooled, network.vision_model(images).pooler_output)
    close(text.pooled, network.text_model(ids).pooler_output)
    assert text.tokens.shape == (3, 17, 64)
    assert text.mask.sum(1).tolist() == [5, 7, 2]
    close(text.tokens[:, -1], text.pooled)
    assert backbone.earlier_fingerprint(backbone.fingerprint()) is None  # earlier versions kept capitals


CAPTIONS = ["A Red Shoe!", "is a_b c; with  'quotes'", "", "Ünïcode, STRASSE", "100% [wool]", "-- !?", "tab\tand\nline"]


def test_siglip_texts_are_those_of_open_clip(siglip_folder):
    """Equal ids to OpenCLIP's tokenizer of the same words, wherever the files put the padding."""
    backbone = load_hf("siglip2", siglip_folder)
    expected = HFTokenizer(str(siglip_folder), context_length=16, clean="canonicalize")
    for side in ("left", "right"):
        backbone.tokenizer.padding_side = side
        ids, mask = backbone._tokenize([canonicalize(text) for text in CAPTIONS])
        assert ids.equal(expected(CAPTIONS))
        assert (mask.int().diff(dim=1) <= 0).all()  # words first
    assert [canonicalize(text) for text in CAPTIONS] == [canonicalize_text(text) for text in CAPTIONS]


@torch.no_grad()
def test_a_siglip_token_is_the_output_of_the_head_for_it_alone(siglip_folder, images):
    backbone = load_hf("siglip2", siglip_folder)
    vision = backbone.network.vision_model
    hidden = vision(images).last_hidden_state
    tokens = backbone.encode_image(images).tokens
    for place in range(hidden.shape[1]):
        close(tokens[:, 1 + place], vision.head(hidden[:, place : place + 1]))


@torch.no_grad()
def test_clip_returns_its_own_embeddings(clip_folder, images):
    backbone = load_hf("hf:some/clip", clip_folder)
    network = CLIPModel.from_pretrained(clip_folder).eval()
    ids = backbone.tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    outputs = network(input_ids=ids, pixel_values=images)
    image, text = backbone.encode_image(images), backbone.encode_text(TEXTS)
    close(F.normalize(image.pooled, dim=-1), outputs.image_embeds)
    close(F.normalize(text.pooled, dim=-1), outputs.text_embeds)
    assert text.mask.sum(1).tolist() == [5, 8, 2]


@pytest.mark.slow
def test_the_preprocessing_is_the_folders_but_for_the_recipe_of_blip(blip_folder, siglip_folder, clip_folder):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    assert load_hf("blip", blip_folder).preprocess == Preprocess(32, mean, std, fit="pad")
    assert load_hf("hf:a/b", blip_folder).preprocess == Preprocess(32, mean, std, fit="squash")
    assert load_hf("siglip2", siglip_folder).preprocess == Preprocess(32, mean, std, "squash", "bilinear")
    assert load_hf("hf:a/b", clip_folder).preprocess == Preprocess(32, mean, std, fit="crop")


SIZE, CROP = {"height": 32, "width": 32}, {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 32}, **CROP},
        {"size": 32, **CROP},
        {"size": SIZE, **CROP},
        {"size": SIZE},
        {"size": SIZE, "do_normalize": False},
        {"size": {"shortest_edge": 32}, "resample": 2, **CROP},
    ],
)
def test_preprocessing_equals_that_of_transformers(clip_folder, tmp_path, settings):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    write_notes(folder, **settings)
    processor = CLIPImageProcessor.from_pretrained(folder)
    image = Image.effect_noise((48, 40), 60).convert("RGB")
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    found = ImageToTensor(load_hf("hf:a/b", folder).preprocess)(image)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 40}, **CROP}, r"has size {'shortest_edge': 40}, which .* \(expected 32"),
        ({"size": 40}, "has size 40"),
        ({"size": {"height": 32, "width": 64}}, "has size"),
        ({"size": SIZE, "do_center_crop": True, "crop_size": 24}, "has crop_size 24"),
        ({"do_rescale": False}, "does not rescale"),
        ({"rescale_factor": 0.5}, "does not rescale"),
        ({"do_resize": False}, "does not resize"),
    ],
)
def test_preprocessing_that_is_not_supported_is_an_error(clip_folder, tmp_path, settings, message):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    write_notes(folder, **settings)
    with pytest.raises(CheckpointError, match=message):
        load_hf("hf:a/b", folder)


def test_a_tokenizer_may_be_a_vocabulary(blip_folder):
    tokenizer = load_tokenizer(blip_folder / "vocab.txt", "blip")
    assert tokenizer("make it red")["input_ids"] == [2, 5, 6, 7, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json in .* cannot be read"),
        ("config.json", "{", "config.json in .* cannot be read"),
        ("config.json", '{"model_type": "bert"}', "is a bert model; supported are blip, siglip, clip"),
        ("config.json", '{"model_type": "siglip2"}', "use a repository of a fixed one"),
        ("model.safetensors", None, "model.safetensors in .* cannot be read"),
        ("model.safetensors", "x" * 20, "model.safetensors in .* cannot be read"),
        ("preprocessor_config.json", None, "preprocessor_config.json in .* cannot be read"),
        ("preprocessor_config.json", '{"image_mean": [0, 0, 0]}', "lacks image_std"),
        (
            "preprocessor_config.json",
            '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 0}',
            "resamples by 0",
        ),
    ],
)
def test_a_broken_folder_is_named(clip_folder, tmp_path, file, content, message):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        load_hf("hf:a/b", folder)
    assert "\n" not in str(error.value)


def test_missing_weights_are_never_random(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"miss \[vision_model\.encoder\.layers\.2"):
        load_hf("hf:a/b", folder)


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"Salesforce/blip-itm-base-coco is not in the cache") as error:
        load_hf("blip")
    assert "model.weights=PATH" in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_names_and_files_in_place_of_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="choose blip, siglip2, tinyclip or hf:"):
        load_hf("base")
    with pytest.raises(ConfigError, match="choose one of tiny, photos, base, large"):
        build_backbone("nope")
    for name in ("hf:/not/there", "hf:../x", "hf:", "hf:a/b/c"):
        with pytest.raises((CheckpointError, ConfigError), match=r"existing folder|choose blip") as error:
            load_hf(name)
        assert "\n" not in str(error.value)
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_hf("blip", tmp_path / "weights.bin")


def test_code_and_adapters_in_a_folder_are_errors(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config | auto_map | {"model_type": "mine"}))
    with pytest.raises(
        CheckpointError, match=r"copy has code of its own, which is not run; use .* \(blip, siglip, clip\)"
    ):
        load_hf("hf:a/b", folder)
    (folder / "config.json").write_text(json.dumps(config | auto_map))
    load_hf("hf:a/b", folder)  # transformers' own code


def adapter_notes(folder, base, **changes):
    folder.mkdir(exist_ok=True)
    notes = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj", "v_proj"], "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(notes | changes))


def test_adapters_without_peft_or_of_other_kinds_are_refused(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "find_spec", lambda _: None)
    adapter_notes(tmp_path / "lora", "openai/clip")
    line = (
        r'LoRA adapter of openai/clip; pip install "union-igrot\[peft\]" to merge it on loading, or merge it \(merge_'
    )
    with pytest.raises(CheckpointError, match=line) as error:
        load_hf("hf:a/b", tmp_path / "lora")
    assert "\n" not in str(error.value)
    adapter_notes(tmp_path / "lora", "openai/clip", peft_type="IA3")
    with pytest.raises(CheckpointError, match="holds an adapter of type IA3; give one whole model"):
        load_hf("hf:a/b", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config.json in .* cannot be read .*; copy the file again"):
        load_hf("hf:a/b", tmp_path / "lora")
    shutil.copytree(clip_folder, tmp_path / "both")
    adapter_notes(tmp_path / "both", "openai/clip")
    with pytest.raises(CheckpointError, match="holds both an adapter and a whole model"):
        load_hf("hf:a/b", tmp_path / "both")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_an_adapter_is_merged_as_by_peft(clip_folder, tmp_path, images):
    import peft  # noqa: PLC0415 - takes seconds

    base = CLIPModel.from_pretrained(clip_folder)
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    tuned = peft.get_peft_model(base, peft.LoraConfig(**options))
    tuned.save_pretrained(tmp_path / "lora")
    expected = tuned.merge_and_unload().eval()
    backbone = build_backbone("hf:some/clip", tmp_path / "lora")
    plain = build_backbone("hf:some/clip", clip_folder)
    ids, _ = backbone._tokenize(TEXTS)
    outputs = expected(input_ids=ids, pixel_values=images)
    for found, wanted in (
        (backbone.encode_image(images).pooled, outputs.image_embeds),
        (backbone.encode_text(TEXTS).pooled, outputs.text_embeds),
    ):
        torch.testing.assert_close(F.normalize(found, dim=-1), wanted, atol=1e-4, rtol=0)
    assert (plain.encode_image(images).pooled - backbone.encode_image(images).pooled).abs().max() > 0.01
    adapter_notes(tmp_path / "lora", clip_folder, target_modules=["k_proj"])
    with pytest.raises(CheckpointError, match=r"the LoRA adapter .*lora does not fit its model: \["):
        build_backbone("hf:some/clip", tmp_path / "lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "open_clip:mine", "blip", "siglip2", "hf:some/clip"])
def test_texts_that_are_cut_are_reported_once(request, caplog, monkeypatch, name):
    monkeypatch.setattr(base, "_truncation_logged", set())
    folders = {"open_clip:mine": "open_clip_folder", "blip": "blip_folder", "siglip2": "siglip_folder"}
    folder = request.getfixturevalue(folders.get(name, "clip_folder"))
    backbone = build_backbone(name, None if name == "tiny" else folder)
    limit = backbone.context
    backbone.encode_text(["", "make it red", "a " * (limit - 2)])
    assert not caplog.records
    backbone.encode_text(["make it red", "two cats " * limit, "two dogs " * limit])
    backbone.encode_text(["two cats " * limit])
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"texts of more than {limit} tokens are cut by backbone {name}, such as 'two cats two")
    assert len(message) < 250
    assert backbone.count_truncated(["make it red", "two cats " * limit, "two cats " * limit]) == 2


def test_a_folder_of_sentence_transformers_loads(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "0_CLIPModel")
    assert load_hf("hf:a/b", tmp_path).fingerprint() == load_hf("hf:a/b", clip_folder).fingerprint()
