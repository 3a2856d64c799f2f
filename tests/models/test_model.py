"""One model embeds images, texts or both, the same from tensors and features, and survives a round trip."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_world import DIM, LinearBackbone, trainable
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.models.factory import build_backbone, build_query_head, build_target_head
from union_igrot.models.model import IGROTModel, load
from union_igrot.training.losses import InfoNCE

HEADS = [
    *[("transagg", target) for target in ("frozen", "residual", "sum", "union", "shared")],
    *[(fusion, "frozen") for fusion in ("image", "text", "sum")],
]
TEXTS = ["red square", None, "", "remove the large blue night"]


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def perturbed(fusion="transagg", target="union", backbone=None, seed=0):
    """A model whose heads are far from their start, so that each weight matters."""
    model = trainable(fusion, target, backbone, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model.eval()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("fusion", "target"), HEADS)
@torch.no_grad()
def test_tensors_and_features_give_the_same(fusion, target, pixels):
    model = perturbed(fusion, target)
    images = model.backbone.encode_image(pixels)
    texts = model.backbone.encode_text([text or "" for text in TEXTS])
    for embedded in (model.embed_queries(pixels, TEXTS), model.embed_gallery(pixels)):
        assert embedded.shape == (4, DIM)
        close(embedded.norm(dim=-1), torch.ones(4))
    close(model.embed_queries(pixels, TEXTS), model.embed_queries(images, texts))
    close(model.embed_queries(pixels, texts), model.embed_queries(images, TEXTS))
    close(model.embed_gallery(pixels), model.embed_gallery(images))


@torch.no_grad()
def test_none_and_the_empty_string_are_the_null_text(pixels):
    model = perturbed()
    null = model.backbone.encode_text([""] * 4)
    expected = model.embed_queries(pixels, null)
    for texts in (None, [None] * 4, [""] * 4, [None, "", "", None]):
        close(model.embed_queries(pixels, texts), expected)


@torch.no_grad()
def test_a_query_does_not_depend_on_the_others(pixels):
    model = perturbed()
    together = model.embed_queries(pixels, TEXTS)
    for row, text in enumerate(TEXTS):
        close(together[row : row + 1], model.embed_queries(pixels[row : row + 1], [text]))
        if not text:
            close(together[row : row + 1], model.embed_queries(pixels[row : row + 1]))


@torch.no_grad()
def test_texts_alone_are_their_own_embeddings():
    model = perturbed()
    expected = torch.nn.functional.normalize(model.backbone.encode_text([t or "" for t in TEXTS]).pooled, dim=-1)
    close(model.embed_queries(texts=TEXTS), expected)
    close(model.embed_queries(texts=model.backbone.encode_text(["red"])), model.embed_queries(texts=["red"]))
    close(model.embed_queries(texts=[None, ""])[0], model.embed_queries(texts=[""])[0])


def test_nothing_and_unequal_numbers_are_errors(pixels):
    model = perturbed()
    with pytest.raises(ConfigError, match="images, texts or both"):
        model.embed_queries()
    for texts in (["red"], TEXTS[:3], [None] * 5):
        with pytest.raises(DataError, match=f"4 images and {len(texts)} texts"):
            model.embed_queries(pixels, texts)


@torch.no_grad()
def test_the_null_text_is_encoded_once(pixels):
    model = perturbed("transagg", "shared")
    for _ in range(3):
        model.embed_gallery(pixels)
        model.embed_queries(pixels)
        model.embed_queries(pixels, [None, "", None, ""])
    assert model.backbone.text_batches == [[""]]


@pytest.mark.parametrize(("fusion", "target"), HEADS)
def test_a_step_takes_two_passes_of_each_encoder_at_most(fusion, target, pixels):
    model = perturbed(fusion, target).train()
    backbone = model.backbone
    model.embed_queries(pixels, TEXTS)
    model.embed_gallery(pixels)
    assert len(backbone.image_batches) <= 2
    assert len(backbone.text_batches) <= 2
    images, texts = backbone.encode_image(pixels), backbone.encode_text(["red"] * 4)
    passes = len(backbone.image_batches), len(backbone.text_batches)
    model.embed_queries(images, texts)
    model.embed_gallery(images)
    assert (len(backbone.image_batches), len(backbone.text_batches)) == passes


@torch.no_grad()
def test_a_shared_target_is_the_query_without_a_text(pixels):
    model = perturbed("transagg", "shared")
    close(model.embed_gallery(pixels), model.embed_queries(pixels))
    model.fusion.sep_token += 1
    close(model.embed_gallery(pixels), model.embed_queries(pixels))


def test_gradients_reach_the_heads_alone(pixels):
    model = perturbed("transagg", "union").train()
    groups = torch.arange(4)
    InfoNCE()(model.embed_queries(pixels, TEXTS), model.embed_gallery(pixels), groups).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    reached = [p for p in (*model.fusion.parameters(), *model.target.parameters()) if p.grad is not None]
    assert len(reached) == len([p for p in model.parameters() if p.requires_grad])
    assert not model.backbone.training


def test_training_works_after_an_evaluation_in_inference_mode(pixels):
    model = perturbed("transagg", "union")
    with torch.inference_mode():
        model.embed_gallery(pixels)
    model.train()
    InfoNCE()(model.embed_queries(pixels), model.embed_gallery(pixels), torch.arange(4)).backward()
    assert model.fusion.sep_token.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "target"), HEADS)
@torch.no_grad()
def test_a_saved_model_embeds_the_same(tmp_path, fusion, target, pixels):
    model = perturbed(fusion, target)
    model.metadata = {"data": "noise", "classes": ["a"]}
    assert model.save(tmp_path / "deep" / "model") == tmp_path / "deep" / "model"
    again = IGROTModel.load(tmp_path / "deep" / "model", LinearBackbone())
    assert not again.training
    assert again.embed_queries(pixels, TEXTS).equal(model.embed_queries(pixels, TEXTS))
    assert again.embed_gallery(pixels).equal(model.embed_gallery(pixels))
    assert again.fingerprint() == model.fingerprint()
    assert again.describe() == model.describe()
    assert again.metadata == model.metadata
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == [
        "README.md",
        "heads.safetensors",
        "model.json",
    ]
    assert not [name for name in load_file(tmp_path / "deep" / "model" / "heads.safetensors") if "backbone" in name]


@torch.no_grad()
def test_half_a_model_is_half_as_large_and_nearly_the_same(tmp_path, pixels):
    model = perturbed()
    whole, half = (model.save(tmp_path / str(half), half=half) / "heads.safetensors" for half in (False, True))
    assert all(x.dtype == torch.float16 for x in load_file(half).values())
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    again = IGROTModel.load(half.parent, LinearBackbone())
    assert all(x.dtype == torch.float32 for x in again.heads_state_dict().values())
    torch.testing.assert_close(
        again.embed_queries(pixels, TEXTS), model.embed_queries(pixels, TEXTS), atol=1e-2, rtol=0
    )


def test_a_fingerprint_tells_heads_and_backbones_apart():
    model = perturbed()
    prints = [model.fingerprint(), perturbed(seed=1).fingerprint(), perturbed(backbone=LinearBackbone(5)).fingerprint()]
    assert perturbed().fingerprint() == prints[0]
    with torch.no_grad():
        model.target.union_weighted_layer[-1].bias += 1e-3
    prints.append(model.fingerprint())
    assert len(set(prints)) == 4


def one_line(error):
    assert "\n" not in str(error.value)


def test_another_backbone_is_refused(tmp_path):
    perturbed().save(tmp_path)
    with pytest.raises(CheckpointError, match="trained on backbone linear") as error:
        IGROTModel.load(tmp_path, LinearBackbone(seed=1))
    one_line(error)
    with pytest.raises(ConfigError, match="'linear'") as error:
        IGROTModel.load(tmp_path)  # its name is not among those that can be built
    one_line(error)


@pytest.mark.parametrize("name", ["heads.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    perturbed().save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "cut": whole[: len(whole) // 2], "noise": random.Random(0).randbytes(500)}[damage]
        )
    with pytest.raises(CheckpointError, match="is not a saved model") as error:
        IGROTModel.load(tmp_path, LinearBackbone())
    one_line(error)


def test_heads_of_another_save_are_refused(tmp_path):
    perturbed().save(tmp_path)
    state = load_file(tmp_path / "heads.safetensors")
    state["fusion.sep_token"] = state["fusion.sep_token"] + 1
    save_file(state, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match=r"does not match model\.json") as error:
        IGROTModel.load(tmp_path, LinearBackbone())
    one_line(error)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a saved model"):
        load(tmp_path)


def test_saving_again_replaces_the_model(tmp_path):
    first, second = perturbed(seed=0), perturbed("transagg", "frozen", seed=3)
    first.save(tmp_path)
    second.save(tmp_path)
    assert IGROTModel.load(tmp_path, LinearBackbone()).fingerprint() == second.fingerprint()


def tuned_tiny():
    """A model on the bundled backbone whose text encoder was tuned."""
    torch.manual_seed(0)
    fusion = build_query_head("transagg", 128, layers=1, heads=2, feedforward=32)
    model = IGROTModel(build_backbone("tiny"), fusion, build_target_head("frozen", 128))
    assert not model.tuned
    model.tune(["text"])
    with torch.no_grad():
        model.backbone.network.text_projection.weight.mul_(1.5)
    model.finish_training()
    return model


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_a_tuned_backbone_is_saved_and_loaded_with_the_model(tmp_path, half):
    model = tuned_tiny()
    assert model.tuned
    model.save(tmp_path, half=half)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "heads.safetensors",
        "model.json",
        "backbone.safetensors",
    }
    # Weights of its name are ignored: the model brings its own.
    again = IGROTModel.load(tmp_path, weights=tmp_path / "absent.safetensors")
    assert again.tuned
    assert again.backbone.fingerprint() != build_backbone("tiny").fingerprint()
    if not half:
        assert again.fingerprint() == model.fingerprint()
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(
        again.embed_queries(images, ["red circle", None]),
        model.embed_queries(images, ["red circle", None]),
        atol=2e-3 if half else 0,
        rtol=0,
    )
    # Once more, from what was loaded.
    again.save(tmp_path / "twice", half=half)
    assert IGROTModel.load(tmp_path / "twice").fingerprint() == again.fingerprint()


def test_a_given_backbone_gets_the_tuned_weights_of_the_folder(tmp_path, pixels):
    model = perturbed()
    with torch.no_grad():
        model.backbone.words.mul_(2.0)
    model.tuned = True
    model.save(tmp_path)
    given = LinearBackbone(seed=5)
    again = IGROTModel.load(tmp_path, given)
    assert again.backbone is given
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        assert again.embed_queries(pixels, TEXTS).equal(model.embed_queries(pixels, TEXTS))


def test_tuned_weights_of_another_save_are_refused(tmp_path):
    tuned_tiny().save(tmp_path)
    state = load_file(tmp_path / "backbone.safetensors")
    state["text_norm.weight"] = state["text_norm.weight"] + 1
    save_file(state, tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors does not match model\.json") as error:
        IGROTModel.load(tmp_path)
    one_line(error)
    (tmp_path / "backbone.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors is not a file"):
        IGROTModel.load(tmp_path)


def test_a_frozen_model_saved_over_a_tuned_one_leaves_no_weights_of_it(tmp_path):
    model = tuned_tiny()
    model.training_images = frozenset({"a" * 16})
    model.save(tmp_path)
    perturbed().save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "heads.safetensors", "model.json"}
    assert IGROTModel.load(tmp_path, LinearBackbone()).tuned is False


def test_tuning_nothing_is_not_tuning():
    model = perturbed()
    model.tune([])
    assert not model.tuned


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file .*give another folder") as error:
        perturbed().save(tmp_path / "file")
    one_line(error)
