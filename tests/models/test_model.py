"""One model embeds images, texts or both, the same from tensors and features, and survives a round trip."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_world import DIM, TRANSAGG, UNION, LinearBackbone, trainable
from union_igrot.cli.config import compose, plain
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.experiment import build_model
from union_igrot.models.factory import build_backbone, build_query_head, build_target_head
from union_igrot.models.model import IGROTModel, load
from union_igrot.training.losses import InfoNCE

HEADS = [
    *[("transagg", target) for target in ("frozen", "sum", "union", "shared")],
    *[(fusion, "frozen") for fusion in ("image", "text", "sum")],
]
TEXTS = ["red square", None, "", "remove the large blue night"]


@pytest.fixture
def pictures():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def stirred(fusion="transagg", target="union", backbone=None, seed=0):
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
def test_embeddings_are_of_unit_length(fusion, target, pictures):
    model = stirred(fusion, target)
    for embedded in (model.embed_queries(pictures, TEXTS), model.embed_gallery(pictures)):
        assert embedded.shape == (4, DIM)
        close(embedded.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize(("fusion", "target"), HEADS)
@torch.no_grad()
def test_tensors_and_features_give_the_same(fusion, target, pictures):
    model = stirred(fusion, target)
    images = model.backbone.encode_image(pictures)
    texts = model.backbone.encode_text([text or "" for text in TEXTS])
    close(model.embed_queries(pictures, TEXTS), model.embed_queries(images, texts))
    close(model.embed_queries(pictures, texts), model.embed_queries(images, TEXTS))
    close(model.embed_gallery(pictures), model.embed_gallery(images))


@torch.no_grad()
def test_none_and_the_empty_string_are_the_null_text(pictures):
    model = stirred()
    null = model.backbone.encode_text([""] * 4)
    expected = model.embed_queries(pictures, null)
    for texts in (None, [None] * 4, [""] * 4, [None, "", "", None]):
        close(model.embed_queries(pictures, texts), expected)


@torch.no_grad()
def test_a_query_does_not_depend_on_the_others(pictures):
    model = stirred()
    together = model.embed_queries(pictures, TEXTS)
    for row, text in enumerate(TEXTS):
        close(together[row : row + 1], model.embed_queries(pictures[row : row + 1], [text]))
        if not text:
            close(together[row : row + 1], model.embed_queries(pictures[row : row + 1]))


@torch.no_grad()
def test_texts_alone_are_their_own_embeddings():
    model = stirred()
    expected = torch.nn.functional.normalize(model.backbone.encode_text([t or "" for t in TEXTS]).pooled, dim=-1)
    close(model.embed_queries(texts=TEXTS), expected)
    close(model.embed_queries(texts=model.backbone.encode_text(["red"])), model.embed_queries(texts=["red"]))
    close(model.embed_queries(texts=[None, ""])[0], model.embed_queries(texts=[""])[0])


def test_nothing_and_unequal_numbers_are_errors(pictures):
    model = stirred()
    with pytest.raises(ConfigError, match="images, texts or both"):
        model.embed_queries()
    for texts in (["red"], TEXTS[:3], [None] * 5):
        with pytest.raises(DataError, match=f"4 images and {len(texts)} texts"):
            model.embed_queries(pictures, texts)


@torch.no_grad()
def test_the_null_text_is_encoded_once(pictures):
    model = stirred("transagg", "shared")
    for _ in range(3):
        model.embed_gallery(pictures)
        model.embed_queries(pictures)
        model.embed_queries(pictures, [None, "", None, ""])
    assert model.backbone.text_batches == [[""]]


@pytest.mark.parametrize(("fusion", "target"), HEADS)
def test_a_step_takes_two_passes_of_each_encoder_at_most(fusion, target, pictures):
    model = stirred(fusion, target).train()
    backbone = model.backbone
    model.embed_queries(pictures, TEXTS)
    model.embed_gallery(pictures)
    assert len(backbone.image_batches) <= 2
    assert len(backbone.text_batches) <= 2
    images, texts = backbone.encode_image(pictures), backbone.encode_text(["red"] * 4)
    passes = len(backbone.image_batches), len(backbone.text_batches)
    model.embed_queries(images, texts)
    model.embed_gallery(images)
    assert (len(backbone.image_batches), len(backbone.text_batches)) == passes


@torch.no_grad()
def test_a_shared_target_is_the_query_without_a_text(pictures):
    model = stirred("transagg", "shared")
    close(model.embed_gallery(pictures), model.embed_queries(pictures))
    model.fusion.sep_token += 1
    close(model.embed_gallery(pictures), model.embed_queries(pictures))


def test_gradients_reach_the_heads_alone(pictures):
    model = stirred("transagg", "union").train()
    groups = torch.arange(4)
    InfoNCE()(model.embed_queries(pictures, TEXTS), model.embed_gallery(pictures), groups).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    reached = [p for p in (*model.fusion.parameters(), *model.target.parameters()) if p.grad is not None]
    assert len(reached) == len([p for p in model.parameters() if p.requires_grad])
    assert not model.backbone.training


def test_training_works_after_an_evaluation_in_inference_mode(pictures):
    model = stirred("transagg", "union")
    with torch.inference_mode():
        model.embed_gallery(pictures)
    model.train()
    InfoNCE()(model.embed_queries(pictures), model.embed_gallery(pictures), torch.arange(4)).backward()
    assert model.fusion.sep_token.grad is not None


@pytest.mark.parametrize(("fusion", "target"), HEADS)
@torch.no_grad()
def test_a_saved_model_embeds_the_same(tmp_path, fusion, target, pictures):
    model = stirred(fusion, target)
    model.metadata = {"data": "noise", "classes": ["a"]}
    assert model.save(tmp_path / "deep" / "model") == tmp_path / "deep" / "model"
    again = IGROTModel.load(tmp_path / "deep" / "model", LinearBackbone())
    assert not again.training
    assert again.embed_queries(pictures, TEXTS).equal(model.embed_queries(pictures, TEXTS))
    assert again.embed_gallery(pictures).equal(model.embed_gallery(pictures))
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
def test_half_a_model_is_half_as_large_and_nearly_the_same(tmp_path, pictures):
    model = stirred()
    whole, half = (model.save(tmp_path / str(half), half=half) / "heads.safetensors" for half in (False, True))
    assert all(x.dtype == torch.float16 for x in load_file(half).values())
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    again = IGROTModel.load(half.parent, LinearBackbone())
    assert all(x.dtype == torch.float32 for x in again.heads_state_dict().values())
    torch.testing.assert_close(
        again.embed_queries(pictures, TEXTS), model.embed_queries(pictures, TEXTS), atol=1e-2, rtol=0
    )


def test_a_fingerprint_tells_heads_and_backbones_apart():
    model = stirred()
    prints = [model.fingerprint(), stirred(seed=1).fingerprint(), stirred(backbone=LinearBackbone(5)).fingerprint()]
    assert stirred().fingerprint() == prints[0]
    with torch.no_grad():
        model.target.union_weighted_layer[-1].bias += 1e-3
    prints.append(model.fingerprint())
    assert len(set(prints)) == 4


def one_line(caught):
    assert "\n" not in str(caught.value)


def test_another_backbone_is_refused(tmp_path):
    stirred().save(tmp_path)
    with pytest.raises(CheckpointError, match="trained on backbone linear") as caught:
        IGROTModel.load(tmp_path, LinearBackbone(seed=1))
    one_line(caught)
    with pytest.raises(ConfigError, match="'linear'") as caught:
        IGROTModel.load(tmp_path)  # its name is not among those that can be built
    one_line(caught)


@pytest.mark.parametrize("name", ["heads.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    stirred().save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "cut": whole[: len(whole) // 2], "noise": random.Random(0).randbytes(500)}[damage]
        )
    with pytest.raises(CheckpointError, match="is not a saved model") as caught:
        IGROTModel.load(tmp_path, LinearBackbone())
    one_line(caught)


def test_heads_of_another_save_are_refused(tmp_path):
    stirred().save(tmp_path)
    state = load_file(tmp_path / "heads.safetensors")
    state["fusion.sep_token"] = state["fusion.sep_token"] + 1
    save_file(state, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match=r"does not match model\.json") as caught:
        IGROTModel.load(tmp_path, LinearBackbone())
    one_line(caught)


def edited(folder, change):
    saved = json.loads((folder / "model.json").read_text())
    change(saved)
    (folder / "model.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["fusion"].update(kind="magic"),
        lambda saved: saved["target"].update(kind="magic"),
        lambda saved: saved["target"].update(colour=3),
        lambda saved: saved["fusion"].update(layers=2),
        lambda saved: saved["fusion"].update(feedforward=64),
        lambda saved: saved["fusion"].pop("kind"),
        lambda saved: saved.pop("fusion"),
        lambda saved: saved.pop("backbone_fingerprint"),
        lambda saved: saved.pop("heads"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change):
    stirred().save(tmp_path)
    edited(tmp_path, change)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        IGROTModel.load(tmp_path, LinearBackbone())
    one_line(caught)


def test_a_description_that_names_no_backbone_needs_one_given(tmp_path):
    stirred().save(tmp_path)
    edited(tmp_path, lambda saved: saved.pop("backbone"))
    with pytest.raises(CheckpointError) as caught:
        IGROTModel.load(tmp_path)
    one_line(caught)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a saved model"):
        load(tmp_path)


def test_saving_again_replaces_the_model(tmp_path):
    first, second = stirred(seed=0), stirred("transagg", "frozen", seed=3)
    first.save(tmp_path)
    second.save(tmp_path)
    assert IGROTModel.load(tmp_path, LinearBackbone()).fingerprint() == second.fingerprint()


def test_unknown_heads_are_errors_that_name_the_known():
    with pytest.raises(ConfigError, match="image, text, sum, transagg"):
        build_query_head("magic", DIM, **TRANSAGG)
    with pytest.raises(ConfigError, match="frozen, sum, union, shared"):
        build_target_head("magic", DIM, **UNION)


def tuned_tiny():
    """A model on the embedded backbone whose text extractor was tuned."""
    torch.manual_seed(0)
    fusion = build_query_head("transagg", 128, layers=1, heads=2, feedforward=32)
    model = IGROTModel(build_backbone("tiny"), fusion, build_target_head("frozen", 128))
    assert not model.tuned
    model.tune(["text"])
    with torch.no_grad():
        model.backbone.network.text_projection.weight.mul_(1.5)
    model.finish_training()
    return model


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_a_tuned_backbone_is_saved_along_and_found_by_itself(tmp_path, half):
    model = tuned_tiny()
    assert model.tuned
    model.save(tmp_path, half=half)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "heads.safetensors",
        "model.json",
        "backbone.safetensors",
    }
    # Weights of its name's are not looked at: the model brings its own.
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


def test_a_tuned_backbone_of_ones_own_kind_is_filled_from_the_folder(tmp_path, pictures):
    model = stirred()
    with torch.no_grad():
        model.backbone.words.mul_(2.0)
    model.tuned = True
    model.save(tmp_path)
    given = LinearBackbone(seed=5)
    again = IGROTModel.load(tmp_path, given)
    assert again.backbone is given
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        assert again.embed_queries(pictures, TEXTS).equal(model.embed_queries(pictures, TEXTS))


def test_tuned_weights_of_another_save_are_refused(tmp_path):
    tuned_tiny().save(tmp_path)
    state = load_file(tmp_path / "backbone.safetensors")
    state["text_norm.weight"] = state["text_norm.weight"] + 1
    save_file(state, tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors does not match model\.json") as caught:
        IGROTModel.load(tmp_path)
    one_line(caught)
    (tmp_path / "backbone.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors is not a file"):
        IGROTModel.load(tmp_path)


def test_a_frozen_model_saved_over_a_tuned_one_leaves_no_weights_of_it(tmp_path):
    model = tuned_tiny()
    model.training_images = frozenset({"a" * 16})
    model.save(tmp_path)
    stirred().save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "heads.safetensors", "model.json"}
    assert IGROTModel.load(tmp_path, LinearBackbone()).tuned is False


def test_tuning_nothing_leaves_the_backbone_its_names():
    model = stirred()
    model.tune([])
    assert not model.tuned


def test_a_later_format_and_a_folder_that_cannot_be_written_are_named(tmp_path):
    stirred().save(tmp_path / "model")
    edited(tmp_path / "model", lambda saved: saved.update(format=99))
    with pytest.raises(CheckpointError, match=r"is in format 99 .*install a later union-igrot") as caught:
        IGROTModel.load(tmp_path / "model", LinearBackbone())
    one_line(caught)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file .*give another folder") as caught:
        stirred().save(tmp_path / "file")
    one_line(caught)


@pytest.mark.parametrize("heads", [3, 7, 256])
def test_heads_that_do_not_divide_the_width_are_named_before_anything_is_encoded(heads):
    fits = "1, 2, 4, 8, 16, 32, 64, 128"
    with pytest.raises(ConfigError, match=rf"fusion\.heads: {heads} .* width 128: {fits}\)$"):
        build_model(plain(compose("train", [f"fusion.heads={heads}"])), {})
