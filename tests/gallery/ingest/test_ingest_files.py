"""The work files of indexing, and how images are dealt."""

import numpy as np
import torch

from indexing_world import QUIET, picture
from small_world import LinearBackbone, trainable
from union_igrot.gallery.engines.memory import MemoryIndex
from union_igrot.gallery.ingest.chunks import Chunk, Fact, read_chunk, write_chunk
from union_igrot.gallery.ingest.entries import Entry, Listing, data_entry
from union_igrot.gallery.ingest.plan import shares
from union_igrot.gallery.ingest.run import Report, ingest_images
from union_igrot.gallery.ingest.skipped import Skip, SkippedFile


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
    ingest_images(MemoryIndex(model.backbone.dim), model, Listing("added", [data_entry("a", picture(1))]), QUIET)
    assert not (tmp_path / "no").exists()
