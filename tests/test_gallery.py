"""`Gallery` against a slow, literal ranking; refinement, filters, forms of pictures, and the model it belongs to."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.nn.functional import normalize

import union_igrot
from small_world import DIM, LinearBackbone, Noise, cir_benchmark, encoder, sbir_benchmark, trainable
from union_igrot.data.folder import folder_benchmark
from union_igrot.data.transforms import picture_batch
from union_igrot.embedding import embed
from union_igrot.errors import CheckpointError, ConfigError, DataError, PictureError
from union_igrot.gallery import queries
from union_igrot.gallery.answers import Answers
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import ALPHA, BETA, GAMMA, refine, several
from union_igrot.index.open import open_index
from union_igrot.indexing.work import Work
from union_igrot.model import IGROTModel
from union_igrot.scoring import score
from union_igrot.types import Benchmark

REAL = Path(__file__).parents[1] / "../shared/data/caltech_quickdraw"
COUNT = 12


@pytest.fixture(scope="module")
def model():
    return trainable().eval()


def picture(number: int) -> Image.Image:
    return Noise(number, number % 4).open()


def names(count: int = COUNT) -> list[str]:
    return [f"p{number}" for number in range(count)]


def filled(model) -> Gallery:
    made = Gallery.open("memory:", model)
    columns = {"class": ["cat", "dog", None] * (COUNT // 3), "year": list(range(COUNT))}
    made.add([picture(number) for number in range(COUNT)], names(), columns)
    return made


@pytest.fixture(scope="module")
def gallery(model):
    """For tests that only ask."""
    return filled(model)


@torch.inference_mode()
def embedded(model, numbers, texts=None) -> torch.Tensor:
    return model.embed_queries(picture_batch([picture(n) for n in numbers], model.preprocess), texts)


@torch.inference_mode()
def ranked(model, query, numbers=range(COUNT)) -> list[tuple[str, float]]:
    """Every picture's score with a query, one by one, best first."""
    rows = model.embed_gallery(picture_batch([picture(n) for n in numbers], model.preprocess))
    scores = [(f"p{number}", float(query @ row)) for number, row in zip(numbers, rows, strict=True)]
    return sorted(scores, key=lambda pair: -pair[1])


def same(answers: Answers, wanted: list[tuple[str, float]]) -> bool:
    return answers.ids == [name for name, _ in wanted] and np.allclose(
        answers.scores, [value for _, value in wanted], atol=1e-5
    )


def test_every_way_of_asking_ranks_as_the_model_says(model, gallery):
    assert len(gallery) == COUNT
    (image,) = embedded(model, [40])
    assert same(gallery.search(picture(40), k=5), ranked(model, image)[:5])
    (changed,) = embedded(model, [40], ["the red square"])
    assert same(gallery.search(picture(40), "the red square", k=COUNT), ranked(model, changed))
    with torch.inference_mode():
        (spoken,) = model.embed_queries(None, ["blue night"])
    assert same(gallery.search(text="blue night"), ranked(model, spoken)[:10])
    both = normalize(normalize(embedded(model, [40, 41, 42], ["small"] * 3), dim=-1).mean(0), dim=-1)
    assert same(gallery.search([picture(40), picture(41), picture(42)], "small"), ranked(model, both)[:10])


def test_more_answers_than_pictures_are_all_pictures(gallery):
    assert sorted(gallery.search(picture(40), k=100).ids) == sorted(names())


def test_a_filter_is_applied_before_the_ranking(model, gallery):
    (image,) = embedded(model, [40])
    wanted = [pair for pair in ranked(model, image) if int(pair[0][1:]) % 3 == 1 and int(pair[0][1:]) > 2]
    assert same(gallery.search(picture(40), where="class = 'dog' and year > 2"), wanted)
    assert len(gallery.search(picture(40), where="class = 'bird'")) == 0
    with pytest.raises(ConfigError, match="no column 'colour'"):
        gallery.search(picture(40), where="colour = 'red'")


def test_what_is_excluded_does_not_shorten_the_list(model, gallery):
    (image,) = embedded(model, [3])
    whole = ranked(model, image)
    wanted = [pair for pair in whole if pair[0] not in {"p3", "p5"}][:4]
    first = gallery.search(picture(3), k=1)[0]
    assert same(gallery.search(picture(3), k=4, exclude=["p3", "p5", "not there"]), wanted)
    assert same(gallery.search(picture(3), k=4, exclude=first), [p for p in whole if p[0] != first.id][:4])


def test_refinement_is_rocchios(model, gallery):
    (image,) = embedded(model, [40])
    with torch.inference_mode():
        rows = model.embed_gallery(picture_batch([picture(n) for n in range(COUNT)], model.preprocess))
    moved = ALPHA * image + BETA * (rows[1] + rows[2]) / 2 - GAMMA * (rows[3] + rows[4] + rows[5]) / 3
    wanted = [p for p in ranked(model, moved / moved.norm()) if p[0] not in {"p3", "p4", "p5"}]
    hits = gallery.search(picture(40), k=COUNT)
    by_id = {hit.id: hit for hit in hits}
    found = gallery.search(picture(40), liked=["p1", by_id["p2"]], disliked=(by_id["p3"], "p4", "p5"), k=COUNT)
    assert same(found, wanted)
    alone = rows[1] / rows[1].norm()
    assert same(gallery.search(liked="p1", k=COUNT), ranked(model, alone))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_a_refined_query_is_of_unit_length_and_nearer_to_what_was_liked(liked, disliked, asked, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(7, 32, generator=draw), dim=-1)
    if not (liked or asked):
        return
    query = rows[6] if asked else None
    moved = refine(query, list(rows[:liked]), list(rows[3 : 3 + disliked]))
    assert abs(float(moved.norm()) - 1) < 1e-5
    if asked and liked and not disliked:
        centre = rows[:liked].mean(0)
        assert float(moved @ centre) >= float(rows[6] @ centre) - 1e-6


def test_many_queries_are_answered_as_one_by_one(model, gallery, monkeypatch):
    asked = [
        {"image": picture(40)},
        {"text": "red"},
        {"image": [picture(41), picture(42)], "text": "large"},
        {"image": picture(43), "text": "remove", "exclude": ["p1"]},
        {"liked": ["p2"], "disliked": ["p1", "p3"]},
        {"image": picture(44), "liked": ["p2"]},
        {"text": "blue", "disliked": "p0"},
        {"image": [picture(45)] * 3},
    ]
    alone = [gallery.search(**one, k=6) for one in asked]
    for batch in (256, 2):
        monkeypatch.setattr(queries, "BATCH", batch)
        together = gallery.search_many(asked, 6)
        assert [found.ids for found in together] == [found.ids for found in alone]
        for one, other in zip(together, alone, strict=True):
            assert np.allclose(one.scores, other.scores, atol=1e-5)
    assert gallery.search_many([]) == []


def test_a_batch_in_parts_is_the_batch(model, gallery, monkeypatch):
    asked = [{"image": picture(number)} for number in range(30, 50)]
    whole = gallery.search_many(asked, COUNT)
    monkeypatch.setattr(queries, "BATCH", 7)
    parts = gallery.search_many(asked, COUNT)
    assert [found.ids for found in parts] == [found.ids for found in whole]


@pytest.mark.parametrize(
    ("asked", "error", "part"),
    [
        ({}, ConfigError, "nothing is asked"),
        ({"text": "  "}, ConfigError, "nothing is asked"),
        ({"disliked": ["p1"]}, ConfigError, "nothing is asked"),
        ({"image": "not there.png"}, PictureError, "missing"),
        ({"image": np.zeros((3, 8, 9))}, PictureError, "channels stand first"),
        ({"text": "red", "liked": ["p99"]}, DataError, "p99"),
        ({"text": "red", "liked": [3]}, ConfigError, "names no picture"),
        ({"text": "red", "liked": ["p1"], "disliked": ["p1"]}, ConfigError, "liked and disliked"),
        ({"text": "red", "k": 0}, ConfigError, "k is 0"),
        ({"text": "red", "how": "ann"}, ConfigError, "no approximate index"),
    ],
)
def test_a_mistake_in_a_search_is_one_line(gallery, asked, error, part):
    with pytest.raises(error, match=part) as caught:
        gallery.search(**asked)
    assert "\n" not in str(caught.value)


def test_a_mistake_among_many_queries_says_which(gallery):
    with pytest.raises(ConfigError, match=r"^query 2: nothing is asked"):
        gallery.search_many([{"text": "red"}, {}])
    with pytest.raises(ConfigError, match=r"^query 1: a query has no 'txt'; it has image, text"):
        gallery.search_many([{"txt": "red"}, {"text": "red"}])
    with pytest.raises(ConfigError, match=r"^query 2: text is int"):
        gallery.search_many([{"text": "red"}, {"text": 3}])
    with pytest.raises(PictureError, match=r"^query 2: .*missing"):
        gallery.search_many([{"text": "red"}, {"image": "not there.png"}])


def test_hits_carry_what_is_kept_beside_the_embedding(gallery):
    hit = next(hit for hit in gallery.search(picture(4), k=COUNT) if hit.id == "p4")
    assert (hit.columns["class"], hit.columns["year"]) == ("dog", 4)
    assert (hit.columns["width"], hit.columns["height"], hit.columns["source"]) == (8, 8, "added")
    assert "thumbnail" not in hit.columns
    assert hit.thumbnail.size == (8, 8)
    assert hit.path is None
    bare = gallery.search(picture(4), k=2, thumbnails=False)
    assert all(hit.thumbnail is None and "hash" in hit.columns for hit in bare)


def test_answers_are_a_sequence_that_a_notebook_shows(gallery):
    found = gallery.search(picture(4), k=3)
    assert [hit.id for hit in found] == found.ids
    assert found[0].score == max(found.scores)
    assert found[1:].ids == found.ids[1:]
    assert found[-1] in found
    assert repr(found).splitlines()[0] == "3 answers"
    assert found.ids[0] in repr(found)
    assert found._repr_html_().count("<img") == 3
    assert "nothing found" in gallery.search(picture(4), where="year > 99")._repr_html_()
    assert repr(gallery) == "Gallery('memory:': 12 pictures, linear)"


def test_every_form_of_a_picture_is_added_and_named(model, tmp_path):
    path = tmp_path / "a b,c'.png"
    picture(1).save(path)
    array = np.asarray(picture(2))
    file = io.BytesIO()
    picture(3).save(file, format="JPEG")
    forms = [path, array, torch.from_numpy(array.copy()).permute(2, 0, 1), file.getvalue(), picture(5), picture(6)]
    gallery = Gallery.open("memory:", model)
    report = gallery.add(forms)
    assert len(gallery) == report.added == 5  # the tensor is the array's picture
    ids = gallery.search(picture(1), k=9).ids
    assert str(path) in ids
    assert sum(name.startswith("sha256:") and len(name) == 39 for name in ids) == 4
    hit = next(hit for hit in gallery.search(path, k=9) if hit.id == str(path))
    assert hit.path == path
    assert hit.columns["size"] == path.stat().st_size
    assert gallery.add(forms).embedded == 0
    assert len(gallery) == 5
    assert len(gallery.search(path, exclude=path, k=9)) == 4
    path.unlink()
    assert hit.path is None


def test_one_picture_need_not_stand_in_a_list(model):
    gallery = Gallery.open("memory:", model)
    gallery.add(picture(1), "one")
    gallery.add(np.asarray(picture(2)), ["two"])
    assert sorted(gallery.search(picture(1)).ids) == ["one", "two"]
    assert several(np.zeros((4, 4))) != ()
    assert several(iter("ab")) == ("a", "b")


def test_a_picture_of_the_same_name_replaces_the_other(model):
    gallery = Gallery.open("memory:", model)
    gallery.add(picture(1), "x", {"year": [1]})
    report = gallery.add(picture(2), "x", {"year": [2]})
    assert (report.added, report.updated, len(gallery)) == (0, 1, 1)
    (hit,) = gallery.search(picture(2))
    assert hit.columns["year"] == 2
    with torch.inference_mode():
        query = model.embed_queries(picture_batch([picture(2)], model.preprocess))
        row = model.embed_gallery(picture_batch([picture(2)], model.preprocess))
    assert abs(hit.score - float(query[0] @ row[0])) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (([b"1", b"2"], ["a"]), "ids: 1 values for 2 pictures"),
        (([b"1", b"2"], ["a", "a"]), "'a' stands twice"),
        (([b"1"], None, {"year": [1, 2]}), "year: 2 values for 1 pictures"),
        (([b"1"], None, {"year": "1"}), "one text"),
        (([b"1"], None, {"thumbnail": [1]}), "cannot be called thumbnail"),
    ],
)
def test_what_cannot_be_added_is_one_line(model, arguments, part):
    gallery = Gallery.open("memory:", model)
    with pytest.raises(DataError, match=part):
        gallery.add(*arguments)
    assert len(gallery) == 0


def test_a_broken_picture_is_an_error_or_counted(model, tmp_path):
    gallery = Gallery.open("memory:", model)
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(PictureError, match=r"torn\.png"):
        gallery.add([picture(1), torn])
    report = gallery.add([picture(1), torn], on_broken="skip")
    assert (report.skipped, len(gallery)) == (1, 1)


def test_rows_are_removed_by_id_path_or_hit(model, tmp_path):
    gallery = filled(model)
    path = tmp_path / "x.png"
    picture(1).save(path)
    gallery.add(path)
    hit = gallery.search(picture(3), k=1)[0]
    assert gallery.delete(["p1", hit, "not there"]) == 2 - (hit.id == "p1")
    assert gallery.delete(path) == 1
    assert gallery.delete("p1") == 0
    assert path.exists()
    assert hit.id not in gallery.search(picture(3), k=COUNT).ids


def test_pictures_are_listed_and_those_that_pass_a_filter_removed(model):
    gallery = filled(model)
    assert gallery.ids() == names()
    assert gallery.ids("class is null") == ["p2", "p5", "p8", "p11"]
    assert gallery.delete(gallery.ids("year < 6")) == 6
    assert gallery.ids() == names()[6:]


def test_a_folder_is_followed(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        picture(number).save(photos / f"{number}.png")
    gallery = Gallery.open("memory:", model)
    quiet = Work(workers=0, progress=False)
    assert gallery.update(photos, quiet).added == 4
    gallery.add(picture(9), "mine")
    (photos / "0.png").unlink()
    picture(7).save(photos / "1.png")
    picture(8).save(photos / "new.png")
    report = gallery.update(photos, quiet)
    assert (report.added, report.updated, report.removed, report.unchanged) == (1, 1, 1, 2)
    wanted = sorted(["mine", *(str(photos / name) for name in ("1.png", "2.png", "3.png", "new.png"))])
    assert sorted(gallery.search(picture(1)).ids) == wanted


def test_describe_says_what_it_is(gallery, model):
    said = gallery.describe()
    assert (said["uri"], said["pictures"], said["dim"]) == ("memory:", COUNT, DIM)
    assert said["columns"]["year"] == "int"
    assert said["model"] == model.describe()
    assert said["fingerprint"] == model.fingerprint()


def test_nothing_is_made_before_a_picture_is_added(model, tmp_path):
    place = tmp_path / "photos.lance"
    gallery = Gallery.open(place, model)
    assert (len(gallery), gallery.describe()["pictures"]) == (0, 0)
    for ask in (lambda: gallery.search(text="red"), lambda: gallery.delete("x"), gallery.optimise):
        with pytest.raises(DataError, match=r"no gallery at .*photos\.lance yet"):
            ask()
    gallery.close()
    assert not place.exists()
    with pytest.raises(ConfigError, match=r"has to be made: give a model"):
        Gallery.open(place)
    with pytest.raises(ConfigError):
        Gallery.open(place, model, create=False)
    with pytest.raises(ConfigError, match="not the name of an index"):
        Gallery.open("photos.txt", model).add(picture(1))


class TestOnDisk:
    @pytest.fixture(autouse=True)
    def needs_the_engine(self):
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')

    def test_a_gallery_is_there_for_the_next(self, model, tmp_path):
        place = tmp_path / "photos.lance"
        with Gallery.open(place, model) as gallery:
            gallery.add([picture(n) for n in range(COUNT)], names(), {"year": list(range(COUNT))})
            first = gallery.search(picture(40), where="year > 3")
        with Gallery.open(place, model, create=False) as again:
            second = again.search(picture(40), where="year > 3")
        assert (second.ids, second.scores) == (first.ids, first.scores)
        assert second[0].thumbnail is not None

    def test_another_model_is_refused_and_both_are_named(self, model, tmp_path):
        place = tmp_path / "photos.lance"
        with Gallery.open(place, model) as gallery:
            gallery.add(picture(1), "x")
        other = trainable(backbone=LinearBackbone(seed=1), target="sum").eval()
        for create in (True, False):
            with pytest.raises(CheckpointError) as caught:
                Gallery.open(place, other, create=create)
            said = str(caught.value)
            for one in (model, other):
                assert one.backbone.fingerprint() in said
                assert one.describe()["heads"] in said
            assert "transagg + union" in said
            assert "transagg + sum" in said
            assert "index again" in said

    @pytest.mark.slow
    def test_the_index_knows_its_model(self, tmp_path):
        place = tmp_path / "photos.lance"
        with Gallery.open(place, "tiny") as gallery:
            gallery.add(picture(1), "x")
        with Gallery.open(place) as again:
            assert again.search(picture(1)).ids == ["x"]
            assert again.describe()["checkpoint"] == "tiny"

    def test_an_index_of_no_known_model_is_refused(self, model, tmp_path):
        with Gallery.open(tmp_path / "a.lance", model) as gallery:
            gallery.add(picture(1), "x")
        with pytest.raises(ConfigError, match=r"does not say where its model lies.*linear"):
            Gallery.open(tmp_path / "a.lance")
        open_index(str(tmp_path / "b.lance"), dim=DIM, create=True).close()
        with pytest.raises(CheckpointError, match="does not say which model"):
            Gallery.open(tmp_path / "b.lance", model)

    def test_a_saved_model_is_found_again_by_its_folder(self, tmp_path, monkeypatch):
        tiny = union_igrot.load("tiny")
        tiny.save(tmp_path / "run" / "model")
        monkeypatch.chdir(tmp_path)
        with Gallery.open("x.lance", "run") as gallery:
            gallery.add(picture(1), "x")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        with Gallery.open("../x.lance") as again:
            assert again.describe()["checkpoint"] == str(tmp_path / "run")


def differing(model: IGROTModel, benchmark: Benchmark, folder: Path, uri: str) -> int:
    """Count the queries that a gallery's exact search answers otherwise than the evaluation."""
    asked, kept, _ = embed(model, benchmark, encoder(folder / "store", model.backbone, batch_size=256, shard=2048))
    truth = score(benchmark, asked, kept).ranking.positions
    left_out = benchmark.protocol.exclude_reference
    with Gallery.open(uri, model) as gallery:
        gallery.add([item.image for item in benchmark.gallery], [item.id for item in benchmark.gallery])
        found = gallery.search_many(
            [{"image": q.image, "text": q.text, "exclude": q.exclude if left_out else ()} for q in benchmark.queries],
            truth.shape[1],
            how="exact",
            thumbnails=False,
        )
    wanted = [[benchmark.gallery[position].id for position in row] for row in truth.tolist()]
    return sum(answers.ids != row for answers, row in zip(found, wanted, strict=True))


@pytest.mark.parametrize("benchmark", [cir_benchmark(), sbir_benchmark(9, 19)], ids=["cir", "sbir"])
def test_exact_search_is_the_evaluations_ranking(model, benchmark, tmp_path):
    assert differing(model, benchmark, tmp_path, "memory:") == 0


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the micro benchmark of real pictures is not at ../shared/data")
@pytest.mark.parametrize("engine", ["memory", "lance"])
def test_exact_search_is_the_evaluations_ranking_to_the_last_id(tmp_path, engine):
    if engine == "lance":
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    uri = "memory:" if engine == "memory" else str(tmp_path / "photos.lance")
    assert differing(union_igrot.load("tiny"), folder_benchmark(REAL, "test"), tmp_path, uri) == 0
