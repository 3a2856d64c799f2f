"""The contract of every backbone."""

from importlib.resources import files

import pytest
import torch

from exported_models import assert_exported_equals, needs_onnx
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.factory import build_backbone
from union_igrot.models.model import load

TEXTS = ["make it red", "", "a small dog ! two cats", "two red cats " * 60]
# Name, fixture of the weights, image tokens, whether the pooled vector is also a token of the text.
KINDS = {
    "tiny": ("tiny", None, 10),
    "open_clip": ("open_clip:small", "open_clip_folder", 5),
    "open_clip_siglip": ("open_clip:small-siglip", "open_clip_siglip_folder", 5),
    "open_clip_resnet": ("open_clip:small-resnet", "open_clip_resnet_folder", 5),
    "blip": ("blip", "blip_folder", 5),
    "siglip": ("siglip2", "siglip_folder", 5),
    "hf_clip": ("hf:some/clip", "clip_folder", 5),
}


@pytest.fixture(scope="module", params=KINDS)
def built(request):
    name, fixture, tokens = KINDS[request.param]
    if fixture is None and not (files("union_igrot") / "weights" / "tiny" / "backbone.safetensors").is_file():
        pytest.skip("the tiny backbone's weights are missing")
    backbone = build_backbone(name, None if fixture is None else request.getfixturevalue(fixture))
    return backbone, tokens


def pixels(backbone, count=4):
    size = backbone.preprocess.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_shapes_types_and_masks_of_images(built):
    backbone, tokens = built
    image = backbone.encode_image(pixels(backbone))
    assert image.pooled.shape == (4, backbone.dim)
    assert image.tokens.shape == (4, tokens, backbone.dim)
    assert image.mask.all()
    assert image.pooled.dtype == torch.float32
    same(image.pooled, image.tokens[torch.arange(4), image.pooled_at])


def test_shapes_and_masks_of_texts(built):
    backbone, _ = built
    text = backbone.encode_text(TEXTS)
    assert text.pooled.shape == (4, backbone.dim)
    assert text.tokens.shape[0] == 4
    assert text.mask.shape == text.tokens.shape[:2]
    same(text.pooled, text.tokens[torch.arange(4), text.pooled_at])
    lengths = text.mask.sum(1)
    # By position: real tokens first, padding after; "!" inside a text is a word like others.
    for row, length in zip(text.mask, lengths, strict=True):
        assert row[:length].all()
    assert text.mask[torch.arange(4), text.pooled_at].all()
    assert lengths[1] < lengths[0] < lengths[2] < lengths[3]
    assert lengths[3] == text.mask.shape[1], "a long text is cut at the context"


def test_an_empty_text_is_encoded_the_same_alone_and_in_a_batch(built):
    backbone, _ = built
    alone, batch = backbone.encode_text([""]), backbone.encode_text(TEXTS)
    same(alone.pooled[0], batch.pooled[1])
    length = int(alone.mask.sum())
    assert length == batch.mask[1].sum()
    same(alone.tokens[0, :length], batch.tokens[1, :length])


def test_an_item_does_not_depend_on_its_batch(built):
    backbone, _ = built
    images = pixels(backbone)
    both, one = backbone.encode_image(images), backbone.encode_image(images[2:3])
    same(both.pooled[2:3], one.pooled)
    same(both.tokens[2:3], one.tokens)
    same(backbone.encode_text(TEXTS).pooled[[3, 0]], backbone.encode_text([TEXTS[3], TEXTS[0]]).pooled)


def test_different_items_have_different_features(built):
    backbone, _ = built
    image, text = backbone.encode_image(pixels(backbone)), backbone.encode_text(TEXTS)
    for pooled in (image.pooled, text.pooled):
        apart = torch.cdist(pooled, pooled) + torch.eye(4)
        assert apart.min() > 1e-4


@pytest.mark.slow
def test_stays_frozen(built):
    backbone, _ = built
    before, mark = weights_hash(backbone.state_dict()), backbone.fingerprint()
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(x.requires_grad for x in backbone.parameters())
    images = pixels(backbone).requires_grad_()
    backbone.encode_image(images).pooled.sum().backward()
    assert images.grad.abs().sum() > 0, "gradients pass through to what comes before"
    assert all(x.grad is None for x in backbone.parameters())
    assert not backbone.encode_text(TEXTS).pooled.requires_grad
    assert weights_hash(backbone.state_dict()) == before
    assert backbone.fingerprint() == mark


@pytest.mark.slow
def test_two_builds_are_equal(built, request):
    backbone, _ = built
    kind = next(k for k in KINDS if f"[{k}]" in request.node.name)
    name, fixture, _ = KINDS[kind]
    again = build_backbone(name, None if fixture is None else request.getfixturevalue(fixture))
    assert again.fingerprint() == backbone.fingerprint()
    assert again.name == backbone.name == name
    assert again.device == torch.device("cpu")


@pytest.fixture(params=KINDS)
def backbone(request):
    """One of its own for each test: these change it."""
    name, fixture, *_ = KINDS[request.param]
    return build_backbone(name, None if fixture is None else request.getfixturevalue(fixture))


def features(backbone, side):
    return backbone.encode_image(pixels(backbone)) if side == "image" else backbone.encode_text(TEXTS)


def gradients(backbone, side):
    backbone.zero_grad()
    image = features(backbone, side)
    (image.pooled.square().sum() + image.tokens.square().mean()).backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def trainable(backbone):
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def test_every_weight_of_a_tuned_encoder_learns_and_no_other_does(backbone):
    own = {}
    for side, other in (("image", "text"), ("text", "image")):
        assert backbone.tune([side]) is backbone
        assert backbone.tuned_encoders == {side}
        own[side] = trainable(backbone)
        assert len(own[side]) > 4
        assert set(gradients(backbone, side)) == own[side]
        assert not features(backbone, other).pooled.requires_grad
    # No weight serves both sides in these models.
    assert not own["image"] & own["text"]
    backbone.tune(["image", "text"])
    assert own["image"] | own["text"] <= trainable(backbone)
    backbone.freeze()
    before = features(backbone, "image").pooled
    backbone.tune(["image"]).train()
    assert not any(module.training for module in backbone.modules())
    torch.testing.assert_close(features(backbone, "image").pooled.detach(), before)
    backbone.freeze()
    assert (trainable(backbone), backbone.tuned_encoders) == (set(), frozenset())


@pytest.mark.slow
def test_saving_memory_changes_no_gradient(backbone):
    def saved_numbers(side):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            features(backbone, side)
        return sum(held)

    names = set(backbone.state_dict())
    expected, before = {}, {}
    for side in ("image", "text"):
        expected[side] = gradients(backbone.tune([side]), side)
        before[side] = saved_numbers(side)
    backbone.checkpoint_activations()
    assert set(backbone.state_dict()) == names
    for side in ("image", "text"):
        found = gradients(backbone.tune([side]), side)
        assert found.keys() == expected[side].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[side][name], atol=1e-5, rtol=1e-4)
        assert 0 < saved_numbers(side) < 0.8 * before[side]


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("kind", ["blip", "siglip", "hf_clip"])
def test_towers_of_transformers_are_exported_to_onnx(request, kind, tmp_path):
    name, fixture, _ = KINDS[kind]
    assert_exported_equals(load(name, weights=request.getfixturevalue(fixture)), tmp_path, TEXTS[:3])
