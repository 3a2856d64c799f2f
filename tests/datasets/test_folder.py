"""Folders of one's own images: layouts, splits, benchmarks, training sets, and mistakes."""

import json
import os
import sys
import unicodedata
from collections import Counter
from itertools import chain, product

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from union_igrot.datasets.folder import (
    SPLITS,
    folder_benchmark,
    folder_training,
    read_folder,
)
from union_igrot.errors import ConfigError, DataError, ImageError, UnionError
from union_igrot.images.decode import broken_images, open_image


def paint(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (len(name), 80, 120)).save(path)


def sketches(root, sizes, split="val"):
    """Write a manifest; `sizes` gives (sketches, photos) of each class."""
    lines = ["domain,path,class,split"]
    for label, (asking, answering) in sizes.items():
        for domain, number in (("photo", answering), ("sketch", asking)):
            names = [f"{domain}s/{label}/{n}.png" for n in range(number)]
            paint(root, *names)
            lines += [f"{domain},{name},{label},{split}" for name in names]
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def triplets(root, *rows):
    for row in rows:
        paint(root, row["reference"], *row["targets"])
    (root / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def row(reference, *targets, split="val", text="make it red"):
    return {"reference": reference, "text": text, "targets": list(targets), "split": split}


# --- sketch retrieval


def test_sketch_benchmark(tmp_path):
    root = sketches(tmp_path, {"cat": (2, 3), "dog": (1, 1), "only photos": (0, 2)})
    benchmark = folder_benchmark(root, "val", text="a photo of the same thing")
    assert (benchmark.name, benchmark.split, benchmark.task, benchmark.skipped) == ("folder", "val", "sbir", 0)
    assert [q.id for q in benchmark.queries] == ["sketchs/cat/0.png", "sketchs/cat/1.png", "sketchs/dog/0.png"]
    assert [q.label for q in benchmark.queries] == ["cat", "cat", "dog"]
    assert {q.text for q in benchmark.queries} == {"a photo of the same thing"}
    assert [item.label for item in benchmark.gallery] == ["cat"] * 3 + ["dog"] + ["only photos"] * 2
    assert benchmark.queries[0].targets == tuple(f"photos/cat/{n}.png" for n in range(3))
    assert benchmark.queries[0].targets is benchmark.queries[1].targets  # one tuple a class
    assert benchmark.queries[0].image == root / "sketchs/cat/0.png"
    assert benchmark.queries[0].exclude == ()
    protocol = benchmark.protocol
    assert (protocol.primary, protocol.exclude_reference) == ("mAP", False)
    assert protocol.metrics == ("mAP", "mAP@200", "P@100", "P@200", "R@1", "R@10")
    assert protocol.note == "own images; splits as given; 0 of the 2 classes of val are in train too"
    assert folder_benchmark(root).queries[0].text is None


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1),
       st.integers(1, 60), st.integers(0, 3))  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_pairs_are_balanced_and_repeatable(tmp_path_factory, sizes, pairs, seed):
    root = sketches(tmp_path_factory.mktemp("pairs"), sizes, "train")
    data = (root / "manifest.csv").read_text() + "".join(f"{d},{d}s/v.png,v,val\n" for d in ("photo", "sketch"))
    (root / "manifest.csv").write_text(data)
    training = folder_training(root, pairs=pairs, seed=seed, text="find it")
    assert training == folder_training(root, pairs=pairs, seed=seed, text="find it")
    assert training.classes == tuple(sorted(sizes))
    assert len(training.triplets) == pairs
    for t in training.triplets:
        assert t.image.parent == root / "sketchs" / t.group
        assert t.target.parent == root / "photos" / t.group
        assert (t.text, t.task) == ("find it", "sbir")
    counts = Counter(t.group for t in training.triplets)
    assert max(counts.values()) - min(counts[label] for label in sizes) <= 1
    for label, (asking, answering) in sizes.items():
        for side, number in (("image", asking), ("target", answering)):
            used = Counter(getattr(t, side) for t in training.triplets if t.group == label)
            if counts[label] >= number:
                assert len(used) == number
                assert max(used.values()) - min(used.values()) <= 1


def test_classes_without_sketches_or_photos_are_named(tmp_path):
    root = sketches(tmp_path, {"cat": (1, 1), "dog": (2, 0)})
    with pytest.raises(DataError, match=r"manifest\.csv, line 4: class 'dog' has sketches but no photo in split 'val'"):
        folder_benchmark(root, on_missing="skip")
    root = sketches(tmp_path, {"cat": (0, 2)})
    with pytest.raises(DataError, match="split 'val' has photos but no sketch"):
        folder_benchmark(root)
    with pytest.raises(DataError, match="split 'train' is empty"):
        folder_training(root)


# --- composed retrieval


def test_composed_benchmark(tmp_path):
    root = triplets(
        tmp_path, row("a.jpg", "b.jpg", "c.jpg"), row("b.jpg", "a.jpg", text=None), row("x.jpg", "y.jpg", split="train")
    )
    paint(root, "z.jpg")
    (root / "gallery.txt").write_text("z.jpg\na.jpg\n")
    benchmark = folder_benchmark(root, "val", text="not for triplets")
    assert (benchmark.task, benchmark.name) == ("cir", "folder")
    first, second = benchmark.queries
    assert (first.image, first.text, first.targets) == (root / "a.jpg", "make it red", ("b.jpg", "c.jpg"))
    assert (first.exclude, second.exclude, second.text) == (("a.jpg",), ("b.jpg",), None)
    assert [item.id for item in benchmark.gallery] == ["a.jpg", "b.jpg", "c.jpg", "z.jpg"]
    assert benchmark.protocol.exclude_reference
    assert benchmark.protocol.metrics == ("R@1", "R@5", "R@10", "R@50", "mAP@10", "mAP")
    assert benchmark.protocol.primary == "mAP@10"
    assert "0 of the 3 images of val are in train too" in benchmark.protocol.note


def test_composed_training_has_one_sample_a_row_and_target(tmp_path):
    root = triplets(
        tmp_path,
        row("a.jpg", "b.jpg", "c.jpg", split="train"),
        row("b.jpg", "c.jpg", split="train"),
        row("v.jpg", "w.jpg"),
    )
    (root / "gallery.txt").write_text("nowhere.jpg\n")  # the gallery is no matter of training
    training = folder_training(root, text="not for triplets")
    assert [(t.image.name, t.target.name, t.group, t.text, t.task) for t in training.triplets] == [
        ("a.jpg", "b.jpg", "b.jpg", "make it red", "cir"),
        ("a.jpg", "c.jpg", "c.jpg", "make it red", "cir"),
        ("b.jpg", "c.jpg", "c.jpg", "make it red", "cir"),
    ]
    assert training.classes == ()


# --- missing and broken images


def test_a_missing_image_names_file_and_line(tmp_path):
    root = sketches(tmp_path, {"cat": (2, 3)})
    (root / "photos/cat/1.png").unlink()
    (root / "sketchs/cat/0.png").write_bytes(b"")
    with pytest.raises(
        ImageError, match=r"manifest\.csv, line 3: .*photos/cat/1\.png.*missing.*on_missing=skip \(1 more"
    ):
        folder_benchmark(root)
    benchmark = folder_benchmark(root, on_missing="skip")
    assert (len(benchmark.queries), len(benchmark.gallery), benchmark.skipped) == (1, 2, 2)
    assert benchmark.queries[0].targets == ("photos/cat/0.png", "photos/cat/2.png")
    assert benchmark.protocol.note.endswith("2 missing images of val left out, 0 queries with them")


def test_sketches_that_lost_their_photos_are_counted(tmp_path):
    root = sketches(tmp_path, {"cat": (2, 1), "dog": (1, 1)})
    (root / "photos/cat/0.png").unlink()
    benchmark = folder_benchmark(root, on_missing="skip")
    assert (len(benchmark.queries), benchmark.skipped) == (1, 3)
    (root / "photos/dog/0.png").unlink()
    with pytest.raises(DataError, match="2 missing images of val left out, 3 queries with them, which leaves no query"):
        folder_benchmark(root, on_missing="skip")


def test_triplets_without_images(tmp_path):
    root = triplets(
        tmp_path,
        row("a.jpg", "b.jpg", "c.jpg"),
        row("gone.jpg", "b.jpg"),
        row("b.jpg", "lost.jpg"),
        row("a.jpg", "gone.jpg", "c.jpg", text="other"),
        row("a.jpg", "gone.jpg", "c.jpg", split="train", text="yet another"),
    )
    for name in ("gone.jpg", "lost.jpg"):
        (root / name).unlink()
    with pytest.raises(ImageError, match=r"triplets\.jsonl, line 2: .*gone\.jpg: the image is missing"):
        folder_benchmark(root)
    benchmark = folder_benchmark(root, on_missing="skip")
    assert [q.targets for q in benchmark.queries] == [("b.jpg", "c.jpg"), ("c.jpg",)]
    assert [item.id for item in benchmark.gallery] == ["a.jpg", "b.jpg", "c.jpg"]
    assert benchmark.skipped == 4  # two images, two queries
    training = folder_training(root, on_missing="skip")
    assert [t.group for t in training.triplets] == ["c.jpg"]
    assert training.skipped == 1
    (root / "gallery.txt").write_text("\nz.jpg\n")
    for name in ("gone.jpg", "lost.jpg"):
        paint(root, name)
    with pytest.raises(ImageError, match=r"gallery\.txt, line 2: .*z\.jpg"):
        folder_benchmark(root)
    assert folder_benchmark(root, on_missing="skip").skipped == 1


def test_verify_finds_what_cannot_be_decoded(tmp_path):
    root = sketches(tmp_path, {"cat": (2, 3)})
    broken = root / "photos/cat/2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert len(folder_benchmark(root).gallery) == 3  # found only when opened
    with pytest.raises(ImageError, match=r"manifest\.csv, line 4: .*photos/cat/2\.png"):
        folder_benchmark(root, verify=True)
    benchmark = folder_benchmark(root, verify=True, on_missing="skip")
    assert (len(benchmark.gallery), benchmark.skipped) == (2, 1)
    for item in benchmark.gallery:
        open_image(item.image)
    images = [item.image for item in folder_benchmark(root).gallery]
    ((found, why),) = broken_images(images, workers=2)
    assert found == broken
    assert str(broken) in why
    assert broken_images([]) == []


# --- settings


def test_settings_that_do_not_exist(tmp_path):
    root = sketches(tmp_path, {"cat": (1, 1)})
    with pytest.raises(ConfigError, match=r"split: 'train' .*one of val, test"):
        folder_benchmark(root, "train")
    for read in (folder_benchmark, folder_training):
        with pytest.raises(ConfigError, match=r"on_missing: 'ignore' .*one of error, skip"):
            read(root, on_missing="ignore")
    with pytest.raises(ConfigError, match="pairs: 0"):
        folder_training(root, pairs=0)


ROW = {"reference": "a.jpg", "text": "make it red", "targets": ["b.jpg"]}


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(root, *rows):
    return write(
        root,
        "triplets.jsonl",
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows),
    )


def write_manifest(root, *lines, header="domain,path,class,split"):
    return write(root, "manifest.csv", "\n".join([header, *lines]) + "\n")


def split_keys(listed):
    return {split: {entry.key for entry in listed.splits[split]} for split in SPLITS}


# --- layouts


def test_the_first_existing_layout_is_used(tmp_path):
    with pytest.raises(DataError, match=r"triplets\.jsonl.*manifest\.csv.*photos/<class>/ and sketches/<class>/"):
        read_folder(tmp_path)
    write(tmp_path, "photos/cat/a.jpg", "")
    with pytest.raises(DataError, match="no known layout"):
        read_folder(tmp_path)
    write(tmp_path, "sketches/cat/a.png", "")
    (sample, _) = read_folder(tmp_path).splits["train"]
    assert (sample.id, sample.key, sample.is_sketch) == ("photos/cat/a.jpg", "cat", False)
    write_manifest(tmp_path, "photo,x/y.png,dog,train")
    assert read_folder(str(tmp_path)).splits["train"][0].id == "x/y.png"
    write_rows(tmp_path, ROW)
    assert read_folder(tmp_path).is_composed


def test_no_folder(tmp_path):
    for root in (tmp_path / "nowhere", write(tmp_path, "file", ""), "~no_such_user_here/x"):
        with pytest.raises(DataError, match="no such folder"):
            read_folder(root)


def test_triplets_as_written(tmp_path):
    listed = write_rows(
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
    assert not data.is_composed
    samples = sorted(chain(*data.splits.values()), key=lambda sample: sample.place)
    assert [s.place for s in samples] == [f"{path}, line {n}" for n in (2, 4, 5)]
    assert [(s.key, s.id, s.is_sketch) for s in samples][:2] == [
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
    samples = sorted((s.id, s.key) for s in chain(*data.splits.values()))
    assert samples == [
        ("photos/a/deep/er/1.gif", "a"),
        ("photos/b/10.JPEG", "b"),
        ("photos/b/2.jpg", "b"),
        ("sketches/a/1.bmp", "a"),
        ("sketches/b/1.png", "b"),
    ]
    assert [s.id for s in data.splits["train"] + data.splits["test"] if not s.is_sketch and s.key == "b"] == [
        "photos/b/10.JPEG",
        "photos/b/2.jpg",
    ]


def test_invalid_class_folders(tmp_path):
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
@settings(max_examples=10, deadline=None)
def test_classes_are_assigned_by_name_only(tmp_path_factory, number):
    root = tmp_path_factory.mktemp("classes")
    names = [f"class {n}" for n in range(number)]
    lines = [f"{domain},{domain}/{name}.png,{name}" for name in names for domain in ("photo", "sketch")]
    write_manifest(root, *lines, header="domain,path,class")
    assigned = split_keys(read_folder(root))
    assert sorted(chain(*assigned.values())) == sorted(names)  # each class in one split
    assert assigned["train"]
    if number >= 3:
        least = 2 if number >= 6 else 1
        assert len(assigned["val"]) == max(least, round(number / 10))
        assert len(assigned["test"]) == max(least, round(number / 5))
    write_manifest(root, *lines[::-1], header="domain,path,class")
    assert split_keys(read_folder(root)) == assigned


def test_validation_is_held_out_of_train(tmp_path):
    lines = [f"{d},{d}{n}.png,c{n},{'test' if n >= 33 else 'train'}" for n in range(43) for d in ("photo", "sketch")]
    write_manifest(tmp_path, *lines, "photo,extra.png,photos only,train")
    data = read_folder(tmp_path)
    got = split_keys(data)
    assert [len(got[split]) for split in SPLITS] == [27, 7, 10]
    assert "photos only" in got["train"]
    assert got["test"] == {f"c{n}" for n in range(33, 43)}
    assert not got["train"] & got["val"]
    assert data.note == "7 of 33 train classes held out as val by a hash of their names"


@pytest.mark.parametrize("number", [2, 9])
def test_few_classes_are_divided_within(tmp_path, number):
    for n, k in product(range(number), range(12)):
        write(tmp_path, f"photos/c{n}/{k}.jpg", "x")
        write(tmp_path, f"sketches/c{n}/{k}.png", "x")
    data = read_folder(tmp_path)
    assert [len(data.splits[split]) for split in SPLITS] == [number * 2 * count for count in (9, 1, 2)]
    assert all(names == {f"c{n}" for n in range(number)} for names in split_keys(data).values())
    assert data.note == (
        "images of each class dealt 70/10/20 into train/val/test by a hash of their names, "
        f"since there are only {number} classes"
    )
    lines = [
        f"{'sketch' if image.is_sketch else 'photo'},{image.id},{image.key},{split.replace('val', 'train')}"
        for split, images in data.splits.items()
        for image in images
    ]
    write_manifest(tmp_path, *lines)
    held = read_folder(tmp_path)
    assert [len(held.splits[split]) for split in SPLITS] == [number * 2 * count for count in (8, 2, 2)]
    assert held.note.startswith("a fifth of the train images of each class held out as val")


def test_harmless_variants_of_triplets(tmp_path):
    write_rows(
        tmp_path,
        {**ROW, "id": 7, "category": "dress", "split": "test"},
        {"reference": "sub\\1.jpg", "text": ["is red", " ", "is longer"], "targets": ["sub\\2.jpg"], "split": "test"},
        {**ROW, "split": "test"},
        {**ROW, "text": " ", "targets": "c.jpg", "split": "test"},
    )
    rows = read_folder(tmp_path).splits["test"]
    assert [(row.id, row.text, row.targets) for row in rows] == [
        ("a.jpg#1", "make it red", ("b.jpg",)),
        ("sub/1.jpg#2", "is red and is longer", ("sub/2.jpg",)),
        ("a.jpg#4", None, ("c.jpg",)),
    ]
    write_rows(tmp_path, {**ROW, "split": "test"}, {**ROW, "split": "train"})
    with pytest.raises(DataError, match=r"line 2: repeats .*line 1 in another split, 'train'"):
        read_folder(tmp_path)


def test_every_known_image_format_is_used_and_other_files_are_counted(tmp_path):
    for number, suffix in enumerate((".avif", ".jfif", ".jp2", ".JPG")):
        write(tmp_path, f"photos/a/{number}{suffix}", "x")
        write(tmp_path, f"sketches/a/{number}{suffix}", "x")
    write(tmp_path, "photos/a/1.nef", "x")
    write(tmp_path, "photos/@eaDir/a/1.jpg", "x")
    data = read_folder(tmp_path)
    assert sum(len(images) for images in data.splits.values()) == 8
    assert data.note.endswith(
        "; not used: 1 other file (1 .nef: camera RAW file, which is not decoded; export it as JPEG or TIFF)"
    )


def test_letters_composed_in_another_way_are_found(tmp_path):
    composed, decomposed = unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")
    paint(tmp_path, decomposed, "a.png", "b.png", "c.png")
    write_rows(tmp_path, {"reference": composed, "text": None, "targets": ["a.png"], "split": "val"})
    assert folder_benchmark(tmp_path).queries[0].image == tmp_path / decomposed


def test_unchecked_reading_needs_no_image(tmp_path):
    write_rows(tmp_path, {**ROW, "split": "test"})
    with pytest.raises(ImageError, match="missing"):
        folder_benchmark(tmp_path, "test")
    assert len(folder_benchmark(tmp_path, "test", check_images=False).gallery) == 2


def test_rows_of_one_reference_stay_together(tmp_path):
    rows = [{"reference": f"{n % 10}.jpg", "text": f"{n}", "targets": ["t.jpg"]} for n in range(40)]
    write_rows(tmp_path, *rows)
    got = split_keys(read_folder(tmp_path))
    assert [len(got[split]) for split in SPLITS] == [6, 2, 2]
    write_rows(tmp_path, *[{**row, "split": "train"} for row in rows])
    assert [len(split_keys(read_folder(tmp_path))[split]) for split in SPLITS] == [8, 2, 0]


# --- mistakes


def json_row(**changes):
    return json.dumps({**ROW, **changes})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("1" * 5000, "not usable JSON"),
        ("[1]", "is not an object with the fields reference, text, targets"),
        ('{"reference": "a.jpg", "text": "x"}', "field 'targets' is missing"),
        (json_row(Split="train"), "unknown field 'Split'; did you mean 'split'"),
        (json_row(reference=3), "reference is '3'"),
        (json_row(reference="/etc/a.jpg"), "inside the folder"),
        (json_row(reference="x/../../a.jpg"), "inside the folder"),
        (json_row(reference="a.txt"), "known suffixes are .jpg"),
        (json_row(reference="a\0.jpg"), "control character"),
        (json_row(reference="\ud800.jpg"), "not valid Unicode"),
        (json_row(text=3), "text is 3"),
        (json_row(targets=[]), r"targets is \[\]"),
        (json_row(targets=["b.jpg", "a.jpg"]), "or is the reference"),
        (json_row(split="dev"), "split is 'dev'; expected one of train, val, test"),
        (json_row(split="val"), "split is 'val', unlike before"),
    ],
)
def test_a_wrong_triplet_names_file_and_line(tmp_path, line, says):
    first = {**ROW, "text": "first", "targets": ["b.jpg", "c.jpg"]}
    file = write_rows(tmp_path, first, "", line)
    with pytest.raises(DataError, match=f"triplets.jsonl, line 3: .*{says}") as caught:
        read_folder(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("picture,b.jpg,x,train", "domain is 'picture'; expected photo or sketch"),
        ("photo,b.jpg,,train", "class is ''"),
        ('photo,b.jpg,"a\tb",train', "control character"),
        ("photo,../b.jpg,x,train", "inside the folder"),
        ("photo,b.svg,x,train", "known suffixes"),
        ("photo,b.jpg,x", "3 fields, but the header has 4"),
        ("photo,b.jpg,x,validation", "split is 'validation'"),
        ("photo,./a.jpg,y,test", "repeats .*line 2"),
        ('photo,"b.jpg,x,train', "not CSV"),
        (f"photo,{'b' * 200_000}.jpg,x,train", "not CSV"),
    ],
)
def test_a_wrong_manifest_row_names_file_and_line(tmp_path, line, says):
    write_manifest(tmp_path, "photo,a.jpg,x,train", line, "sketch,z.png,x,train")
    with pytest.raises(DataError, match=f"manifest.csv, line 3: .*{says}") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", ["", "path,class", "domain,path,class,path", "domain,path,class,Split"])
def test_a_wrong_header(tmp_path, header):
    write_manifest(tmp_path, header=header)
    with pytest.raises(DataError, match=r"line 1: (the header is .*expected domain,path,class,split|.*did you mean)"):
        read_folder(tmp_path)


def test_manifest_of_a_spreadsheet_with_further_columns(tmp_path):
    header = "id;domain; path;class;split;taken by"
    file = write_manifest(tmp_path, "1;photo;a\\1.jpg;x;val;Ann, Bo", "2;sketch;b.png;x;val;", header=header)
    file.write_bytes(file.read_text().encode("utf-16"))
    assert [(one.id, one.key) for one in read_folder(tmp_path).splits["val"]] == [("a/1.jpg", "x"), ("b.png", "x")]


def test_files_that_are_empty_unreadable_or_not_utf8(tmp_path):
    write_manifest(tmp_path)
    with pytest.raises(DataError, match="names no image"):
        read_folder(tmp_path)
    file = write(tmp_path, "triplets.jsonl", "\n \n")
    with pytest.raises(DataError, match="contains no row"):
        read_folder(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + json_row().encode() + b"\n\xff\n")
    with pytest.raises(DataError, match=r"triplets\.jsonl, line 2: not UTF-8"):
        read_folder(tmp_path)
    write_rows(tmp_path, ROW)
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
@settings(max_examples=25, deadline=None)
def test_any_file_content_is_read_or_a_union_error(tmp_path_factory, content, name):
    root = tmp_path_factory.mktemp("any")
    if name == "gallery.txt":
        write_rows(root, ROW)
    write(root, name, content)
    try:
        listed = read_folder(root)
    except UnionError as error:
        listed, line = None, str(error)
        assert line.startswith(str(root))
        assert "\n" not in line
    assert listed is None or sum(len(entries) for entries in listed.splits.values()) > 0
