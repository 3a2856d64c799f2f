"""Galleries that another program serves: indexed, searched, refined, kept up to date, by the commands users type."""

import json

import pytest
from test_index import CPU, fill

from engine_places import FAR, clear, place_of
from union_igrot.cli.index import main as union_index
from union_igrot.cli.search import main as union_search
from union_igrot.demo.backends import SearchRequest
from union_igrot.demo.gallery_backend import open_backend
from union_igrot.gallery.gallery import Gallery


@pytest.fixture(params=FAR)
def far(request, tmp_path):
    found = place_of(request.param, tmp_path)
    yield found
    if found.kind == "milvus":
        found.again()  # the commands made it; here it is dropped
    clear(found)


def test_from_a_folder_to_an_answer_and_back(far, tmp_path, capsys):
    images = tmp_path / "pictures"
    fill(images, 40)
    settings = [f"images={images}", f"index={far.uri}", *CPU]
    union_index(settings)
    assert f"{far.uri}: 40 rows; 40 added, 0 updated, 0 unchanged, 0 removed, 0 skipped" in capsys.readouterr().out

    asked = images / "0007.png"
    union_search([f"index={far.uri}", f"image={asked}", "where=width = 16 and id like '/%'", "k=3", "format=jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == [1, 2, 3]
    first = lines[0]["id"]

    (images / "0003.png").unlink()
    fill(images, 1, start=90)
    union_index(settings)
    assert "40 rows; 1 added, 0 updated, 39 unchanged, 1 removed, 0 skipped" in capsys.readouterr().out

    with Gallery.open(far.uri, create=False) as gallery:
        straight = gallery.search(asked, k=40)
        assert straight.ids[0] == first
        assert len(straight) == 40
        assert straight[0].thumbnail is not None
        refined = gallery.search(asked, k=40, liked=straight[5], disliked=straight[0])
        assert straight.ids[0] not in refined.ids
        assert gallery.delete(straight[:2]) == 2
        assert len(gallery) == 38
    engine = open_backend(far.uri)
    assert [one.id for one in engine.search(SearchRequest(None, "red"), 0, 38)] != []
    assert engine.image(straight.ids[5]).size == (16, 12)
    engine._gallery.close()
    engine._rows.close()
