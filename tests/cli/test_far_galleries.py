"""Galleries on a server or an object store, through the commands and the demo."""

import json

import pytest
from test_index import CPU, fill

from index_locations import REMOTE, new_location
from union_igrot.cli.index import main as union_index
from union_igrot.cli.search import main as union_search
from union_igrot.demo.backends import open_backend
from union_igrot.gallery.gallery import Gallery


@pytest.fixture(params=REMOTE)
def remote(request, tmp_path):
    location = new_location(request.param, tmp_path)
    yield location
    if location.engine == "milvus":
        location.reopen()  # the commands created it, so that it has to be dropped here
    location.remove()


def test_index_search_refine_and_delete(remote, tmp_path, capsys):
    images = tmp_path / "photos"
    fill(images, 40)
    settings = [f"images={images}", f"index={remote.uri}", *CPU]
    union_index(settings)
    assert f"{remote.uri}: 40 rows; 40 added, 0 updated, 0 unchanged, 0 removed, 0 skipped" in capsys.readouterr().out

    query = images / "0007.png"
    union_search([f"index={remote.uri}", f"image={query}", "where=width = 16 and id like '/%'", "k=3", "format=jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == [1, 2, 3]
    first = lines[0]["id"]

    (images / "0003.png").unlink()
    fill(images, 1, start=90)
    union_index(settings)
    assert "40 rows; 1 added, 0 updated, 39 unchanged, 1 removed, 0 skipped" in capsys.readouterr().out

    with Gallery.open(remote.uri, create=False) as gallery:
        found = gallery.search(query, k=40)
        assert found.ids[0] == first
        assert len(found) == 40
        assert found[0].thumbnail is not None
        refined = gallery.search(query, k=40, liked=found[5], disliked=found[0])
        assert found.ids[0] not in refined.ids
        assert gallery.delete(found[:2]) == 2
        assert len(gallery) == 38
    engine = open_backend(remote.uri)
    assert [one.id for one in engine.search(0, 38, None, "red")] != []
    assert engine.image(found.ids[5]).size == (16, 12)
    engine._gallery.close()
    engine._rows.close()
