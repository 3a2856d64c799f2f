"""The three layouts as written, and as people get them wrong."""

import json
import os
import sys
from itertools import chain

import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.datasets.folder import SPLITS, FolderImages, FolderTriplets, read_folder
from union_igrot.errors import DataError, UnionError

ROW = {"reference": "a.jpg", "text": "make it red", "targets": ["b.jpg"]}


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def triplets(root, *rows):
    return write(root, "triplets.jsonl", "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def manifest(root, *lines, header="domain,path,class,split"):
    return write(root, "manifest.csv", "\n".join([header, *lines]) + "\n")


def keys(listed):
    return {split: {entry.key for entry in listed.splits[split]} for split in SPLITS}


# --- layouts


def test_the_first_layout_that_exists_is_taken(tmp_path):
    with pytest.raises(DataError, match=r"triplets\.jsonl.*manifest\.csv.*photos/<class>/ and sketches/<class>/"):
        read_folder(tmp_path)
    write(tmp_path, "photos/cat/a.jpg", "")
    with pytest.raises(DataError, match="no known layout"):
        read_folder(tmp_path)
    write(tmp_path, "sketches/cat/a.png", "")
    (sample, _) = read_folder(tmp_path).splits["train"]
    assert (sample.path, sample.key, sample.is_sketch) == ("photos/cat/a.jpg", "cat", False)
    manifest(tmp_path, "photo,x/y.png,dog,train")
    assert read_folder(str(tmp_path)).splits["train"][0].path == "x/y.png"
    triplets(tmp_path, ROW)
    assert isinstance(read_folder(tmp_path), FolderTriplets)


def test_no_folder(tmp_path):
    for root in (tmp_path / "nowhere", write(tmp_path, "file", ""), "~no_such_user_here/x"):
        with pytest.raises(DataError, match="no such folder"):
            read_folder(root)


def test_triplets_as_written(tmp_path):
    listed = triplets(
        tmp_path,
        {"reference": "./x//a.JPG", "text": "a\u2028b", "targets": ["b.webp", "sub/../c.tif"], "split": "val"},
        "  ",
        {"reference": "x/a.JPG", "text": None, "targets": ["b.webp"], "split": "test"},
    )
    write(tmp_path, "gallery.txt", "d.png\r\n\nb.webp\n")
    data = read_folder(tmp_path)
    (first,), (second,) = data.splits["val"], data.splits["test"]
    assert (first.key, first.targets, first.text) == ("x/a.JPG", ("b.webp", "c.tif"), "a\u2028b")
    assert (first.place, second.place) == (f"{listed}, line 1", f"{listed}, line 3")
    assert (first.id, second.id) == ("x/a.JPG#1", "x/a.JPG#3")
    assert second.text is None
    assert data.gallery == {"d.png": f"{tmp_path}/gallery.txt, line 1", "b.webp": f"{tmp_path}/gallery.txt, line 3"}


def test_manifest_as_written(tmp_path):
    rows = 'class,domain,path\r\n"big, red\u00a0cat",photo,"a,b.jpg"\r\n\r\n"x",sketch,"s.png"\r\nx,photo,p.png\r\n'
    path = write(tmp_path, "manifest.csv", b"\xef\xbb\xbf" + rows.encode())
    data = read_folder(tmp_path)
    assert isinstance(data, FolderImages)
    samples = sorted(chain(*data.splits.values()), key=lambda sample: sample.place)
    assert [s.place for s in samples] == [f"{path}, line {n}" for n in (2, 4, 5)]
    assert [(s.key, s.path, s.is_sketch) for s in samples][:2] == [
        ("big, red\u00a0cat", "a,b.jpg", False),
        ("x", "s.png", True),
    ]


def test_class_folders_are_walked_in_order_without_hidden_things(tmp_path):
    for name in ("photos/b/2.jpg", "photos/b/10.JPEG", "photos/a/deep/er/1.gif", "sketches/a/1.bmp"):
        write(tmp_path, name, "")
    for name in ("photos/b/.x.jpg", "photos/.trash/x/1.jpg", "photos/b/notes.txt", "photos/readme.md", ".x/1.jpg"):
        write(tmp_path, name, "")
    write(tmp_path, "elsewhere/1.png", "")
    (tmp_path / "sketches" / "b").symlink_to(tmp_path / "elsewhere")
    data = read_folder(tmp_path)
    samples = sorted((s.path, s.key) for s in chain(*data.splits.values()))
    assert samples == [
        ("photos/a/deep/er/1.gif", "a"),
        ("photos/b/10.JPEG", "b"),
        ("photos/b/2.jpg", "b"),
        ("sketches/a/1.bmp", "a"),
        ("sketches/b/1.png", "b"),
    ]
    assert [s.path for s in data.splits["train"] + data.splits["test"] if not s.is_sketch and s.key == "b"] == [
        "photos/b/10.JPEG",
        "photos/b/2.jpg",
    ]


def test_class_folders_gone_wrong(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "sketches").mkdir()
    with pytest.raises(DataError, match="names no image"):
        read_folder(tmp_path)
    stray = write(tmp_path, "sketches/1.png", "")
    with pytest.raises(DataError, match=r"sketches/1\.png: is in no class folder"):
        read_folder(tmp_path)
    stray.unlink()
    loop = tmp_path / "photos" / "a" / "loop"
    loop.symlink_to(tmp_path / "photos")
    with pytest.raises(DataError, match="loop: links back"):
        read_folder(tmp_path)
    loop.unlink()
    if sys.platform == "linux":
        (tmp_path / "photos" / "a" / os.fsdecode(b"\xff.jpg")).touch()
        with pytest.raises(DataError, match="not valid Unicode"):
            read_folder(tmp_path)


# --- splits


@given(st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_classes_are_dealt_by_name_alone(tmp_path_factory, number):
    root = tmp_path_factory.mktemp("dealt")
    names = [f"class {n}" for n in range(number)]
    lines = [f"{domain},{domain}/{name}.png,{name}" for name in names for domain in ("photo", "sketch")]
    manifest(root, *lines, header="domain,path,class")
    dealt = keys(read_folder(root))
    assert sorted(chain(*dealt.values())) == sorted(names)  # each class in one split
    assert dealt["train"]
    if number >= 3:
        assert len(dealt["val"]) == max(1, round(number / 10))
        assert len(dealt["test"]) == max(1, round(number / 5))
    manifest(root, *lines[::-1], header="domain,path,class")
    assert keys(read_folder(root)) == dealt


def test_photo_only_classes_take_no_place_of_asking_classes(tmp_path):
    lines = [f"photo,p{n}.png,c{n}" for n in range(50)] + [f"sketch,s{n}.png,c{n}" for n in range(3)]
    manifest(tmp_path, *lines, header="domain,path,class")
    data = read_folder(tmp_path)
    for split in SPLITS:
        assert sum(sample.is_sketch for sample in data.splits[split]) == 1
        assert len(data.splits[split]) > 2
    assert "70/10/20" in data.note


def test_validation_is_held_out_of_train(tmp_path):
    lines = [f"{d},{d}{n}.png,c{n},{'test' if n >= 33 else 'train'}" for n in range(43) for d in ("photo", "sketch")]
    manifest(tmp_path, *lines, "photo,extra.png,photos only,train")
    data = read_folder(tmp_path)
    got = keys(data)
    assert [len(got[split]) for split in SPLITS] == [27, 7, 10]
    assert "photos only" in got["train"]
    assert got["test"] == {f"c{n}" for n in range(33, 43)}
    assert not got["train"] & got["val"]
    assert data.note == "7 of 33 train classes held out as val by a hash of their names"


def test_splits_as_given_are_kept(tmp_path):
    rows = [{**ROW, "reference": f"{n}.jpg", "split": split} for n, split in enumerate(["train", "val", "train"])]
    triplets(tmp_path, *rows)
    data = read_folder(tmp_path)
    assert keys(data) == {"train": {"0.jpg", "2.jpg"}, "val": {"1.jpg"}, "test": set()}
    assert data.note == "splits as given"


def test_rows_of_one_reference_stay_together(tmp_path):
    rows = [{"reference": f"{n % 10}.jpg", "text": f"{n}", "targets": ["t.jpg"]} for n in range(40)]
    triplets(tmp_path, *rows)
    got = keys(read_folder(tmp_path))
    assert [len(got[split]) for split in SPLITS] == [7, 1, 2]
    triplets(tmp_path, *[{**row, "split": "train"} for row in rows])
    assert [len(keys(read_folder(tmp_path))[split]) for split in SPLITS] == [8, 2, 0]


# --- mistakes


def row(**changes):
    return json.dumps({**ROW, **changes})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "JSON"),
        ("1" * 5000, "not usable JSON"),
        ("[1]", "is not an object with the keys reference, text, targets"),
        ("null", "is not an object"),
        ('{"reference": "a.jpg", "text": "x"}', "is not an object with the keys"),
        (row(Split="train"), "is not an object with the keys"),
        (row(reference=3), "reference is '3'"),
        (row(reference=""), "reference is ''"),
        (row(reference="/etc/a.jpg"), "inside the folder"),
        (row(reference="C:\\a.jpg"), "inside the folder"),
        (row(reference="x/../../a.jpg"), "inside the folder"),
        (row(reference=".."), "inside the folder"),
        (row(reference="."), "inside the folder"),
        (row(reference="a.txt"), "known suffixes are .jpg"),
        (row(reference="a\0.jpg"), "control character"),
        (row(reference="a\n.jpg"), "control character"),
        (row(reference="\ud800.jpg"), "not valid Unicode"),
        (row(text=3), "text is 3"),
        (row(text=" "), "text is ' '"),
        (row(text="\udc80"), "not valid Unicode"),
        (row(targets="b.jpg"), "targets is 'b.jpg'"),
        (row(targets=[]), r"targets is \[\]"),
        (row(targets=[None]), "a target is None"),
        (row(targets=["b.jpg", "./b.jpg"]), "a target is repeated"),
        (row(targets=["b.jpg", "a.jpg"]), "or is the reference"),
        (row(split="dev"), "split is 'dev'; expected one of train, val, test"),
        (row(split=[1]), r"split is \[1\]"),
        (row(split="val"), "split is 'val', unlike before"),
        (row(text="first", targets=["./c.jpg", "b.jpg"]), "repeats .*line 1"),
    ],
)
def test_a_wrong_triplet_names_file_and_line(tmp_path, line, says):
    first = {**ROW, "text": "first", "targets": ["b.jpg", "c.jpg"]}
    file = triplets(tmp_path, first, "", line)
    with pytest.raises(DataError, match=f"triplets.jsonl, line 3: .*{says}") as caught:
        read_folder(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("picture,b.jpg,x,train", "domain is 'picture'; expected photo or sketch"),
        ("photo,,x,train", "path is ''"),
        ("photo,b.jpg,,train", "class is ''"),
        ('photo,b.jpg,"a\tb",train', "control character"),
        ("photo,/b.jpg,x,train", "inside the folder"),
        ("photo,../b.jpg,x,train", "inside the folder"),
        ("photo,b.svg,x,train", "known suffixes"),
        ("photo,b.jpg,x", "3 fields, but the header has 4"),
        ("photo,b,c.jpg,x,train", "5 fields"),
        ("photo,b.jpg,x,validation", "split is 'validation'"),
        ("photo,b.jpg,x,", "split is None, unlike before"),
        ("photo,./a.jpg,y,test", "repeats .*line 2"),
        ('photo,"b.jpg,x,train', "not CSV"),
        ('photo,"b"c.jpg,x,train', "not CSV"),
        (f"photo,{'b' * 200_000}.jpg,x,train", "not CSV"),
    ],
)
def test_a_wrong_manifest_row_names_file_and_line(tmp_path, line, says):
    manifest(tmp_path, "photo,a.jpg,x,train", line, "sketch,z.png,x,train")
    with pytest.raises(DataError, match=f"manifest.csv, line 3: .*{says}") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", ["", "path,class", "domain,path,class,split,more", "domain,path,class,path", "a"])
def test_a_wrong_header(tmp_path, header):
    manifest(tmp_path, header=header)
    with pytest.raises(DataError, match=r"line 1: the header is .*expected domain,path,class,split"):
        read_folder(tmp_path)


def test_files_that_are_empty_unreadable_or_not_utf8(tmp_path):
    manifest(tmp_path)
    with pytest.raises(DataError, match="names no image"):
        read_folder(tmp_path)
    file = write(tmp_path, "triplets.jsonl", "\n \n")
    with pytest.raises(DataError, match="contains no row"):
        read_folder(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + row().encode() + b"\n\xff\n")
    with pytest.raises(DataError, match=r"triplets\.jsonl, line 2: not UTF-8"):
        read_folder(tmp_path)
    triplets(tmp_path, ROW)
    for lines, says in (("a.jpg\na.jpg", "line 2: .*repeats"), ("../a.jpg", "line 1: path"), ("\na", "line 2: path")):
        write(tmp_path, "gallery.txt", lines)
        with pytest.raises(DataError, match=f"gallery.txt, {says}"):
            read_folder(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r"triplets\.jsonl: cannot be read \(Is a directory\)"):
        read_folder(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a.jpg", "train", "b.png"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*ROW, "split", "x"]), inner),
    max_leaves=8,
)
CELL = st.sampled_from(["photo", "sketch", "a.jpg", "x", "train", "", '"', "../", "\r", "\0", ","]) | st.text(
    max_size=4
)


@given(
    st.binary(max_size=60)
    | st.lists(JSON.map(json.dumps), max_size=3).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
    | st.lists(st.lists(CELL, max_size=5).map(",".join), max_size=4).map(
        lambda lines: "\n".join(["domain,path,class,split", *lines]).encode("utf-8", "surrogatepass")
    ),
    st.sampled_from(["triplets.jsonl", "manifest.csv", "gallery.txt"]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_stands_in_a_file_the_error_is_ours(tmp_path_factory, content, name):
    root = tmp_path_factory.mktemp("any")
    if name == "gallery.txt":
        triplets(root, ROW)
    write(root, name, content)
    try:
        listed = read_folder(root)
    except UnionError as error:
        listed, line = None, str(error)
        assert line.startswith(str(root))
        assert "\n" not in line
    assert listed is None or sum(len(entries) for entries in listed.splits.values()) > 0
