import pytest
import torch

from union_igrot.errors import ConfigError
from union_igrot.models.backbones.open_clip import OpenClipBackbone
from union_igrot.models.factory import build_projector, build_query_head, build_target_head
from union_igrot.models.heads.query import VisionProjector
from union_igrot.models.model import IGROTModel
from union_igrot.types import Features, Preprocess


def features(batch=3, length=5, dim=16):
    tokens = torch.randn(batch, length, dim)
    at = torch.tensor([0, 2, 4])
    return Features(tokens[torch.arange(batch), at], tokens, torch.ones(batch, length, dtype=torch.bool), at)


def test_starts_as_the_identity_to_the_last_digit():
    given = features()
    found = VisionProjector(16)(given)
    assert torch.equal(found.pooled, given.pooled)
    assert torch.equal(found.tokens, given.tokens)
    assert found.mask is given.mask
    assert found.pooled_at is given.pooled_at


def test_changes_pooled_and_tokens_alike_by_the_formula():
    projector, given = VisionProjector(16, hidden=8), features()
    torch.nn.init.normal_(projector.down.weight)
    found = projector(given)
    torch.testing.assert_close(found.pooled, found.tokens[torch.arange(3), given.pooled_at])
    x = given.pooled[0]
    normed = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
    inner = projector.up.weight @ normed + projector.up.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(found.pooled[0], x + projector.down.weight @ gelu)


def test_takes_pooled_features_alone_and_learns_from_the_first_step():
    projector = VisionProjector(16)
    found = projector(Features(torch.randn(2, 16)))
    assert found.tokens is None
    found.pooled.pow(2).sum().backward()
    assert projector.down.weight.grad.abs().sum() > 0


def test_is_built_by_name():
    assert build_projector("none", 16) is None
    built = build_projector("mlp", 16, hidden=4)
    assert built.options == {"hidden": 4}
    assert build_projector(built.kind, 16, **built.options).up.out_features == 4
    assert build_projector("mlp", 16).up.out_features == 32


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("linear", {}, "choose none or mlp"),
        ("mlp", {"depth": 2}, "no option depth .*hidden"),
        ("none", {"hidden": 2}, "takes no option"),
        ("mlp", {"hidden": 0}, "hidden: 0 .*>= 1"),
    ],
)
def test_wrong_settings_are_named(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        build_projector(kind, 16, **options)


def model(projector, target="shared"):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    backbone = OpenClipBackbone(config, Preprocess(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "mine")
    fusion = build_query_head("transagg", 16, heads=2, feedforward=8)
    return IGROTModel(backbone, fusion, build_target_head(target, 16), projector=projector).eval()


def bent():
    """A projector that no longer is the identity."""
    projector = VisionProjector(16, hidden=8)
    torch.nn.init.normal_(projector.down.weight)
    return projector


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("target", ["frozen", "shared"])
def test_a_model_projects_query_and_target_side_once(target):
    images, texts = torch.randn(3, 3, 16, 16), ["red", None, "a dog"]
    plain, fresh, projector = model(None, target), model(VisionProjector(16), target), bent()
    trained = model(projector, target)
    assert torch.equal(plain.embed_queries(images, texts), fresh.embed_queries(images, texts))
    assert torch.equal(plain.embed_gallery(images), fresh.embed_gallery(images))
    projected = projector(plain.backbone.encode_image(images))
    assert torch.equal(trained.embed_queries(images, texts), plain.embed_queries(projected, texts))
    assert torch.equal(trained.embed_gallery(images), plain.embed_gallery(projected))
    assert not torch.allclose(trained.embed_gallery(images), plain.embed_gallery(images), atol=1e-2)
    features = plain.backbone.encode_image(images)
    assert torch.equal(trained.embed_gallery(features), trained.embed_gallery(images)), (
        "cached features are projected too"
    )
    assert torch.equal(trained.embed_queries(None, ["red"]), plain.embed_queries(None, ["red"]))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("projector", [bent(), None], ids=["mlp", "none"])
def test_a_model_is_saved_and_loaded_with_its_projector(tmp_path, projector):
    saved, images = model(projector), torch.randn(2, 3, 16, 16)
    saved.save(tmp_path)
    loaded = IGROTModel.load(tmp_path, saved.backbone)
    assert (loaded.projector is None) == (projector is None)
    assert loaded.describe() == saved.describe()
    assert loaded.describe()["projector"] == (None if projector is None else {"kind": "mlp", "hidden": 8})
    assert torch.equal(loaded.embed_gallery(images), saved.embed_gallery(images))
