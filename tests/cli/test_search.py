"""`union-search` on a small gallery: what is printed where, and how it ends."""

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
from union_igrot.errors import CheckpointError, DataError, ImageError, UnionError
from union_igrot.gallery import gallery as room
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import read_queries

COUNT = 9


@pytest.fixture(scope="module")
def kept():
    """A gallery in memory, as the command would find it on disk."""
    gallery = Gallery.open("memory:", trainable().eval())
    numbers = range(COUNT)
    columns = {"class": ["it's", 'a "dog"', "x = y, z"] * 3, "year": list(numbers)}
    gallery.add([Noise(n, n % 3).open() for n in numbers], [f"p{n}" for n in numbers], columns)
    return gallery


@pytest.fixture
def gallery(kept, tmp_path, monkeypatch):
    asked = []

    def opened(uri, **_):
        asked.append(uri)
        return kept._index

    monkeypatch.setattr(room, "open_index", opened)
    # The model is loaded once: that an index finds its own is a test of `Gallery`.
    monkeypatch.setattr(room, "load_recorded_model", lambda *_: (kept.model, "linear"))
    monkeypatch.chdir(tmp_path)
    Noise(40, 1).open().save(tmp_path / "a.png")
    Noise(41, 2).open().save(tmp_path / "it's b, c=[1].png")
    kept.asked = asked
    return kept


def rows(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def ask(*arguments: str) -> None:
    """What the command does, without the time that Hydra takes to run it."""
    command.search(compose("search", ["index=x.lance", *arguments]), Path())


def ends(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        ask(*arguments)
    assert stopped.value.code == code


def test_a_pipe_gets_one_object_a_hit(gallery, capsys):
    search(["index=x.lance", "image=a.png", "k=4"])
    found = rows(capsys)
    wanted = gallery.search("a.png", k=4)
    assert [row["id"] for row in found] == wanted.ids
    assert [row["rank"] for row in found] == [1, 2, 3, 4]
    assert np.allclose([row["score"] for row in found], wanted.scores, atol=1e-6)
    assert {row["query"] for row in found} == {1}
    for row, hit in zip(found, wanted, strict=True):
        assert row["columns"] == dict(hit.columns)
        assert "thumbnail" not in row["columns"]
    assert gallery.asked == [str(Path("x.lance").absolute())]


def test_a_person_gets_a_table(gallery, capsys):
    ask("image=a.png", "text=large red", "k=3", "format=table")
    said = capsys.readouterr().out
    wanted = gallery.search("a.png", "large red", k=3)
    assert "a.png + 'large red'" in said
    assert "class" in said
    assert "year" in said
    assert "hash" not in said
    assert "▀" not in said
    for hit in wanted:
        assert any(f"{hit.score:.4f}" in line and hit.id in line for line in said.splitlines())
    ask("image=a.png", "k=3", "format=table", "thumbnails=on")
    said = capsys.readouterr().out
    assert said.count("▀") == 3 * 16 * 8
    assert "\x1b[38;2;" in said


@pytest.mark.parametrize(
    ("arguments", "asked"),
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
    ],
)
def test_what_is_typed_is_what_is_asked(gallery, capsys, arguments, asked):
    ask("k=5", *arguments)
    assert [row["id"] for row in rows(capsys)] == gallery.search(k=5, **asked).ids


def test_nothing_found_is_said_and_has_a_code_of_its_own(gallery, capsys):
    ends(1, "text=red", "where=year > 99")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "no hits\n")
    ends(1, "text=red", "where=year > 99", "format=table")


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
]


@pytest.mark.parametrize(("arguments", "part"), MISTAKES)
def test_a_mistake_is_one_line(gallery, capsys, arguments, part):
    with pytest.raises(UnionError) as caught:
        ask(*arguments)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("arguments", "part"), MISTAKES[::6])
def test_a_mistake_has_code_2(gallery, capsys, arguments, part):
    with pytest.raises(SystemExit) as stopped:
        search(["index=x.lance", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("union-search: ")
    assert part in said.err
    assert len(said.err.splitlines()) == 1


def test_no_index_is_one_line_too(tmp_path, capsys):
    for uri in ("x.txt", "memory:"):
        with pytest.raises(SystemExit) as stopped:
            search([f"index={uri}", "text=red"])
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_another_model_than_the_indexs_is_refused(gallery, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"made with backbone linear.*not with backbone tiny") as caught:
        ask("text=red", "checkpoint=tiny")
    assert gallery.model.describe()["heads"] in str(caught.value)


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


def batch_answers(gallery, deep) -> list[tuple]:
    asked = [
        {"image": deep / "deep/a.png"},
        {"text": BATCH[1]["text"]},
        {"image": [deep / "deep/a.png", deep / "deep/b.png"], "text": "small", "exclude": ["p0"], "liked": ["p1"]},
    ]
    found = gallery.search_many(asked, 4)
    return [(name, hit.id) for name, hits in zip(("first", 2, 3), found, strict=True) for hit in hits]


def test_queries_from_a_file_of_json_lines(gallery, deep, capsys, monkeypatch):
    file = deep / "queries, 1.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in BATCH) + "\n\n", encoding="utf-8")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal; nobody looks at a bar elsewhere
    for step in (256, 2):
        monkeypatch.setattr(command, "_BATCH", step)
        ask(f"queries={file}", "k=4", "format=jsonl")
        said = capsys.readouterr()
        found = [json.loads(line) for line in said.out.splitlines()]
        assert [(row["query"], row["id"]) for row in found] == batch_answers(gallery, deep)
        assert ("searching" in said.err) is (step == 2)


def test_queries_from_a_table(gallery, deep, capsys):
    file = deep / "queries.csv"
    file.write_text('﻿text,image,id\n,deep/a.png,first\n"it\'s blue, ""large""",,\n', encoding="utf-8")
    ask(f"queries={file}", "k=4")
    assert [(row["query"], row["id"]) for row in rows(capsys)] == batch_answers(gallery, deep)[:8]
    ask(f"queries={file}", "k=2", "format=table")
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
def test_a_wrong_line_is_named(tmp_path, name, text, part):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises((DataError, ImageError)) as caught:
        read_queries(tmp_path / name)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "q.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_queries(tmp_path / "q.csv")


def test_a_sheet_is_drawn_on_request(gallery, deep, capsys, tmp_path):
    ask("image=a.png", "contact=it's a sheet.png", "k=20")
    assert len(rows(capsys)) == COUNT
    with Image.open(tmp_path / "it's a sheet.png") as one:
        alone = one.height
    lines = "".join(json.dumps({"text": f"large {number}"}) + "\n" for number in range(30))
    (deep / "q.jsonl").write_text(lines)
    ask(f"queries={deep / 'q.jsonl'}", "contact=many.png", "k=3")
    assert "shows the first 12 of 30 queries" in capsys.readouterr().err
    with Image.open(tmp_path / "many.png") as many:
        assert many.height > alone


def test_a_sheet_that_cannot_be_written_is_one_line(gallery, capsys, tmp_path):
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(DataError, match=r"cannot write contact=sheet\.png"):
        ask("image=a.png", "contact=sheet.png")


@pytest.mark.parametrize("form", ["jsonl", "table"])
def test_a_reader_that_goes_away_ends_it_in_peace(gallery, capsys, monkeypatch, form):
    unread, written = os.pipe()
    os.close(unread)
    with os.fdopen(written, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        ends(141, "image=a.png", f"format={form}")
    assert capsys.readouterr().err == ""


def test_an_interruption_has_the_shells_code(gallery, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Gallery, "search_many", interrupted)
    with pytest.raises(SystemExit) as stopped:
        search(["index=x.lance", "text=red"])
    assert stopped.value.code == 130
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)


def test_a_name_beyond_the_outputs_letters_is_escaped(gallery, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"text": "red", "id": "猫 \\ud800"}\n', encoding="utf-8")
    for encoding in ("ascii", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        ask("queries=q.jsonl", "k=1")
        sys.stdout.flush()
        assert json.loads(raw.getvalue())["query"] == "猫 \ud800"


def test_help_names_the_exit_codes(capsys):
    search(["--help"])
    said = capsys.readouterr().out
    for part in ("usage: union-search", "0 results, 1 no results", "taken as typed", "where=null"):
        assert part in said


@pytest.mark.slow
def test_the_command_on_disk_and_in_a_pipe(tmp_path):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    place = tmp_path / "my photos, all.lance"
    with Gallery.open(place, "tiny") as gallery:
        gallery.add([Noise(n, n % 3).open() for n in range(300)], [f"p{n}" for n in range(300)])
    words = [sys.executable, "-m", "union_igrot.cli.search", f"index={place}", "text=a red square", "k=300"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 300
    assert done.stderr == ""
    (tmp_path / "q.jsonl").write_text('{"text": "a red square"}\n' * 60)
    words = [*words[:-2], "queries=q.jsonl", "k=300"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert json.loads(process.stdout.readline())["rank"] == 1
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
    none = subprocess.run(
        [*words[:3], f"index={tmp_path / 'none.lance'}", "text=a"], capture_output=True, text=True, check=False
    )
    assert none.returncode == 2
    assert len(none.stderr.splitlines()) == 1
