"""Models of sentence-transformers as backbones, and models behind its `encode`."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models.encode import SentenceEncoder
from union_igrot.models.factory import build_backbone
from union_igrot.models.model import baseline, load

RED, BLUE = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (40, 40), "blue")
needs_library = pytest.mark.skipif(
    find_spec("sentence_transformers") is None, reason='the extra "sentence-transformers" is not installed'
)


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(load("tiny"))


def test_texts_images_and_both_pass_their_heads_in_any_order(encoder):
    model = encoder.model
    inputs = [RED, "a red star", {"image": BLUE, "text": "in red"}, {"text": "a blue moon"}, {"image": BLUE}]
    found = encoder.encode(inputs)
    assert isinstance(found, np.ndarray)
    assert found.shape == (5, encoder.get_embedding_dimension())
    np.testing.assert_allclose(found[[0, 4]], model.encode_gallery([RED, BLUE]), atol=1e-5)
    np.testing.assert_allclose(found[[1, 3]], model.encode_queries(None, ["a red star", "a blue moon"]), atol=1e-5)
    np.testing.assert_allclose(found[2], model.encode_queries([BLUE], ["in red"])[0], atol=1e-5)
    np.testing.assert_allclose(encoder.encode_document(inputs), found, atol=1e-5)
    queries = encoder.encode_query([RED, "a red star"], convert_to_tensor=True)
    torch.testing.assert_close(queries[0], model.encode_queries([RED])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.similarity(queries, queries).diagonal(), torch.ones(2))


def test_forms_of_the_result_and_of_wrong_inputs(encoder):
    assert encoder.encode("a red star").shape == (128,)
    assert encoder.encode([], convert_to_tensor=True).shape == (0, 128)
    several = encoder.encode(["a", "b"], convert_to_numpy=False, batch_size=1, prompt_name=None)
    assert [type(one) for one in several] == [torch.Tensor] * 2
    with pytest.raises(ConfigError, match="no option prompt for this model"):
        encoder.encode("a", prompt="query: ")
    for wrong in ({}, {"image": None}, {"text": "a", "audio": 1}):
        with pytest.raises(ConfigError, match="expected text, image or both"):
            encoder.encode([wrong])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, clip_folder):
    library = pytest.importorskip("sentence_transformers", reason='the extra "sentence-transformers" is not installed')
    folder = tmp_path_factory.mktemp("sentence")
    library.SentenceTransformer(str(clip_folder), device="cpu", local_files_only=True).save(str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_saved_model_embeds_as_its_library_and_as_transformers(saved, clip_folder):
    backbone = build_backbone("st:owner/name", saved)
    other = build_backbone("hf:owner/name", clip_folder)
    model, texts = baseline(backbone, "sum"), ["a red shoe", "", "blue"]
    images = [Image.effect_noise((32, 32), sigma).convert("RGB") for sigma in (20, 40, 80)]
    for mine, inputs in ((model.encode_gallery(images), images), (model.encode_queries(None, texts), texts)):
        expected = torch.nn.functional.normalize(backbone.network.encode(inputs, convert_to_tensor=True), dim=-1)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    images += [RED, Image.effect_noise((90, 70), 60).convert("RGB")]  # which transformers' tensors round otherwise
    torch.testing.assert_close(
        model.encode_gallery(images), baseline(other, "sum").encode_gallery(images), atol=1e-4, rtol=0
    )
    features = backbone.encode_text(texts)
    assert features.tokens.shape == (3, 1, backbone.dim)
    assert features.mask.all()
    assert backbone.fingerprint() == build_backbone("st:owner/name", saved).fingerprint() != other.fingerprint()
    with pytest.raises(ConfigError, match="cannot be tuned"):
        backbone.tune(["image"])


@needs_library
@pytest.mark.slow
def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="by sentence-transformers"):
        build_backbone("st:owner/name", tmp_path)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r'pip install "union-igrot\[sentence-transformers\]"'):
        build_backbone("st:owner/name")
