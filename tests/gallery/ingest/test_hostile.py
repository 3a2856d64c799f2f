"""Hostile files: none stops a run; each is indexed right side up, or listed with a reason."""

import json
from pathlib import Path

import pytest

from hostile_files import hostile_folder, is_upright
from small_world import trainable
from union_igrot.cli.index import main as index_images
from union_igrot.gallery.engines.factory import MemoryIndex, open_index
from union_igrot.gallery.ingest.entries import path_as_text
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.ingest.sources import list_images


def check(fates, rows, listed):
    """Hold rows and listed against what has to become of each file."""
    assert set(rows) == {path_as_text(path) for path, fate in fates.items() if fate == "row"}
    assert set(listed) == {path_as_text(path) for path, fate in fates.items() if fate == "listed"}
    assert all(listed.values()), "a reason is missing"
    for name, row in rows.items():
        assert is_upright(row["thumbnail"]), name
        assert min(row["width"], row["height"]) >= 40, name


def rows_of(index):
    columns = ["id", "thumbnail", "width", "height"]
    return {
        name: {column: batch[column][at] for column in columns}
        for batch in index.scan(columns)
        for at, name in enumerate(batch["id"])
    }


@pytest.mark.slow
def test_some_hostile_files(tmp_path):
    fates = hostile_folder(tmp_path / "p", 60)
    model = trainable("sum", "frozen")
    index = MemoryIndex(model.backbone.dim)
    listing = list_images(str(tmp_path / "p"))
    # One by one, so that one reason a file is told.
    work = IngestOptions(batch_size=16, workers=0, progress=False)
    report = ingest_images(index, model, listing, work)
    listed = {entry.id: entry.fault for entry in listing.entries if entry.fault}
    assert report.skipped == sum(fate == "listed" for fate in fates.values())
    again = ingest_images(index, model, listing, work)
    assert again.unchanged == report.added
    check({path: fate for path, fate in fates.items() if fate == "row"}, rows_of(index), {})
    assert set(listed) <= {path_as_text(path) for path, fate in fates.items() if fate == "listed"}


@pytest.mark.slow
def test_a_thousand_hostile_files(tmp_path, capsys):
    pytest.importorskip("lance", reason='the extra "gallery" is not installed')
    fates = hostile_folder(tmp_path / "p", 1000)
    assert len(fates) == 1000
    uri = str(tmp_path / "photos.lance")
    settings = [
        f"images={tmp_path / 'p'}",
        f"index={uri}",
        "checkpoint=tiny",
        "progress=false",
        "batch_size=64",
        "strategy=cpu",
    ]
    index_images(settings)
    with open_index(uri) as index:
        rows = rows_of(index)
    lines = [json.loads(line) for line in Path(f"{uri}.skipped.jsonl").read_bytes().splitlines()]
    check(fates, rows, {line["path"]: line["reason"] for line in lines})
    said = capsys.readouterr().out
    assert f"{len(rows):,} added, 0 updated, 0 unchanged, 0 removed, {len(lines):,} skipped" in said
    # Again: nothing is read, and all of it stays as it is.
    index_images(settings)
    said = capsys.readouterr().out
    assert f"0 added, 0 updated, {len(rows):,} unchanged, 0 removed, {len(lines):,} skipped" in said
    assert len(Path(f"{uri}.skipped.jsonl").read_bytes().splitlines()) == len(lines)
