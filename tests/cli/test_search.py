"""`union-search` on a small gallery: output, errors and exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from small_world import Noise, trainable
from union_igrot.cli import search as command
from union_igrot.cli.config import compose
from union_igrot.cli.search import main as search
from union_igrot.errors import ConfigError, DataError, ImageError, UnionError
from union_igrot.gallery import gallery as gallery_module
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import read_queries
from union_igrot.gallery.results import Hit, SearchResult

COUNT = 9


@pytest.fixture(scope="module")
def shared_gallery():
    """A gallery in memory, which the command opens instead of one on disk."""
    gallery = Gallery.open("memory:", trainable().eval())
    numbers = range(COUNT)
    columns = {"class": ["it's", 'a "dog"', "x = y, z"] * 3, "year": list(numbers)}
    gallery.add([Noise(n, n % 3).open() for n in numbers], [f"p{n}" for n in numbers], columns)
    return gallery


@pytest.fixture
def gallery(shared_gallery, tmp_path, monkeypatch):
    opened_uris = []

    def opened(uri, **_):
        opened_uris.append(uri)
        return shared_gallery._index

    monkeypatch.setattr(gallery_module, "open_index", opened)
    # The model is loaded once; that an index loads its own is tested elsewhere.
    by_name, own = gallery_module.model_of_index, (shared_gallery.model, "linear")
    monkeypatch.setattr(gallery_module, "model_of_index", lambda *given: by_name(*given) if given[2] else own)
    monkeypatch.chdir(tmp_path)
    Noise(40, 1).open().save(tmp_path / "a.png")
    Noise(41, 2).open().save(tmp_path / "it's b, c=[1].png")
    shared_gallery.opened_uris = opened_uris
    return shared_gallery


def rows(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def run(*arguments: str) -> None:
    """Run the command without Hydra's start-up time."""
    command.search(compose("search", ["index=x.lance", *arguments]), Path())


def exits(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == code


def test_a_pipe_receives_one_object_per_hit(gallery, capsys):
    search(["index=x.lance", "image=a.png", "k=4"])
    found = rows(capsys)
    expected_hits = gallery.search("a.png", k=4)
    assert [row["id"] for row in found] == expected_hits.ids
    assert [row["rank"] for row in found] == [1, 2, 3, 4]
    assert np.allclose([row["score"] for row in found], expected_hits.scores, atol=1e-6)
    assert {row["query"] for row in found} == {1}
    for row, hit in zip(found, expected_hits, strict=True):
        assert row["columns"] == dict(hit.columns)
        assert "thumbnail" not in row["columns"]
    assert gallery.opened_uris == [str(Path("x.lance").absolute())]


def test_format_table(gallery, capsys):
    run("image=a.png", "text=large red", "k=3", "format=table")
    output = capsys.readouterr().out
    expected_hits = gallery.search("a.png", "large red", k=3)
    assert "a.png + 'large red'" in output
    assert "class" in output
    assert "year" in output
    assert "hash" not in output
    assert "▀" not in output
    for hit in expected_hits:
        assert any(f"{hit.score:.4f}" in line and hit.id in line for line in output.splitlines())
    run("terms=2:red", "terms=-a.png", "k=3", "format=table", "contact=terms.png")
    assert "2 * 'red' + -1 * a.png" in capsys.readouterr().out
    run("image=a.png", "k=3", "format=table", "thumbnails=on")
    output = capsys.readouterr().out
    assert output.count("▀") == 3 * 16 * 8
    assert "\x1b[38;2;" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["text=it's red, not [blue] = ${x}"], {"text": "it's red, not [blue] = ${x}"}),
        (["image=it's b, c=[1].png"], {"image": "it's b, c=[1].png"}),
        (["image=a.png", "image=it's b, c=[1].png"], {"image": ["a.png", "it's b, c=[1].png"]}),
        (["image=[a.png]", "text=null"], {"image": "a.png", "text": "null"}),
        (
            ["text=red", "where=class = 'it''s' or class = 'x = y, z'"],
            {"text": "red", "where": "year in (0,3,6,2,5,8)"},
        ),
        (["text=red", 'where="class" = \'a "dog"\' and year > 1'], {"text": "red", "where": "year in (4, 7)"}),
        (["text=red", "liked=[p1,p2]", "disliked=p3"], {"text": "red", "liked": ["p1", "p2"], "disliked": ["p3"]}),
        (["liked=p1", "liked=p2", "exclude=p1"], {"liked": ["p1", "p2"], "exclude": "p1"}),
        (["text=red", "search=exact"], {"text": "red", "mode": "exact"}),
        (["terms=2:red", "terms=./a.png", "terms=-blue"], {"terms": [("red", 2), ("./a.png", 1), ("blue", -1)]}),
        (["terms=[2:red,-a.png + large]"], {"terms": [("red", 2), (("a.png", "large"), -1)]}),
        (["image=a.png", "text=red", "terms=-blue"], {"image": "a.png", "text": "red", "terms": [("blue", -1)]}),
        (["image=a.png#1,2,5,4"], {"image": "a.png#1,2,5,4"}),
        (["image=['a.png#0,0,50%,50%',a.png]"], {"image": ["a.png#0,0,50%,50%", "a.png"]}),
    ],
)
def test_arguments_are_passed_to_the_search(gallery, capsys, arguments, expected):
    run("k=5", *arguments)
    assert [row["id"] for row in rows(capsys)] == gallery.search(k=5, **expected).ids


def test_pages_lowest_scores_and_narrow_tables(gallery, capsys, monkeypatch):
    run("text=red", "k=9")
    whole = rows(capsys)
    run("text=red", "k=3", "offset=4", f"min_score={whole[5]['score'] - 1e-6}")
    assert [(row["rank"], row["id"]) for row in rows(capsys)] == [(row["rank"], row["id"]) for row in whole[4:6]]
    run("text=red", "k=3", "offset=4", "format=table")
    assert any(line.split()[:1] == ["5"] for line in capsys.readouterr().out.splitlines())
    monkeypatch.setenv("COLUMNS", "20")
    run("text=red", "k=1", "format=table")
    narrow = capsys.readouterr().out
    assert whole[0]["id"] in narrow
    assert "class" not in narrow
    exits(1, "text=red", "min_score=1.1")


def test_nothing_near_is_one_line_and_exits_with_1(gallery, capsys, tmp_path, monkeypatch):
    run("text=red", "k=9")
    whole = rows(capsys)
    exits(1, "text=red", "min_score=1.1")
    nothing = f"nothing near: the best score is {whole[0]['score']:.4f}, below min_score=1.1000\n"
    assert capsys.readouterr() == ("", nothing)
    kinds = []
    limit = whole[2]["score"] - 1e-6
    monkeypatch.setattr(Gallery, "near_score", lambda _, kind: kinds.append(kind) or limit)
    run("text=red", "min_score=auto")
    assert [row["id"] for row in rows(capsys)] == [row["id"] for row in whole[:3]]
    assert kinds == ["text"]
    limit = 1.1
    (tmp_path / "q.jsonl").write_text('{"text": "blue", "id": "b"}\n{"text": "red", "liked": ["p1"]}\n')
    with pytest.raises(ConfigError, match=r"^q.jsonl, line 2: min_score=auto is for queries of an image"):
        run("queries=q.jsonl", "min_score=auto")
    (tmp_path / "q.jsonl").write_text('{"text": "blue", "id": "b"}\n{"text": "red"}\n')
    exits(1, "queries=q.jsonl", "min_score=auto")
    assert capsys.readouterr().err.startswith("nothing near for 2 of 2 queries, such as b: the best score is ")
    for value in ("nan", "high"):
        with pytest.raises(ConfigError, match=f"min_score: {value} .expected a number, auto or null"):
            run("text=red", f"min_score={value}")


def test_results_without_a_file_are_reported(gallery, capsys, tmp_path, monkeypatch):
    hits = [Hit(str(tmp_path / name), 0.5, {"source": source}) for name, source in (("a", "/photos"), ("b", "added"))]
    monkeypatch.setattr(Gallery, "search_many", lambda *_, **__: [SearchResult(hits)])
    run("text=red")
    assert capsys.readouterr().err.startswith(f"1 results no longer exist on this disk, such as '{tmp_path}/a'; run")


def test_no_hits_exit_with_1(gallery, capsys):
    exits(1, "text=red", "where=year > 99")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "no hits\n")
    exits(1, "text=red", "where=year > 99", "format=table")


MISTAKES = [
    ([], "the query is empty"),
    (["disliked=p1"], "the query is empty"),
    (["image=not there.png"], "not there.png: the image is missing"),
    (["image="], "image"),
    (["text=red", "k=0"], "k: 0"),
    (["text=red", "search=quick"], "search: quick"),
    (["text=red", "search=ann"], "no approximate index"),
    (["text=red", "where=color = 'red'"], "no column 'color'"),
    (["text=red", "where=year >"], "cannot be parsed"),
    (["text=red", "liked=p99"], "p99"),
    (["text=red", "queries=q.csv"], "text= and queries= are both given"),
    (["queries=q.csv"], "no such file"),
    (["queries=a.png"], "expected a .jsonl or .csv file"),
    (["text=red", "contact=a.jpg"], "expected a .png file"),
    (["text=red", "contact=no/a.png"], "does not exist"),
    (["text=red", "checkpoint=no/such"], "no/such"),
    (["text=red", "format=xml"], "format: xml"),
    (["txt=red"], "txt"),
    (["terms=-red"], "only negative terms; add one positive term"),
    (["terms=2:"], "the term '2:' is empty"),
    (["terms=b.png"], "b.png: the image is missing"),
    (["terms=red", "queries=q.csv"], "terms= and queries= are both given"),
    (["image=a.png#1,2,99,4"], "invalid region of a.png: #1,2,99,4"),
    (["image=a.png#1,2,3"], "expected FILE#x,y,width,height"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "part"), MISTAKES)
def test_mistakes_are_one_line_errors(gallery, capsys, arguments, part):
    with pytest.raises(UnionError) as caught:
        run(*arguments)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_missing_index_exits_with_2(refused):
    for uri in ("x.txt", "memory:"):
        assert uri in refused(search, f"index={uri}", "text=red")


BATCH = [
    {"image": "deep/a.png", "id": "first"},
    {"text": 'it\'s blue, "large"'},
    {"image": ["deep/a.png", "deep/b.png"], "text": "small", "exclude": ["p0"], "liked": ["p1"], "disliked": None},
]


@pytest.fixture
def deep(gallery, tmp_path):
    (tmp_path / "lists" / "deep").mkdir(parents=True)
    for name, number in (("a", 50), ("b", 51)):
        Noise(number, 1).open().save(tmp_path / "lists" / "deep" / f"{name}.png")
    return tmp_path / "lists"


def batch_hits(gallery, deep) -> list[tuple]:
    queries = [
        {"image": deep / "deep/a.png"},
        {"text": BATCH[1]["text"]},
        {"image": [deep / "deep/a.png", deep / "deep/b.png"], "text": "small", "exclude": ["p0"], "liked": ["p1"]},
    ]
    found = gallery.search_many(queries, 4)
    return [(name, hit.id) for name, hits in zip(("first", 2, 3), found, strict=True) for hit in hits]


def test_queries_from_a_file_of_json_lines(gallery, deep, capsys, monkeypatch):
    file = deep / "queries, 1.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in BATCH) + "\n\n", encoding="utf-8")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where a bar is shown
    for step in (256, 2):
        monkeypatch.setattr(command, "_BATCH", step)
        run(f"queries={file}", "k=4", "format=jsonl")
        output = capsys.readouterr()
        found = [json.loads(line) for line in output.out.splitlines()]
        assert [(row["query"], row["id"]) for row in found] == batch_hits(gallery, deep)
        assert ("searching" in output.err) is (step == 2)


def test_queries_from_a_csv_file(gallery, deep, capsys):
    file = deep / "queries.csv"
    file.write_text('﻿text,image,id\n,deep/a.png,first\n"it\'s blue, ""large""",,\n', encoding="utf-8")
    run(f"queries={file}", "k=4")
    assert [(row["query"], row["id"]) for row in rows(capsys)] == batch_hits(gallery, deep)[:8]
    run(f"queries={file}", "k=2", "format=table")
    assert "first: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("q.jsonl", '{"text": "a"}\n{"image": "no.png"}\n', "q.jsonl, line 2: "),
        ("q.jsonl", '{"text": "a"}\n{"text": ""}\n', "q.jsonl, line 2: the query is empty"),
        ("q.jsonl", '{"text": "a"}\nnot json\n', "q.jsonl, line 2: not JSON"),
        ("q.jsonl", "[1]\n", "q.jsonl, line 1: not an object"),
        ("q.jsonl", '{"txt": "a"}\n', "q.jsonl, line 1: unknown field 'txt'"),
        ("q.jsonl", '{"text": 3}\n', "q.jsonl, line 1: invalid value for text"),
        ("q.jsonl", '{"image": {"a": 1}}\n', "q.jsonl, line 1: invalid image"),
        ("q.jsonl", '{"text": "a", "liked": [1]}\n', "q.jsonl, line 1: invalid liked [1]"),
        ("q.jsonl", '{"text": "a", "id": [1]}\n', "q.jsonl, line 1: invalid id [1]"),
        ("q.jsonl", '{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n', "is already used in"),
        ("q.jsonl", "\n", "holds no query"),
        ("q.csv", "", "holds no query"),
        ("q.csv", "text,image\n", "holds no query"),
        ("q.csv", "txt\na\n", "q.csv, line 1: unknown field 'txt'"),
        ("q.csv", "text,text\na,b\n", "is repeated"),
        ("q.csv", "text,image\na\n", "q.csv, line 2: has 1 cells, the header 2"),
        ("q.csv", 'text\n"a\n', "q.csv"),
    ],
)
def test_an_invalid_line_is_named(tmp_path, name, text, part):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises((DataError, ImageError)) as caught:
        read_queries(tmp_path / name)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contact_draws_a_sheet(gallery, deep, capsys, tmp_path):
    run("image=a.png", "contact=it's a sheet.png", "k=20")
    assert len(rows(capsys)) == COUNT
    with Image.open(tmp_path / "it's a sheet.png") as one:
        alone = one.height
    lines = "".join(json.dumps({"text": f"large {number}"}) + "\n" for number in range(30))
    (deep / "q.jsonl").write_text(lines)
    run(f"queries={deep / 'q.jsonl'}", "contact=many.png", "k=3")
    assert "shows the first 12 of 30 queries" in capsys.readouterr().err
    with Image.open(tmp_path / "many.png") as many:
        assert many.height > alone


def test_a_contact_sheet_that_cannot_be_written_is_an_error(gallery, capsys, tmp_path):
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(DataError, match=r"cannot write contact=sheet\.png"):
        run("image=a.png", "contact=sheet.png")


@pytest.mark.parametrize("form", ["jsonl", "table"])
def test_a_closed_pipe_exits_with_141(gallery, capsys, monkeypatch, form):
    unread, written = os.pipe()
    os.close(unread)
    with os.fdopen(written, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            search(["index=x.lance", "image=a.png", f"format={form}"])
    assert stopped.value.code == 141
    assert capsys.readouterr().err == ""


def test_names_beyond_the_output_encoding_are_escaped(gallery, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"text": "red", "id": "猫 \\ud800"}\n', encoding="utf-8")
    for encoding in ("ascii", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        run("queries=q.jsonl", "k=1")
        sys.stdout.flush()
        assert json.loads(raw.getvalue())["query"] == "猫 \ud800"


def test_help_lists_the_exit_codes(capsys):
    search(["--help"])
    output = capsys.readouterr().out
    for part in ("usage: union-search", "0 results, 1 no results", "taken as typed", "where=null"):
        assert part in output


@pytest.mark.slow
def test_the_command_on_disk_and_in_a_pipe(tmp_path):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    index = tmp_path / "my photos, all.lance"
    with Gallery.open(index, "tiny") as gallery:
        gallery.add([Noise(n, n % 3).open() for n in range(300)], [f"p{n}" for n in range(300)])
    command_line = [sys.executable, "-m", "union_igrot.cli.search", f"index={index}", "text=a red square", "k=300"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 300
    assert done.stderr == ""
    (tmp_path / "q.jsonl").write_text('{"text": "a red square"}\n' * 60)
    command_line = [*command_line[:-2], "queries=q.jsonl", "k=300"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert json.loads(process.stdout.readline())["rank"] == 1
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
