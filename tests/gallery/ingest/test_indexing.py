"""Images into rows: what is embedded, what is found again, what is removed, what cannot be read."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from indexing_world import counts, fill, picture
from union_igrot.errors import DataError, ImageError
from union_igrot.gallery.ingest import rows
from union_igrot.gallery.ingest.entries import Entry, Listing
from union_igrot.gallery.ingest.sources import list_images


def test_a_folder_becomes_rows_and_the_next_run_opens_nothing(world, monkeypatch):
    fill(world.pictures, [f"{letter}/{number}.png" for letter in "ab" for number in range(5)])
    report = world.run()
    assert counts(report) == (10, 0, 0, 0, 0, 10)
    assert world.backbone.image_batches == [4, 4, 2]
    assert {row["source"] for row in world.rows().values()} == {str(world.pictures)}
    world.check()
    monkeypatch.setattr(Image, "open", None)
    report = world.run()
    assert (counts(report), report.opened, world.embedded) == ((0, 0, 10, 0, 0, 0), 0, 0)


@pytest.mark.slow
def test_changes_are_followed_and_nothing_is_embedded_twice(world):
    fill(world.pictures, [f"{number}.png" for number in range(8)])
    world.run()
    at = world.pictures
    (at / "0.png").unlink()
    (at / "1.png").rename(at / "moved.png")
    os.utime(at / "2.png", ns=(1, 1))
    (at / "3.png").write_bytes(picture(333))
    (at / "4.png").write_bytes((at / "5.png").read_bytes())
    fill(at, ["new/a.png"])
    shutil.copy(at / "new" / "a.png", at / "new" / "b.png")
    report = world.run()
    assert counts(report) == (3, 3, 3, 2, 0, 2)
    assert world.embedded == 2, "3.png and new/a.png are the only contents that are new"
    assert report.opened == 6
    world.check()


@pytest.mark.slow
def test_names_that_change_places_find_their_vectors(world):
    """Numbers shifted by one: each name's old content is another name's new one."""
    fill(world.pictures, [f"{number:02d}.png" for number in range(12)])
    world.run()
    for number in reversed(range(12)):
        (world.pictures / f"{number:02d}.png").rename(world.pictures / f"{number + 1:02d}.png")
    report = world.run(batch_size=1)
    assert counts(report) == (1, 11, 0, 1, 0, 0)
    assert world.embedded == 0
    world.check()


@pytest.mark.slow
def test_a_content_that_waits_for_the_end_is_given_to_its_copies(world, monkeypatch):
    monkeypatch.setattr(rows, "BATCH_ROWS", 1)
    fill(world.pictures, ["a.png", "b.png"])
    world.run()
    for name in ("a.png", "b.png", "copy1.png", "copy2.png"):
        (world.pictures / name).write_bytes(picture(77))
    report = world.run(batch_size=1)
    assert counts(report) == (2, 2, 0, 0, 0, 1)
    world.check()


@pytest.mark.slow
def test_only_rows_of_the_same_images_are_removed(world, tmp_path):
    fill(world.pictures, ["a/1.png", "a/2.png", "b/3.png"])
    world.run(world.pictures / "a")
    world.run(world.pictures / "b")
    (world.pictures / "a" / "1.png").unlink()
    report = world.run(world.pictures / "b")
    assert counts(report) == (0, 0, 1, 0, 0, 0)
    assert len(world.index) == 3
    assert world.run(world.pictures / "a", prune=False).removed == 0
    assert world.run(world.pictures / "a").removed == 1
    world.check()


def test_an_empty_folder_is_rather_a_disk_that_is_not_there(world):
    fill(world.pictures, ["1.png"])
    world.run()
    (world.pictures / "1.png").unlink()
    with pytest.raises(DataError, match="disk is mounted"):
        world.run()
    assert world.run(prune=False).unchanged == 0
    assert len(world.index) == 1


@pytest.mark.slow
def test_rows_below_an_empty_folder_are_kept_until_the_folder_is_removed(world):
    fill(world.pictures, ["1.png", "usb/a/2.png", "usb/b/3.png", "album/4.png"])
    world.run()
    shutil.rmtree(world.pictures / "album")
    for name in ("a", "b"):
        shutil.rmtree(world.pictures / "usb" / name)
    report = world.run()
    assert counts(report) == (0, 0, 1, 1, 0, 0)
    assert report.emptied == {str(world.pictures / "usb"): 2}
    (world.pictures / "usb").rmdir()
    assert world.run().removed == 2
    world.check()


@pytest.mark.slow
def test_sources_that_no_longer_exist_are_reported(world):
    fill(world.pictures, ["old/1.png", "old/2.png", "c.png"])
    world.run(world.pictures / "old")
    (world.pictures / "old").rename(world.pictures / "new")
    report = world.run(f"{world.pictures}/new/*.png")
    assert report.lost_sources == {str(world.pictures / "old"): 2}
    assert (report.added, report.embedded) == (2, 0)
    shutil.rmtree(world.pictures / "new")
    assert world.run(world.pictures).lost_sources == {
        str(world.pictures / "old"): 2,
        f"{world.pictures}/new/*.png": 2,
    }


def test_a_larger_limit_of_pixels_is_tried_again(world):
    fill(world.pictures, ["1.png"])
    (world.pictures / "large.png").write_bytes(picture(1, (50, 50)))
    report = world.run(max_megapixels=0.001)
    assert counts(report) == (1, 0, 0, 0, 1, 1)
    assert "50 x 50 pixels are more than the limit" in report.reasons[0][1]
    assert world.run().added == 1
    world.check()


def test_rows_below_a_folder_that_cannot_be_read_are_kept(world):
    fill(world.pictures, ["a/1.png", "b/2.png"])
    world.run()
    listing = list_images(str(world.pictures))
    shut = str(world.pictures / "b")
    fault = Entry(shut, shut, fault="the folder cannot be read (Permission denied)")
    report = world.run(Listing(listing.source, [listing.entries[0], fault], [shut]))
    assert counts(report) == (0, 0, 1, 0, 1, 0)
    world.check()


@pytest.mark.slow
def test_columns_of_a_list_are_kept_and_followed_without_opening_a_picture(world, monkeypatch):
    fill(world.pictures, ["1.png", "2.png", "3.png"])
    listed = world.pictures.parent / "list.csv"
    listed.write_text("path,label,year\npictures/1.png,dog,2020\npictures/2.png,cat,\n")
    assert counts(world.run(listed)) == (2, 0, 0, 0, 0, 2)
    columns = {Path(name).name: (row["label"], row["year"]) for name, row in world.rows().items()}
    assert columns == {"1.png": ("dog", 2020), "2.png": ("cat", None)}
    monkeypatch.setattr(Image, "open", None)
    listed.write_text("path,label,year\npictures/1.png,wolf,2020\npictures/2.png,cat,\n")
    assert counts(world.run(listed)) == (0, 1, 1, 0, 0, 0)
    # A column that is left out stays; an empty cell empties it.
    listed.write_text("path,label\npictures/1.png,wolf\npictures/2.png,cat\n")
    assert counts(world.run(listed)) == (0, 0, 2, 0, 0, 0)
    listed.write_text("path,label,year\npictures/1.png,wolf,\npictures/2.png,cat,\n")
    assert counts(world.run(listed)) == (0, 1, 1, 0, 0, 0)
    columns = {Path(name).name: (row["label"], row["year"]) for name, row in world.rows().items()}
    assert columns == {"1.png": ("wolf", None), "2.png": ("cat", None)}
    monkeypatch.undo()
    # The same images by their folder: the list's columns stay.
    assert counts(world.run()) == (1, 0, 2, 0, 0, 1)
    assert {Path(name).name: row["label"] for name, row in world.rows().items()}["1.png"] == "wolf"


@pytest.mark.slow
def test_two_lists_of_the_same_pictures_keep_each_others_columns(world):
    fill(world.pictures, ["1.png", "2.png"])
    lists = [world.pictures.parent / f"{name}.csv" for name in "ab"]
    for path in lists:
        path.write_text(f"path,{path.stem}\npictures/1.png,{path.stem}1\npictures/2.png,{path.stem}2\n")
    assert counts(world.run(lists[0])) == (2, 0, 0, 0, 0, 2)
    assert counts(world.run(lists[1])) == (0, 2, 0, 0, 0, 0)
    for path in [*lists, *lists]:
        assert counts(world.run(path)) == (0, 0, 2, 0, 0, 0)
    assert sorted((row["a"], row["b"]) for row in world.rows().values()) == [("a1", "b1"), ("a2", "b2")]


def test_columns_that_cannot_be_kept_are_refused_before_anything_is_embedded(world):
    fill(world.pictures, ["1.png"])
    listed = world.pictures.parent / "list.jsonl"
    listed.write_text('{"path": "pictures/1.png", "year": 3}\n')
    world.run(listed)
    for line, message in [
        ('"year": "x"', "year"),
        ('"a.b": 1', "invalid column name"),
        ('"_x": 1', "invalid column name"),
    ]:
        listed.write_text(f'{{"path": "pictures/1.png", {line}}}\n')
        with pytest.raises(DataError, match=message):
            world.run(listed)
        assert world.embedded == 0


@pytest.mark.slow
def test_shards(world):
    import tarfile  # noqa: PLC0415

    pictures = {f"{n}.png": picture(n) for n in range(5)} | {"broken.png": b"no picture"}
    tar = world.pictures.parent / "s-0.tar"

    def pack(members):
        with tarfile.open(tar, "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    pack({**pictures, "3.cls": b"7"})
    report = world.run(tar)
    assert counts(report) == (5, 0, 0, 0, 1, 5)
    rows = world.rows()
    assert set(rows) == {f"{tar}/{n}.png" for n in range(5)}
    assert rows[f"{tar}/3.png"]["cls"] == 7
    assert {row["hash"] for row in rows.values()} == {
        hashlib.sha256(data).hexdigest()[:32] for name, data in pictures.items() if name != "broken.png"
    }
    assert counts(world.run(tar)) == (0, 0, 5, 0, 1, 0)
    pack({**pictures, "9.png": picture(9)} | {"0.png": picture(100)})
    os.utime(tar, ns=(5, 5))
    report = world.run(tar)
    assert counts(report) == (1, 5, 0, 0, 1, 2)
    assert world.embedded == 2


@pytest.mark.slow
def test_bytes_in_memory_become_rows(world):
    entries = [Entry(f"mine {n}", columns={"n": n}, data=picture(n)) for n in range(3)]
    assert counts(world.run(Listing("added", entries), prune=False)) == (3, 0, 0, 0, 0, 3)
    assert counts(world.run(Listing("added", entries), prune=False)) == (0, 0, 3, 0, 0, 0)
    entries[1] = Entry("mine 1", columns={"n": 1}, data=picture(50))
    assert len(entries[1].data) == len(picture(1)), "the size does not tell"
    assert counts(world.run(Listing("added", entries[1:2]), prune=False)) == (0, 1, 0, 0, 0, 1)
    assert world.rows()["mine 1"]["hash"] == hashlib.sha256(picture(50)).hexdigest()[:32]


@pytest.mark.slow
def test_what_cannot_be_read_is_listed_with_its_reason_and_not_tried_again(lance_world, monkeypatch):
    world = lance_world
    fill(world.pictures, ["1.png", "2.png"])
    (world.pictures / "text.jpg").write_text("no image")
    (world.pictures / "cut.png").write_bytes(picture(1, (50, 50))[:3000])
    (world.pictures / "empty.png").touch()
    report = world.run()
    assert counts(report) == (2, 0, 0, 0, 3, 2)
    assert report.skipped_file == Path(f"{world.uri}.skipped.jsonl")
    lines = [json.loads(line) for line in report.skipped_file.read_text().splitlines()]
    assert {Path(line["path"]).name: line["reason"] for line in lines}.keys() == {"text.jpg", "cut.png", "empty.png"}
    assert all(line["source"] == str(world.pictures) for line in lines)
    reasons = {Path(name).name: reason for name, reason in report.reasons}
    assert reasons["text.jpg"] == "no known image format"
    assert "truncated" in reasons["cut.png"]
    assert reasons["empty.png"] == "is empty (0 bytes)"
    world.check(broken=reasons)
    before = report.skipped_file.read_bytes()

    real = Image.open
    monkeypatch.setattr(Image, "open", None)
    report = world.run()
    assert (counts(report), report.opened) == ((0, 0, 2, 0, 3, 0), 0)
    assert sorted(report.skipped_file.read_bytes().splitlines()) == sorted(before.splitlines())
    monkeypatch.setattr(Image, "open", real)

    (world.pictures / "cut.png").write_bytes(picture(1, (50, 50)))
    (world.pictures / "text.jpg").unlink()
    (world.pictures / "1.png").write_bytes(b"broken now")
    report = world.run()
    assert counts(report) == (1, 0, 1, 1, 2, 1)
    assert {Path(json.loads(line)["path"]).name for line in report.skipped_file.read_text().splitlines()} == {
        "empty.png",
        "1.png",
    }
    world.check(broken=("empty.png", "1.png"))
    for name in ("empty.png", "1.png"):
        (world.pictures / name).unlink()
    assert world.run().skipped_file is None
    assert not Path(f"{world.uri}.skipped.jsonl").exists()


def test_a_broken_picture_may_be_an_error_and_what_was_embedded_before_is_kept(lance_world):
    world = lance_world
    fill(world.pictures, [f"{n}.png" for n in range(9)])
    (world.pictures / "8.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"8\.png: no known image format.*on_broken=skip"):
        world.run(on_broken="fail")
    world.run()
    assert world.embedded == 0, "all eight were kept"
    world.check(broken=("8.png",))
    with pytest.raises(ImageError, match=r"8\.png"):
        world.run(on_broken="fail")
