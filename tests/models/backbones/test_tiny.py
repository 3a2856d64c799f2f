"""The bundled model: its words, its weights and what it recognizes."""

import json
import random
import re
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pretrain_tiny import caption_batch, held_out_metrics
from safetensors.torch import save_file

from union_igrot.errors import CheckpointError
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.backbones.tiny import CONTEXT, TinyBackbone, TinyVLM, tokenize
from union_igrot.synthetic import scenes

COUNT = TinyVLM().words.num_embeddings


@pytest.fixture(scope="module")
def tiny():
    return TinyBackbone()


def pixels(count, seed=0):
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def test_an_empty_batch_returns_empty_features(tiny):
    texts, images = tiny.encode_text([]), tiny.encode_image(pixels(0))
    assert (len(texts), len(images)) == (0, 0)
    assert texts.pooled.shape == images.pooled.shape == (0, 128)
    assert images.tokens.shape == (0, 10, 128)


def test_fingerprint_follows_weights_and_preprocessing(tiny):
    other = TinyBackbone()
    assert other.fingerprint() == tiny.fingerprint()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0].add_(1e-6)
    assert other.fingerprint() != tiny.fingerprint()
    assert tiny.preprocess.fingerprint() in tiny.fingerprint().split("-")
    assert (tiny.preprocess.size, tiny.device.type, tiny.name) == (48, "cpu", "tiny")


def test_weights_hash_sees_names_types_shapes_and_bytes():
    x = torch.arange(6.0)
    base = weights_hash({"a": x, "b": x + 1})
    assert weights_hash({"b": x + 1, "a": x}) == base
    assert len(base) == 16
    others = [
        {"a": x},
        {"a": x + 1, "b": x},
        {"c": x, "b": x + 1},
        {"a": x.double(), "b": x + 1},
        {"a": x.view(2, 3), "b": x + 1},
        {"a": x, "b": x + 1, "empty": torch.zeros(0)},
    ]
    assert len({base, *map(weights_hash, others)}) == len(others) + 1
    turned = torch.arange(6.0).view(2, 3).T
    assert weights_hash({"a": turned}) == weights_hash({"a": turned.contiguous()})


def grammar_words():
    """Every word that a caption, an edit or a prompt can hold, by drawing many."""
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        scene = scenes.random_scene(rng, "train")
        texts += [scenes.caption(rng, scene), scenes.edit_scene(rng, scene).text]
    texts += [f"a sketch of {scenes.with_article(shape)}" for shape in scenes.SHAPES]
    for words in (scenes.SHAPES, scenes.COLORS, scenes.SIZES, scenes.FILLS, scenes.BACKGROUNDS, scenes.POSITIONS):
        texts += words
    return sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})


@pytest.mark.slow
def test_every_word_of_the_grammar_has_its_own_id(tiny):
    words = grammar_words()
    ids = tokenize(words)[:, 0]
    buckets = tiny.network.words.num_embeddings - 64
    assert (ids < buckets).all(), [w for w, i in zip(words, ids, strict=True) if i >= buckets]
    assert (ids >= 2).all()
    assert len(ids.unique()) == len(words) > 60


@pytest.mark.slow
def test_captions_and_edits_are_never_cut():
    rng = random.Random(1)
    for _ in range(150):
        scene = scenes.random_scene(rng, "train")
        for text in (scenes.caption(rng, scene), scenes.edit_scene(rng, scene, double=1.0).text):
            assert tokenize([text]).shape[1] == len(text.split()) + 1 <= CONTEXT


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=5))
def test_any_text_becomes_ids(texts):
    ids = tokenize(texts)
    assert ids.shape[0] == len(texts)
    assert ids.shape[1] <= CONTEXT
    assert (ids >= 0).all()
    assert (ids < COUNT).all()
    for text, row in zip(texts, ids.tolist(), strict=True):
        real = row[: row.index(1) + 1]
        assert len(real) == min(len(re.findall(r"\w+", text.lower())), CONTEXT - 1) + 1
        assert set(row[len(real) :]) <= {0}
        assert 0 not in real


def test_unknown_words_keep_their_bucket():
    first, again, other = tokenize(["zeppelin", "Zeppelin!", "accordion"])[:, 0].tolist()
    assert first == again != other
    assert tokenize(["RED, star."]).tolist() == tokenize(["red star"]).tolist()
    assert tokenize([""]).tolist() == [[1]]


def test_description_agrees_with_the_shipped_weights(tiny):
    saved = json.loads((files("union_igrot") / "weights" / "tiny" / "backbone.json").read_text())
    assert saved["weights"] == weights_hash(tiny.network.state_dict())
    assert saved["parameters"] == sum(p.numel() for p in tiny.network.parameters()) < 2_000_000
    assert saved["shapes_without_sketches"] == list(scenes.HELD_OUT_SHAPES)
    assert all(0 < metric <= 100 for metric in saved["held_out_percent"].values())


@pytest.mark.slow
def test_shapes_are_recognized_far_above_chance(tiny):
    """Floors on a few validation scenes; chance is 5 for a shape and 0.4 for a caption."""
    network = TinyVLM()
    network.load_state_dict(tiny.network.state_dict())
    metrics = held_out_metrics(network, "test of the floor", "val", batches=1)
    floors = {
        "caption_retrieval_in_256": 70,
        "shape_of_photo": 70,
        "shape_of_sketch_seen": 85,
        "shape_of_sketch_held_out": 40,
    }
    assert set(metrics) == set(floors)
    assert all(metrics[name] >= floor for name, floor in floors.items()), metrics


def test_captions_find_their_images(tiny):
    batch = caption_batch("contract", "val", pairs=8, sketches=1)
    images, texts = tiny.encode_image(batch.photos).pooled, tiny.encode_text(batch.captions).pooled
    right = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1).argmax(1) == torch.arange(16)
    assert right.float().mean() > 0.6


def test_weights_of_a_file_are_the_weights(tiny, tmp_path):
    torch.manual_seed(5)
    network = TinyVLM()
    save_file({n: x.contiguous() for n, x in network.state_dict().items()}, tmp_path / "own.safetensors")
    own = TinyBackbone(tmp_path / "own.safetensors")
    assert weights_hash(own.network.state_dict()) == weights_hash(network.state_dict())
    assert own.fingerprint() != tiny.fingerprint()


def broken(case, folder, tiny):
    path = folder / "weights.safetensors"
    state = {n: x.clone() for n, x in tiny.network.state_dict().items()}
    if case == "absent":
        return path
    if case == "garbage":
        path.write_bytes(b"these are no weights")
        return path
    if case == "missing":
        del state["log_scale"], state["image_places"]
    if case == "extra":
        state["surplus"] = torch.zeros(1)
    if case == "shape":
        state["words.weight"] = torch.zeros(3, 3)
    save_file({name: x.contiguous() for name, x in state.items()}, path)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("absent", "not a file"),
        ("garbage", "weights.safetensors"),
        ("truncated", "weights.safetensors"),
        ("missing", "log_scale"),
        ("extra", "surplus"),
        ("shape", "words.weight"),
    ],
)
def test_broken_weights_are_one_clear_line(case, word, tiny, tmp_path):
    path = broken(case, tmp_path, tiny)
    with pytest.raises(CheckpointError) as error:
        TinyBackbone(path)
    message = str(error.value)
    assert word in message
    assert "\n" not in message
    assert str(path) in message


def test_the_number_of_threads_does_not_change_features(tiny):
    images, threads = pixels(70), torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        with torch.inference_mode():
            found.append(tiny.encode_image(images).tokens)
    torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0][50:], tiny.encode_image(images[50:]).tokens, atol=1e-5, rtol=0)
