import io
import json
import shutil
from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from small_backbones import draw
from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models.backbones import open_clip as loading
from union_igrot.models.backbones.open_clip import (
    OPENAI_MEAN,
    OPENAI_STD,
    OpenClipBackbone,
    load_open_clip,
    model_config,
)
from union_igrot.models.factory import build_backbone, build_query_head, build_target_head
from union_igrot.models.model import IGROTModel, load
from union_igrot.types import Preprocess

PLAIN = Preprocess(32, OPENAI_MEAN, OPENAI_STD)
TEXTS = ["make it red", "", "wow! a dog!", "two cats instead of one " * 30]
CONFIG = {
    "embed_dim": 32,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 20, "width": 64, "heads": 2, "layers": 2},
}


def changed(**changes):
    config = deepcopy(CONFIG)
    for name, value in changes.items():
        if isinstance(value, dict) and name in config:
            config[name] |= value
        else:
            config[name] = value
    return config


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_mask_goes_by_position_not_by_the_id_of_padding():
    backbone = OpenClipBackbone(CONFIG, PLAIN, "mine")
    ids = backbone.tokenize(["! ! dog"])
    assert (ids[0, 1:3] == 0).sum() + (ids[0, 1:3] == 256).sum() == 2
    text = backbone.encode_text(TEXTS)
    assert text.pooled_at.tolist() == [4, 1, 6, 19]
    assert text.mask.sum(1).tolist() == [5, 2, 7, 20]


def test_names_of_architectures_tags_and_activations():
    assert model_config("base")["vision_cfg"]["patch_size"] == 32
    assert model_config("base")["quick_gelu"]
    assert model_config("large")["embed_dim"] == 768
    assert not model_config("openclip_h")["quick_gelu"]
    assert not model_config("open_clip:ViT-B-32/laion2b_s34b_b79k")["quick_gelu"]
    assert model_config("open_clip:ViT-B-32/openai") == model_config("base")


def test_the_preprocessing_is_that_of_the_tag():
    config = model_config("base")
    openai = loading._tag_preprocess(config, get_pretrained_cfg("ViT-B-32", "openai"))
    assert openai == Preprocess(224, OPENAI_MEAN, OPENAI_STD, fit="crop", interpolation="bicubic")
    laion = loading._tag_preprocess(config, get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k"))
    assert laion == Preprocess(224, OPENAI_MEAN, OPENAI_STD, fit="crop")
    with pytest.raises(ConfigError, match="resize_mode 'longest'"):
        loading._tag_preprocess(config, {"resize_mode": "longest"})
    with pytest.raises(ConfigError, match="square"):
        loading._tag_preprocess(config, {"size": (224, 336)})


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_brings_its_own_configuration_and_preprocessing(open_clip_folder, images):
    backbone = load_open_clip("open_clip:mine", open_clip_folder)
    assert backbone.preprocess == Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), fit="squash")
    config = json.loads((open_clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    network = open_clip.CLIP(**config).eval()
    network.load_state_dict(load_file(open_clip_folder / "open_clip_model.safetensors"))
    torch.testing.assert_close(backbone.encode_image(images).pooled, network.encode_image(images), atol=1e-5, rtol=1e-4)
    for name in ("base", "open_clip:ViT-B-32"):
        with pytest.raises(CheckpointError, match="its embed_dim is 32, not 512; use open_clip:ANY"):
            load_open_clip(name, open_clip_folder)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("quick", [True, False])
def test_activation_and_preprocessing_follow_the_weights_not_the_name(tmp_path, monkeypatch, images, quick):
    small_base(monkeypatch)
    network = open_clip.CLIP(**changed(quick_gelu=quick)).eval()
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, tmp_path / "model.safetensors")
    settings = {"model_cfg": changed(quick_gelu=quick), "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    backbone = load_open_clip("base", tmp_path)
    assert backbone.preprocess.fit == ("pad" if quick else "squash")  # `base` is OpenAI's with the reference's pad
    torch.testing.assert_close(backbone.encode_image(images).pooled, network.encode_image(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "open_clip:ViT-B-32/laion2b_s34b_b79k"])
def test_a_file_of_openai_is_recognized_under_any_name(tmp_path, monkeypatch, images, name):
    network = small_base(monkeypatch)
    torch.save(network.state_dict() | {"input_resolution": torch.tensor(32)}, tmp_path / "openai.pt")
    backbone = load_open_clip(name, tmp_path / "openai.pt")
    assert backbone.preprocess.fit == "pad"
    torch.testing.assert_close(backbone.encode_image(images).pooled, network.encode_image(images), atol=1e-5, rtol=1e-4)
    torch.save(network.state_dict(), tmp_path / "other.pt")
    assert load_open_clip(name, tmp_path / "other.pt").preprocess.fit == "crop"


@pytest.mark.slow
def test_padding_is_a_choice(tmp_path, monkeypatch):
    torch.save(small_base(monkeypatch).state_dict(), tmp_path / "w.pt")
    usual, model, pad = (build_backbone("base", tmp_path / "w.pt", choice) for choice in (None, "model", "pad"))
    crop = Preprocess(32, OPENAI_MEAN, OPENAI_STD, fit="crop")
    assert usual.preprocess == pad.preprocess == replace(crop, fit="pad", pad_ratio=1.25)
    assert model.preprocess == crop
    assert usual.fingerprint() == pad.fingerprint() != model.fingerprint()
    other = build_backbone("open_clip:ViT-B-16/laion2b_s34b_b88k", tmp_path / "w.pt", "pad")
    assert other.preprocess == replace(crop, fit="pad")


@pytest.mark.slow
def test_heads_are_loaded_with_the_preprocessing_they_were_trained_with(tmp_path, monkeypatch):
    torch.save(small_base(monkeypatch).state_dict(), tmp_path / "w.pt")
    for choice in ("model", "pad"):
        backbone = build_backbone("base", tmp_path / "w.pt", choice)
        IGROTModel(backbone, build_query_head("sum", 32), build_target_head("residual", 32)).save(tmp_path / choice)
        loaded = load(tmp_path / choice, weights=tmp_path / "w.pt")
        assert loaded.backbone.preprocess == backbone.preprocess
        assert loaded.describe()["preprocess"] == choice
    with pytest.raises(ConfigError, match=r"preprocess: model \(the heads of .*pad were trained with pad\); leave"):
        load(tmp_path / "pad", weights=tmp_path / "w.pt", preprocess="model")
    note = tmp_path / "pad" / "model.json"
    note.write_text(note.read_text().replace('"preprocess": "pad"', '"preprocess": "squash"'))
    with pytest.raises(CheckpointError, match=r"preprocess in model.json is 'squash', not model or pad"):
        load(tmp_path / "pad", weights=tmp_path / "w.pt")


def shrunk(name):
    """The configuration of a name with small towers of the same kinds."""
    config = deepcopy(OWN_CONFIG(name))
    text, vision = config["text_cfg"], config["vision_cfg"]
    text |= {"width": 64, "heads": 2, "layers": 1}
    if "timm_model_name" in vision:
        kind, size = ("test_vit3", 160) if vision["timm_pool"] == "map" else ("test_convnext", 64)
        vision |= {"timm_model_name": kind, "image_size": size}
    else:
        vision |= {"width": 64, "head_width": 32, "layers": 1, "image_size": 64, "attn_pooler_heads": 2}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 64, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    return config | {"embed_dim": 64}


OWN_CONFIG = open_clip.get_model_config


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["coca_ViT-B-32", "MobileCLIP-S1", "MobileCLIP2-S0", "PE-Core-T-16-384"])
def test_names_of_other_families_equal_open_clip(tmp_path, monkeypatch, name):
    for module in (open_clip, open_clip.factory):
        monkeypatch.setattr(module, "get_model_config", shrunk)
    tag = open_clip.list_pretrained_tags_by_model(name)[0]
    own = get_pretrained_cfg(name, tag)
    chosen = ("mean", "std", "interpolation", "resize_mode")
    options = {f"image_{key}": own[key] for key in chosen if own.get(key)}
    torch.manual_seed(0)
    network, _, transform = open_clip.create_model_and_transforms(name, **options)
    torch.save(draw(network.eval(), 1).state_dict(), tmp_path / "w.pt")
    # The size is that of the tag, of the whole model; here of the small one.
    monkeypatch.setattr(loading, "get_pretrained_cfg", lambda *_: {k: x for k, x in own.items() if k != "size"})
    backbone = build_backbone(f"open_clip:{name}/{tag}", tmp_path / "w.pt")
    photo = Image.effect_noise((160, 120), 80).convert("RGB")
    pixels = transform(photo)[None]
    torch.testing.assert_close(ImageToTensor(backbone.preprocess)(photo)[None], pixels, atol=0.02, rtol=0)
    texts = [*TEXTS, "Two Cats & a dog"]
    for found, expected in (
        (backbone.encode_image(pixels).pooled, network.encode_image(pixels)),
        (backbone.encode_text(texts).pooled, network.encode_text(open_clip.get_tokenizer(name)(texts))),
    ):
        torch.testing.assert_close(F.normalize(found, dim=-1), F.normalize(expected, dim=-1), atol=1e-4, rtol=0)


def test_code_in_a_repository_is_an_error_and_never_run(tmp_path, open_clip_resnet_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    folder = shutil.copytree(open_clip_resnet_folder, tmp_path / "copy")
    shutil.copy(tmp_path / "evil.py", folder)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    for change in ({"model_type": "mine"}, {}):
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map} | change))
        with pytest.raises(ConfigError, match="has code of its own, which is not run"):
            load_open_clip("open_clip:mine", folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Words", null]}}')
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    load_open_clip("open_clip:mine", folder)  # with transformers' own tokenizer of this kind


def small_base(monkeypatch):
    """Make `base` a small architecture, so that its files are small."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: deepcopy(CONFIG))
    torch.manual_seed(3)
    return open_clip.CLIP(**changed(quick_gelu=True)).eval()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["safetensors", "state dict", "wrapped", "half", "torchscript"])
def test_weights_come_from_any_kind_of_file(tmp_path, monkeypatch, images, kind):
    network = small_base(monkeypatch)
    state = {name: x.contiguous() for name, x in network.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "torchscript":
        # OpenAI's archives: traced, sizes kept as tensors.
        holder = torch.nn.Module()
        for name, part in network.named_children():
            holder.add_module(name, part)
        for name, x in network.named_parameters(recurse=False):
            holder.register_parameter(name, x)
        for name, size in (("input_resolution", 32), ("context_length", 20), ("vocab_size", 49408)):
            holder.register_buffer(name, torch.tensor(size))
        holder.forward = network.visual.forward
        torch.jit.save(torch.jit.trace(holder, images[:1], check_trace=False), path)
    else:
        extra = {"input_resolution": torch.tensor(32)}
        saved = {name: x.half() for name, x in state.items()} | extra if kind == "half" else state
        torch.save({"state_dict": {f"module.{n}": x for n, x in saved.items()}} if kind == "wrapped" else saved, path)
    backbone = build_backbone("base", path)
    within = 2e-2 if kind == "half" else 1e-5
    torch.testing.assert_close(
        backbone.encode_image(images).pooled, network.encode_image(images), atol=within, rtol=1e-3
    )
    assert backbone.name == "base"
    assert backbone.preprocess.fit == "pad"


@pytest.mark.slow
def test_a_custom_text_tower_takes_the_older_layout_of_names():
    torch.manual_seed(0)
    plain = OpenClipBackbone(CONFIG, PLAIN, "plain")
    custom = OpenClipBackbone(changed(custom_text=True), PLAIN, "custom", plain.network.state_dict())
    torch.testing.assert_close(custom.encode_text(TEXTS).pooled, plain.encode_text(TEXTS).pooled, atol=1e-5, rtol=1e-4)


def test_weights_that_do_not_fit_are_listed(tmp_path, monkeypatch):
    network = small_base(monkeypatch)
    state = network.state_dict()
    del state["visual.proj"]
    torch.save(state | {"stray": torch.zeros(1), "ln_final.bias": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError) as error:
        build_backbone("base", tmp_path / "weights.pt")
    for part in ("missing [visual.proj]", "not known [stray]", "ln_final.bias (3,) for (64,)", "weights.pt"):
        assert part in str(error.value)


def test_files_without_weights_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    messages = {
        "list.pt": "no state dict but list",
        "numbers.pt": r"not tensors: \[epoch\]",
        "text.pt": "cannot be read as weights|is damaged",
        "text.safetensors": "cannot be read as weights",
        "empty.pt": "cannot be read as weights|is damaged",
        "absent.pt": "is not a file",
    }
    for file, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as error:
            load_open_clip("base", tmp_path / file)
        assert "\n" not in str(error.value)


def test_a_folder_without_its_files_is_named(open_clip_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights; put one of open_clip_model\.safetensors"):
        load_open_clip("base", tmp_path)
    folder = shutil.copytree(open_clip_folder, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="is a model of OpenCLIP; use the backbone open_clip:<any name> with it"):
        build_backbone("hf:some/clip", folder)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*open_clip_config\.json"):
        load_open_clip("base", folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a model of transformers; use the backbone hf:<any name> with it"):
        load_open_clip("base", folder)


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"timm/vit_base_patch32_clip_224\.openai") as error:
        load_open_clip("base")
    assert "open_clip_model.safetensors" in str(error.value)
    assert "model.weights=PATH" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-32/nope", "ViT-B-32 has no tag 'nope'; choose one of"),
        ("open_clip:ViT-B-32", "give model.weights"),
        ("open_clip:ViT-B-31/openai", "no architecture 'ViT-B-31'; the nearest are .*ViT-B-32"),
        ("open_clip:", "open_clip:<architecture>/<tag>"),
        ("blip", "not OpenCLIP's"),
    ],
)
def test_wrong_names_are_errors_that_suggest_others(name, message):
    with pytest.raises(ConfigError, match=message):
        load_open_clip(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"embed_dim": 8}, "no embed_dim, vision_cfg or text_cfg"),
        (changed(vision_cfg={"depth": 3}), "not a CLIP configuration"),
        (changed(vision_cfg={"timm_model_name": "no_such_model"}), r"not a CLIP configuration: Unknown model"),
    ],
)
def test_invalid_configurations_are_refused(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        OpenClipBackbone(config, PLAIN, "mine")
    assert "\n" not in str(error.value)


def test_a_text_tower_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"configuration of its text tower roberta-base .* with its config\.json"):
        OpenClipBackbone(changed(text_cfg={"hf_model_name": "roberta-base"}), PLAIN, "mine")


def test_a_damaged_tokenizer_is_named(open_clip_siglip_folder, tmp_path):
    folder = shutil.copytree(open_clip_siglip_folder, tmp_path / "copy")
    for content in ("{", '{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}'):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer files in .*copy cannot be read") as error:
            load_open_clip("open_clip:mine", folder)
        assert "\n" not in str(error.value)


def test_weights_without_a_tag_get_the_preprocessing_that_all_tags_agree_on():
    def preprocess(arch):
        return loading._tag_preprocess(model_config(f"open_clip:{arch}"), loading._common_preprocess(arch))

    assert preprocess("ViT-B-16-SigLIP") == Preprocess(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), fit="squash")
    # OpenAI's and others' tags of one architecture differ in what they were trained with, not in means.
    assert preprocess("ViT-B-32") == Preprocess(224, OPENAI_MEAN, OPENAI_STD, fit="crop")


@torch.no_grad()
def test_counts_of_batches_and_coca_decoders_in_a_file_do_not_matter(tmp_path, open_clip_resnet_folder):
    folder = shutil.copytree(open_clip_resnet_folder, tmp_path / "copy")
    path = folder / "open_clip_model.safetensors"
    state = {name: x for name, x in load_file(path).items() if not name.endswith("num_batches_tracked")}
    save_file(state | {"text_decoder.text_projection": torch.zeros(2, 2)}, path)
    found, expected = (load_open_clip("open_clip:mine", place) for place in (folder, open_clip_resnet_folder))
    assert found.fingerprint() == expected.fingerprint()


def test_a_repository_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError,
        match=r"some/clip cannot be reached: HF_HUB_OFFLINE=1 allows no request, and open_clip_config.json",
    ) as error:
        build_backbone("hf-hub:some/clip")
    assert "\n" not in str(error.value)


def test_a_model_of_transformers_is_named(tmp_path, monkeypatch):
    small_base(monkeypatch)
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"is a model of transformers; use the backbone hf:<any name>"):
        load_open_clip("base", tmp_path / "weights.pt")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "clip."])
def test_files_of_training_programs_load(tmp_path, monkeypatch, images, prefix):
    network = small_base(monkeypatch)
    state = {f"{prefix}{name}": x for name, x in network.state_dict().items()}
    state |= {f"{prefix}logit_bias": torch.tensor(0.0), "head.weight": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 1e-4}}, tmp_path / "weights.pt")
    backbone = build_backbone("base", tmp_path / "weights.pt")
    torch.testing.assert_close(backbone.encode_image(images).pooled, network.encode_image(images), atol=1e-5, rtol=1e-4)
