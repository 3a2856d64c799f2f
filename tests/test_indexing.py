"""Pictures into rows: what is embedded, what is found again, what is removed, and what interruptions leave."""

import hashlib
import io
import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from small_world import LinearBackbone, trainable
from union_igrot.data.entries import Entry, Listing, data_entry
from union_igrot.data.sources import list_pictures
from union_igrot.data.transforms import picture_batch
from union_igrot.errors import DataError, PictureError, UnionError
from union_igrot.index.memory import MemoryIndex
from union_igrot.index.open import open_index
from union_igrot.indexing import keep, place as places
from union_igrot.indexing.batches import _quiet_fork
from union_igrot.indexing.chunks import Chunk, Fact, read_chunk, write_chunk
from union_igrot.indexing.decode import Decoder
from union_igrot.indexing.plan import shares
from union_igrot.indexing.run import Report, Work, index_pictures
from union_igrot.indexing.skipped import Skip, SkippedFile
from union_igrot.processes import Machine

QUIET = Work(batch_size=4, workers=0, progress=False)


def picture(seed, size=(12, 10)):
    """Bytes of a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(zlib.crc32(name.encode())))


class World:
    """A folder of pictures, an index, a model that counts, and what stands in the rows."""

    def __init__(self, folder, kind):
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        self.model = trainable("sum", "frozen")
        self.backbone = self.model.backbone
        if kind == "lance":
            pytest.importorskip("lance", reason='the extra "gallery" is not installed')
        self.uri = "memory:" if kind == "memory" else str(folder / "photos.lance")
        self.index = open_index(self.uri, dim=self.backbone.dim, create=True)

    def run(self, images=None, **changed):
        self.backbone.image_batches.clear()
        listing = images if isinstance(images, Listing) else list_pictures(str(images or self.pictures))
        return index_pictures(self.index, self.model, listing, replace(QUIET, **changed))

    @property
    def embedded(self):
        return sum(self.backbone.image_batches)

    def rows(self):
        columns = ["id", "hash", "size", "mtime", "width", "height", "thumbnail", "source", *self.index.columns]
        found = {}
        for batch in self.index.scan(list(dict.fromkeys(columns))):
            for at, name in enumerate(batch["id"]):
                assert name not in found, "a row stands twice"
                found[name] = {column: batch[column][at] for column in batch}
        return found

    def check(self, broken=()):
        """Hold the rows against the folder, picture by picture."""
        rows = self.rows()
        files = [path for path in self.pictures.rglob("*") if path.is_file() and path.name not in broken]
        assert set(rows) == {str(path) for path in files}
        vectors = self.index.fetch([str(path) for path in files]).vectors
        for path, vector in zip(files, vectors, strict=True):
            row, data = rows[str(path)], path.read_bytes()
            with Image.open(path) as opened:
                assert (row["width"], row["height"]) == opened.size
            assert row["hash"] == hashlib.sha256(data).hexdigest()[:32]
            assert (row["size"], row["mtime"]) == (len(data), path.stat().st_mtime_ns)
            with torch.inference_mode():
                alone = self.model.embed_gallery(picture_batch([path], self.model.preprocess))[0]
            torch.testing.assert_close(vector, alone)
            with Image.open(io.BytesIO(row["thumbnail"])) as small:
                small.load()
                assert (small.format, max(small.size)) == ("JPEG", min(160, max(row["width"], row["height"])))


@pytest.fixture(params=["memory", "lance"])
def world(request, tmp_path):
    made = World(tmp_path, request.param)
    yield made
    made.index.close()


@pytest.fixture
def lance_world(tmp_path):
    made = World(tmp_path, "lance")
    yield made
    made.index.close()


def counts(report):
    return report.added, report.updated, report.unchanged, report.removed, report.skipped, report.embedded


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


def test_a_content_that_waits_for_the_end_is_given_to_its_copies(world, monkeypatch):
    monkeypatch.setattr(keep, "ROWS", 1)
    fill(world.pictures, ["a.png", "b.png"])
    world.run()
    for name in ("a.png", "b.png", "copy1.png", "copy2.png"):
        (world.pictures / name).write_bytes(picture(77))
    report = world.run(batch_size=1)
    assert counts(report) == (2, 2, 0, 0, 0, 1)
    world.check()


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


def test_a_row_that_others_brought_is_left_to_them(world):
    fill(world.pictures, ["a/1.png", "b/2.png"])
    world.run()
    before = world.rows()
    assert counts(world.run(world.pictures / "a")) == (0, 0, 1, 0, 0, 0)
    assert world.rows() == before


def test_an_empty_folder_is_rather_a_disk_that_is_not_there(world):
    fill(world.pictures, ["1.png"])
    world.run()
    (world.pictures / "1.png").unlink()
    with pytest.raises(DataError, match="is its disk there"):
        world.run()
    assert world.run(prune=False).unchanged == 0
    assert len(world.index) == 1


def test_rows_below_a_folder_that_cannot_be_read_stay(world):
    fill(world.pictures, ["a/1.png", "b/2.png"])
    world.run()
    listing = list_pictures(str(world.pictures))
    shut = str(world.pictures / "b")
    fault = Entry(shut, shut, fault="the folder cannot be read (Permission denied)")
    report = world.run(Listing(listing.source, [listing.entries[0], fault], [shut]))
    assert counts(report) == (0, 0, 1, 0, 1, 0)
    world.check()


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
    listed.write_text("path,label\npictures/1.png,wolf\npictures/2.png,cat\n")
    assert counts(world.run(listed)) == (0, 1, 1, 0, 0, 0)
    columns = {Path(name).name: (row["label"], row["year"]) for name, row in world.rows().items()}
    assert columns == {"1.png": ("wolf", None), "2.png": ("cat", None)}
    monkeypatch.undo()
    # The same pictures by their folder: the list's columns stay.
    assert counts(world.run()) == (1, 0, 2, 0, 0, 1)
    assert {Path(name).name: row["label"] for name, row in world.rows().items()}["1.png"] == "wolf"


def test_columns_that_cannot_be_kept_are_refused_before_anything_is_embedded(world):
    fill(world.pictures, ["1.png"])
    listed = world.pictures.parent / "list.jsonl"
    listed.write_text('{"path": "pictures/1.png", "year": 3}\n')
    world.run(listed)
    for line, message in [('"year": "x"', "year"), ('"a.b": 1', "cannot be called"), ('"_x": 1', "cannot be called")]:
        listed.write_text(f'{{"path": "pictures/1.png", {line}}}\n')
        with pytest.raises(DataError, match=message):
            world.run(listed)
        assert world.embedded == 0


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


def test_bytes_in_memory_become_rows(world):
    entries = [data_entry(f"mine {n}", picture(n), {"n": n}) for n in range(3)]
    assert counts(world.run(Listing("added", entries), prune=False)) == (3, 0, 0, 0, 0, 3)
    assert counts(world.run(Listing("added", entries), prune=False)) == (0, 0, 3, 0, 0, 0)
    entries[1] = data_entry("mine 1", picture(50), {"n": 1})
    assert len(entries[1].data) == len(picture(1)), "the size does not tell"
    assert counts(world.run(Listing("added", entries[1:2]), prune=False)) == (0, 1, 0, 0, 0, 1)
    assert world.rows()["mine 1"]["hash"] == hashlib.sha256(picture(50)).hexdigest()[:32]


def test_what_cannot_be_read_is_listed_with_its_reason_and_not_tried_again(lance_world, monkeypatch):
    world = lance_world
    fill(world.pictures, ["1.png", "2.png"])
    (world.pictures / "text.jpg").write_text("no picture")
    (world.pictures / "cut.png").write_bytes(picture(1, (50, 50))[:3000])
    (world.pictures / "empty.png").touch()
    report = world.run()
    assert counts(report) == (2, 0, 0, 0, 3, 2)
    assert report.skipped_file == Path(f"{world.uri}.skipped.jsonl")
    lines = [json.loads(line) for line in report.skipped_file.read_text().splitlines()]
    assert {Path(line["path"]).name: line["reason"] for line in lines}.keys() == {"text.jpg", "cut.png", "empty.png"}
    assert all(line["source"] == str(world.pictures) for line in lines)
    reasons = {Path(name).name: reason for name, reason in report.reasons}
    assert reasons["text.jpg"] == "no known picture format"
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
    with pytest.raises(PictureError, match=r"8\.png: no known picture format.*on_broken=skip"):
        world.run(on_broken="fail")
    world.run()
    assert world.embedded == 0, "all eight were kept"
    world.check(broken=("8.png",))
    with pytest.raises(PictureError, match=r"8\.png"):
        world.run(on_broken="fail")


def test_worker_processes_give_the_same_rows(lance_world):
    world = lance_world
    fill(world.pictures, [f"{n}.png" for n in range(11)])
    (world.pictures / "bad.png").write_bytes(b"no picture")
    report = world.run(workers=2)
    assert counts(report) == (11, 0, 0, 0, 1, 11)
    assert report.rate > 0
    world.check(broken=("bad.png",))


@pytest.mark.slow
def test_a_file_that_ends_the_decoding_process_is_listed(lance_world, monkeypatch):
    import union_igrot.indexing.decode as decoding  # noqa: PLC0415

    world = lance_world
    fill(world.pictures, [f"{n}.png" for n in range(9)])
    (world.pictures / "4.png").write_bytes(b"deadly" + picture(4))
    real = decoding.decode_picture

    def dying(source, at_least=None):
        if source.getvalue().startswith(b"deadly"):
            os.kill(os.getpid(), 9)
        return real(source, at_least)

    monkeypatch.setattr(decoding, "decode_picture", dying)
    report = world.run(workers=2, batch_size=2)
    assert counts(report) == (8, 0, 0, 0, 1, 8)
    ((name, reason),) = report.reasons
    assert (Path(name).name, reason[:30]) == ("4.png", "decoding it ended the process;")
    world.check(broken=("4.png",))


def test_half_precision_gives_rows_of_length_one_and_leaves_the_model_as_it_was(world):
    fill(world.pictures, [f"{n}.png" for n in range(3)])
    world.model.train()
    world.run(machine=Machine("cpu", 1, precision="bf16-mixed"))
    vectors = world.index.fetch(sorted(world.rows())).vectors
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert world.model.null_text().pooled.dtype == torch.float32
    assert not world.model.training


def test_the_null_text_is_encoded_once(world):
    world.model = trainable("sum", "sum", world.backbone)
    fill(world.pictures, [f"{n}.png" for n in range(9)])
    world.run()
    world.run()
    assert world.backbone.text_batches == [[""]]


def test_two_at_once_are_refused_but_not_after_a_kill(lance_world):
    world = lance_world
    fill(world.pictures, ["1.png"])
    with places.work_place(world.uri, "model", "elsewhere", None):
        with pytest.raises(UnionError, match="another process is putting pictures into"):
            world.run()
        with _quiet_fork():
            child = os.fork()
        if child == 0:
            os._exit(0 if not places._HELD else 1)
        assert os.waitpid(child, 0)[1] == 0, "a forked worker holds the lock"
    world.run()
    world.check()


class Killed(BaseException):
    """What stands for a kill: nothing in the code handles it."""


def test_a_picture_that_broke_before_an_interruption_loses_its_row(lance_world):
    world = lance_world
    fill(world.pictures, ["1.png", "2.png"])
    world.run()
    broken = world.pictures / "1.png"
    broken.write_bytes(b"broken now")
    skip = Skip(str(broken), "no known picture format", 10, broken.stat().st_mtime_ns)
    SkippedFile(Path(f"{world.uri}.skipped.jsonl"), str(world.pictures)).add([skip])  # and was killed
    assert counts(world.run()) == (0, 0, 1, 1, 1, 0)
    world.check(broken=("1.png",))


def test_a_missing_picture_of_a_list_loses_its_row_but_not_one_that_cannot_be_reached(world):
    fill(world.pictures, ["1.png", "2.png", "3.png"])
    listed = world.pictures.parent / "list.txt"
    listed.write_text("".join(f"pictures/{n}.png\n" for n in (1, 2, 3)))
    world.run(listed)
    (world.pictures / "1.png").unlink()
    (world.pictures / "2.png").unlink()
    (world.pictures / "2.png").symlink_to("2.png")
    assert counts(world.run(listed, prune=False)) == (0, 0, 1, 0, 2, 0)
    assert counts(world.run(listed)) == (0, 0, 1, 1, 2, 0)
    assert {Path(name).name for name in world.rows()} == {"2.png", "3.png"}


def test_a_disk_that_fails_costs_no_row_and_its_pictures_are_tried_again(lance_world, monkeypatch):
    world = lance_world
    fill(world.pictures, ["1.png", "2.png"])
    world.run()
    (world.pictures / "1.png").write_bytes(picture(9))
    real = Decoder._read

    def failing(self, one):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Decoder, "_read", failing)
    report = world.run()
    assert (report.skipped, report.removed) == (1, 0)
    assert report.reasons[0][1] == "the file cannot be reached (Input/output error)"
    assert len(world.index) == 2
    monkeypatch.setattr(Decoder, "_read", real)
    assert counts(world.run()) == (0, 1, 1, 0, 0, 1)
    world.check()


@pytest.mark.parametrize("after", range(0, 7, 2))
def test_an_interrupted_run_is_taken_up(lance_world, monkeypatch, after):
    """Ended at the n-th write to the index, as if killed just after it; files of the work folder stay."""
    world = lance_world
    monkeypatch.setattr(keep, "ROWS", 4)
    fill(world.pictures, [f"{n:02d}.png" for n in range(12)])
    world.run()
    for n in range(0, 12, 2):
        (world.pictures / f"{n:02d}.png").write_bytes(picture(1000 + n))
    (world.pictures / "01.png").rename(world.pictures / "moved.png")
    (world.pictures / "03.png").unlink()
    fill(world.pictures, [f"new {n}.png" for n in range(8)])

    writes = 0
    real = type(world.index).upsert, type(world.index).delete

    def killing(write):
        def wrapped(self, given):
            nonlocal writes
            if writes == after:
                raise Killed
            writes += 1
            return write(self, given)

        return wrapped

    for name, write in zip(("upsert", "delete"), real, strict=True):
        monkeypatch.setattr(type(world.index), name, killing(write))
    embedded = 0
    try:
        world.run()
    except Killed:
        embedded = world.embedded
        assert len(world.index) >= 11
    for name, write in zip(("upsert", "delete"), real, strict=True):
        monkeypatch.setattr(type(world.index), name, write)
    if embedded:
        world.run()
        assert embedded + world.embedded <= 14 + 4, "more than a chunk was embedded again"
    world.check()
    assert world.run().unchanged == 20 - 1 + 0 or len(world.rows()) == 19
    assert list((world.pictures.parent / "own-cache" / "indexing").glob("*")) != []
    assert not [one for one in (world.pictures.parent / "own-cache" / "indexing").iterdir() if one.is_dir()]


def test_an_error_while_writing_ends_the_run_and_the_next_goes_on(lance_world, monkeypatch):
    world = lance_world
    monkeypatch.setattr(keep, "ROWS", 4)
    fill(world.pictures, [f"{n:02d}.png" for n in range(12)])
    real = type(world.index).upsert
    monkeypatch.setattr(type(world.index), "upsert", lambda *_: (_ for _ in ()).throw(DataError("the disk is full")))
    with pytest.raises(DataError, match="the disk is full"):
        world.run()
    monkeypatch.setattr(type(world.index), "upsert", real)
    first = world.embedded
    world.run()
    assert first + world.embedded == 12
    world.check()


def test_a_damaged_work_file_costs_its_pictures_alone(lance_world, monkeypatch):
    world = lance_world
    monkeypatch.setattr(keep, "ROWS", 4)
    fill(world.pictures, [f"{n:02d}.png" for n in range(12)])
    real = type(world.index).upsert
    monkeypatch.setattr(type(world.index), "upsert", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        world.run()
    monkeypatch.setattr(type(world.index), "upsert", real)
    first, *rest = sorted((world.pictures.parent / "own-cache" / "indexing").rglob("*.safetensors"))
    held = sum(len(read_chunk(path).facts) for path in rest)
    first.write_bytes(first.read_bytes()[:-7])
    world.run()
    assert world.embedded == 12 - held
    world.check()


def test_a_row_that_vanishes_meanwhile_costs_a_second_round(world, monkeypatch):
    fill(world.pictures, ["1.png", "2.png"])
    world.run()
    (world.pictures / "1.png").rename(world.pictures / "moved.png")
    import union_igrot.indexing.run as running  # noqa: PLC0415

    real = running.lead_round

    def meanwhile(*given, **named):
        world.index.delete([str(world.pictures / "1.png")])
        return real(*given, **named)

    monkeypatch.setattr(running, "lead_round", meanwhile)
    report = world.run()
    assert (report.added, report.embedded) == (1, 1)
    world.check()


def test_pictures_are_dealt_so_that_equal_ones_meet(tmp_path):
    rng = np.random.default_rng(0)
    entries = [Entry(f"{n}", size=int(size)) for n, size in enumerate(rng.integers(1000, 90000, 4000))]
    dealt = shares(entries, 4)
    assert sorted(entry.id for part in dealt for entry in part) == sorted(entry.id for entry in entries)
    assert max(map(len, dealt)) < 1.2 * 1000
    homes = [{entry.size for entry in part} for part in dealt]
    assert sum(map(len, homes)) == len(set.union(*homes)), "one size, one process"
    # Bitmaps: all of one size, and some equal.
    entries = []
    for n in range(300):
        path = tmp_path / f"{n}.bmp"
        path.write_bytes(bytes(5000) + (n % 100).to_bytes(2, "big"))
        entries.append(Entry(str(n), str(path), size=5002))
    dealt = shares(entries, 3)
    assert max(map(len, dealt)) < 150
    for part in dealt:
        for entry in part:
            assert all(str((int(entry.id) + far) % 300) in {other.id for other in part} for far in (100, 200))


def test_chunks_come_back_as_they_were_written(tmp_path):
    facts = [Fact("a\udcff", 1, 2, "0" * 32, 3, 4, 0), Fact("b\n", 5, 6, "1" * 32), Fact("c", 0, 0, reason="why")]
    chunk = Chunk(facts, torch.randn(1, 4), [b"jpeg"])
    write_chunk(tmp_path / "x.safetensors", chunk)
    again = read_chunk(tmp_path / "x.safetensors")
    assert (again.facts, again.thumbnails) == (facts, [b"jpeg"])
    assert torch.equal(again.vectors, chunk.vectors)
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    assert read_chunk(tmp_path / "y.safetensors") is None
    assert (tmp_path / "y.safetensors.broken").exists()


def test_the_list_of_the_skipped_survives_a_torn_line_and_keeps_what_others_wrote(tmp_path):
    path = tmp_path / "skipped.jsonl"
    one, two = Skip("a", "why", 1, 2), Skip("b \udcff", "two\nlines", 3, 4)
    SkippedFile(path, "mine").add([one])
    SkippedFile(path, "theirs").add([one])
    with path.open("ab") as file:
        file.write(b'{"path": "torn')
    again = SkippedFile(path, "mine")
    assert again.own == {"a": one}
    again.add([two])
    assert SkippedFile(path, "mine").own == {"a": one, two.path: two}
    assert SkippedFile(path, "theirs").own == {"a": one}
    again.settle({"a"})
    assert SkippedFile(path, "mine").own == {"a": one}
    SkippedFile(path, "mine").settle(set())
    SkippedFile(path, "theirs").settle(set())
    assert not path.exists()


def test_a_report_of_nothing_has_no_rate():
    assert Report().rate == 0.0


def test_an_index_in_memory_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UNION_CACHE", str(tmp_path / "no" / "cache"))
    model = trainable("sum", "frozen", LinearBackbone())
    index_pictures(MemoryIndex(model.backbone.dim), model, Listing("added", [data_entry("a", picture(1))]), QUIET)
    assert not (tmp_path / "no").exists()
