"""Columns that are found in and beside files: EXIF data, class folders, captions."""

import json
import os

import pytest

from indexing_world import counts, fill
from photo_files import NIKON, PIXEL, photo
from union_igrot.gallery.ingest.entries import ADDED_SOURCE, Entry, Listing
from union_igrot.gallery.ingest.sources import list_images

WHERE = "taken >= '2024-05-01' and camera like 'Pixel%'"
FOUND = ("taken", "camera", "lens", "latitude", "longitude", "class", "caption")


def write_photos(folder):
    (folder / "new.jpg").write_bytes(photo(PIXEL))
    (folder / "old.jpg").write_bytes(photo(NIKON))
    (folder / "plain.png").write_bytes(photo(({}, {}, {}), "PNG"))


def columns(world, name):
    row = world.rows()[str(world.pictures / name)]
    return {column: row[column] for column in FOUND if row.get(column) is not None}


def ids(world, where):
    return [os.path.basename(name) for batch in world.index.scan(["id"], where) for name in batch["id"]]  # noqa: PTH119


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_photos_have_the_columns_of_their_exif_data(world, workers):
    write_photos(world.pictures)
    assert counts(world.run(workers=workers)) == (3, 0, 0, 0, 0, 3)
    assert ids(world, WHERE) == ["new.jpg"]
    assert counts(world.run()) == (0, 0, 3, 0, 0, 0)


@pytest.mark.slow
def test_columns_follow_a_file_that_changes_and_copies_have_them_too(world):
    write_photos(world.pictures)
    world.run()
    (world.pictures / "copy.jpg").write_bytes(photo(PIXEL))
    (world.pictures / "old.jpg").write_bytes(photo(({0x0110: "X100"}, {}, {}), color="red"))
    assert counts(world.run()) == (1, 1, 2, 0, 0, 1)
    assert columns(world, "copy.jpg") == columns(world, "new.jpg")
    assert columns(world, "old.jpg") == {"camera": "X100"}


@pytest.mark.slow
def test_an_index_from_before_is_filled_without_embedding(world):
    write_photos(world.pictures)
    (world.pictures / "new.txt").write_text("a lake\n")
    assert counts(world.run(list_images(str(world.pictures), file_columns=False), file_columns="none"))[5] == 3
    assert not set(FOUND) & set(world.index.columns)
    assert counts(world.run()) == (0, 1, 2, 0, 0, 0)
    assert (columns(world, "new.jpg"), columns(world, "old.jpg")) == ({"caption": "a lake"}, {})
    report = world.run(file_columns="all")
    assert (counts(report), report.opened, world.embedded) == ((0, 3, 0, 0, 0, 0), 3, 0)
    assert ids(world, WHERE) == ["new.jpg"]


@pytest.mark.slow
def test_columns_of_a_list_replace_what_is_found(world, tmp_path):
    write_photos(world.pictures)
    lines = [
        {"path": "pictures/new.jpg", "camera": "mine", "year": 1},
        {"path": "pictures/old.jpg", "lens": None},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    world.run(tmp_path / "list.jsonl")
    assert columns(world, "new.jpg") == {
        "taken": "2024-05-01T18:30:05",
        "camera": "mine",
        "latitude": pytest.approx(47.4208333),
        "longitude": -122.505,
    }
    assert columns(world, "old.jpg") == {"taken": "2023-12-31T23:59:59"}
    assert counts(world.run(tmp_path / "list.jsonl")) == (0, 0, 2, 0, 0, 0)
    world.run(file_columns="all")  # the folder finds more, but replaces nothing that people gave
    assert columns(world, "new.jpg")["camera"] == "mine"
    assert columns(world, "old.jpg")["camera"] == "NIKON"


@pytest.mark.slow
def test_a_column_that_people_use_for_something_else_stays_theirs(world, tmp_path):
    (tmp_path / "list.csv").write_text("path,taken,class,caption,latitude\npictures/plain.png,7,3,5,north\n")
    write_photos(world.pictures)
    world.run(tmp_path / "list.csv")
    (world.pictures / "new.txt").write_text("a lake")
    assert counts(world.run())[:2] == (2, 0)
    assert columns(world, "plain.png") == {"taken": 7, "class": 3, "caption": 5, "latitude": "north"}
    assert columns(world, "new.jpg") == {"camera": "Pixel 8", "lens": "Pixel 8 back camera", "longitude": -122.505}


def test_images_in_memory_have_columns_and_given_ones_stay(world):
    listing = world.run(data_listing([Entry("a", columns={"camera": "mine"}, data=photo(PIXEL))]))
    assert listing.added == 1
    world.run(data_listing([Entry("a", data=photo(NIKON))]))
    row = world.rows()["a"]
    assert (row["camera"], row["lens"]) == ("mine", "Pixel 8 back camera")


def data_listing(entries):
    return Listing(ADDED_SOURCE, entries)


# Class folders


def classes(root):
    return {entry.id.removeprefix(f"{root}/"): entry.found.get("class") for entry in list_images(str(root)).entries}


def test_class_folders(tmp_path):
    fill(tmp_path, ["cat/1.png", "cat/2.png", "dog/3.png"])
    (tmp_path / "README.md").write_text("not an image")
    assert classes(tmp_path) == {"cat/1.png": "cat", "cat/2.png": "cat", "dog/3.png": "dog", "README.md": None}


@pytest.mark.parametrize(
    "names", [["cat/1.png", "cat/2.png"], ["cat/1.png", "dog/2.png", "3.png"], ["2024/05/1.png", "2024/06/2.png"]]
)
def test_other_folders_are_no_classes(tmp_path, names):
    fill(tmp_path, names)
    assert set(classes(tmp_path).values()) == {None}


@pytest.mark.slow
def test_a_class_is_updated_without_embedding_when_its_folder_is_renamed(world):
    fill(world.pictures, ["cat/1.png", "dog/2.png"])
    world.run()
    (world.pictures / "cat").rename(world.pictures / "lynx")
    assert counts(world.run()) == (1, 0, 1, 1, 0, 0)
    assert columns(world, "lynx/1.png") == {"class": "lynx"}
    fill(world.pictures, ["3.png"])
    world.run()
    assert columns(world, "lynx/1.png") == {}


# Captions


@pytest.mark.parametrize(
    ("name", "content", "caption"),
    [
        ("a.txt", "a lake\n\n  in  winter \n", "a lake\nin winter"),
        ("a.txt", "\ufeffein See\n", "ein See"),
        ("a.json", '"a lake"', "a lake"),
        ("a.json", '{"caption": "a lake", "license": 3}', "a lake"),
        ("a.json", '{"captions": ["a lake", "in winter", 3, "a lake"]}', "a lake\nin winter"),
        ("a.json", '["a lake"]', "a lake"),
        ("a.json", '["\\ud800"]', "\\ud800"),
    ],
)
def test_captions(tmp_path, name, content, caption):
    fill(tmp_path, ["a.png", "b.png"])
    (tmp_path / name).write_text(content)
    for images in (tmp_path, tmp_path / "*.png", tmp_path / "*"):
        entries = list_images(str(images)).entries
        assert [(os.path.basename(one.id), one.found["caption"]) for one in entries] == [  # noqa: PTH119
            ("a.png", caption),
            ("b.png", None),
        ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{}"),
        ("a.json", "{"),
        ("a.json", "[" * 30_000),
        ("a.json", '{"caption": {"caption": "deep"}}'),
        ("a.txt", " \n"),
        ("a.txt", "x" * 70_000),
        ("c.txt", "of no image"),
    ],
)
def test_files_without_captions_are_listed_as_before(tmp_path, name, content):
    fill(tmp_path, ["a.png"])
    (tmp_path / name).write_text(content)
    found = {os.path.basename(one.id): one.found.get("caption") for one in list_images(str(tmp_path)).entries}  # noqa: PTH119
    assert found == {"a.png": None, name: None}


def test_a_pipe_beside_an_image_is_not_opened(tmp_path):
    fill(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "a.txt")
    for images in (tmp_path, tmp_path / "*.png"):
        assert list_images(str(images)).entries[0].found == {"class": None, "caption": None}


@pytest.mark.slow
def test_a_caption_that_changes_is_written_without_opening_the_image(world, monkeypatch):
    fill(world.pictures, ["a.png", "b.png"])
    (world.pictures / "a.txt").write_text("a lake\nin winter")
    assert counts(world.run()) == (2, 0, 0, 0, 0, 2)
    assert ids(world, "caption like '%lake%'") == ids(world, "caption like '%winter'") == ["a.png"]
    (world.pictures / "a.txt").write_text("a river")
    (world.pictures / "b.json").write_text('["a hill"]')
    report = world.run()
    assert (counts(report), report.opened) == ((0, 2, 0, 0, 0, 0), 0)
    assert (columns(world, "a.png"), columns(world, "b.png")) == ({"caption": "a river"}, {"caption": "a hill"})
    (world.pictures / "a.txt").unlink()
    world.run()
    assert columns(world, "a.png") == {}
