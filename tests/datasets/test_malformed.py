"""Annotation files as they get broken: one error with the file and the place each, never anything else."""

import json
import tempfile
from pathlib import Path

import official
import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.datasets.loading import load_benchmark
from union_igrot.errors import DataError, UnionError

ROWS = {  # benchmark, its options, a file that lists rows, and the keys that every row needs
    "fashioniq": ({"category": "dress"}, "captions/cap.dress.val.json", ("target", "candidate", "captions")),
    "cirr": ({}, "cirr/captions/cap.rc2.val.json", ("pairid", "reference", "target_hard", "caption", "img_set")),
    "circo": (
        {},
        "annotations/val.json",
        (
            "reference_img_id",
            "target_img_id",
            "relative_caption",
            "shared_concept",
            "gt_img_ids",
            "id",
            "semantic_aspects",
        ),
    ),
    "genecis": ({"task": "focus_object"}, "genecis/focus_object.json", ("reference", "target", "gallery", "condition")),
    "lasco": ({}, "lasco_val.json", ("qid", "query-image", "query-text", "target-image")),
    "llavasco": (
        {},
        "val_llavasco.json",
        (
            "reference_image_id",
            "relative_caption",
            "target_image_id",
            "llava_reference_caption",
            "llava_target_caption",
        ),
    ),
}
LISTS = {  # benchmark, its options, and its list files
    "dtin": ({"domain": "toy"}, ("imgnet/imgnet_real_query.txt", "imgnet/imgnet_targets.txt")),
    "sketchy": (
        {},
        ("zeroshot1/sketch_tx_000000000000_ready_filelist_zero.txt", "zeroshot1/all_photo_filelist_zero.txt"),
    ),
    "tuberlin": (
        {},
        ("zeroshot/png_ready_filelist_zero.txt", "zeroshot/ImageResized_ready_filelist_zero.txt"),
    ),
    "quickdraw": ({}, ("zeroshot/sketch_zero.txt", "zeroshot/all_photo_zero.txt", "zeroshot/cname_cid_zero.txt")),
}
WHOLE = [
    (b"", r": not JSON|line 1: not JSON|contains \[\]"),
    (b"[", r"line 1: not JSON"),
    (b'[{"a": 1}', r"line 1: not JSON"),
    (b"\xff[]", "line 1: not UTF-8"),
    (b"[]", "expected a JSON list"),
    (b"{}", "expected a JSON list|is missing"),
    (b"17", "expected a JSON list|is not a JSON object"),
    (b"[17]", "row 0: 17 is not a JSON object"),
    (b'[{"a": 1, "a": 2}]', "duplicate key 'a'"),
    (b"[" * 100_000, "not usable JSON|line 1: not JSON"),
    (b"[" + b"9" * 5000 + b"]", "not usable JSON"),
]
TEXTS = {
    "caption",
    "relative_caption",
    "shared_concept",
    "query-text",
    "llava_reference_caption",
    "llava_target_caption",
}
WRONG = [None, True, -1, 1.5, {}, [], [[]], "\ud800", "a\x00b"]


def fails(name, root, options, match):
    with pytest.raises(DataError, match=match) as error:
        load_benchmark(name, root, check_images=False, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ROWS)
def test_a_json_file_broken_as_a_whole(tmp_path, name):
    options, file, _ = ROWS[name]
    official.WRITERS[name](tmp_path, with_images=False)
    for content, match in WHOLE:
        (tmp_path / file).write_bytes(content)
        assert str(tmp_path / file) in fails(name, tmp_path, options, match)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in ROWS for key in ROWS[name][2]])
def test_a_wrong_row_is_named(tmp_path, name, key):
    options, file, _ = ROWS[name]
    official.WRITERS[name](tmp_path, with_images=False)
    rows = json.loads((tmp_path / file).read_text())
    del rows[1][key]
    (tmp_path / file).write_text(json.dumps(rows))
    assert f"{file}, row 1: {key!r} is missing" in fails(name, tmp_path, options, "missing")
    allowed = "a\x00b" if key in TEXTS else [] if key == "semantic_aspects" else object()
    for value in WRONG:
        if value != allowed:
            rows[1][key] = value
            (tmp_path / file).write_text(json.dumps(rows))
            assert f"{file}, row 1" in fails(name, tmp_path, options, "row 1")


# Where a contradiction is put: the benchmark, its options and the file.
CAPTIONS = ("fashioniq", {"category": "dress"}, "captions/cap.dress.val.json")
SPLIT = ("fashioniq", {"category": "dress"}, "image_splits/split.dress.val.json")
CIRR = ("cirr", {}, "cirr/captions/cap.rc2.val.json")
CIRR_SPLIT = ("cirr", {}, "cirr/image_splits/split.rc2.val.json")
CIRCO = ("circo", {}, "annotations/val.json")
CIRCO_IMAGES = ("circo", {}, "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json")
LASCO = ("lasco", {}, "lasco_val.json")
CORPUS = ("lasco", {}, "lasco_val_corpus.json")
LLAVASCO = ("llavasco", {"stride": 5}, "val_llavasco.json")
GENECIS = ("genecis", {"task": "focus_object"}, "genecis/focus_object.json")


def change(root, file, mutate):
    value = json.loads((root / file).read_text())
    mutate(value)
    (root / file).write_text(json.dumps(value))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "mutate", "match"),
    [
        (
            CAPTIONS,
            lambda v: v[2].update(target="X"),
            r"cap\.dress\.val\.json, row 2: 'X' is not in the split file",
        ),
        (CAPTIONS, lambda v: v[2].update(captions=["a"]), "row 2: captions must be a list of two texts"),
        (CAPTIONS, lambda v: v[2].update(target=v[2]["candidate"]), "row 2: the candidate is its own target"),
        (CAPTIONS, lambda v: v[2].update(candidate="../x"), "row 2: candidate is '../x', a path"),
        (SPLIT, lambda v: v.append(v[1]), r"split\.dress\.val\.json, row 8: 'BDv001' repeats .* row 1"),
        (SPLIT, lambda v: v.insert(3, None), "row 3: entry is None"),
        (CIRR, lambda v: v[3].update(target_hard="X"), "row 3: 'X' is not in the split file"),
        (CIRR, lambda v: v[3].update(pairid=100), "row 3: '100' repeats .* row 0"),
        (CIRR, lambda v: v[3]["img_set"]["members"].pop(2), r"row 3: img_set\.members lacks"),
        (CIRR, lambda v: v[3]["img_set"].pop("members"), "row 3, img_set: 'members' is missing"),
        (
            CIRR,
            lambda v: v[3]["img_set"]["members"].append(v[3]["reference"]),
            "row 3, img_set: members names an entry twice",
        ),
        (CIRR, lambda v: v[3].update(target_hard=v[3]["reference"]), "row 3: the reference is its own target"),
        (
            CIRR_SPLIT,
            lambda v: v.update({"val-1-0-img0": "../../x.png"}),
            r"split\.rc2\.val\.json, 'val-1-0-img0': .* expected a relative path inside",
        ),
        (CIRR_SPLIT, lambda v: v.update({"val-1-0-img0": "C:\\x.png"}), "expected a relative path inside"),
        (CIRR_SPLIT, lambda v: v.update({"a\nb": "x.png"}), r"'a\\nb': a name is .*without control characters"),
        (CIRR_SPLIT, lambda v: v.update({"\ud800": "x.png"}), "not valid Unicode"),
        (CIRR_SPLIT, lambda v: v.update({"x": "a\x7fb.png"}), "'x': x is .*without control characters"),
        (CIRR_SPLIT, lambda v: v.update({"x": "a\x9bb.png"}), "'x': x is .*without control characters"),
        (CIRR_SPLIT, lambda v: v.clear(), "names no image"),
        (CIRCO, lambda v: v[2].update(id=3), "row 2: id is 3 \\(expected 2\\)"),
        (CIRCO, lambda v: v.pop(1), "row 1: id is 2"),
        (CIRCO, lambda v: v[2].update(gt_img_ids=[1, 2]), "row 2: gt_img_ids lacks target_img_id"),
        (CIRCO, lambda v: v[2]["gt_img_ids"].append(v[2]["gt_img_ids"][0]), "row 2: gt_img_ids names an entry twice"),
        (CIRCO, lambda v: v[2]["gt_img_ids"].append(5), "row 2: '5' is not in image_info"),
        (CIRCO, lambda v: v[2].update(semantic_aspects=["nice"]), "row 2: semantic_aspects must be"),
        (CIRCO, lambda v: v[2].update(reference_img_id=6), "row 2: '6' is not in image_info"),
        (CIRCO_IMAGES, lambda v: v.pop("images"), "'images' is missing"),
        (CIRCO_IMAGES, lambda v: v["images"][4].pop("file_name"), r"images\[4\]: 'file_name' is missing"),
        (CIRCO_IMAGES, lambda v: v["images"].append(v["images"][2]), r"images\[12\]: '1014' repeats .*images\[2\]"),
        (LASCO, lambda v: v[2].update({"target-image": [9, "a.jpg"]}), "row 2: '9' is not in the corpus"),
        (LASCO, lambda v: v[2].update({"query-image": [9]}), r"row 2: query-image is \[9\]; expected \[id, path\]"),
        (CORPUS, lambda v: v.append(v[0]), r"lasco_val_corpus\.json, row 10: '40' repeats"),
        (CORPUS, lambda v: v.clear(), "contains no image"),
        (CORPUS, lambda v: v[3].update(path="/etc/passwd"), "row 3: path is '/etc/passwd'"),
        (LLAVASCO, lambda v: v[2].update(relative_caption=None), "row 2: relative_caption"),
        (GENECIS, lambda v: v[1]["gallery"][2].clear(), r"row 1, gallery\[2\]: 'val_image_id' is missing"),
    ],
)
def test_rows_that_contradict(tmp_path, place, mutate, match):
    name, options, file = place
    official.WRITERS[name](tmp_path, with_images=False)
    change(tmp_path, file, mutate)
    fails(name, tmp_path, options, match)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name in LISTS for file in LISTS[name][1]])
def test_a_wrong_line_is_named(tmp_path, name, file):
    options = LISTS[name][0]
    official.WRITERS[name](tmp_path, with_images=False)
    good = (tmp_path / file).read_bytes().splitlines(keepends=True)
    path = good[1].rsplit(None, 1)[0]
    variants = [
        b"\n",  # no line at all
        [path + b"\n"],
        [b"7\n"],
        [path + b" x\n"],
        [path + b" -1\n"],
        [path + b" 1.5\n"],
        [path + b" 99999999999999999999999\n"],
        [path + "\u0663".encode() + b" \xd9\xa3\n"],
        [path + b"\xff 1\n"],
        [b"a\x01b.png 1\n"],
        good[:1],
    ]
    if "cname" not in file:
        variants += [[b"/abs/" + path + b" 1\n"], [b"../../" + path + b" 1\n"], [path + b" 4567\n"]]
    for variant in variants:
        whole = variant if isinstance(variant, bytes) else b"".join([good[0], *variant, *good[2:]])
        (tmp_path / file).write_bytes(whole)
        message = fails(name, tmp_path, options, "line |is empty")
        assert str(tmp_path / file) in message
        assert isinstance(variant, bytes) or "line 2" in message


@pytest.mark.parametrize(
    "line", ["cat a.png", "cat a.png b.jpg c", "cat a b.png c.jpg", "cat /a.png b.jpg", "cat a.png ../b.jpg"]
)
def test_a_wrong_training_pair(tmp_path, line):
    official.training_sketchy(tmp_path, with_images=False)
    file = tmp_path / "zeroshot1/training_sketchy.txt"
    file.write_text(file.read_text() + line + "\n")
    fails("training_sketchy", tmp_path, {}, r"training_sketchy\.txt, line 7: ")


# --- fuzzing

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def leaves(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaves(value[key], (*path, key))


def read_any(name, root, options):
    try:
        load_benchmark(name, root, check_images=False, **options)
    except UnionError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_json_mutations_raise_union_errors_alone(data):
    name = data.draw(st.sampled_from(sorted(ROWS)))
    options, file, _ = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        official.WRITERS[name](root, with_images=False)
        value = json.loads((root / file).read_text())
        *path, last = data.draw(st.sampled_from([p for p in leaves(value) if p]))
        inner = value
        for key in path:
            inner = inner[key]
        inner[last] = data.draw(VALUES)
        (root / file).write_text(json.dumps(value))
        read_any(name, root, options)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_byte_mutations_raise_union_errors_alone(data):
    every = {name: (options, (file,)) for name, (options, file, _) in ROWS.items()} | LISTS
    name = data.draw(st.sampled_from(sorted(every)))
    options, files = every[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        official.WRITERS[name](root, with_images=False)
        file = root / data.draw(st.sampled_from(files))
        content = file.read_bytes()
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 30)))
        file.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[stop:])
        read_any(name, root, options)
