"""Each image and text through the backbone once, whatever is interrupted, repeated or broken."""

import itertools

import pytest
import torch

from small_world import DIM, LinearBackbone, Noise, extractor
from union_igrot.errors import ImageError
from union_igrot.features.extractor import FeatureExtractor, join_features
from union_igrot.features.store import FeatureStore
from union_igrot.images.dataset import load_pixels
from union_igrot.images.decode import image_key, open_image
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.backbones.tiny import TinyBackbone
from union_igrot.types import Features


def directly(backbone, sources):
    to_tensor = ImageToTensor(backbone.preprocess)
    return backbone.encode_image(torch.stack([to_tensor(open_image(source)) for source in sources]))


def written(folder, count):
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Noise(i).open().resize((11 + i, 9)).save(path)
    return paths


def test_pictures_are_encoded_once_each_and_found_by_key(tmp_path):
    backbone = LinearBackbone()
    sources = [Noise(i) for i in (4, 1, 4, 2, 0, 1, 3, 3)]
    filled = extractor(tmp_path, backbone, batch_size=2)
    keys = filled.extract_images(sources, tokens=True)
    assert sum(backbone.image_batches) == 5
    assert max(backbone.image_batches) == 2
    assert filled.extract_images(sources, tokens=True) == keys
    assert sum(backbone.image_batches) == 5
    found, expected = filled.lookup(keys, tokens=True), directly(backbone, sources)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=0)
    assert found.mask.equal(expected.mask)
    assert found.pooled_at.equal(expected.pooled_at)


def test_texts_are_encoded_once_each_and_none_is_the_empty_text(tmp_path):
    backbone = LinearBackbone()
    filled = extractor(tmp_path, backbone, batch_size=3)
    keys = filled.extract_texts(["red", None, "blue square", "", "red", "large"])
    assert sorted(itertools.chain(*backbone.text_batches)) == ["", "blue square", "large", "red"]
    assert keys[1] == keys[3]
    assert keys[0] == keys[4]
    filled.extract_texts(["large", "small"])
    assert backbone.text_batches[-1] == ["small"]


def test_a_picture_and_a_text_of_one_name_are_two_things(tmp_path):
    filled = extractor(tmp_path)
    assert not set(filled.extract_images([Noise(1)], tokens=False)) & set(filled.extract_texts([Noise(1).key]))


@pytest.mark.parametrize("make", [LinearBackbone, TinyBackbone])
def test_texts_of_differing_lengths_say_the_same_together_and_alone(tmp_path, make):
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


def test_a_new_run_encodes_only_what_an_earlier_one_left_out(tmp_path):
    extractor(tmp_path).extract_images([Noise(i) for i in range(6)], tokens=True)
    backbone = LinearBackbone()
    keys = extractor(tmp_path, backbone).extract_images([Noise(i) for i in range(10)], tokens=True)
    assert sum(backbone.image_batches) == 4
    found = extractor(tmp_path, backbone).lookup(keys, tokens=False).pooled
    torch.testing.assert_close(found, directly(backbone, [Noise(i) for i in range(10)]).pooled, atol=1e-5, rtol=0)


def test_tokens_that_were_not_kept_are_encoded_when_they_are_asked_for(tmp_path):
    backbone = LinearBackbone()
    filled = extractor(tmp_path, backbone)
    sources = [Noise(i) for i in range(5)]
    keys = filled.extract_images(sources, tokens=False)
    assert filled.lookup(keys, tokens=False).tokens is None
    assert filled.extract_images(sources, tokens=True) == keys
    assert sum(backbone.image_batches) == 10
    assert filled.lookup(keys, tokens=True).tokens.shape == (5, 5, DIM)
    filled.extract_images(sources, tokens=False)
    assert sum(backbone.image_batches) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_and_what_came_before_is_kept(tmp_path, workers):
    (tmp_path / "pictures").mkdir()
    paths = written(tmp_path / "pictures", 8)
    whole = paths[5].read_bytes()
    paths[5].write_bytes(whole[: len(whole) // 2])
    backbone = LinearBackbone()
    store = FeatureStore(tmp_path / "cache", backbone.fingerprint())
    filled = FeatureExtractor(backbone, store, batch_size=2, workers=workers, shard=100, progress=False)
    with pytest.raises(ImageError, match=r"5\.png"):
        filled.extract_images(paths, tokens=True)
    assert sum(backbone.image_batches) == 4  # the batch with the broken one is not encoded
    paths[5].write_bytes(whole)
    keys = filled.extract_images(paths, tokens=True)
    assert sum(backbone.image_batches) == 8
    expected = directly(backbone, paths).pooled
    torch.testing.assert_close(filled.lookup(keys, tokens=False).pooled, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("token_budget", [0, 2**40])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_gives_every_picture_in_order_whatever_is_stored(tmp_path, token_budget, workers):
    backbone = LinearBackbone()
    sources = [Noise(i) for i in range(11)]
    store = FeatureStore(tmp_path, backbone.fingerprint())
    filled = FeatureExtractor(backbone, store, batch_size=4, workers=workers, shard=6, progress=False)
    filled.extract_images([sources[i] for i in (0, 1, 2, 3, 5, 9)], tokens=True)
    filled.extract_images([sources[6]], tokens=False)
    passed = sum(backbone.image_batches)
    blocks = list(filled.stream(sources, token_budget=token_budget))
    assert sum(backbone.image_batches) - passed == 5  # what stands there with tokens is not encoded again
    assert [block.rows for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [block.stored for block in blocks] == [True, bool(token_budget), bool(token_budget)]
    expected, found = directly(LinearBackbone(), sources), join_features([block.features for block in blocks])
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=0)
    assert found.mask.equal(expected.mask)
    assert found.pooled_at.equal(expected.pooled_at)
    keys = filled.extract_images(sources, tokens=False)
    assert len(store.missing(keys, tokens=True)) == (0 if token_budget else 5)
    assert sum(backbone.image_batches) - passed == 5
    torch.testing.assert_close(filled.lookup(keys, tokens=False).pooled, expected.pooled, atol=1e-5, rtol=0)


def test_the_room_is_that_of_all_tokens_on_disk(tmp_path):
    backbone, sources = LinearBackbone(), [Noise(i) for i in range(6)]
    needed = 6 * (5 * DIM * 4 + 5)  # five tokens an image, and a byte of mask each
    for token_budget in (needed - 1, needed):
        filled = extractor(tmp_path / str(token_budget), backbone, batch_size=2)
        assert [block.stored for block in filled.stream(sources, token_budget=token_budget)] == [
            token_budget == needed
        ] * 3


def test_a_broken_picture_ends_a_stream_and_what_came_before_is_kept(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = written(tmp_path / "pictures", 8)
    paths[5].write_bytes(b"broken")
    backbone = LinearBackbone()
    store = FeatureStore(tmp_path / "cache", backbone.fingerprint())
    filled = FeatureExtractor(backbone, store, batch_size=2, workers=0, shard=100, progress=False)
    with pytest.raises(ImageError, match=r"5\.png"):
        list(filled.stream(paths, token_budget=0))
    assert len(store.missing([f"image/{image_key(path)}" for path in paths])) == 4


def test_a_text_that_is_known_is_not_encoded(tmp_path):
    backbone = LinearBackbone()
    filled = extractor(tmp_path, backbone)
    seen = backbone.encode_text(["red square"])
    filled.add_text("red square", seen)
    filled.add_text("red square", backbone.encode_text(["blue"]))
    passed = len(backbone.text_batches)
    found = filled.lookup(filled.extract_texts(["red square"]), tokens=True)
    assert len(backbone.text_batches) == passed
    assert found.tokens.equal(seen.tokens)
    assert found.pooled.equal(seen.pooled)


def test_a_missing_picture_is_named_before_anything_is_encoded(tmp_path):
    backbone = LinearBackbone()
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        extractor(tmp_path, backbone).extract_images([Noise(1), tmp_path / "nowhere.png"], tokens=False)
    assert not backbone.image_batches


def test_an_interruption_keeps_whole_shards_and_what_was_pending(tmp_path):
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
    with pytest.raises(KeyboardInterrupt):
        FeatureExtractor(Stopped(), store, batch_size=2, workers=0, shard=4, progress=False).extract_images(
            sources, tokens=False
        )
    backbone = LinearBackbone()
    keys = extractor(tmp_path, backbone).extract_images(sources, tokens=False)
    assert sum(backbone.image_batches) == 3  # six of nine were kept
    expected = directly(backbone, sources).pooled
    torch.testing.assert_close(store.get(keys).pooled, expected, atol=1e-5, rtol=0)


def test_worker_processes_change_nothing(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = written(tmp_path / "pictures", 7)
    preprocess, spans = LinearBackbone().preprocess, [[0, 1, 2], [3, 4, 5], [6]]
    here, there = (torch.cat(list(load_pixels(paths, spans, preprocess, workers))) for workers in (0, 1))
    assert here.shape == (7, 3, 8, 8)
    assert here.equal(there)


def test_encoding_leaves_torch_s_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    extractor(tmp_path).extract_images([Noise(i) for i in range(9)], tokens=True)
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_on_standard_error_or_not_at_all(tmp_path, capfd, monkeypatch, progress):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    backbone = LinearBackbone()
    store = FeatureStore(tmp_path, backbone.fingerprint())
    filled = FeatureExtractor(backbone, store, workers=0, progress=progress)
    filled.extract_images([Noise(1)], tokens=True, label="drawings")
    filled.extract_texts(["red"])
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("encoding drawings" in shown.err) == progress
    assert progress or shown.err == ""


def test_nothing_to_encode_shows_nothing(tmp_path, capfd):
    backbone = LinearBackbone()
    filled = FeatureExtractor(backbone, FeatureStore(tmp_path, backbone.fingerprint()), workers=0)
    assert filled.extract_images([], tokens=True) == []
    assert capfd.readouterr().err == ""


def test_joined_features_are_padded_behind():
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


def test_features_with_and_without_tokens_are_not_joined():
    whole = LinearBackbone().encode_text(["red"])
    bare = Features(whole.pooled)
    assert join_features([bare, bare]).tokens is None
    with pytest.raises(ValueError, match="mask and pooled_at"):
        join_features([whole, bare])


def test_features_of_half_arithmetic_are_near_and_kept_apart(tmp_path):
    backbone = LinearBackbone()
    found = {}
    for precision in ("float32", "bfloat16"):
        store = FeatureStore(tmp_path, precision)
        filled = FeatureExtractor(backbone, store, workers=0, precision=precision, progress=False)
        keys = filled.extract_images([Noise(i) for i in range(9)], tokens=True)
        texts = filled.extract_texts(["red square", "the night"])
        seen, said = filled.lookup(keys, tokens=True), filled.lookup(texts, tokens=True)
        assert {x.dtype for x in (seen.pooled, seen.tokens, said.pooled)} == {torch.float32}
        found[precision] = seen
    near, exact = found["bfloat16"].pooled, found["float32"].pooled
    assert not near.equal(exact)
    torch.testing.assert_close(near, exact, atol=0.05, rtol=0.05)
