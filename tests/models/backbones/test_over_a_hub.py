"""Backbones over a loopback hub by the download code of huggingface_hub, transformers and OpenCLIP."""

import json
import shutil
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from loopback_hub import POINTER, serve_hub
from small_backbones import CLIP_CONFIG
from union_igrot.errors import CheckpointError
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models import hub as models_hub
from union_igrot.models.factory import build_backbone

pytestmark = [pytest.mark.enable_socket, pytest.mark.allow_hosts(["127.0.0.1"])]
TEXTS = ["make it red", "a small dog ! two cats", ""]
CLIP, SIGLIP, BLIP = "openai/clip-vit-base-patch32", "google/siglip2-base-patch16-224", "Salesforce/blip-itm-base-coco"
BASE = "timm/vit_base_patch32_clip_224.openai"


@pytest.fixture(scope="module")
def photo():
    """A small photograph-like image that is not square."""
    image = Image.effect_noise((12, 9), 80).resize((48, 36), Image.Resampling.BICUBIC)
    return Image.merge("RGB", (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image))


@pytest.fixture
def small_base(monkeypatch):
    """OpenCLIP's ViT-B-32 at the size of the repository."""

    def small(_):
        return deepcopy(CLIP_CONFIG)

    monkeypatch.setattr(open_clip, "get_model_config", small)
    monkeypatch.setattr(open_clip.factory, "get_model_config", small)


def transformers_outputs(repository, model_class, photo, texts, length):
    """Pixels and embeddings from the library alone, everything by its name on the hub."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository)
    processor = transformers.AutoImageProcessor.from_pretrained(repository)
    network = model_class.from_pretrained(repository).eval()
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return network, pixels, ids


def same(found, expected, within=1e-4):
    assert (F.normalize(found, dim=-1) - F.normalize(expected, dim=-1)).abs().max() < within


def check(backbone, photo, pixels, image, text, texts=TEXTS):
    """Compare one backbone with its library: texts, the same pixels, and the file through its own preprocessing."""
    same(backbone.encode_image(pixels).pooled, image)
    same(backbone.encode_text(texts).pooled, text)
    own = ImageToTensor(backbone.preprocess)(photo)[None]
    assert (own - pixels).abs().max() < 0.03  # one of 256 levels
    assert 1 - F.cosine_similarity(backbone.encode_image(own).pooled, image).min() < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_clip_equals_transformers(hub, photo):
    network, pixels, ids = transformers_outputs(CLIP, transformers.CLIPModel, photo, TEXTS, 16)
    outputs = network(input_ids=ids["input_ids"], pixel_values=pixels)
    check(build_backbone(f"hf:{CLIP}"), photo, pixels, outputs.image_embeds, outputs.text_embeds)


@pytest.mark.slow
@torch.no_grad()
def test_siglip_equals_transformers(hub, photo):
    network, pixels, ids = transformers_outputs(SIGLIP, transformers.SiglipModel, photo, ["make it red", ""], 16)
    image, text = network.vision_model(pixels).pooler_output, network.text_model(ids["input_ids"]).pooler_output
    check(build_backbone("siglip2"), photo, pixels, image, text, ["Make it RED!", ""])


@pytest.mark.slow
@torch.no_grad()
def test_blip_equals_transformers(hub, photo):
    network, pixels, ids = transformers_outputs(BLIP, transformers.BlipForImageTextRetrieval, photo, TEXTS, 35)
    image = network.vision_proj(network.vision_model(pixels).last_hidden_state[:, 0])
    hidden = network.text_encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state
    check(build_backbone(f"hf:{BLIP}"), photo, pixels, image, network.text_proj(hidden[:, 0]))
    padded = build_backbone("blip")
    assert padded.preprocess.fit == "pad"  # the reference's recipe
    same(padded.encode_image(pixels).pooled, image)
    plain = build_backbone("blip", preprocess="model")
    check(plain, photo, pixels, image, network.text_proj(hidden[:, 0]))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["tag", "repository"])
def test_models_of_open_clip_equal_it(hub, photo, kind, request):
    if kind == "tag":
        request.getfixturevalue("small_base")
        network, _, transform = open_clip.create_model_and_transforms(
            "ViT-B-32", "openai", force_quick_gelu=True, cache_dir=huggingface_hub.constants.HF_HUB_CACHE
        )
        tokenizer, backbone = open_clip.SimpleTokenizer(context_length=20), build_backbone("base")
        assert backbone.preprocess.fit == "pad"
        backbone = build_backbone("base", preprocess="model")
    else:
        cache = huggingface_hub.constants.HF_HUB_CACHE
        network, _, transform = open_clip.create_model_and_transforms("hf-hub:some/siglip", cache_dir=cache)
        tokenizer = open_clip.get_tokenizer("hf-hub:some/siglip", cache_dir=cache)
        backbone = build_backbone("hf-hub:some/siglip")
    pixels, network = transform(photo)[None], network.eval()
    same(backbone.encode_image(pixels).pooled, network.encode_image(pixels))
    same(backbone.encode_text(TEXTS).pooled, network.encode_text(tokenizer(TEXTS)))
    own = ImageToTensor(backbone.preprocess)(photo)[None]
    assert 1 - F.cosine_similarity(backbone.encode_image(own).pooled, network.encode_image(pixels)).min() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"hf:{CLIP}", "base", "hf-hub:some/siglip"])
def test_what_is_cached_is_used_without_a_request(hub, small_base, name):
    first = build_backbone(name).fingerprint()
    assert [path for _, path, _ in hub.requests].count(hub.requests[0][1]) == 1
    hub.requests.clear()
    hub.faults = {"": {"silent": 5}}
    assert build_backbone(name).fingerprint() == first
    assert hub.requests == []


@pytest.fixture
def large(monkeypatch):
    """Every file of weights is a large one, read in small pieces."""
    monkeypatch.setattr(models_hub, "_LARGE", 1000)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))


OPEN_CLIP = "some/siglip"


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"hf-hub:{OPEN_CLIP}", f"hf:{CLIP}"])
def test_an_interrupted_download_resumes_in_the_next_run(hub, large, caplog, monkeypatch, name):
    file = "pytorch_model.bin" if name.startswith("hf:") else "open_clip_model.safetensors"
    hub.faults = {f"resolve/.*{file}": {"cut": 50_000}}

    def interrupt(_):
        raise KeyboardInterrupt

    # The library waits for a second before it tries again.
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=interrupt))
        with pytest.raises(KeyboardInterrupt):
            build_backbone(name)
    hub.faults = {}
    hub.requests.clear()
    build_backbone(name)
    (span,) = hub.gets(file)
    start = int(span.removeprefix("bytes=").removesuffix("-"))
    assert 40_000 <= start <= 50_000
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"downloading {file} of ")
    assert first.endswith(huggingface_hub.constants.HF_HUB_CACHE)
    assert "are there)" in second
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.partial"))


def test_a_download_that_is_cut_resumes_within_a_run(hub, large):
    hub.faults = {"resolve/.*safetensors": {"cut": 50_000, "times": 2}}
    build_backbone("siglip2")
    assert [span is not None for span in hub.gets("safetensors")] == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_that_stalls_is_an_error_and_resumes(hub, large, monkeypatch, capfd, fault):
    """The hub hangs up in the middle of a file, or sends nothing more; then it never answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    first = {fault: 50_000, "times": 1, "seconds": 0.3}
    hub.faults = {"resolve/.*safetensors": first, "(?=)resolve/.*safetensors": {"silent": 0.2}}
    with pytest.raises(CheckpointError, match=r"cannot be reached for model.safetensors \(.*timed out"):
        build_backbone("siglip2")
    assert len(hub.gets("safetensors")) == 6
    assert "Trying to resume" not in capfd.readouterr().err
    hub.faults = {}
    hub.requests.clear()
    build_backbone("siglip2")
    (span,) = hub.gets("safetensors")
    assert int(span.removeprefix("bytes=").removesuffix("-")) > 40_000


def test_a_hub_that_is_silent_after_its_list_is_asked_twice(hub, large, monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults = {"resolve": {"silent": 0.2}}
    with pytest.raises(CheckpointError, match=r"cannot be reached for config.json \(.*timed out.*check the network"):
        build_backbone("siglip2")
    assert [method for method, _, _ in hub.requests] == ["GET"] * 3  # the list, and the file twice
    assert "Trying to resume" not in capfd.readouterr().err


def test_damage_on_the_way_is_found_by_the_checksum(hub, large):
    for file in ("tokenizer.json", "safetensors"):
        hub.faults = {f"resolve/.*{file}": {"corrupt": True}}
        with pytest.raises(CheckpointError, match=rf"{file} of .* was damaged on its way .*run the command") as error:
            build_backbone("siglip2")
        assert "\n" not in str(error.value)
    hub.faults = {}
    build_backbone("siglip2")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"hf-hub:{OPEN_CLIP}", f"hf:{CLIP}"])
def test_damage_in_the_cache_names_the_file_to_delete(hub, name):
    build_backbone(name)
    blobs = Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("blobs/*")
    weights = max(blobs, key=lambda path: path.stat().st_size)
    weights.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"in the cache: delete (\S+) and run the command again") as error:
        build_backbone(name)
    assert str(weights) in str(error.value)
    assert "\n" not in str(error.value)
    weights.unlink()
    build_backbone(name)


FAULTS = {
    "no repository": ({}, "some/where does not exist or is private; check the name, or `hf auth login`"),
    "gated": ({"resolve/.*bin": {"status": 403, "code": "GatedRepo"}}, "is open to some users only; request access"),
    "private": ({"": {"status": 401, "code": "RepoNotFound"}}, "does not exist or is private"),
    "forbidden": ({"": {"status": 403}}, r"refused the request for config.json \(status 403\); check your account"),
    "down": ({"": {"status": 503}}, r"refused the request for config.json \(status 503\); try again later"),
    "login page": ({"": {"status": 200, "content": b"<html>"}}, "no valid answer for config.json: a firewall, a proxy"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_failures_say_what_they_are(hub, monkeypatch, capfd, kind):
    monkeypatch.setattr(models_hub, "_PAUSES", (0.0, 0.0))
    hub.faults, message = deepcopy(FAULTS[kind][0]), FAULTS[kind][1]
    with pytest.raises(CheckpointError, match=message) as error:
        build_backbone("hf:some/where" if kind == "no repository" else f"hf:{CLIP}")
    assert "\n" not in str(error.value)
    assert hub.address in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"rfilename": "model-/../../../../../outside.safetensors"},
        {"rfilename": "/outside"},
        {"rfilename": "..\\outside"},
        {"blobId": "../../../outside"},
        {"sha": "../../../outside"},
    ],
)
def test_a_hub_cannot_name_files_outside_the_cache(hub, tmp_path, changed):
    file = {"rfilename": "config.json", "size": 2, "blobId": "a" * 40} | changed
    listed = {"id": CLIP, "modelId": CLIP, "sha": changed.get("sha", "b" * 40), "siblings": [file], "tags": []}
    hub.faults = {"^/api/models": {"status": 200, "content": json.dumps(listed).encode()}}
    with pytest.raises(CheckpointError, match="expected a path inside the repository") as error:
        build_backbone(f"hf:{CLIP}")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("outside*"))


def test_a_busy_hub_is_asked_again(hub, monkeypatch):
    monkeypatch.setattr(models_hub, "_PAUSES", (0.0, 0.0))
    hub.faults = {"api/models": {"status": 503, "times": 2}}
    build_backbone(f"hf:{CLIP}")


def test_pointers_and_missing_files_are_named(hub, repositories, tmp_path):
    folder = shutil.copytree(repositories / CLIP, tmp_path / "root" / "some" / "clip")
    (folder / "pytorch_model.bin").write_bytes(POINTER % 1)
    hub.root = tmp_path / "root"
    with pytest.raises(CheckpointError, match="is a Git-LFS pointer, not the weights"):
        build_backbone("hf:some/clip")
    (folder / "preprocessor_config.json").unlink()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    with pytest.raises(CheckpointError, match=r"some/clip holds none of preprocessor_config.json, processor_config"):
        build_backbone("hf:some/clip")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="some/clip holds a LoRA adapter, not a model"):
        build_backbone("hf:some/clip")


@pytest.mark.slow
def test_shards_are_downloaded_and_found_in_the_cache(hub, repositories, tmp_path):
    folder = tmp_path / "root" / "some" / "clip"
    transformers.CLIPModel.from_pretrained(repositories / CLIP).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repositories / CLIP / name, folder)
    hub.root = tmp_path / "root"
    found = build_backbone("hf:some/clip")
    assert found.fingerprint() == build_backbone("hf:some/clip", repositories / CLIP).fingerprint()
    hub.requests.clear()
    build_backbone("hf:some/clip")
    assert hub.requests == []


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_without_an_answer_one_line_comes_soon(hub, monkeypatch, capfd, kind):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    if kind == "silent":
        hub.faults = {"": {"silent": 1}}
    else:
        with serve_hub(hub.root) as other:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", other.address)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"cannot be reached for config.json \(.*check the network") as error:
        build_backbone(f"hf:{CLIP}")
    assert time.perf_counter() - start < 1
    for part in ("HF_ENDPOINT", "HF_HUB_OFFLINE=1", huggingface_hub.constants.HF_HUB_CACHE, "weights=PATH"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert len(hub.requests) <= 1


def test_files_are_moved_if_links_are_not_allowed(hub, monkeypatch):
    def refuse(*_):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    found = models_hub.fetch_files(CLIP, [("config.json",)], texts=False)
    assert not found.is_symlink()
    assert found.read_bytes() == (hub.root / CLIP / "config.json").read_bytes()
    hub.requests.clear()
    assert models_hub.fetch_files(CLIP, [("config.json",)], texts=False) == found
    assert not hub.requests
