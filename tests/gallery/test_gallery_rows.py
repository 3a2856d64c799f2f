"""Adding, updating and deleting images of a gallery."""

import inspect
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from small_gallery import COUNT, fill_gallery, names, noise_image
from union_igrot.errors import ConfigError, DataError, ImageError, UnionError
from union_igrot.gallery import gallery as gallery_module
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.ingest.entries import list_additions
from union_igrot.gallery.ingest.pipeline import lock_index
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.queries import as_items
from union_igrot.images.transforms import image_batch


def test_every_form_of_an_image_is_added_under_an_id(model, tmp_path):
    path = tmp_path / "a b,c'.png"
    noise_image(1).save(path)
    array = np.asarray(noise_image(2))
    file = io.BytesIO()
    noise_image(3).save(file, format="JPEG")
    forms = [
        path,
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        file.getvalue(),
        noise_image(5),
        noise_image(6),
    ]
    gallery = Gallery.open("memory:", model)
    report = gallery.add(forms)
    assert len(gallery) == report.added == 5  # the tensor is the array's image
    ids = gallery.search(noise_image(1), k=9).ids
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


def test_a_single_image_needs_no_list(model):
    gallery = Gallery.open("memory:", model)
    gallery.add(noise_image(1), "one")
    gallery.add(np.asarray(noise_image(2)), ["two"])
    assert sorted(gallery.search(noise_image(1)).ids) == ["one", "two"]
    assert as_items(np.zeros((4, 4))) != ()
    assert as_items(iter("ab")) == ("a", "b")


def test_one_pattern_is_not_its_letters():
    assert IngestOptions(exclude="*.gif").exclude == ("*.gif",)


def test_an_image_with_an_existing_id_replaces_it(model):
    gallery = Gallery.open("memory:", model)
    gallery.add(noise_image(1), "x", {"year": [1]})
    report = gallery.add(noise_image(2), "x", {"year": [2]})
    assert (report.added, report.updated, len(gallery)) == (0, 1, 1)
    (hit,) = gallery.search(noise_image(2))
    assert hit.columns["year"] == 2
    with torch.inference_mode():
        query = model.embed_queries(image_batch([noise_image(2)], model.preprocess))
        row = model.embed_gallery(image_batch([noise_image(2)], model.preprocess))
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
def test_invalid_additions_are_one_line_errors(model, arguments, part):
    gallery = Gallery.open("memory:", model)
    with pytest.raises(DataError, match=part):
        gallery.add(*arguments)
    assert len(gallery) == 0


class Labelled(list):
    """Like a column of a sorted table: a label gives another value than the position."""

    def __getitem__(self, label):
        return super().__getitem__(len(self) - 1 - label)


def test_ids_and_columns_belong_to_images_by_position(model):
    gallery = Gallery.open("memory:", model)
    images = [noise_image(n) for n in range(3)]
    gallery.add(
        images, Labelled(["a", "b", "c"]), {"year": Labelled([1, 2, 3]), "even": (n % 2 == 0 for n in range(3))}
    )
    found = gallery.index.fetch(["a", "b", "c"]).columns
    assert (found["year"], found["even"]) == ([1, 2, 3], [True, False, True])
    with torch.inference_mode():
        rows = model.embed_gallery(image_batch(images, model.preprocess))
    torch.testing.assert_close(gallery.index.fetch(["a", "b", "c"]).vectors, rows)


class NAType:
    """Like NA of pandas, which does not equal itself."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


def test_scalars_of_other_libraries_are_converted(model):
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
    gallery.add([noise_image(1), noise_image(2)], np.array(["a", "b"]), columns)
    kinds = gallery.describe()["columns"]
    expected = {"year": "int", "flag": "bool", "weight": "float", "made": "str", "place": "str", "mixed": "str"}
    assert {name: kinds[name] for name in expected} == expected
    assert "gone" not in kinds
    assert gallery.ids("year > 2020 and not flag and made is null") == ["b"]
    assert gallery.index.fetch(["a"]).columns["made"][0].startswith("2020-01-02")


def test_columns_that_are_not_given_stay_and_rows_keep_their_source(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    path = photos / "1.png"
    noise_image(1).save(path)
    gallery, quiet = Gallery.open("memory:", model), IngestOptions(workers=0, progress=False)

    def row():
        found = gallery.index.fetch([str(path)]).columns
        return {name: found[name][0] for name in ("note", "tag", "source") if name in found}

    gallery.update(photos, quiet)
    assert gallery.add(path).unchanged == 1
    assert row() == {"source": str(photos)}
    gallery.add(path, columns={"note": ["mine"]})
    noise_image(2).save(path)
    assert gallery.update(photos, quiet).updated == 1
    assert row() == {"note": "mine", "source": str(photos)}
    (tmp_path / "list.csv").write_text(f"path,tag\n{path},old\n")
    gallery.update(tmp_path / "list.csv", quiet)
    listed = str(tmp_path / "list.csv")  # its columns are new: the row belongs to it now
    assert row() == {"note": "mine", "tag": "old", "source": listed}
    assert gallery.update(tmp_path / "list.csv", quiet).unchanged == 1
    gallery.add(path, columns={"tag": [None]})
    assert row() == {"note": "mine", "tag": None, "source": listed}
    noise_image(3).save(photos / "2.png")
    gallery.add(photos / "2.png")
    assert gallery.update(photos, quiet).unchanged == 2
    (photos / "2.png").unlink()
    assert gallery.update(photos, quiet).removed == 0  # images that were added alone stay
    assert str(photos / "2.png") in gallery.ids()


def test_relative_paths_are_resolved(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    gallery = Gallery.open("memory:", model)
    for name in ("x.png", "y.png"):
        noise_image(ord(name[0])).save(tmp_path / name)
    gallery.add(["x.png", "~/y.png", noise_image(1)], ids=None)
    gallery.add(noise_image(2), "z.png")
    noise_image(3).save(tmp_path / "z.png")  # another image than the row of that name
    found = gallery.search("~/x.png", liked="y.png", exclude=["x.png", "z.png"], k=9).ids
    assert str(tmp_path / "y.png") in found
    assert {str(tmp_path / "x.png"), "z.png"}.isdisjoint(found)
    (tmp_path / "x.png").unlink()
    assert gallery.delete(["x.png", "z.png", "no.png"]) == 2
    with pytest.raises(ImageError, match=r"is a folder; add it alone"):
        gallery.add([tmp_path])


def test_invalid_images_in_memory_are_errors_or_skipped(model, tmp_path):
    gallery = Gallery.open("memory:", model)
    (tmp_path / "words.txt").write_text(str(tmp_path / "secret.png"))
    with (tmp_path / "words.txt").open() as text:
        forms = {"text mode": text, "0 x 0 pixels": Image.new("RGB", (0, 0)), "channel": np.zeros((3, 8, 9))}
        for message, wrong in forms.items():
            with pytest.raises(ImageError, match=message):
                gallery.add([noise_image(1), wrong])
            report = gallery.add([noise_image(1), wrong], on_broken="skip")
            assert (report.skipped, len(gallery)) == (1, 1)
    with pytest.raises(ImageError, match=r"words\.txt"):
        gallery.search(text)  # closed by now
    skipping = IngestOptions(workers=0, progress=False, on_broken="skip")
    assert gallery.add(np.zeros((3, 8, 9)), options=skipping).skipped == 1
    assert gallery.add(noise_image(2), options=skipping).reasons == ()


def test_the_model_is_hashed_once(model, monkeypatch):
    hashed = []
    plain = type(model.backbone).fingerprint
    monkeypatch.setattr(type(model.backbone), "fingerprint", lambda self: hashed.append(1) or plain(self))
    gallery = Gallery.open("memory:", model)
    for number in range(4):
        gallery.add(noise_image(number))
    assert len(hashed) == 1
    assert gallery.metadata["fingerprint"] == model.fingerprint()


def test_each_invalid_image_is_reported(model):
    gallery = Gallery.open("memory:", model)
    broken = [np.zeros((3, 8, 9)), np.zeros((3, 8, 9)), "\ud800.png", noise_image(1)]
    report = gallery.add(broken, columns={"n": [1, 2, 3, 4]}, on_broken="skip")
    assert (report.skipped, report.added) == (3, 1)
    assert [name for name, _ in report.reasons][:2] == [f"image {n} (ndarray)" for n in (1, 2)]
    with pytest.raises(DataError, match=r"the id '.ud800' is not valid Unicode"):
        gallery.add(noise_image(1), "\ud800")
    with pytest.raises(DataError, match=r"year: 2020 .expected a list"):
        inspect.unwrap(list_additions)([b"1"], None, {"year": 2020})


def test_few_images_are_added_without_reading_the_whole_index(model, monkeypatch):
    gallery = fill_gallery(model)
    scanned = []
    plain = type(gallery.index).scan
    monkeypatch.setattr(
        type(gallery.index), "scan", lambda self, names, where=None: scanned.append(where) or plain(self, names, where)
    )
    assert gallery.add(noise_image(77), "it's new.png").added == 1
    assert gallery.add(noise_image(77), "it's new.png").unchanged == 1
    assert scanned == ["id in ('it''s new.png')"] * 2
    assert gallery.add(noise_image(78), "it's new.png").updated == 1
    assert len(gallery) == COUNT + 1


def test_an_unreadable_image_removes_no_row(model, caplog):
    gallery = fill_gallery(model)
    report = gallery.add(b"no image", "p0", on_broken="skip")
    assert (report.skipped, report.removed, len(gallery)) == (1, 0, COUNT)
    options = IngestOptions()
    object.__setattr__(options, "on_broken", "raise")  # as without type checks
    with pytest.raises(ConfigError, match=r"on_broken: 'raise' .expected one of skip, fail"):
        options.__post_init__()
    for wrong in ({"batch_size": 0}, {"workers": -1}):
        with pytest.raises(ConfigError, match="expected an integer"):
            IngestOptions(**wrong)
    IngestOptions(decoder="torchcodec")
    assert "decoder=torchcodec was removed" in caplog.text


@pytest.mark.parametrize(("arguments", "message"), [(([1],), "an id"), ((None, {3: [1]}), "a column name")])
def test_names_of_other_types_are_refused_without_type_checks(arguments, message):
    with pytest.raises(DataError, match=rf"{message}: .* .expected str, not int"):
        inspect.unwrap(list_additions)([b"1"], *arguments)


def test_rows_are_removed_by_id_path_or_hit(model, tmp_path):
    gallery = fill_gallery(model)
    path = tmp_path / "x.png"
    noise_image(1).save(path)
    gallery.add(path)
    hit = gallery.search(noise_image(3), k=1)[0]
    assert gallery.delete(["p1", hit, "not there"]) == 2 - (hit.id == "p1")
    assert gallery.delete(path) == 1
    assert gallery.delete("p1") == 0
    assert path.exists()
    assert hit.id not in gallery.search(noise_image(3), k=COUNT).ids


@pytest.mark.slow
def test_concurrent_additions_wait_for_each_other(model, tmp_path, monkeypatch):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    uri = tmp_path / "photos.lance"

    def add_images(first):
        with Gallery.open(uri, model) as gallery:
            for number in (first, first + 2):
                gallery.add([noise_image(number), noise_image(number + 1)], names(12)[number : number + 2])

    with ThreadPoolExecutor(3) as pool:  # a lock is held by an open file, not by a process
        list(pool.map(add_images, (0, 4, 8)))
    with Gallery.open(uri, model, create=False) as gallery:
        assert sorted(gallery.ids()) == sorted(names(12))
        monkeypatch.setattr(gallery_module, "_ADD_WAIT_SECONDS", 0.05)
        with lock_index(gallery.uri), pytest.raises(UnionError, match="another process is putting images into"):
            gallery.add(noise_image(20), "new")
        assert gallery.add(noise_image(20), "new").added == 1


def test_ids_are_listed_and_deleted_by_filter(model):
    gallery = fill_gallery(model)
    assert gallery.ids() == names()
    assert gallery.ids("class is null") == ["p2", "p5", "p8", "p11"]
    assert gallery.delete(gallery.ids("year < 6")) == 6
    assert gallery.ids() == names()[6:]


def test_folders_patterns_and_lists_are_added(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        noise_image(number).save(photos / f"{number}.png")
    (photos / "notes.txt").write_text("no image")
    gallery, options = Gallery.open("memory:", model), IngestOptions(workers=0, progress=False)
    report = gallery.add(photos, options=options)
    assert (report.added, report.skipped) == (3, 1)
    noise_image(5).save(photos / "5.png")
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
