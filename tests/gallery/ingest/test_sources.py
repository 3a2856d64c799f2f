"""The forms of `images=`: folders, patterns, lists and tar shards."""

import io
import json
import os
import tarfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.ingest import sources
from union_igrot.gallery.ingest.entries import (
    WEB_ADDRESS,
    Entry,
    column_value,
    unify_column_types,
    unique_entries,
)
from union_igrot.gallery.ingest.sources import list_images

BYTES = b"not looked at here"


def write(path, data=BYTES):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(listing, root):
    return [entry.id.removeprefix(f"{root}/") for entry in listing.entries]


def test_a_folder_is_read_with_its_subfolders_but_not_what_is_hidden(tmp_path):
    for name in ("b.jpg", "a/c.png", "a/.hidden.jpg", ".git/d.jpg", "a/b/no suffix", "z/Über 雪.jpg", "@eaDir/x.jpg"):
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    listing = list_images(f"{tmp_path}/")
    assert listing.source == str(tmp_path)
    assert names(listing, tmp_path) == ["b.jpg", "a/c.png", "a/b/no suffix", "z/Über 雪.jpg"]
    entry = listing.entries[0]
    found = (tmp_path / "b.jpg").stat()
    expected = Entry(str(tmp_path / "b.jpg"), str(tmp_path / "b.jpg"), found.st_size, found.st_mtime_ns)
    assert replace(entry, found={}) == expected
    assert listing.unreadable == []
    assert listing.excluded == {".hidden.jpg": 1, ".git": 1, "@eaDir": 1}


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (["drafts"], ["a/drafts/1.jpg", "drafts/2.jpg"]),
        (["drafts/"], ["a/drafts/1.jpg", "drafts/2.jpg"]),
        (["**/drafts/**"], ["a/drafts/1.jpg", "drafts/2.jpg"]),
        (["a/drafts/**"], ["a/drafts/1.jpg"]),
        (["*.gif", "a/b*"], ["4.gif", "a/b.jpg"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("pattern", ["", "/**/*.*"])
def test_patterns_of_files_and_folders_are_left_out(tmp_path, exclude, left_out, pattern):
    given = ["4.gif", "a/b.jpg", "a/drafts/1.jpg", "drafts/2.jpg", "z.jpg"]
    for name in given:
        write(tmp_path / name)
    listing = list_images(f"{tmp_path}{pattern}", exclude=exclude)
    assert sorted(names(listing, tmp_path)) == sorted(set(given) - set(left_out))
    assert bool(listing.excluded) is bool(left_out)


def test_lists_in_other_spellings_and_addresses(tmp_path):
    write(tmp_path / "sub" / unicodedata.normalize("NFD", "café.jpg"))
    text = f"sub\\{unicodedata.normalize('NFC', 'café.jpg')}\nhttps://host/a.jpg\n"
    (tmp_path / "list.txt").write_text(f'{text} "sub/{unicodedata.normalize("NFD", "café.jpg")}" \n')
    found, address = list_images(str(tmp_path / "list.txt")).entries  # the last is the first again
    assert (found.fault, found.path) == (None, f"{tmp_path}/sub/{unicodedata.normalize('NFD', 'café.jpg')}")
    assert (address.id, address.fault) == ("https://host/a.jpg", WEB_ADDRESS)
    with pytest.raises(ConfigError, match="web address"):
        list_images("https://host/a.jpg")


def test_a_list_without_any_existing_image_is_an_error(tmp_path):
    (tmp_path / "list.csv").write_text("path\na.jpg\nhttp://host/b.jpg\n")
    with pytest.raises(
        DataError, match=r"none of the 2 listed images exists \(first: .*/a\.jpg: the file is missing\)"
    ):
        list_images(str(tmp_path / "list.csv"))


def test_raw_files_are_named(tmp_path):
    write(tmp_path / "a.NEF")
    shard(tmp_path / "b.tar", [("c.cr2", b"raw")])
    for source in ("a.NEF", "b.tar"):
        (entry,) = list_images(str(tmp_path / source)).entries
        assert entry.fault.startswith("camera RAW file")


def test_links_are_followed_but_no_folder_is_entered_twice_nor_a_parent(tmp_path):
    write(tmp_path / "outside" / "far.jpg")
    write(tmp_path / "root" / "deep" / "x.jpg")
    write(tmp_path / "beside.jpg")
    root = tmp_path / "root"
    (root / "0 first").symlink_to(root / "deep")
    (root / "deep" / "loop").symlink_to(root)
    (root / "deep" / "self").symlink_to("self")
    (root / "up").symlink_to("..")
    (root / "away").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(root)
    (root / "same.jpg").symlink_to(root / "deep" / "x.jpg")
    (root / "gone.jpg").symlink_to(root / "nothing")
    listing = list_images(str(root))
    faults = {name: entry.fault for name, entry in zip(names(listing, root), listing.entries, strict=True)}
    assert faults == {
        "gone.jpg": "the file is missing",
        "same.jpg": None,
        "deep/self": "the file cannot be reached (Too many levels of symbolic links)",
        "deep/x.jpg": None,
        "away/far.jpg": None,
    }


def test_files_that_cannot_be_images_have_a_fault(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    write(tmp_path / "folder.jpg" / "inside.jpg")
    listing = list_images(str(tmp_path))
    assert [entry.fault for entry in listing.entries] == ["is empty (0 bytes)", "is not a regular file", None]
    (tmp_path / "list.txt").write_text("folder.jpg\npipe.jpg\n\0.jpg\n")
    faults = [entry.fault for entry in list_images(str(tmp_path / "list.txt")).entries]
    assert faults == ["is a folder", "is not a regular file", "the file cannot be reached (embedded null byte)"]


def test_an_unreadable_folder_is_listed(tmp_path, monkeypatch):
    write(tmp_path / "open" / "a.jpg")
    write(tmp_path / "shut" / "b.jpg")
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images(str(tmp_path))
    assert names(listing, tmp_path) == ["open/a.jpg", "shut"]
    assert listing.entries[1].fault == "the folder cannot be read (Permission denied)"
    assert listing.unreadable == [str(tmp_path / "shut")]


def test_undecodable_names_are_escaped_and_never_confused(tmp_path):
    odd = os.fsdecode(b"odd \xff.jpg")
    for name in (odd, "odd \\xff.jpg", "two\nlines.jpg", " blanks "):
        (tmp_path / name).write_bytes(BYTES)
    listing = list_images(str(tmp_path))
    by_path = {Path(entry.path).name: entry for entry in listing.entries}
    assert set(by_path) == {odd, "odd \\xff.jpg", "two\nlines.jpg", " blanks "}
    ids = [entry.id for entry in listing.entries]
    assert len(set(ids)) == 4
    for one in ids:
        one.encode()
    clash = [entry for entry in listing.entries if entry.fault]
    assert [entry.fault for entry in clash] == [
        "another file has the same name after its undecodable bytes are escaped; rename it"
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("?.jpg", ["a.jpg", "b.jpg"]),
        ("**/?.jpg", ["a.jpg", "b.jpg", "deep/down/e.jpg"]),
        ("[ab].???", ["a.jpg", "b.jpg"]),
        ("{a,b,c}.{jpg,png}", ["a.jpg", "a.png", "b.jpg", "b.png", "c.jpg", "c.png"]),
        ("{a,b}*", ["a.jpg", "b.jpg"]),
        ("*/**/*.jpg", ["deep/down/e.jpg"]),
        ("deep/**", ["deep/down/e.jpg"]),
        (".h*", [".hidden.jpg"]),
        ("n{8..10}.jpg", ["n8.jpg", "n9.jpg", "n10.jpg"]),
        ("n{008..010}.jpg", ["n008.jpg", "n009.jpg", "n010.jpg"]),
        ("n{9..8}.jpg", ["n9.jpg", "n8.jpg"]),
        ("[x].jpg", ["[x].jpg"]),
        ("{x}.jpg", ["{x}.jpg"]),
    ],
)
def test_patterns(tmp_path, pattern, expected):
    given = ["a.jpg", "b.jpg", "deep/down/e.jpg", ".hidden.jpg", "n8.jpg", "n9.jpg", "n10.jpg", "n008.jpg"]
    for name in [*given, "[x].jpg", "{x}.jpg", ".away/f.jpg"]:
        write(tmp_path / name)
    (tmp_path / "deep" / "loop1").symlink_to(tmp_path)
    (tmp_path / "deep" / "loop2").symlink_to(tmp_path)
    listing = list_images(f"{tmp_path}/{pattern}")
    assert names(listing, tmp_path) == expected
    # A name without wildcards is listed even if it does not exist.
    there = {entry.id for entry in listing.entries if entry.fault is None}
    assert there == {f"{tmp_path}/{name}" for name in expected if (tmp_path / name).exists()}


@pytest.mark.slow
@pytest.mark.parametrize("images", ["nothing here", "*.nope", "{a,b}.jpg", "", "{0..9}{0..999999}.tar", "a**b/*"])
def test_a_source_without_files_is_an_error(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"give|pattern"):
        list_images(images)


def test_a_single_image_and_a_compressed_archive(tmp_path):
    picture = write(tmp_path / "a.jpg")
    assert [entry.path for entry in list_images(str(picture)).entries] == [str(picture)]
    write(tmp_path / "a.tar.gz")
    with pytest.raises(ConfigError, match="compressed tar"):
        list_images(str(tmp_path / "a.tar.gz"))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "photos" / "a.jpg")
    assert list_images("~/photos").source == str(tmp_path / "photos")


def test_a_text_list(tmp_path):
    for name in ("a.jpg", "sub/b.jpg", " blank.jpg"):
        write(tmp_path / name)
    text = f"# a comment\na.jpg\r\n\n./sub/../sub/b.jpg\n blank.jpg\n{tmp_path}/a.jpg\nno.jpg\n"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\xff.jpg")
    listing = list_images(str(tmp_path / "list.txt"))
    assert listing.source == str(tmp_path / "list.txt")
    assert names(listing, tmp_path) == ["a.jpg", "sub/b.jpg", " blank.jpg", "no.jpg", "\\xff.jpg"]
    assert [entry.fault is None for entry in listing.entries] == [True, True, True, False, False]


@pytest.fixture
def listed(tmp_path):
    """A folder with the image of a list; others may be missing."""
    write(tmp_path / "a.jpg")
    return tmp_path


def test_a_csv_list_keeps_its_columns_with_their_types(listed, tmp_path):
    rows = ["path,label,year,share,seen,zip,note", 'a.jpg,"dog, big",2020,0.5,true,00123,']
    rows += ["b.jpg,cat,,1,False,10115,x", "c.jpg,,-3,2e3,,7,"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    listing = list_images(str(tmp_path / "list.csv"))
    assert [dict(entry.columns) for entry in listing.entries] == [
        {"label": "dog, big", "year": 2020, "share": 0.5, "seen": True, "zip": "00123", "note": None},
        {"label": "cat", "year": None, "share": 1.0, "seen": False, "zip": "10115", "note": "x"},
        {"label": None, "year": -3, "share": 2000.0, "seen": None, "zip": "7", "note": None},
    ]


@pytest.mark.parametrize(("name", "separator"), [("list.csv", ";"), ("list.tsv", "\t")])
def test_a_list_of_a_spreadsheet(listed, name, separator):
    text = f"year{separator}path\n2020{separator}a.jpg\n"
    (listed / name).write_bytes(text.encode("utf-16"))
    (entry,) = list_images(str(listed / name)).entries
    assert (entry.path, entry.fault, entry.columns) == (f"{listed}/a.jpg", None, {"year": 2020})


def test_json_lines_and_parquet_keep_their_columns(listed, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: PLC0415 - an extra

    values = [
        {"path": "a.jpg", "n": 1, "x": 1.5, "tags": ["a", "b"], "mix": 1, "big": 2**70, "nan": float("nan")},
        {"path": "b.jpg", "n": 2.5, "x": None, "mix": "text", "big": 3},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    expected = [
        {"n": 1.0, "x": 1.5, "tags": '["a", "b"]', "mix": "1", "big": str(2**70), "nan": None},
        {"n": 2.5, "x": None, "mix": "text", "big": "3"},
    ]
    assert [entry.columns for entry in list_images(str(tmp_path / "list.jsonl")).entries] == expected
    table = pa.table(
        {"path": ["a.jpg", "b.jpg"], "n": [1, 2], "tags": [["a"], None], "when": pa.array([0, 1], "date32")}
    )
    pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
    assert [entry.columns for entry in list_images(str(tmp_path / "list.parquet")).entries] == [
        {"n": 1, "tags": '["a"]', "when": "1970-01-01"},
        {"n": 2, "tags": None, "when": "1970-01-02"},
    ]


def test_lists_in_parts_agree_on_the_types(listed, tmp_path):
    (tmp_path / "part-0.csv").write_text("path,year\na.jpg,1999\n")
    (tmp_path / "part-1.csv").write_text("path,year\nb.jpg,1999.5\n")
    listing = list_images(f"{tmp_path}/part-*.csv")
    assert [entry.columns["year"] for entry in listing.entries] == [1999.0, 1999.5]
    assert isinstance(listing.entries[0].columns["year"], float)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "file,label\na.jpg,dog\n", r"no column path \(found file, label\); rename"),
        ("l.csv", "path,label\na.jpg,dog,more\n", "line 2"),
        ("l.csv", "path,label\n,dog\n", "line 2"),
        ("l.csv", "path,size\na.jpg,3\n", "reserved column name: size"),
        ("l.csv", "path,label\na.jpg,x\na.jpg,y\n", "twice with different columns"),
        ("l.csv", 'path,label\na.jpg,"dog\nb.jpg,cat\n', "line 2: .*unexpected end of data"),
        ("l.csv", "path,year,year\na.jpg,1,2\n", "'year' twice"),
        ("l.jsonl", '{"path": "\\ud800.jpg"}\n', "line 1"),
        ("l.jsonl", '{"path": "a.jpg"}\n{"file": "b.jpg"}\n', "line 2"),
        ("l.jsonl", '{"path": "a.jpg"}\n[1, 2\n', "line 2"),
        ("l.jsonl", '{"path": 3}\n', "line 1"),
        ("l.jsonl", '["path"]\n', "line 1"),
        ("l.jsonl", '{"path": "a.jpg", "vector": 3}\n', "reserved column name: vector"),
    ],
)
def test_an_invalid_list_is_one_clear_line(listed, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        list_images(str(tmp_path / name))


def test_an_invalid_parquet_list_is_one_clear_line(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: PLC0415 - an extra

    write(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="cannot read"):
        list_images(str(tmp_path / "bad.parquet"))
    # A byte of a damaged file is quoted by the library.
    (tmp_path / "bad.parquet").write_bytes(b"PAR1\x1f" + (1).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match=r"cannot read .*\(.*\\x0f\)") as error:
        list_images(str(tmp_path / "bad.parquet"))
    assert str(error.value).isprintable()
    pyarrow.parquet.write_table(pa.table({"path": ["a.jpg"], "raw": [b"x"]}), tmp_path / "raw.parquet")
    with pytest.raises(DataError, match="holds bytes"):
        list_images(str(tmp_path / "raw.parquet"))
    pyarrow.parquet.write_table(pa.table({"file": ["a.jpg"]}), tmp_path / "file.parquet")
    with pytest.raises(DataError, match="no column path"):
        list_images(str(tmp_path / "file.parquet"))


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards(tmp_path):
    about = json.dumps({"caption": "a dog", "width": 5, "o.k": [1], "_row": 1, "n": 1}).encode()
    first = [("./s/001.jpg", b"one"), ("./s/001.json", about), ("./s/001.cls", b"7\n"), ("./s/001.seg.png", b"two")]
    shard(tmp_path / "s-00.tar", [*first, ("002.txt", "Hündchen".encode()), ("002.jpg", b"three"), ("._x.jpg", b"no")])
    shard(tmp_path / "s-01.tar", [("003.jpg", b""), ("003.json", b'{"n": 1.5}'), ("004.jpg", b"4"), ("004.json", b"[")])
    listing = list_images(f"{tmp_path}/s-{{00..01}}.tar")
    found = {entry.id.removeprefix(f"{tmp_path}/"): entry for entry in listing.entries}
    assert list(found) == [
        "s-00.tar/s/001.jpg",
        "s-00.tar/s/001.seg.png",
        "s-00.tar/002.jpg",
        "s-01.tar/003.jpg",
        "s-01.tar/004.jpg",
        "s-01.tar/004.json",
    ]
    assert found["s-00.tar/s/001.jpg"].columns == {"caption": "a dog", "o_k": "[1]", "n": 1.0, "cls": 7}
    assert found["s-00.tar/s/001.seg.png"].columns == found["s-00.tar/s/001.jpg"].columns
    assert found["s-00.tar/002.jpg"].columns == {"txt": "Hündchen"}
    assert [entry.fault for entry in found.values()][:3] == [None] * 3
    assert found["s-01.tar/003.jpg"].fault == "is empty (0 bytes)"
    assert found["s-01.tar/004.json"].fault.startswith("is not a JSON object")
    for name, data in {"s/001.jpg": b"one", "s/001.seg.png": b"two", "002.jpg": b"three"}.items():
        entry = found[f"s-00.tar/{name}"]
        file = (tmp_path / "s-00.tar").read_bytes()
        assert file[entry.offset : entry.offset + entry.size] == data
        assert entry.mtime == (tmp_path / "s-00.tar").stat().st_mtime_ns
        assert entry.path == str(tmp_path / "s-00.tar")


def test_a_truncated_or_missing_shard_is_unreadable(tmp_path):
    whole = shard(tmp_path / "a.tar", [(f"{n}.jpg", bytes(2000)) for n in range(5)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:6000])
    listing = list_images(f"{tmp_path}/{{a,b}}.tar")
    assert [entry.id for entry in listing.entries][:2] == [f"{tmp_path}/a.tar/0.jpg", f"{tmp_path}/a.tar/1.jpg"]
    assert listing.unreadable == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    faults = {entry.id: entry.fault for entry in listing.entries if entry.fault}
    assert set(faults) == {f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"}
    assert faults[f"{tmp_path}/a.tar"].startswith("the shard cannot be read to its end")
    assert faults[f"{tmp_path}/b.tar"] == "the shard is missing"


def test_links_in_a_shard_have_a_fault(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hosts"
        archive.addfile(info)
    (entry,) = list_images(str(tmp_path / "a.tar")).entries
    assert entry.fault == "is not a regular member of its shard"


def test_columns_get_one_type():
    rows = [{"a": 1, "b": True, "c": 1}, {"a": 2.5, "b": "x", "c": None}, {"b": 3}]
    unify_column_types(rows)
    assert rows == [{"a": 1.0, "b": "true", "c": 1}, {"a": 2.5, "b": "x", "c": None}, {"b": "3"}]
    assert column_value({"a": [1]}) == '{"a": [1]}'
    assert column_value("\udcff") == "\\udcff"
    assert column_value(float("inf")) is None


def test_progress_is_reported(listed, monkeypatch):
    monkeypatch.setattr(sources, "_REPORT_EVERY", 10)
    (listed / "l.txt").write_text("a.jpg\n" + "".join(f"{n}.jpg\n" for n in range(25)))
    counts = []
    list_images(str(listed / "l.txt"), counts.append)
    assert counts == [10, 20]


def test_the_first_of_equal_entries_is_kept():
    assert unique_entries([Entry("a", "/a"), Entry("a", "/a")], "x") == [Entry("a", "/a")]
