"""Queries and galleries from what people have: paths, images, arrays, texts, one or many."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from small_world import DIM, LinearBackbone, Noise, trainable
from union_igrot.errors import ConfigError, DataError, UnionError
from union_igrot.images.transforms import image_batch
from union_igrot.models.model import IGROTModel, check_model_input, load
from union_igrot.models.registry import is_backbone


@pytest.fixture
def model():
    return trainable().eval()


@pytest.fixture
def forms(tmp_path):
    """One image in every form."""
    image = Noise(1).open()
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    return [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        image,
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        Noise(1),
        (tmp_path / "a.png").read_bytes(),
    ]


def test_one_image_in_any_form_is_one_query(model, forms):
    expected = model.embed_gallery(image_batch([forms[0]], model.preprocess)).detach()
    for image in forms:
        torch.testing.assert_close(model.encode_gallery(image), expected)
        assert model.encode_queries(image, "red square").shape == (1, DIM)
    many = model.encode_gallery(forms, batch_size=3)
    torch.testing.assert_close(many, expected.expand(len(forms), -1))
    torch.testing.assert_close(model.encode_gallery(np.stack([forms[3]] * 2)), expected.expand(2, -1))


def test_queries_equal_the_core_and_have_no_gradient(model):
    images = [Noise(number) for number in range(5)]
    texts = ["red", None, "", "blue square", "night"]
    batch = image_batch([image.open() for image in images], model.preprocess)
    model.train()
    found = model.encode_queries(images, texts, batch_size=2, progress=True)
    assert model.training
    assert (found.requires_grad, found.dtype, found.device.type) == (False, torch.float32, "cpu")
    model.eval()
    torch.testing.assert_close(found, model.embed_queries(batch, texts).detach())
    torch.testing.assert_close(model.encode_queries(batch, texts), found)
    torch.testing.assert_close(model.encode_queries(images), model.embed_queries(batch).detach())
    assert model.encode_gallery([]).shape == (0, DIM)


def test_a_text_is_one_query_and_never_its_letters(model):
    found = model.encode_queries(texts="a red circle")
    assert found.shape == (1, DIM)
    torch.testing.assert_close(found, model.encode_queries(texts=["a red circle"]))
    torch.testing.assert_close(found, model.embed_queries(texts="a red circle").detach())
    assert model.backbone.text_batches == [["a red circle"]] * 3
    assert model.encode_queries(texts=["red", None]).shape == (2, DIM)


def test_a_gallery_is_normalized_also_under_the_training_sum():
    model = trainable("sum", "sum")
    model.target.form = "training"
    found = model.encode_gallery([Noise(1), Noise(2)])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(found, F.normalize(model.encode_gallery([Noise(1), Noise(2)]), dim=-1))


@pytest.mark.parametrize(
    ("images", "given"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8 [2, 3, 8, 8]"),
        (torch.zeros(2, 3, 8, 9), "float32 [2, 3, 8, 9]"),
        (torch.zeros(3, 8, 8), "float32 [3, 8, 8]"),
        (torch.zeros(2, 1, 8, 8), "float32 [2, 1, 8, 8]"),
    ],
)
def test_the_core_says_what_it_expects(model, images, given):
    for embed, instead in ((model.embed_queries, "encode_queries"), (model.embed_gallery, "encode_gallery")):
        with pytest.raises(ConfigError) as error:
            embed(images)
        for words in (given, "[batch, 3, 8, 8]", instead):
            assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_no_image_or_text_is_an_error(model):
    for odd in (["a.jpg"], Image.new("RGB", (8, 8)), "a.jpg"):
        with pytest.raises(ConfigError, match=r"got (list|Image|str)\)"):
            check_model_input(odd, 8, "encode_queries")
    with pytest.raises(ConfigError, match="images: int"):
        model.encode_gallery(3)
    with pytest.raises(ConfigError, match="images, texts or both"):
        model.encode_queries()
    with pytest.raises(DataError, match="got 1 images and 2 texts"):
        model.encode_queries(Noise(1), ["red", "blue"])
    with pytest.raises(ConfigError, match="batch_size: 0"):
        model.encode_gallery([Noise(1)], batch_size=0)
    with pytest.raises(UnionError, match=r"absent\.png"):
        model.encode_gallery("absent.png")


@pytest.mark.slow
def test_a_model_is_loaded_from_the_folder_of_its_run_to_a_device(tmp_path, monkeypatch):
    model = load("tiny", "cpu")
    model.save(tmp_path / "run" / "model")
    for name in (tmp_path / "run", tmp_path / "run" / "model"):
        assert load(name, device=torch.device("cpu")).fingerprint() == model.fingerprint()
    with pytest.raises(UnionError, match=r"did you mean tiny\?"):
        load("tinny")
    with pytest.raises(ConfigError, match="'cuda:9' is not available"):
        load("tiny", device="cuda:9")
    assert not is_backbone("tiny")


def test_reprs_are_short():
    model = IGROTModel(LinearBackbone(), trainable().fusion, trainable().target, {"data": "noise"})
    assert repr(model) == "IGROTModel(linear, transagg queries, union target, dim=16, device=cpu, trained on noise)"
    assert repr(model.backbone) == "LinearBackbone(linear, dim=16, image_size=8, device=cpu)"
    assert repr(model.fusion).startswith("TransAggFusion(layers=1, heads=2")
