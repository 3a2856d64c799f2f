"""Backbones of every kind at tiny sizes, from seeded weights and words made here."""

import json
import shutil
import time
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import pytest
import torch
import transformers.utils.hub
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
)

from loopback_hub import serve_hub
from small_backbones import (
    CLIP_CONFIG,
    RESNET_CONFIG,
    SIGLIP_CONFIG,
    SMALL,
    VISION,
    WORDS,
    draw,
    word_tokenizer,
    write_notes,
    write_open_clip,
)


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    return write_open_clip(tmp_path_factory.mktemp("open_clip"), CLIP_CONFIG, 1)


@pytest.fixture(scope="session")
def open_clip_siglip_folder(tmp_path_factory):
    """An image tower of timm that pools by attention, texts pooled at the last place, padding that is the end mark."""
    folder = tmp_path_factory.mktemp("open_clip_siglip")
    word_tokenizer("", "</s>", "</s>").save_pretrained(folder)
    return write_open_clip(folder, SIGLIP_CONFIG, 5)


@pytest.fixture(scope="session")
def open_clip_resnet_folder(tmp_path_factory):
    """A ResNet with attention pooling, and a text tower of Hugging Face that is averaged."""
    folder = tmp_path_factory.mktemp("open_clip_resnet")
    tokenizer = word_tokenizer("<s>", "</s>", "<pad>")
    tokenizer.save_pretrained(folder)
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 40, "type_vocab_size": 1}
    marks = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2}
    RobertaConfig(**text, **marks).save_pretrained(folder)
    return write_open_clip(folder, RESNET_CONFIG, 6)


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    text = {**SMALL, "vocab_size": len(words), "encoder_hidden_size": 64, "max_position_embeddings": 64}
    config = BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=24)
    draw(BlipForImageTextRetrieval(config), 2).save_pretrained(folder)
    write_notes(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    word_tokenizer("", "</s>", "<pad>").save_pretrained(folder)
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 16, "projection_size": 64}
    draw(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)), 3).save_pretrained(folder)
    write_notes(folder, resample=2)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    # As in OpenAI's repositories, padding has the number of the end mark.
    tokenizer = word_tokenizer("<start>", "<end>", "<end>")
    tokenizer.save_pretrained(folder)
    text = {
        **SMALL,
        "vocab_size": 20,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<start>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    draw(CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=48)), 4).save_pretrained(folder)
    write_notes(folder, size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    return folder


@pytest.fixture(scope="session")
def repositories(tmp_path_factory, clip_folder, siglip_folder, blip_folder, open_clip_folder, open_clip_siglip_folder):
    """Small models in the layouts of public repositories: their names of files, old buffers and settings."""
    root = tmp_path_factory.mktemp("repositories")
    clip = shutil.copytree(clip_folder, root / "openai" / "clip-vit-base-patch32")
    # As of 2021: a pickle with positions, sizes as numbers.
    state = load_file(clip / "model.safetensors")
    positions = {
        f"{side}_model.embeddings.position_ids": torch.arange(n)[None] for side, n in (("text", 16), ("vision", 5))
    }
    torch.save(state | positions, clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    settings = {
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "crop_size": 32,
        "size": 32,
    }
    kind = {"feature_extractor_type": "CLIPFeatureExtractor"}
    means = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (clip / "preprocessor_config.json").write_text(json.dumps(settings | means | kind))
    (clip / "README.md").write_text("---\ntags: [vision]\n---\n")
    shutil.copytree(siglip_folder, root / "google" / "siglip2-base-patch16-224")
    blip = shutil.copytree(blip_folder, root / "Salesforce" / "blip-itm-base-coco")
    positions = {"text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(load_file(blip / "model.safetensors") | positions, blip / "pytorch_model.bin")
    (blip / "model.safetensors").unlink()
    shutil.copytree(open_clip_siglip_folder, root / "some" / "siglip")
    shutil.copytree(open_clip_siglip_folder, root / "some" / "words", ignore=shutil.ignore_patterns("open_clip*"))
    base = root / "timm" / "vit_base_patch32_clip_224.openai"
    base.mkdir(parents=True)
    shutil.copy(open_clip_folder / "open_clip_model.safetensors", base)
    (base / "config.json").write_text('{"architecture": "vit_base_patch32_clip_quickgelu_224"}')
    return root


@pytest.fixture(scope="session")
def served_hub(repositories):
    """One server for all tests."""
    with serve_hub(repositories) as served:
        yield served


@pytest.fixture
def hub(served_hub, repositories, tmp_path, monkeypatch):
    """The loopback hub as the hub of this process, with an empty cache."""
    served_hub.root, served_hub.faults = repositories, {}
    served_hub.requests.clear()
    close_session()
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    changes = {
        "ENDPOINT": served_hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": served_hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "AGENT_HARNESSES_PATH": str(tmp_path / "harnesses.json"),
    }
    (tmp_path / "harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}')
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", served_hub.address)
    # transformers keeps one with the address of its first use; to another address it would wait for minutes.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    waiting = SimpleNamespace(sleep=lambda _: pytest.fail("huggingface_hub waits before it asks again"), time=time.time)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", waiting)
    for name, value in changes.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield served_hub
    close_session()
