"""What is added to a gallery and removed from it, in whatever form."""

import inspect
import io

import numpy as np
import pytest
import torch
from PIL import Image

from small_gallery import COUNT, filled, names, picture
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.additions import list_additions
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.queries import as_items
from union_igrot.images.transforms import image_batch


def test_every_form_of_a_picture_is_added_and_named(model, tmp_path):
    path = tmp_path / "a b,c'.png"
    picture(1).save(path)
    array = np.asarray(picture(2))
    file = io.BytesIO()
    picture(3).save(file, format="JPEG")
    forms = [path, array, torch.from_numpy(array.copy()).permute(2, 0, 1), file.getvalue(), picture(5), picture(6)]
    gallery = Gallery.open("memory:", model)
    report = gallery.add(forms)
    assert len(gallery) == report.added == 5  # the tensor is the array's image
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
    assert as_items(np.zeros((4, 4))) != ()
    assert as_items(iter("ab")) == ("a", "b")


def test_a_picture_of_the_same_name_replaces_the_other(model):
    gallery = Gallery.open("memory:", model)
    gallery.add(picture(1), "x", {"year": [1]})
    report = gallery.add(picture(2), "x", {"year": [2]})
    assert (report.added, report.updated, len(gallery)) == (0, 1, 1)
    (hit,) = gallery.search(picture(2))
    assert hit.columns["year"] == 2
    with torch.inference_mode():
        query = model.embed_queries(image_batch([picture(2)], model.preprocess))
        row = model.embed_gallery(image_batch([picture(2)], model.preprocess))
    assert abs(hit.score - float(query[0] @ row[0])) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (([b"1", b"2"], ["a"]), "ids: 1 values for 2 images"),
        (([b"1", b"2"], ["a", "a"]), "'a' is repeated"),
        (([b"1"], None, {"year": [1, 2]}), "year: 2 values for 1 images"),
        (([b"1"], None, {"year": "1"}), "one string"),
        (([b"1"], None, {"thumbnail": [1]}), "thumbnail"),
    ],
)
def test_what_cannot_be_added_is_one_line(model, arguments, part):
    gallery = Gallery.open("memory:", model)
    with pytest.raises(DataError, match=part):
        gallery.add(*arguments)
    assert len(gallery) == 0


class Labelled(list):
    """As a column of a table that was sorted: asked by label it gives another value than by place."""

    def __getitem__(self, label):
        return super().__getitem__(len(self) - 1 - label)


def test_columns_and_ids_belong_to_pictures_by_place(model):
    gallery = Gallery.open("memory:", model)
    given = [picture(n) for n in range(3)]
    gallery.add(given, Labelled(["a", "b", "c"]), {"year": Labelled([1, 2, 3]), "even": (n % 2 == 0 for n in range(3))})
    found = gallery.index.fetch(["a", "b", "c"]).columns
    assert (found["year"], found["even"]) == ([1, 2, 3], [True, False, True])
    with torch.inference_mode():
        rows = model.embed_gallery(image_batch(given, model.preprocess))
    torch.testing.assert_close(gallery.index.fetch(["a", "b", "c"]).vectors, rows)


class NAType:
    """As pandas' NA: it does not even say whether it equals itself."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


def test_scalars_of_other_libraries_are_plain_values(model):
    gallery = Gallery.open("memory:", model)
    columns = {
        "year": np.array([2020, 2021]),
        "flag": np.array([True, False]),
        "weight": torch.tensor([0.5, 1.5]),
        "made": np.array(["2020-01-02", "NaT"], dtype="datetime64[ns]"),
        "place": np.array(["here", "there"]),
        "gone": [np.float32("nan"), NAType()],
        "mixed": [1, "x"],
    }
    gallery.add([picture(1), picture(2)], np.array(["a", "b"]), columns)
    kinds = gallery.describe()["columns"]
    wanted = {"year": "int", "flag": "bool", "weight": "float", "made": "str", "place": "str", "mixed": "str"}
    assert {name: kinds[name] for name in wanted} == wanted
    assert "gone" not in kinds
    assert gallery.ids("year > 2020 and not flag and made is null") == ["b"]
    assert gallery.index.fetch(["a"]).columns["made"][0].startswith("2020-01-02")


def test_columns_that_are_not_given_stay_and_what_is_followed_is_followed_further(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    path = photos / "1.png"
    picture(1).save(path)
    gallery, quiet = Gallery.open("memory:", model), IngestOptions(workers=0, progress=False)

    def row():
        found = gallery.index.fetch([str(path)]).columns
        return {name: found[name][0] for name in ("note", "tag", "source") if name in found}

    gallery.update(photos, quiet)
    assert gallery.add(path).unchanged == 1
    assert row() == {"source": str(photos)}  # nothing new was said
    gallery.add(path, columns={"note": ["mine"]})
    picture(2).save(path)
    assert gallery.update(photos, quiet).updated == 1  # edited
    assert row() == {"note": "mine", "source": str(photos)}
    (tmp_path / "list.csv").write_text(f"path,tag\n{path},old\n")
    gallery.update(tmp_path / "list.csv", quiet)
    listed = str(tmp_path / "list.csv")  # it says something new, and has the row from now on
    assert row() == {"note": "mine", "tag": "old", "source": listed}
    assert gallery.update(tmp_path / "list.csv", quiet).unchanged == 1
    gallery.add(path, columns={"tag": [None]})
    assert row() == {"note": "mine", "tag": None, "source": listed}
    picture(3).save(photos / "2.png")
    gallery.add(photos / "2.png")
    assert gallery.update(photos, quiet).unchanged == 2
    (photos / "2.png").unlink()
    assert gallery.update(photos, quiet).removed == 0  # what was added by itself stays
    assert str(photos / "2.png") in gallery.ids()


def test_files_are_named_from_where_one_stands(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    gallery = Gallery.open("memory:", model)
    for name in ("x.png", "y.png"):
        picture(ord(name[0])).save(tmp_path / name)
    gallery.add(["x.png", "~/y.png", picture(1)], ids=None)
    gallery.add(picture(2), "z.png")
    picture(3).save(tmp_path / "z.png")  # another image than the row of that name
    found = gallery.search("~/x.png", liked="y.png", exclude=["x.png", "z.png"], k=9).ids
    assert str(tmp_path / "y.png") in found
    assert {str(tmp_path / "x.png"), "z.png"}.isdisjoint(found)
    (tmp_path / "x.png").unlink()
    assert gallery.delete(["x.png", "z.png", "no.png"]) == 2
    with pytest.raises(ImageError, match=r"is a folder; add it alone"):
        gallery.add([tmp_path])


def test_pictures_in_memory_that_are_none_are_left_out_too(model, tmp_path):
    gallery = Gallery.open("memory:", model)
    (tmp_path / "words.txt").write_text(str(tmp_path / "secret.png"))
    with (tmp_path / "words.txt").open() as text:
        forms = {"text mode": text, "0 x 0 pixels": Image.new("RGB", (0, 0)), "channel": np.zeros((3, 8, 9))}
        for said, wrong in forms.items():
            with pytest.raises(ImageError, match=said):
                gallery.add([picture(1), wrong])
            report = gallery.add([picture(1), wrong], on_broken="skip")
            assert (report.skipped, len(gallery)) == (1, 1)
    with pytest.raises(ImageError, match=r"words\.txt"):
        gallery.search(text)  # closed by now
    lenient = IngestOptions(workers=0, progress=False, on_broken="skip")
    assert gallery.add(np.zeros((3, 8, 9)), options=lenient).skipped == 1
    assert gallery.add(picture(2), options=lenient).reasons == ()


def test_the_model_is_hashed_once(model, monkeypatch):
    hashed = []
    plain = type(model.backbone).fingerprint
    monkeypatch.setattr(type(model.backbone), "fingerprint", lambda self: hashed.append(1) or plain(self))
    gallery = Gallery.open("memory:", model)
    for number in range(4):
        gallery.add(picture(number))
    assert len(hashed) == 1
    assert gallery.metadata["fingerprint"] == model.fingerprint()


def test_what_is_wrong_with_pictures_ids_and_columns_is_told_of_each(model):
    gallery = Gallery.open("memory:", model)
    broken = [np.zeros((3, 8, 9)), np.zeros((3, 8, 9)), "\ud800.png", picture(1)]
    report = gallery.add(broken, columns={"n": [1, 2, 3, 4]}, on_broken="skip")
    assert (report.skipped, report.added) == (3, 1)
    assert [name for name, _ in report.reasons][:2] == [f"image {n} (ndarray)" for n in (1, 2)]
    with pytest.raises(DataError, match=r"the id '.ud800' is not valid Unicode"):
        gallery.add(picture(1), "\ud800")
    with pytest.raises(DataError, match=r"year: 2020 .expected a list"):
        inspect.unwrap(list_additions)([b"1"], None, {"year": 2020})


def test_a_few_pictures_are_added_without_reading_the_whole_index(model, monkeypatch):
    gallery = filled(model)
    scanned = []
    plain = type(gallery.index).scan
    monkeypatch.setattr(
        type(gallery.index), "scan", lambda self, names, where=None: scanned.append(where) or plain(self, names, where)
    )
    assert gallery.add(picture(77), "it's new.png").added == 1
    assert gallery.add(picture(77), "it's new.png").unchanged == 1
    assert scanned == ["id in ('it''s new.png')"] * 2
    assert gallery.add(picture(78), "it's new.png").updated == 1
    assert len(gallery) == COUNT + 1


def test_what_cannot_be_read_takes_no_row_away(model):
    gallery = filled(model)
    report = gallery.add(b"no picture", "p0", on_broken="skip")
    assert (report.skipped, report.removed, len(gallery)) == (1, 0, COUNT)
    work = IngestOptions()
    object.__setattr__(work, "on_broken", "raise")  # as who checks no types would make it
    with pytest.raises(ConfigError, match=r"on_broken: 'raise' .expected skip or fail"):
        work.__post_init__()
    for wrong in ({"batch_size": 0}, {"workers": -1}):
        with pytest.raises(ConfigError, match="expected an integer"):
            IngestOptions(**wrong)


@pytest.mark.parametrize(("given", "said"), [(([1],), "an id"), ((None, {3: [1]}), "a column name")])
def test_names_that_are_no_text_are_told_to_who_checks_no_types(given, said):
    with pytest.raises(DataError, match=rf"{said}: .* .expected str, not int"):
        inspect.unwrap(list_additions)([b"1"], *given)


def test_a_broken_picture_is_an_error_or_counted(model, tmp_path):
    gallery = Gallery.open("memory:", model)
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ImageError, match=r"torn\.png"):
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


def test_a_folder_a_pattern_and_a_list_are_added(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        picture(number).save(photos / f"{number}.png")
    (photos / "notes.txt").write_text("no image")
    gallery, options = Gallery.open("memory:", model), IngestOptions(workers=0, progress=False)
    report = gallery.add(photos, options=options)
    assert (report.added, report.skipped) == (3, 1)
    picture(5).save(photos / "5.png")
    (photos / "0.png").unlink()
    report = gallery.add(f"{photos}/*.png", options=options)
    assert (report.added, report.removed, len(gallery)) == (1, 0, 4)
    (tmp_path / "list.csv").write_text(f"path,year\n{photos}/5.png,2020\n")
    assert gallery.add(tmp_path / "list.csv", options=options).updated == 1
    assert gallery.ids("year = 2020") == [str(photos / "5.png")]
    with pytest.raises(ImageError, match=r"notes\.txt"):
        gallery.add(photos, on_broken="fail", options=options)
    with pytest.raises(DataError, match="cannot be given for"):
        gallery.add(photos, ["a"])


def test_a_folder_is_followed(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        picture(number).save(photos / f"{number}.png")
    gallery = Gallery.open("memory:", model)
    quiet = IngestOptions(workers=0, progress=False)
    assert gallery.update(photos, quiet).added == 4
    gallery.add(picture(9), "mine")
    (photos / "0.png").unlink()
    picture(7).save(photos / "1.png")
    picture(8).save(photos / "new.png")
    report = gallery.update(photos, quiet)
    assert (report.added, report.updated, report.removed, report.unchanged) == (1, 1, 1, 2)
    wanted = sorted(["mine", *(str(photos / name) for name in ("1.png", "2.png", "3.png", "new.png"))])
    assert sorted(gallery.search(picture(1)).ids) == wanted
