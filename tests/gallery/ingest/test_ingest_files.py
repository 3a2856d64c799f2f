"""The list of skipped images, options and reports."""

from indexing_world import QUIET, picture
from small_world import LinearBackbone, trainable
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.ingest.entries import Entry, Listing
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestReport, SkippedFile, SkippedImage


def test_the_list_of_the_skipped_survives_a_torn_line_and_keeps_what_others_wrote(tmp_path):
    path = tmp_path / "skipped.jsonl"
    one, two = SkippedImage("a", "why", 1, 2), SkippedImage("b \udcff", "two\nlines", 3, 4)
    SkippedFile(path, "mine").add([one])
    SkippedFile(path, "theirs").add([one])
    with path.open("ab") as file:
        file.write(b'{"path": "torn')
    again = SkippedFile(path, "mine")
    assert again.own == {"a": one}
    again.add([two])
    assert SkippedFile(path, "mine").own == {"a": one, two.path: two}
    assert SkippedFile(path, "theirs").own == {"a": one}
    again.keep({"a"})
    assert SkippedFile(path, "mine").own == {"a": one}
    SkippedFile(path, "mine").keep(set())
    SkippedFile(path, "theirs").keep(set())
    assert not path.exists()


def test_a_report_of_nothing_has_no_rate():
    assert IngestReport().rate == 0.0


def test_an_index_in_memory_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UNION_CACHE", str(tmp_path / "no" / "cache"))
    model = trainable("sum", "frozen", LinearBackbone())
    ingest_images(MemoryIndex(model.backbone.dim), model, Listing("added", [Entry("a", data=picture(1))]), QUIET)
    assert not (tmp_path / "no").exists()
