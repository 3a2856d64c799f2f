"""What workers, crashes, interruptions, failing disks and others at work leave of an indexing."""

import errno
import os
from pathlib import Path

import pytest
import torch

from indexing_world import counts, fill, picture
from small_world import trainable
from union_igrot.errors import DataError, UnionError
from union_igrot.gallery.ingest import pipeline, rows
from union_igrot.gallery.ingest.embedding import ImageReader
from union_igrot.gallery.ingest.pipeline import lock_index
from union_igrot.gallery.ingest.report import SkippedFile, SkippedImage
from union_igrot.storage import locks


@pytest.mark.slow
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
    import union_igrot.gallery.ingest.embedding as decoding  # noqa: PLC0415

    world = lance_world
    fill(world.pictures, [f"{n}.png" for n in range(9)])
    (world.pictures / "4.png").write_bytes(b"deadly" + picture(4))
    real = decoding.decode_image

    def dying(source, at_least=None, *limits):
        if source.getvalue().startswith(b"deadly"):
            os.kill(os.getpid(), 9)
        return real(source, at_least, *limits)

    monkeypatch.setattr(decoding, "decode_image", dying)
    report = world.run(workers=2, batch_size=2)
    assert counts(report) == (8, 0, 0, 0, 1, 8)
    ((name, reason),) = report.reasons
    assert (Path(name).name, reason[:30]) == ("4.png", "decoding it ended the process;")
    world.check(broken=("4.png",))


@pytest.mark.slow
def test_a_picture_for_which_memory_was_short_is_tried_again_and_keeps_its_row(world, monkeypatch):
    import union_igrot.gallery.ingest.embedding as decoding  # noqa: PLC0415

    fill(world.pictures, ["1.png", "2.png"])
    world.run()
    (world.pictures / "1.png").write_bytes(picture(5, (30, 31)))

    def short(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode_image", short)
        report = world.run()
    assert (report.skipped, report.removed, len(world.index)) == (1, 0, 2)
    assert "MemoryError" in report.reasons[0][1]
    assert world.run().updated == 1
    world.check()


def test_where_locks_do_not_work_one_is_warned_and_goes_on(lance_world, monkeypatch, caplog):
    def unknown(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    fill(lance_world.pictures, ["1.png"])
    monkeypatch.setattr(locks, "lock_descriptor", unknown)
    assert lance_world.run().added == 1
    assert "cannot be locked (No locks available)" in caplog.text


def test_half_precision_gives_rows_of_length_one_and_leaves_the_model_as_it_was(world):
    fill(world.pictures, [f"{n}.png" for n in range(3)])
    world.model.train()
    world.run(precision="bf16-mixed")
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
    leftover = world.pictures.parent / "own-cache" / "indexing"
    with lock_index(world.uri), pytest.raises(UnionError, match="another process is putting images into"):
        world.run()
    (lock,) = leftover.glob("*.lock")
    (leftover / f"{lock.stem}-0123").mkdir()  # work files of an earlier version
    world.run()
    assert not [path for path in leftover.iterdir() if path.is_dir()]
    world.check()


class Killed(BaseException):
    """What stands for a kill: nothing in the code handles it."""


def test_a_picture_that_broke_before_an_interruption_loses_its_row(lance_world):
    world = lance_world
    fill(world.pictures, ["1.png", "2.png"])
    world.run()
    broken = world.pictures / "1.png"
    broken.write_bytes(b"broken now")
    skip = SkippedImage(str(broken), "no known image format", 10, broken.stat().st_mtime_ns)
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
    real = ImageReader._read_bytes

    def failing(self, one):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ImageReader, "_read_bytes", failing)
    report = world.run()
    assert (report.skipped, report.removed) == (1, 0)
    assert report.reasons[0][1] == "the file cannot be reached (Input/output error)"
    assert len(world.index) == 2
    monkeypatch.setattr(ImageReader, "_read_bytes", real)
    assert counts(world.run()) == (0, 1, 1, 0, 0, 1)
    world.check()


@pytest.mark.slow
@pytest.mark.parametrize("after", range(0, 7, 2))
def test_an_interrupted_run_is_taken_up(lance_world, monkeypatch, after):
    """Ended at the n-th write to the index, as if killed just after it."""
    world = lance_world
    monkeypatch.setattr(rows, "BATCH_ROWS", 4)
    fill(world.pictures, [f"{n:02d}.png" for n in range(12)])
    world.run()
    for n in range(0, 12, 2):
        (world.pictures / f"{n:02d}.png").write_bytes(picture(1000 + n))
    (world.pictures / "01.png").rename(world.pictures / "moved.png")
    (world.pictures / "03.png").unlink()
    fill(world.pictures, [f"new {n}.png" for n in range(20)])

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
        # At most one batch of four that was being written, one waiting, one filling and one embedded ahead.
        assert embedded + world.embedded <= 26 + 16
    world.check()
    assert world.run().unchanged == len(world.rows()) == 31
    assert list((world.pictures.parent / "own-cache" / "indexing").glob("*")) != []
    assert not [one for one in (world.pictures.parent / "own-cache" / "indexing").iterdir() if one.is_dir()]


@pytest.mark.slow
def test_an_error_while_writing_ends_the_run_and_the_next_goes_on(lance_world, monkeypatch):
    world = lance_world
    monkeypatch.setattr(rows, "BATCH_ROWS", 4)
    fill(world.pictures, [f"{n:02d}.png" for n in range(12)])
    real = type(world.index).upsert
    monkeypatch.setattr(type(world.index), "upsert", lambda *_: (_ for _ in ()).throw(DataError("the disk is full")))
    with pytest.raises(DataError, match="the disk is full"):
        world.run()
    monkeypatch.setattr(type(world.index), "upsert", real)
    assert world.run().added == 12
    world.check()


@pytest.mark.slow
def test_a_row_that_vanishes_meanwhile_costs_a_second_round(world, monkeypatch):
    fill(world.pictures, ["1.png", "2.png"])
    world.run()
    (world.pictures / "1.png").rename(world.pictures / "moved.png")
    real = pipeline.embed_entries

    def meanwhile(*given, **named):
        world.index.delete([str(world.pictures / "1.png")])
        return real(*given, **named)

    monkeypatch.setattr(pipeline, "embed_entries", meanwhile)
    report = world.run()
    assert (report.added, report.embedded) == (1, 1)
    world.check()
