"""Composed retrieval benchmarks: the official files' counts, and small files in the official format."""

import json
import subprocess
import sys
from pathlib import Path

import official
import pytest

from union_igrot.datasets.loading import load_benchmark, load_training
from union_igrot.datasets.registry import find_benchmark
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.types import NoImage

ANNOTATIONS = Path(__file__).parents[2] / "../shared/data/annotations"


def read(name, root, **options):
    return load_benchmark(name, root, **options)


# --- the official files

COUNT = """
import json, sys
from union_igrot.datasets.loading import load_benchmark
root, counts = sys.argv[1], {}
for category in ("dress", "shirt", "toptee"):
    for gallery, captions in (("original", "joined"), ("val", "each"), ("val", "joined")):
        options = {"category": category, "gallery": gallery, "captions": captions}
        found = load_benchmark("fashioniq", f"{root}/fashioniq", check_images=False, **options)
        assert found.protocol.exclude_reference == (gallery == "val")
        assert all(len(query.targets) == 1 and len(query.exclude) == (gallery == "val") for query in found.queries)
        counts[f"{category} {gallery} {captions}"] = [len(found.queries), len(found.gallery)]
cirr = load_benchmark("cirr", f"{root}/cirr", check_images=False)
counts["cirr"] = [len(cirr.queries), len(cirr.gallery), len({query.image for query in cirr.queries})]
assert {len(query.subset) for query in cirr.queries} == {5}
assert all(set(query.targets) < set(query.subset) and query.exclude[0] not in query.subset for query in cirr.queries)
first = cirr.queries[0]
counts["cirr first"] = [first.id, first.text, first.image.name, first.image.parent.name]
circo = load_benchmark("circo", f"{root}/circo", check_images=False)
truths = [len(query.targets) for query in circo.queries]
counts["circo"] = [len(circo.queries), len(circo.gallery), round(sum(truths) / 220, 2), min(truths), max(truths)]
counts["circo tags"] = len({tag for query in circo.queries for tag in query.tags})
first = circo.queries[0]
counts["circo first"] = [first.id, list(first.targets), first.image.name]
sketchy = load_benchmark("sketchy", f"{root}/sketchy", split="zeroshot0", check_images=False)
photos = [len(targets) for targets in {query.targets for query in sketchy.queries}]
counts["sketchy"] = [len(sketchy.queries), len(sketchy.gallery), len(photos), min(photos), max(photos)]
assert len({id(query.targets) for query in sketchy.queries}) == 21
print(json.dumps(counts))
"""


@pytest.mark.slow
@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the official annotation files are not at ../shared/data")
def test_the_official_files_are_read_whole():
    """In a process of its own: 160,000 rows are slow where every call's types are checked."""
    command = [sys.executable, "-c", COUNT, str(ANNOTATIONS)]
    counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    sizes = ("dress", 2017, 3817, 2628), ("shirt", 2038, 6346, 3089), ("toptee", 1961, 5373, 2902)
    for category, rows, original, val in sizes:
        assert counted[f"{category} original joined"] == [rows, original]
        assert counted[f"{category} val each"] == [2 * rows, val]
        assert counted[f"{category} val joined"] == [rows, val]
    assert counted["cirr"] == [4181, 2297, 2165]
    text = "find a photo that show three bottles of soft drink"
    assert counted["cirr first"] == ["12060", text, "dev-244-0-img0.png", "dev"]
    assert counted["circo"] == [220, 123_403, 4.16, 1, 14]
    assert counted["circo tags"] == 9
    assert counted["circo first"] == ["0", ["355099", "528417", "534704"], "000000271520.jpg"]
    assert counted["sketchy"] == [12_694, 12_553, 21, 261, 850]


# --- made-up files


@pytest.mark.parametrize("name", official.WRITERS)
def test_every_image_of_the_official_layout_is_found(name, tmp_path):
    for options in official.WRITERS[name](tmp_path):
        benchmark = read(name, tmp_path, **options)
        assert benchmark.protocol.primary in benchmark.protocol.metrics
        assert benchmark.protocol.prompt
        assert benchmark.protocol.note
        for item in (*benchmark.queries, *benchmark.gallery):
            assert item.image == NoImage() or getattr(item.image, "path", item.image).is_file()
        assert len({query.id for query in benchmark.queries}) == len(benchmark.queries)
        known = {item.id for item in benchmark.gallery}
        assert all({*query.targets, *query.exclude, *(query.subset or ())} <= known for query in benchmark.queries)
        unchecked = read(name, tmp_path, check_images=False, **options)
        assert [query.targets for query in unchecked.queries] == [query.targets for query in benchmark.queries]


@pytest.mark.slow
@pytest.mark.parametrize("name", official.WRITERS)
def test_missing_images_are_one_error(name, tmp_path):
    options = official.WRITERS[name](tmp_path, with_images=False)[0]
    with pytest.raises(
        ImageError, match=r"is missing; .* (\d+) of \1 images are missing: .*check_images=False"
    ) as error:
        read(name, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert read(name, tmp_path, check_images=False, **options).queries


def test_one_missing_image_is_named(tmp_path):
    official.cirr(tmp_path)
    (tmp_path / "dev/val-3-0-img0.png").unlink()
    with pytest.raises(ImageError, match=r"val-3-0-img0\.png: the image is missing.* 1 of 12 images"):
        read("cirr", tmp_path)


def test_unchecked_reading_touches_annotations_alone(tmp_path, monkeypatch):
    official.circo(tmp_path, with_images=False)
    monkeypatch.setattr("union_igrot.datasets.annotations.check_image", lambda path: pytest.fail(f"{path}"))
    read("circo", tmp_path, check_images=False)


def test_fashioniq(tmp_path):
    official.fashioniq(tmp_path, splits=("val", "test", "train"))
    dress = read("fashioniq", tmp_path, category="dress")
    assert dress.name == "fashioniq_dress"
    assert dress.queries[1].text == "Is blue 1. and more of 1?"
    assert dress.queries[1].image == tmp_path / "images/BDv001.jpg"
    assert dress.gallery[2].image == tmp_path / "images/BDv002.png"
    assert dress.queries[1].targets == ("BDv002",)
    assert read("fashioniq", tmp_path, category="dress", prompt="clip4cir").queries[1].text == "Is blue 1 and more of 1"
    both = read("fashioniq", tmp_path, category="dress", prompt="searle")
    assert both.queries[1].text == (
        "a photo of $ that Is blue 1. and more of 1?",
        "a photo of $ that more of 1? and Is blue 1.",
    )
    assert both.protocol.prompt == "searle, unit embeddings of both orders averaged"
    assert read("fashioniq", tmp_path, category="dress", prompt="searle_swapped").protocol.prompt == "searle_swapped"
    own = read("fashioniq", tmp_path, category="dress", gallery="val")
    assert [query.text for query in own.queries[:2]] == ["Is blue 0.", "more of 0?"]
    assert own.queries[0].exclude == ("BDv000",)
    assert len(own.gallery) == 6
    test = read("fashioniq", tmp_path, split="test", category="toptee")
    assert {query.targets for query in test.queries} == {()}
    assert len(test.gallery) == 8
    with pytest.raises(ConfigError, match=r"category .*expected one of dress, shirt, toptee"):
        read("fashioniq", tmp_path)
    with pytest.raises(ConfigError, match="gallery=val"):
        read("fashioniq", tmp_path, split="test", category="dress", gallery="val")
    with pytest.raises(ConfigError, match="leave it out"):
        read("fashioniq", tmp_path, category="dress", gallery="val", prompt="union")
    assert len(load_training("fashioniq", tmp_path, category="shirt").triplets) == 5


def test_fashioniq_captions_in_pic2words_folder(tmp_path):
    official.fashioniq(tmp_path)
    (tmp_path / "captions").rename(tmp_path / "json")
    assert len(read("fashioniq", tmp_path, category="dress").queries) == 5


def test_cirr(tmp_path):
    official.cirr(tmp_path)
    val = read("cirr", tmp_path)
    query = val.queries[0]
    assert (query.id, query.targets, query.exclude) == ("100", ("val-2-0-img0",), ("val-0-0-img0",))
    assert query.subset == tuple(f"val-{at}-0-img0" for at in range(1, 6))
    assert query.text == "find a photo that show 0 bottles"
    assert val.protocol.exclude_reference
    assert val.protocol.means == (("R@5", "Rs@1"),)
    test = read("cirr", tmp_path, split="test1")
    assert test.queries[0].targets == ()
    assert len(test.queries[0].subset) == 5


def test_cirr_images_of_train_may_lie_in_one_folder(tmp_path):
    """Where NLVR2's download has them; the folder that the split file names comes first."""
    official.cirr(tmp_path, splits=("val", "train"))
    listed = tmp_path / "train" / "34"
    (tmp_path / "train" / "train-1-0-img0.png").write_bytes((listed / "train-1-0-img0.png").read_bytes())
    for number in (0, 3, 4, 5, 6, 7):
        (listed / f"train-{number}-0-img0.png").rename(tmp_path / "train" / f"train-{number}-0-img0.png")
    triplets = load_training("cirr", tmp_path).triplets
    assert len(triplets) == 6
    found = {side.relative_to(tmp_path).as_posix() for one in triplets for side in (one.image, one.target)}
    flat = {f"train/train-{number}-0-img0.png" for number in (0, 3, 4, 5, 6, 7)}
    assert found == flat | {f"train/34/train-{number}-0-img0.png" for number in (1, 2)}
    (tmp_path / "train" / "train-0-0-img0.png").unlink()
    with pytest.raises(ImageError, match=r"train/34/train-0-0-img0\.png"):
        load_training("cirr", tmp_path)


def test_cirr_paths_without_a_folder_are_taken_as_they_are(tmp_path):
    official.cirr(tmp_path, with_images=False)
    file = tmp_path / "cirr/image_splits/split.rc2.val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"val-0-0-img0": "a.png"}))
    assert read("cirr", tmp_path, check_images=False).queries[0].image == tmp_path / "a.png"


def test_circo_keeps_or_drops_the_reference(tmp_path):
    official.circo(tmp_path)
    plain, reference = read("circo", tmp_path), read("circo", tmp_path, preset="union_reference")
    assert (plain.protocol.exclude_reference, plain.queries[0].exclude) == (False, ())
    assert (reference.protocol.exclude_reference, reference.queries[0].exclude) == (True, ("1000",))
    assert plain.queries[0].text == "a dog but has 0"
    assert "shared_concept" in plain.protocol.note
    assert "shared_concept" not in read("circo", tmp_path, prompt="covr").protocol.note
    assert plain.protocol.recall_targets == "first"
    assert read("circo", tmp_path, split="test").queries[0].tags == ()


def test_circo_single_target_comes_first(tmp_path):
    official.circo(tmp_path, with_images=False)
    file = tmp_path / "annotations/val.json"
    rows = json.loads(file.read_text())
    rows[0]["target_img_id"] = rows[0]["gt_img_ids"][2]
    rows[1]["gt_img_ids"] = [str(number) for number in rows[1]["gt_img_ids"]]  # ids may be quoted
    file.write_text(json.dumps(rows))
    queries = read("circo", tmp_path, check_images=False).queries
    assert queries[0].targets == ("1021", "1007", "1014")
    assert queries[1].targets == ("1014", "1021", "1028")


def test_lasco(tmp_path):
    official.lasco(tmp_path, splits=("val", "train"))
    val = read("lasco", tmp_path)
    assert (len(val.queries), len(val.gallery)) == (7, 10)
    assert (val.queries[0].id, val.queries[0].targets) == ("40000", ("41",))
    assert val.gallery[2].image == tmp_path / "val2014/COCO_val2014_000000000042.jpg"
    assert val.protocol.metrics == tuple(f"R@{k}" for k in (1, 5, 10, 50, 100, 500, 1000))
    assert len(read("lasco", tmp_path, split="train").gallery) == 8
    (tmp_path / "val").mkdir()
    (tmp_path / "val2014").rename(tmp_path / "val/val2014")
    assert read("lasco", tmp_path).gallery[0].image.is_file()
    corpus = {str(row["id"]): row["path"] for row in json.loads((tmp_path / "lasco_val_corpus.json").read_text())}
    (tmp_path / "lasco_val_corpus.json").write_text(json.dumps(corpus))
    assert [item.id for item in read("lasco", tmp_path).gallery] == [item.id for item in val.gallery]


def test_llavasco_shapes_stride_and_limit(tmp_path):
    official.llavasco(tmp_path)
    listed = read("llavasco", tmp_path)
    assert (len(listed.queries), len(listed.gallery)) == (9, 10)
    rows = json.loads((tmp_path / "val_llavasco.json").read_text())
    for between in ("", "\n", ",\n"):
        (tmp_path / "val_llavasco.json").write_text(between.join(json.dumps(row, indent=1) for row in rows) + "\n")
        assert read("llavasco", tmp_path).queries == listed.queries
    assert [query.id for query in read("llavasco", tmp_path, stride=3, limit=7).queries] == ["0", "3", "6"]
    assert [query.id for query in read("llavasco", tmp_path, stride=3, limit=6).queries] == ["0", "3"]
    assert len(load_training("llavasco", tmp_path, stride=2).triplets) == 5
    with pytest.raises(ConfigError, match="an integer >= 1"):
        read("llavasco", tmp_path, stride=-1)
    with pytest.raises(ConfigError, match="an integer >= 1"):
        read("llavasco", tmp_path, limit=0, preset="union_reference")
    theirs = read("llavasco", tmp_path, preset="union_reference")
    assert [query.id for query in theirs.queries] == ["0"]
    assert "stride=70, limit=350000" in theirs.protocol.note


def test_llavasco_in_the_corpus_of_lasco(tmp_path):
    official.llavasco(tmp_path, with_images=False)
    official.lasco(tmp_path, with_images=False)
    with pytest.raises(DataError, match=r"val_llavasco\.json, row 0: '11' is not in the corpus"):
        read("llavasco", tmp_path, gallery="corpus", check_images=False)
    rows = json.loads((tmp_path / "val_llavasco.json").read_text())
    rows = [row | {"target_image_id": 40 + at} for at, row in enumerate(rows)]
    (tmp_path / "val_llavasco.json").write_text(json.dumps(rows))
    benchmark = read("llavasco", tmp_path, gallery="corpus", check_images=False)
    assert len(benchmark.gallery) == 10
    assert benchmark.queries[3].targets == ("43",)
    with pytest.raises(ConfigError, match="use gallery=named for split=train"):
        read("llavasco", tmp_path, split="train", gallery="corpus", check_images=False)


def test_llavasco_texts_do_not_leak_the_target(tmp_path):
    official.llavasco(tmp_path)
    assert not any("SECRET" in query.text for query in read("llavasco", tmp_path).queries)
    with pytest.raises(ConfigError, match="contains the target's caption"):
        read("llavasco", tmp_path, prompt="union_llava")
    quirk = read("llavasco", tmp_path, preset="union_reference")
    assert quirk.queries[0].text == "add 0 with SECRET target 0"
    assert "LEAK" in quirk.protocol.note
    training = load_training("llavasco", tmp_path, prompt="union_llava")
    assert training.triplets[0].text == "add 0 with SECRET target 0"
    assert load_training("llavasco", tmp_path).triplets[0].text == "add 0"


def test_dtin(tmp_path):
    official.dtin(tmp_path)
    toy = read("dtin", tmp_path, domain="toy")
    assert (len(toy.queries), len(toy.gallery)) == (8, 18)
    answered = [query.targets for query in toy.queries]
    assert answered[0] == ("imgnet/imagenet-r/n0/toy_0.jpg",)
    assert answered[0] is answered[1]
    assert answered[6:] == [(), ()]
    assert (toy.protocol.recall, toy.protocol.unanswered) == ("fraction", "zero")
    assert toy.queries[0].text == "the similar image with toy style"
    some = read("dtin", tmp_path, domain="toy", only_with_gt=True)
    assert (len(some.queries), some.protocol.unanswered) == (6, "omit")
    theirs = read("dtin", tmp_path, domain="toy", preset="union_reference").protocol
    assert (theirs.recall, theirs.ap_norm, theirs.ap_rule) == ("any", "hits", "trapezoid")
    assert read("dtin", tmp_path, domain="toy", recall_mode="any").protocol.recall == "any"
    with pytest.raises(ConfigError, match=r"domain .*one of cartoon, origami, toy, sculpture"):
        read("dtin", tmp_path)
    assert [part["domain"] for part in find_benchmark("dtin").parts] == ["cartoon", "origami", "toy", "sculpture"]


def test_dtin_without_the_first_folder(tmp_path):
    official.dtin(tmp_path, prefix="")
    assert read("dtin", tmp_path, domain="origami").queries[0].image == tmp_path / "real/n0/ILSVRC2012_val_0.JPEG"


def test_a_missing_annotation_file(tmp_path):
    with pytest.raises(
        DataError, match=r"contains no captions/cap\.dress\.val\.json or json/cap\.dress\.val\.json; download"
    ):
        read("fashioniq", tmp_path, category="dress")
    with pytest.raises(DataError, match="no such folder"):
        read("cirr", tmp_path / "nowhere")
