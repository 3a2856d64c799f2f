"""Embeddings that exist already: put into a gallery, and as a query."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

import toy_engine  # noqa: F401 - registers its engine
from indexing_world import QUIET, fill
from small_gallery import fill_gallery, names, noise_image
from small_world import DIM, trainable
from union_igrot.cli.index import main as index
from union_igrot.cli.search import main as search
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.ingest.embedding import read_vectors
from union_igrot.gallery.queries import parse_query
from union_igrot.models.foreign import foreign_model

ROWS = normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=1)


def write(path, matrix):
    if path.suffix == ".npy":
        np.save(path, matrix.numpy())
    elif path.suffix == ".safetensors":
        save_file({"any name": matrix}, path)
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason='the extra "gallery" is not installed')
        import pyarrow as pa  # noqa: PLC0415 - an extra

        parquet.write_table(pa.table({"vector": matrix.tolist(), "other": [1] * len(matrix)}), path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_files_of_embeddings_are_read_with_unit_length(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", 3 * ROWS)
    for given in (path, str(path)):
        torch.testing.assert_close(read_vectors(given), ROWS)


@pytest.mark.parametrize("given", [ROWS.double(), ROWS.half().float(), ROWS.numpy(), ROWS.tolist(), 7 * ROWS])
def test_arrays_of_embeddings(given):
    torch.testing.assert_close(read_vectors(given), ROWS, atol=1e-3, rtol=0)
    torch.testing.assert_close(read_vectors(given[0]), ROWS[:1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "given",
    [
        "a.npy",
        "none.npy",
        "a.txt",
        "a",
        [[0.0, 0.0]],
        [[1e-14, 0.0]],
        [[1e300, 0.0]],
        np.array([[1.0 + 2.0j, 0.0]]),
        [[1.0, float("nan")]],
        [[float("inf")]],
        [],
        [[]],
        [[[1.0]]],
        "x",
        {},
        [["a"]],
    ],
)
def test_what_is_no_embedding_is_one_line(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for one in (given, "objects.npy"):
        with pytest.raises(DataError) as raised:
            read_vectors(one)
        assert len(str(raised.value).splitlines()) == 1


# In


@pytest.fixture(scope="module")
def model():
    return trainable("sum", "frozen").eval()


@pytest.fixture
def listed(tmp_path):
    """A list of images with its embeddings by the model."""
    fill(tmp_path, [f"{number}.png" for number in range(12)])
    (tmp_path / "list.txt").write_text("".join(f"{number}.png\n" for number in range(12)))
    return tmp_path / "list.txt"


def embed(model, folder):
    return model.encode_gallery([folder / f"{number}.png" for number in range(12)])


@pytest.mark.slow
def test_embeddings_of_the_model_are_taken_and_the_rest_is_as_usual(model, listed, tmp_path):
    given = embed(model, tmp_path)
    with Gallery.open("memory:", model) as usual, Gallery.open("memory:", model) as gallery:
        usual.update(listed, QUIET)
        model.backbone.image_batches.clear()
        assert gallery.update(listed, QUIET, vectors=write(tmp_path / "a.npy", 2 * given)).added == 12
        assert sum(model.backbone.image_batches) <= 8, "only a few are embedded, to compare them"
        assert gallery.ids() == usual.ids()
        found, expected = (one.index.fetch(one.ids()) for one in (gallery, usual))
        torch.testing.assert_close(found.vectors, expected.vectors)
        assert found.columns == expected.columns
        assert gallery.update(listed, QUIET, vectors=given).unchanged == 12


def test_single_images_with_an_array(model):
    given = model.encode_gallery([noise_image(number) for number in range(3)]).numpy()
    with Gallery.open("memory:", model) as gallery:
        gallery.add([noise_image(number) for number in range(3)], names(3), vectors=given)
        torch.testing.assert_close(gallery.index.fetch(names(3)).vectors, torch.from_numpy(given))


def test_embeddings_of_another_model_or_another_order_are_refused(model, listed, tmp_path):
    given = embed(model, tmp_path)
    cases = {
        "cosine": given.roll(1, 0),
        "11 rows of width 16 for 12 images": given[1:],
        f"width {DIM}": torch.ones(12, DIM + 1),
    }
    for message, wrong in cases.items():
        with Gallery.open("memory:", model) as gallery, pytest.raises(DataError, match=message):
            gallery.update(listed, QUIET, vectors=wrong)
    with Gallery.open("memory:", model) as gallery, pytest.raises(ConfigError, match="list of images"):
        gallery.update(tmp_path, QUIET, vectors=given)


def test_broken_images_of_a_list_are_skipped_with_their_embeddings(model, listed, tmp_path):
    given = embed(model, tmp_path)
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "1.png").unlink()
    with Gallery.open("memory:", model) as gallery:
        report = gallery.update(listed, QUIET, vectors=given)
        assert (report.added, report.skipped) == (10, 2)
        torch.testing.assert_close(gallery.index.fetch(gallery.ids()).vectors, given[2:])


# Embeddings of a model that is not available


@pytest.mark.slow
def test_a_foreign_index_is_searched_by_embeddings_and_its_own_images(listed, tmp_path, capsys):
    given = write(tmp_path / "a.npy", torch.eye(16)[:12])
    uri = f"toy:{tmp_path}"
    index(
        [
            f"index={uri}",
            f"images={listed}",
            f"vectors={given}",
            "vectors_from=their model",
            "workers=0",
            "progress=false",
        ]
    )
    with Gallery.open(uri) as gallery:
        assert gallery.describe()["model"]["backbone"] == "foreign:their model/16"
        assert gallery.search(vector=np.eye(16)[3], k=1).ids == [str(tmp_path / "3.png")]
        assert gallery.search(liked=tmp_path / "4.png", k=1).ids == [str(tmp_path / "4.png")]
        for query in ({"text": "red"}, {"image": tmp_path / "1.png"}):
            with pytest.raises(ConfigError, match=r"those of their model, which .* vector="):
                gallery.search(**query)
        with pytest.raises(ConfigError, match="vectors="):
            gallery.add(noise_image(1), ["new"])
        gallery.add(noise_image(1), ["new"], vectors=[1.0] * 16)
        assert len(gallery) == 13
    with pytest.raises(CheckpointError, match="foreign:their model/16"):
        Gallery.open(uri, trainable("sum", "frozen"))
    with pytest.raises(CheckpointError, match="foreign:other/16"):
        Gallery.open(uri, foreign_model("foreign:other/16"))
    capsys.readouterr()
    np.save(tmp_path / "q.npy", np.eye(16)[5])
    search([f"index={uri}", f"vector={tmp_path / 'q.npy'}", "k=1", "progress=false"])
    (line,) = capsys.readouterr().out.splitlines()
    assert (json.loads(line)["id"], json.loads(line)["score"]) == (str(tmp_path / "5.png"), 1.0)


@pytest.mark.parametrize("name", ["foreign:", "foreign:a", "foreign:a/0", "foreign:/x"])
def test_an_invalid_foreign_name(name):
    with pytest.raises(ConfigError, match="foreign:NAME/WIDTH"):
        foreign_model(name)


@pytest.mark.parametrize("more", [[], ["vectors=a.npy", "checkpoint=tiny"]])
def test_a_foreign_name_without_embeddings_or_with_a_checkpoint(listed, tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.eye(12))
    with pytest.raises(SystemExit) as ended:
        index(["index=toy:none", f"images={listed}", "vectors_from=x", "progress=false", *more])
    assert ended.value.code == 2
    assert "vectors_from=" in capsys.readouterr().err


# As a query


def test_an_embedding_is_a_query_of_its_own_and_a_term(model):
    gallery = fill_gallery(model)
    rows = gallery.index.fetch(names()).vectors
    for scale, number in ((1, 0), (5, 7)):
        found = gallery.search(vector=scale * rows[number], k=12)
        assert found[0].id == f"p{number}"
        torch.testing.assert_close(torch.tensor(found.scores), (rows @ rows[number]).sort(descending=True).values)
    mixed = gallery.search(vector=rows[1], terms=[("red", -0.5)], k=12)
    text = model.embed_queries(None, ["red"])[0]
    expected = rows @ normalize(rows[1] - 0.5 * text, dim=-1)
    torch.testing.assert_close(torch.tensor(mixed.scores), expected.sort(descending=True).values)


def test_an_embedding_of_another_width_and_several_are_refused(model):
    gallery = fill_gallery(model)
    with pytest.raises(ConfigError, match=r"width 3 \(expected 16"):
        gallery.search(vector=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="2 rows"):
        parse_query({"vector": [[1.0], [2.0]]})
