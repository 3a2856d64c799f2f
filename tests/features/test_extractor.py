"""Each image and text is encoded once, whatever is interrupted, repeated or broken."""

import itertools

import pytest
import torch

from small_world import DIM, LinearBackbone, Noise, extractor
from union_igrot.errors import ImageError
from union_igrot.features.extractor import FeatureExtractor, join_features
from union_igrot.features.store import FeatureStore
from union_igrot.images.decode import image_key, open_image
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.backbones.tiny import TinyBackbone
from union_igrot.types import Features


def encode(backbone, sources):
    to_tensor = ImageToTensor(backbone.preprocess)
    return backbone.encode_image(torch.stack([to_tensor(open_image(source)) for source in sources]))


def write_images(folder, count):
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Noise(i).open().resize((11 + i, 9)).save(path)
    return paths


def same(found, expected):
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-5, rtol=0)
    if found.tokens is not None:
        torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=0)
        assert found.mask.equal(expected.mask)
        assert found.pooled_at.equal(expected.pooled_at)


def test_images_are_encoded_once_each_and_found_by_key(tmp_path):
    backbone = LinearBackbone()
    sources = [Noise(i) for i in (4, 1, 4, 2, 0, 1, 3, 3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    filled = extractor(tmp_path, backbone, batch_size=2)
    keys = filled.extract_images(sources, tokens=True)
    assert torch.rand(3).equal(expected)  # torch's random numbers are left alone
    assert sum(backbone.image_batches) == 5
    assert max(backbone.image_batches) == 2
    assert filled.extract_images(sources, tokens=True) == keys
    assert sum(backbone.image_batches) == 5
    same(filled.lookup(keys, tokens=True), encode(backbone, sources))
    assert not set(keys) & set(filled.extract_texts([source.key for source in sources]))


def test_texts_are_encoded_once_each_and_none_is_the_empty_text(tmp_path):
    backbone = LinearBackbone()
    filled = extractor(tmp_path, backbone, batch_size=3)
    keys = filled.extract_texts(["red", None, "blue square", "", "red", "large"])
    assert sorted(itertools.chain(*backbone.text_batches)) == ["", "blue square", "large", "red"]
    assert keys[1] == keys[3]
    assert keys[0] == keys[4]
    filled.extract_texts(["large", "small"])
    assert backbone.text_batches[-1] == ["small"]
    # Features that were computed elsewhere count as encoded; the first ones stay.
    features = backbone.encode_text(["night"])
    filled.add_text("night", features)
    filled.add_text("night", backbone.encode_text(["blue"]))
    encoded = len(backbone.text_batches)
    same(filled.lookup(filled.extract_texts(["night"]), tokens=True), features)
    assert len(backbone.text_batches) == encoded


@pytest.mark.parametrize("make", [LinearBackbone, TinyBackbone])
def test_texts_of_differing_lengths_are_encoded_the_same_together_and_alone(tmp_path, make):
    backbone = make()
    texts = ["", "a red circle", "make the large blue square small and remove the striped star", "night"]
    filled = extractor(tmp_path, backbone, batch_size=4)
    together = filled.lookup(filled.extract_texts(texts), tokens=True)
    for row, text in enumerate(texts):
        alone = backbone.encode_text([text])
        length = alone.tokens.shape[1]
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.tokens[row, :length], alone.tokens[0], atol=1e-5, rtol=0)
        assert together.mask[row].tolist() == [True] * length + [False] * (together.mask.shape[1] - length)
        assert together.pooled_at[row] == alone.pooled_at[0]


def test_only_what_is_missing_is_encoded(tmp_path):
    sources = [Noise(i) for i in range(10)]
    extractor(tmp_path).extract_images(sources[:6], tokens=False)
    backbone = LinearBackbone()
    filled = extractor(tmp_path, backbone)
    keys = filled.extract_images(sources, tokens=False)
    assert sum(backbone.image_batches) == 4
    assert filled.lookup(keys, tokens=False).tokens is None
    same(filled.lookup(keys, tokens=False), encode(LinearBackbone(), sources))
    assert filled.extract_images(sources, tokens=True) == keys  # tokens are missing
    assert sum(backbone.image_batches) == 14
    assert filled.lookup(keys, tokens=True).tokens.shape == (10, 5, DIM)
    filled.extract_images(sources, tokens=False)
    assert sum(backbone.image_batches) == 14


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stream"), [(0, False), (1, False), (0, True)])
def test_a_broken_image_is_named_and_what_came_before_is_stored(tmp_path, workers, stream):
    paths = write_images(tmp_path / "images", 8)
    whole = paths[5].read_bytes()
    paths[5].write_bytes(whole[: len(whole) // 2])
    backbone = LinearBackbone()
    store = FeatureStore(tmp_path / "cache", backbone.fingerprint())
    filled = FeatureExtractor(backbone, store, batch_size=2, workers=workers, shard=100, progress=False)
    with pytest.raises(ImageError, match=r"5\.png"):
        list(filled.stream(paths, token_budget=0)) if stream else filled.extract_images(paths, tokens=True)
    assert sum(backbone.image_batches) == 4  # the batch with the broken one is not encoded
    assert len(store.missing([f"image/{image_key(path)}" for path in paths])) == 4
    paths[5].write_bytes(whole)
    keys = filled.extract_images(paths, tokens=not stream)
    assert sum(backbone.image_batches) == 8
    same(filled.lookup(keys, tokens=False), encode(LinearBackbone(), paths))


def test_a_missing_image_is_named_before_anything_is_encoded(tmp_path):
    backbone = LinearBackbone()
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        extractor(tmp_path, backbone).extract_images([Noise(1), tmp_path / "nowhere.png"], tokens=False)
    assert not backbone.image_batches


@pytest.mark.parametrize("budget", [0, 2**40])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_yields_every_image_in_order_whatever_is_stored(tmp_path, budget, workers):
    backbone = LinearBackbone()
    sources = [Noise(i) for i in range(11)]
    store = FeatureStore(tmp_path, backbone.fingerprint())
    filled = FeatureExtractor(backbone, store, batch_size=4, workers=workers, shard=6, progress=False)
    filled.extract_images([sources[i] for i in (0, 1, 2, 3, 5, 9)], tokens=True)
    filled.extract_images([sources[6]], tokens=False)
    encoded = sum(backbone.image_batches)
    blocks = list(filled.stream(sources, token_budget=budget))
    assert sum(backbone.image_batches) - encoded == 5  # what is stored with tokens is not encoded again
    assert [block.rows for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [block.stored for block in blocks] == [True, bool(budget), bool(budget)]
    expected = encode(LinearBackbone(), sources)
    same(join_features([block.features for block in blocks]), expected)
    keys = filled.extract_images(sources, tokens=False)
    assert len(store.missing(keys, tokens=True)) == (0 if budget else 5)
    assert sum(backbone.image_batches) - encoded == 5
    same(filled.lookup(keys, tokens=False), expected)


def test_the_budget_is_that_of_all_tokens_on_disk(tmp_path):
    backbone, sources = LinearBackbone(), [Noise(i) for i in range(6)]
    needed = 6 * (5 * DIM * 4 + 5)  # five tokens per image, and a byte of mask each
    for budget in (needed - 1, needed):
        filled = extractor(tmp_path / str(budget), backbone, batch_size=2)
        assert [block.stored for block in filled.stream(sources, token_budget=budget)] == [budget == needed] * 3


def test_an_interruption_stores_whole_shards_and_what_was_pending(tmp_path):
    class Stopped(Backbone):
        """Delegates to the linear backbone and is interrupted at the fourth batch."""

        def __init__(self):
            super().__init__()
            self.inner = LinearBackbone()
            self.name, self.dim, self.preprocess = self.inner.name, self.inner.dim, self.inner.preprocess

        def encode_image(self, images):
            if len(self.inner.image_batches) == 3:
                raise KeyboardInterrupt
            return self.inner.encode_image(images)

        def encode_text(self, texts):
            return self.inner.encode_text(texts)

    store = FeatureStore(tmp_path, LinearBackbone().fingerprint())
    sources = [Noise(i) for i in range(9)]
    filled = FeatureExtractor(Stopped(), store, batch_size=2, workers=0, shard=4, progress=False)
    with pytest.raises(KeyboardInterrupt):
        filled.extract_images(sources, tokens=False)
    backbone = LinearBackbone()
    keys = extractor(tmp_path, backbone).extract_images(sources, tokens=False)
    assert sum(backbone.image_batches) == 3  # six of nine were stored
    same(store.get(keys), encode(backbone, sources))


def test_damaged_features_are_computed_again(tmp_path, caplog):
    """Noise in place of stored numbers, of the same length: named, set aside, and the right ones are used."""
    backbone, sources = LinearBackbone(), [Noise(i) for i in range(6)]
    extractor(tmp_path, backbone, shard=3, batch_size=3).extract_images(sources, tokens=True)
    (shard, *_) = sorted((tmp_path / "features" / backbone.fingerprint()).glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-900] + bytes(byte ^ 255 for byte in content[-900:-300]) + content[-300:])
    filled = extractor(tmp_path, backbone)
    keys = filled.extract_images(sources, tokens=True)
    assert sum(backbone.image_batches) == 9
    assert shard.name in caplog.text
    assert shard.with_name(f"{shard.name}.broken").exists()
    same(filled.lookup(keys, tokens=True), encode(LinearBackbone(), sources))


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_on_standard_error_or_not_at_all(tmp_path, capfd, monkeypatch, progress):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    backbone = LinearBackbone()
    filled = FeatureExtractor(backbone, FeatureStore(tmp_path, backbone.fingerprint()), workers=0, progress=progress)
    assert filled.extract_images([], tokens=True) == []
    assert capfd.readouterr() == ("", "")
    filled.extract_images([Noise(1)], tokens=True, label="drawings")
    filled.extract_texts(["red"])
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("encoding drawings" in shown.err) == progress
    assert progress or shown.err == ""


def test_joined_features_are_padded_at_the_end():
    short = LinearBackbone().encode_text(["red"])
    long = LinearBackbone().encode_text(["the large red square", "night"])
    joined = join_features([short, long])
    assert joined.tokens.shape == (3, 5, DIM)
    assert joined.mask.sum(1).tolist() == [2, 5, 2]
    assert joined.mask[0].tolist() == [True, True, False, False, False]
    assert joined.tokens[0, :2].equal(short.tokens[0])
    assert not joined.tokens[0, 2:].any()
    assert joined.pooled.equal(torch.cat([short.pooled, long.pooled]))
    assert joined.pooled_at.tolist() == [1, 4, 1]
    bare = Features(short.pooled)
    assert join_features([bare, bare]).tokens is None
    with pytest.raises(ValueError, match="mask and pooled_at"):
        join_features([short, bare])


def test_features_of_half_precision_are_near_and_stored_apart(tmp_path):
    backbone = LinearBackbone()
    found = {}
    for precision in ("float32", "bfloat16"):
        store = FeatureStore.for_backbone(backbone, tmp_path, precision=precision)
        filled = FeatureExtractor(backbone, store, workers=0, precision=precision, progress=False)
        images = filled.lookup(filled.extract_images([Noise(i) for i in range(9)], tokens=True), tokens=True)
        texts = filled.lookup(filled.extract_texts(["red square", "the night"]), tokens=True)
        assert {x.dtype for x in (images.pooled, images.tokens, texts.pooled)} == {torch.float32}
        assert filled.describe() == {"precision": precision, "kept": "float32"}
        found[precision] = images.pooled
    assert not found["bfloat16"].equal(found["float32"])
    torch.testing.assert_close(found["bfloat16"], found["float32"], atol=0.05, rtol=0.05)
