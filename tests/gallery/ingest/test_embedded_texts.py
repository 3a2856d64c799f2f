"""A text column that is part of the embedding: what is embedded, when it is embedded again, what is refused."""

from dataclasses import replace

import pytest
import torch

from indexing_world import QUIET, counts, fill, picture
from small_world import trainable
from union_igrot.errors import ConfigError
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.images.transforms import image_batch

TEXTS = replace(QUIET, embed_text="caption")


@pytest.fixture(scope="module")
def model():
    return trainable("transagg", "residual").eval()


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "p", ["a.png", "b.png", "c.png"])
    (tmp_path / "p" / "a.txt").write_text("a red\n large square")
    return tmp_path / "p"


def embed(model, path, text=None):
    with torch.inference_mode():
        pixels = image_batch([path], model.preprocess)
        return (model.embed_gallery(pixels) if text is None else model.embed_queries(pixels, [text]))[0]


def vectors(gallery, folder, *names):
    return gallery.index.fetch([str(folder / name) for name in names]).vectors


def test_images_are_embedded_with_their_captions_and_again_when_these_change(model, folder):
    with Gallery.open("memory:", model) as gallery:
        assert counts(gallery.update(folder, TEXTS)) == (3, 0, 0, 0, 0, 3)
        expected = [
            embed(model, folder / "a.png", "a red large square"),
            *(embed(model, folder / f"{n}.png") for n in "bc"),
        ]
        torch.testing.assert_close(vectors(gallery, folder, "a.png", "b.png", "c.png"), torch.stack(expected))
        assert counts(gallery.update(folder, QUIET)) == (0, 0, 3, 0, 0, 0), "the index records the column"
        (folder / "a.txt").unlink()
        (folder / "b.txt").write_text("blue")
        assert counts(gallery.update(folder, QUIET)) == (0, 2, 1, 0, 0, 2)
        expected = [embed(model, folder / "a.png"), embed(model, folder / "b.png", "blue")]
        torch.testing.assert_close(vectors(gallery, folder, "a.png", "b.png"), torch.stack(expected))
        assert counts(gallery.update(folder, QUIET)) == (0, 0, 3, 0, 0, 0)


def test_equal_images_with_different_captions_have_embeddings_of_their_own(model, folder):
    for name in "bc":
        (folder / f"{name}.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "b.txt").write_text("blue")
    (folder / "c.txt").write_text("a red large square")
    with Gallery.open("memory:", model) as gallery:
        assert gallery.update(folder, TEXTS).embedded == 2
        a, b, c = vectors(gallery, folder, "a.png", "b.png", "c.png")
        torch.testing.assert_close(b, embed(model, folder / "b.png", "blue"))
        torch.testing.assert_close(a, c)
        (folder / "c.png").rename(folder / "d.png")
        (folder / "c.txt").rename(folder / "d.txt")
        assert counts(gallery.update(folder, QUIET)) == (1, 0, 2, 1, 0, 0), "image and caption have moved together"


def test_a_column_of_added_images_and_one_that_is_not_given_again(model):
    with Gallery.open("memory:", model) as gallery:
        options = replace(QUIET, embed_text="note", on_broken="fail")
        gallery.add([picture(1), picture(2)], ["a", "b"], {"note": ["red", None]}, options=options)
        before = gallery.index.fetch(["a", "b"]).vectors
        assert counts(gallery.add([picture(1)], ["a"]))[2] == 1, "the note of its row counts"
        assert gallery.add([picture(1)], ["a"], {"note": ["blue"]}).embedded == 1
        after = gallery.index.fetch(["a", "b"]).vectors
        assert not torch.equal(before[0], after[0])
        torch.testing.assert_close(before[1], after[1])


def test_another_column_than_that_of_the_index_is_refused(model, folder):
    with Gallery.open("memory:", model) as gallery:
        gallery.update(folder, QUIET)
        with pytest.raises(ConfigError, match="made with embed_text=null, not caption"):
            gallery.update(folder, TEXTS)
    with Gallery.open("memory:", model) as gallery:
        gallery.update(folder, TEXTS)
        with pytest.raises(ConfigError, match="made with embed_text=caption, not class"):
            gallery.update(folder, replace(QUIET, embed_text="class"))
        with pytest.raises(ConfigError, match="needs the model itself"):
            gallery.add([picture(1)], ["a"], vectors=model.encode_gallery([picture(1)]), options=QUIET)


def test_a_column_that_no_image_has_is_refused_before_an_index_is_made(model, folder):
    gallery = Gallery.open("memory:", model)
    with pytest.raises(ConfigError, match=r"invalid value for embed_text: captions \(columns of .*: caption\)"):
        gallery.update(folder, replace(QUIET, embed_text="captions"))
    with pytest.raises(ConfigError, match=r"invalid value for embed_text: class \(columns of"):
        gallery.update(folder, replace(QUIET, embed_text="class"))
    gallery.update(folder, TEXTS)


def test_data_of_the_file_itself_cannot_be_embedded():
    with pytest.raises(ConfigError, match="embed_text: camera"):
        IngestOptions(embed_text="camera")
