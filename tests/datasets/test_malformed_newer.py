"""Ten broken variants of each newer format: one error with the file and the place each."""

import json

import official
import pytest

from union_igrot.datasets.loading import load_benchmark
from union_igrot.errors import DataError

COLUMNS = {  # benchmark, options, list file, separator, and whether a path may be at fault
    "nico": ({}, "database_files.csv", " "),
    "minidn": ({}, "query_files.csv", " "),
    "ltll": ({}, "full_files.csv", " "),
    "icir": ({}, "database_files.csv", ","),
    "patterncom": ({"attribute": "color"}, "PatternCom/color.csv", ","),
}
NUMBERS = {"fscoco": ({}, "val_normal.txt"), "shoev2": ({}, "sketch_test.txt"), "chairv2": ({}, "photo_test.txt")}
JSON = {
    "cstbir": ({}, "CSTBIR_dataset.json", ("text", "image", "label", "sketch", "split")),
    "circled": ({"subset": "circo"}, "circo_val.json", ("session_id", "ground_truth_ids", "turns")),
    "mmeb": ({"task": "CIRR"}, "CIRR.jsonl", ("qry_inst", "qry_text", "qry_img_path", "tgt_img_path")),
    "fashioniq": ({"category": "dress", "targets": "more.json"}, "more.json", ("threshold", "confidence_scores")),
}


def fails(name, root, options, file):
    with pytest.raises(DataError) as error:
        load_benchmark(name, root, check_images=False, **options)
    assert "\n" not in str(error.value)
    assert file in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_wrong_line_of_columns_is_named(tmp_path, name):
    options, file, separator = COLUMNS[name]
    official.WRITERS[name](tmp_path, with_images=False)
    good = (tmp_path / file).read_bytes().splitlines(keepends=True)
    path, *rest = good[1].strip().split(separator.encode())
    join = separator.encode().join
    variants = [
        join([path, rest[0]]),
        join([path, *rest, b"more"]),
        path,
        join([b"", *rest]) if separator == "," else b"x",
        join([b"a\x01b.jpg", *rest]),
        join([b"\xff.jpg", *rest]),
        join([b"/etc/passwd", *rest]),
        join([b"../../x.jpg", *rest]),
        join([b"C:/x.jpg", *rest]),
        good[0].strip(),  # repeated
    ]
    for variant in variants:
        (tmp_path / file).write_bytes(b"".join([good[0], variant, b"\n", *good[2:]]))
        assert f"{file}, line 2: " in fails(name, tmp_path, options, file), variant
    (tmp_path / file).write_bytes(b"")
    assert "is empty" in fails(name, tmp_path, options, file)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_wrong_line_of_names_is_named(tmp_path, name):
    options, file = NUMBERS[name]
    official.WRITERS[name](tmp_path, with_images=False)
    good = (tmp_path / file).read_bytes().splitlines(keepends=True)
    variants = [good[0].strip(), b"\xff", b"a\x01b", b"/etc/passwd", b"../x", b"C:/x.png", b".."]
    variants += [b"-1", b"1.5.", b"9" * 30] if name == "fscoco" else [b".png", b"x/", b"."]
    for variant in variants:
        (tmp_path / file).write_bytes(b"".join([good[0], variant, b"\n", *good[2:]]))
        assert f"{file}, line 2: " in fails(name, tmp_path, options, file), variant


@pytest.mark.parametrize("name", JSON)
def test_a_wrong_row_is_named(tmp_path, name):
    options, file, keys = JSON[name]
    official.WRITERS[name](tmp_path, with_images=False)
    if name == "fashioniq":
        row = {"reference_image_name": "BDv000", "target_image_name": "BDv001", "threshold": 0.9}
        official.write_json(tmp_path, file, [row | {"confidence_scores": {}}] * 2)
    text = (tmp_path / file).read_text()
    rows = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)
    for key in keys:
        for value in ("missing", None, True, {"a": []}, [[]]):
            broken = dict(rows[1])
            del broken[key]
            broken |= {} if value == "missing" else {key: value}
            (tmp_path / file).write_text(json.dumps([rows[0], broken, *rows[2:]]))
            assert f"{file}, row 1" in fails(name, tmp_path, options, file), (key, value)
    for content in (b"", b"[", b"{}", b"17", b"[17]", b"\xff[]", b"[]", b"[" * 5000, json.dumps(rows).encode()[:-9]):
        (tmp_path / file).write_bytes(content)
        fails(name, tmp_path, options, file)


@pytest.mark.parametrize("name", ["sketchy_instances", "sketchy_generalized", "tuberlin_generalized", "imagenet_r"])
def test_broken_lists_are_named(tmp_path, name):
    official.WRITERS[name](tmp_path, with_images=False)
    part = "zero" if name == "sketchy_instances" else "train"
    (file,) = [
        *tmp_path.glob(f"zeroshot/Image*_{part}.txt"),
        *tmp_path.glob(f"zeroshot0/all*_{part}.txt"),
        *tmp_path.glob("imgnet/*targets.txt"),
    ]
    good = file.read_bytes().splitlines(keepends=True)
    variants = [b"x", b"7", b"x y", b"x -1", b"x 1.5", b"x 99999999999", b"\xff 1", b"a\x01 1", b"/x 1", b"../x 1"]
    options = {"split": "zeroshot0"} if "sketchy" in name else {}
    for variant in [*variants, good[0].strip(), b"x.png 45678"]:
        file.write_bytes(b"".join([good[0], variant, b"\n", *good[2:]]))
        assert f"{file.name}, line 2: " in fails(name, tmp_path, options, file.name), variant
