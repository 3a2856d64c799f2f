"""The readers of sketch and text, instance, conversion, fine-grained, generalized and multi-turn benchmarks."""

import csv
import io
import itertools
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import official
import pytest
import torch

from union_igrot.datasets.loading import load_benchmark
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.evaluation.evaluate import means, method_result
from union_igrot.evaluation.scoring import score
from union_igrot.images.decode import open_image
from union_igrot.types import NoImage

SHARED = Path(__file__).parents[2] / "../shared"
LISTS, GOLDEN = SHARED / "data/annotations", SHARED / "golden/freedom_ltll.json"
needs_shared = pytest.mark.skipif(not GOLDEN.is_file(), reason="FREEDOM's lists and golden values are in ../shared")


def read(name, root, **options):
    return load_benchmark(name, root, check_images=False, **options)


def feature(key):
    vector = np.random.default_rng(zlib.crc32(f"0:{key}".encode())).standard_normal(32).astype(np.float32)
    return vector / np.linalg.norm(vector)


@pytest.mark.slow
@needs_shared
def test_freedom_equals_the_official_code():
    golden = json.loads(GOLDEN.read_text())
    benchmark = read("ltll", LISTS / "freedom/ltll")
    assert (len(benchmark.queries), len(benchmark.gallery)) == (488, 488)
    mixed = np.stack([0.35 * feature(item.label) + feature(item.id) for item in benchmark.gallery])
    gallery = torch.from_numpy(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))
    at = {item.id: row for row, item in enumerate(benchmark.gallery)}
    images = gallery[[at[query.id.rpartition("@")[0]] for query in benchmark.queries]]
    texts = torch.from_numpy(np.stack([feature(query.text) for query in benchmark.queries]))
    for method, queries in (("image", images), ("sum", images + texts)):
        scores = score(benchmark, queries, gallery)
        pairs = golden[method]
        for pair, expected in pairs.items():
            tag = pair.replace("-->", " -> ")
            rows = [row for row, query in enumerate(benchmark.queries) if query.tags == (tag,)]
            assert len(rows) == {"Today -> Archive": 279, "Archive -> Today": 209}[tag]
            found = {name: 100 * values[rows].mean().item() for name, values in scores.values.items()}
            assert found == pytest.approx(expected, abs=0.01)
        whole = sum(expected["mAP"] for expected in pairs.values()) / len(pairs)
        assert means(benchmark, scores)["mAP"] == pytest.approx(whole, abs=0.01)


COUNT = """
import json, sys
from union_igrot.datasets.loading import load_benchmark
nico = load_benchmark("nico", f"{sys.argv[1]}/freedom/nico", check_images=False)
drawn = load_benchmark("sketchy_instances", f"{sys.argv[1]}/sketchy", check_images=False)
kinds = [len({getattr(query, name) for query in nico.queries}) for name in ("label", "tags", "text")]
sizes = [len(side) for one in (nico, drawn) for side in (one.queries, one.gallery)]
print(json.dumps([*sizes, *kinds, *{len(query.subset) for query in drawn.queries}]))
"""


@needs_shared
@pytest.mark.slow
def test_official_lists_have_the_official_counts():
    """In a process of its own, where types are not checked."""
    command = [sys.executable, "-c", COUNT, str(LISTS)]
    counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert counted == [5 * 8723, 80_134, 12_694, 2_100, 60, 30, 6, 100]


def test_every_domain_is_asked_for_but_the_own(tmp_path):
    official.nico(tmp_path, with_images=False)
    benchmark = read("nico", tmp_path)
    first = benchmark.queries[0]
    assert first.id == "nico/autumn/class0/autumn_0_0.jpg@dimlight"
    assert (first.text, first.tags, first.label) == ("dimlight", ("autumn -> dimlight",), "class0")
    assert first.targets == ("nico/dim/class0/dim_0_0.jpg", "nico/dim/class0/dim_0_1.jpg")
    assert [query.tags[0] for query in benchmark.queries[:2]] == ["autumn -> dimlight", "autumn -> grass"]
    official.minidn(tmp_path / "dn", with_images=False)
    assert {query.text for query in read("minidn", tmp_path / "dn").queries} >= {"photo", "clipart"}


def test_imagenet_r_asks_for_all_pairs_of_five_domains(tmp_path):
    official.imagenet_r(tmp_path, with_images=False)
    benchmark = read("imagenet_r", tmp_path)
    assert len(benchmark.queries) == 4 * len(benchmark.gallery)
    assert (benchmark.name, benchmark.protocol.ap_norm, benchmark.protocol.ap_rule) == (
        "imagenet_r",
        "all",
        "trapezoid",
    )
    asked = {query.id: query for query in benchmark.queries}
    photo = asked["imgnet/imagenet-r/n0/cartoon_0.jpg@photo"]
    assert photo.targets == ("imgnet/real/n0/ILSVRC2012_val_0.JPEG", "imgnet/real/n0/ILSVRC2012_val_1.JPEG")


def test_patterncom_merges_classes_and_counts_its_list_alone(tmp_path):
    official.patterncom(tmp_path, with_images=False)
    benchmark = read("patterncom", tmp_path, attribute="color")
    assert len(benchmark.gallery) == 12  # 10 of them are in the list
    assert len(benchmark.queries) == 10
    first = benchmark.queries[0]
    assert (first.id, first.text) == ("bridge000.jpg@dark blue", "dark blue")
    assert set(first.targets) == {f"{name}{at:03d}.jpg" for name in ("bridge", "overpass") for at in (1, 3)}


def test_average_precision_of_patterncom_and_icir_against_loops(tmp_path):
    official.patterncom(tmp_path / "p", with_images=False)
    official.icir(tmp_path / "i", with_images=False)
    for name, options, trapezoid in (("patterncom", {"attribute": "shape"}, False), ("icir", {}, True)):
        benchmark = read(name, tmp_path / name[0], **options)
        draw = torch.Generator().manual_seed(0)
        queries, gallery = (torch.randn(len(x), 5, generator=draw) for x in (benchmark.queries, benchmark.gallery))
        table, expected = (queries @ gallery.T).tolist(), []
        for query, row in zip(benchmark.queries, table, strict=True):
            own = [at for at, item in enumerate(benchmark.gallery) if query.subset is None or item.id in query.subset]
            hits = [benchmark.gallery[at].id in query.targets for at in sorted(own, key=lambda at, row=row: -row[at])]
            total = found = 0
            for place, hit in enumerate(hits):
                before = 1 if place == 0 else found / place
                found += hit
                total += hit * ((before + found / (place + 1)) / 2 if trapezoid else found / (place + 1))
            expected.append(total / sum(hits))
        scores = score(benchmark, queries, gallery)
        assert scores.values["mAP"].tolist() == pytest.approx(expected)
        if name == "icir":
            groups = [
                [x for q, x in zip(benchmark.queries, expected, strict=True) if q.label == one]
                for one in ("temple", "mug")
            ]
            found = means(benchmark, scores)
            assert found["mmAP"] == pytest.approx(50 * sum(sum(group) / len(group) for group in groups))
            assert found["minmAP"] == pytest.approx(50 * sum(map(min, groups)))


def pack(root):
    """Rewrite an extracted i-CIR as a WebDataset."""
    (root / "annotations").mkdir()
    for side in ("query", "database"):
        file = root / f"{side}_files.csv"
        (root / "webdataset" / side).mkdir(parents=True)
        with tarfile.open(root / "webdataset" / side / f"{side}-000000.tar", "w") as tar:
            for number, line in enumerate(file.read_text().splitlines()):
                path, text, instance = line.split(",")
                described = json.dumps({"img_path": path, "text": text, "instance": instance}).encode()
                image = (root / path.removeprefix("icir/")).read_bytes()
                for suffix, content in (("jpg", image), ("json", described)):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.rename(root / "annotations" / file.name)


def test_icir_is_the_same_in_both_layouts(tmp_path):
    official.icir(tmp_path)
    plain = load_benchmark("icir", tmp_path)
    pixels = [np.asarray(open_image(item.image)) for item in plain.gallery]
    assert {len(query.subset) for query in plain.queries} == {7}
    assert all(query.subset is plain.queries[0].subset for query in plain.queries[:4])
    assert [query.targets for query in plain.queries[:2]] == [
        ("icir/database/temple/at0.jpg", "icir/database/temple/at1.jpg"),
        ("icir/database/temple/as0.jpg", "icir/database/temple/as1.jpg"),
    ]
    pack(tmp_path)
    packed = load_benchmark("icir", tmp_path)
    assert [(q.text, q.targets, q.subset) for q in packed.queries] == [
        (q.text, q.targets, q.subset) for q in plain.queries
    ]
    assert all(
        (np.asarray(open_image(item.image)) == one).all() for item, one in zip(packed.gallery, pixels, strict=True)
    )
    shard = next(tmp_path.glob("webdataset/query/*.tar"))
    shard.unlink()
    with pytest.raises(ImageError, match=r"query_files\.csv, line 1: icir/query/temple/0\.jpg is in no tar file"):
        load_benchmark("icir", tmp_path)
    shard.write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"query-000000\.tar: not a WebDataset tar file"):
        load_benchmark("icir", tmp_path)


def test_fscoco_has_three_kinds_of_queries(tmp_path):
    official.fscoco(tmp_path)
    both, sketch, text = (load_benchmark("fscoco", tmp_path, query=kind) for kind in ("both", "sketch", "text"))
    assert [one.name for one in (both, sketch, text)] == ["fscoco_both", "fscoco_sketch", "fscoco_text"]
    assert [one.task for one in (both, sketch, text)] == ["cir", "sbir", "cir"]
    assert both.queries[0].text == text.queries[0].text == "A man near 100"
    assert sketch.queries[0].text is None
    assert isinstance(text.queries[0].image, NoImage)
    assert both.queries[0].image.parts[-3:] == ("raster_sketches", "1", "000000000100.jpg")
    assert len(load_benchmark("fscoco", tmp_path, "val_unseen_user").queries) == 3
    (tmp_path / "text/1/000000000100.txt").unlink()
    with pytest.raises(DataError, match=r"val_normal\.txt, line 1: no text/<user>/000000000100\.txt"):
        load_benchmark("fscoco", tmp_path)


def test_cstbir_files_prompts_and_galleries(tmp_path):
    official.cstbir(tmp_path)
    benchmark = load_benchmark("cstbir", tmp_path)
    assert (len(benchmark.queries), len(benchmark.gallery)) == (8, 4)
    assert benchmark.queries[3].text == "[sketch] in front of 3"
    assert (benchmark.queries[3].targets, benchmark.queries[3].label) == (("1.jpg",), "hot dog")
    assert "gallery=targets: 4 photos" in benchmark.protocol.note
    assert load_benchmark("cstbir", tmp_path, prompt="drop").queries[3].text == "in front of 3"
    for prompt in ("label", "the {label}"):
        with pytest.raises(ConfigError, match="tells the category"):
            load_benchmark("cstbir", tmp_path, prompt=prompt)
    told = load_benchmark("cstbir", tmp_path, prompt="label", oracle=True)
    assert told.queries[3].text == "hot dog in front of 3"
    assert "ORACLE" in told.protocol.note
    with pytest.raises(DataError, match=r"no row of split 'open' \(its splits: test, val\)"):
        load_benchmark("cstbir", tmp_path, "open")
    rows = json.loads((tmp_path / "CSTBIR_dataset.json").read_text())
    official.write_json(tmp_path, "open.json", [row | {"split": "test_open"} for row in rows[:3]])
    assert len(load_benchmark("cstbir", tmp_path, "open", annotations="open.json").queries) == 3
    official.write_lines(tmp_path, "padded.txt", [f"{at}.jpg" for at in range(5)])
    padded = load_benchmark("cstbir", tmp_path, gallery="padded.txt")
    assert (len(padded.gallery), padded.queries[3].targets) == (5, ("1.jpg",))
    assert "gallery=padded.txt: 5 photos" in padded.protocol.note
    official.write_lines(tmp_path, "short.txt", ["0.jpg"])
    with pytest.raises(DataError, match=r"short\.txt: lacks '1\.jpg', a target \(3 targets"):
        load_benchmark("cstbir", tmp_path, gallery="short.txt")


def test_cstbir_as_csv_with_rendered_sketches(tmp_path):
    official.cstbir(tmp_path)
    plain = load_benchmark("cstbir", tmp_path)
    rows = json.loads((tmp_path / "CSTBIR_dataset.json").read_text())
    with (tmp_path / "queries.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "text", "object_category", "image_filename", "sketch_filename"])
        writer.writerows([row[key] for key in ("split", "text", "label", "image", "sketch")] for row in rows)
    given = load_benchmark("cstbir", tmp_path, annotations="queries.csv")
    assert given.queries == plain.queries
    for path in (tmp_path / "sketches").iterdir():
        path.unlink()
    (tmp_path / "numpy_bitmap").mkdir()
    bitmaps = np.zeros((9, 784), np.uint8)
    bitmaps[3, :392] = 255
    for label in ("camel", "hot dog"):
        np.save(tmp_path / f"numpy_bitmap/{label}.npy", bitmaps)
    drawn = load_benchmark("cstbir", tmp_path)
    assert len({query.image.key for query in drawn.queries}) == 8
    image = np.asarray(open_image(drawn.queries[3].image))
    assert image.shape == (224, 224, 3)
    assert (image[:100].max(), image[-100:].min()) == (0, 255)
    np.save(tmp_path / "numpy_bitmap/camel.npy", bitmaps[:1])
    with pytest.raises(ImageError, match=r"camel\.npy, row 2: not a sketch"):
        open_image(load_benchmark("cstbir", tmp_path).queries[2].image)


@pytest.mark.parametrize("name", ["shoev2", "chairv2"])
def test_qmul_in_both_layouts(tmp_path, name):
    official.WRITERS[name](tmp_path / "lists")
    listed = load_benchmark(name, tmp_path / "lists")
    assert listed.queries[1].targets == ("1000",)
    assert listed.queries[1].image.name == "1000_2.png"
    official.write_images(tmp_path / "pix", [f"testB/{item.image.name}" for item in listed.gallery])
    official.write_images(tmp_path / "pix", [f"testA/{query.image.name}" for query in listed.queries])
    paired = load_benchmark(name, tmp_path / "pix")
    assert [(q.id, q.targets) for q in paired.queries] == [(q.id, q.targets) for q in listed.queries]
    official.write_lines(tmp_path, "lists/photo_test.txt", ["1000.png"])
    with pytest.raises(DataError, match=r"sketch_test\.txt, line 3: sketch '1001_1' is of '1001', which is no photo"):
        load_benchmark(name, tmp_path / "lists")


def test_sketchy_instances(tmp_path):
    official.sketchy_instances(tmp_path)
    own, every = (load_benchmark("sketchy_instances", tmp_path, gallery=kind) for kind in ("class", "all"))
    assert (len(own.queries), len(own.gallery)) == (6, 6)
    assert own.queries[0].targets == ("256x256/photo/tx_000000000000_ready/cat/n0_7.jpg",)
    assert {len(query.subset) for query in own.queries} == {2}
    assert every.queries[0].subset is None
    file = tmp_path / "zeroshot0/all_photo_filelist_zero.txt"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "n1_7" not in line))
    with pytest.raises(DataError, match=r"line 3: its photo 256x256/photo/.*n1_7\.jpg is not in the list"):
        load_benchmark("sketchy_instances", tmp_path)


def test_generalized_galleries(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "CLASSES", tuple(f"class {at}" for at in range(10)))
    official.tuberlin(tmp_path)
    found = {one: load_benchmark("tuberlin_generalized", tmp_path, protocol=one) for one in official.GENERALIZED}
    assert [one.name for one in found.values()] == [f"tuberlin_generalized_{one}" for one in official.GENERALIZED]
    assert [len(one.queries) for one in found.values()] == [30, 30, 36]  # 3 sketches of 10 classes, and of 2 seen ones
    assert [len(one.gallery) for one in found.values()] == [80, 50, 48]  # 4 photos of 10 classes, and of seen ones
    plain = load_benchmark("tuberlin", tmp_path)
    assert [query.targets for query in found["all_seen"].queries] == [query.targets for query in plain.queries]
    again = load_benchmark("tuberlin_generalized", tmp_path, protocol="seen_classes", seed=1)
    assert {query.id for query in again.queries} != {query.id for query in found["seen_classes"].queries}
    assert "protocol=seen_classes" in again.protocol.note
    assert "seed 1" in again.protocol.note


def test_circled_counts_success_by_turn(tmp_path):
    official.circled(tmp_path)
    benchmark = load_benchmark("circled", tmp_path, subset="cirr")
    assert [query.id for query in benchmark.queries] == ["cirr_0-1", "cirr_0-2", "cirr_0-3", "cirr_1-1", "cirr_1-2"]
    assert len(benchmark.gallery) == 12
    assert benchmark.queries[1].tags == ("turn 2", "up to turn 2", "up to turn 3")
    # The first session succeeds at its second turn, the other one never.
    gallery = torch.eye(12)[torch.arange(12)]
    queries = -torch.eye(12)[[4, 4, 4, 5, 5]]
    queries[1] *= -1
    result = method_result(benchmark, "sum", score(benchmark, queries, gallery), {}, {}, 0)
    hits = [result.by_tag[f"up to turn {turn}"].value for turn in (1, 2, 3)]
    assert hits == [0, 50, 50]
    assert [result.by_tag[f"turn {turn}"].value for turn in (1, 2, 3)] == [0, 50, 0]
    assert result.by_tag["last turn"].value == 0
    assert result.metrics == {"groupR@10": 50, "R@10": 20}
    with pytest.raises(ConfigError, match="no training sessions of CIRCO"):
        load_benchmark("circled", tmp_path, "train", subset="circo")


def test_circled_reads_lines_too(tmp_path):
    official.circled(tmp_path, with_images=False)
    file = tmp_path / "circo_val.json"
    sessions = json.loads(file.read_text())
    (tmp_path / "circo_val.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sessions))
    plain = read("circled", tmp_path, subset="circo")
    file.unlink()
    assert read("circled", tmp_path, subset="circo").queries == plain.queries
    file.write_text(json.dumps([*sessions, sessions[0]]))
    with pytest.raises(DataError, match=r"circo_val\.json, row 2: '.*' repeats .*row 0"):
        read("circled", tmp_path, subset="circo")


def test_mmeb_ranks_own_candidates(tmp_path):
    official.mmeb(tmp_path)
    benchmark = load_benchmark("mmeb", tmp_path, task="CIRR")
    first = benchmark.queries[0]
    assert first.text == "Given an image, find another: with 0 bottles"
    assert (first.targets, first.subset) == (("CIRR/1.jpg",), ("CIRR/1.jpg", "CIRR/2.jpg", "CIRR/3.jpg"))
    assert load_benchmark("mmeb", tmp_path, task="CIRR", prompt="caption").queries[0].text == "with 0 bottles"
    same = torch.ones(len(benchmark.gallery), 2)
    assert means(benchmark, score(benchmark, torch.ones(3, 2), same)) == {"hit@1": 0}


def test_mmeb_reads_parquet(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    official.mmeb(tmp_path)
    plain = load_benchmark("mmeb", tmp_path, task="CIRR")
    rows = [json.loads(line) for line in (tmp_path / "CIRR.jsonl").read_text().splitlines()]
    (tmp_path / "CIRR").mkdir()
    file = tmp_path / "CIRR/test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert load_benchmark("mmeb", tmp_path, task="CIRR").queries == plain.queries
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"parquet: not a Parquet file"):
        load_benchmark("mmeb", tmp_path, task="CIRR")


def test_spelling_is_corrected_on_request(tmp_path):
    official.fashioniq(tmp_path)
    official.write_json(tmp_path, "captions/correction_dict_dress.json", {"blue": "azure", "more": "less"})
    plain, fixed = (load_benchmark("fashioniq", tmp_path, category="dress", spelling=one) for one in (False, True))
    assert plain.queries[0].text == "Is blue 0. and more of 0?"
    assert fixed.queries[0].text == "is azure 0 and less of 0"
    assert "spelling corrected" in fixed.protocol.note
    assert "spelling" not in plain.protocol.note


@pytest.mark.parametrize(("name", "options"), [("fashioniq", {"category": "dress"}), ("cirr", {})])
def test_several_targets_are_read_on_request(tmp_path, name, options):
    official.WRITERS[name](tmp_path)
    plain = load_benchmark(name, tmp_path, **options)
    target = plain.queries[0].targets[0]
    reference = plain.queries[0].exclude[0] if name == "cirr" else "BDv000"
    others = [item.id for item in plain.gallery if item.id not in (target, reference)][:2]
    row = {"reference_image_name": reference, "target_image_name": target, "threshold": 0.85}
    scores = {others[0]: 0.9, others[1]: 0.2, target: 0.3, reference: 1}
    official.write_json(tmp_path, "more.json", [row | {"relative_captions": "x", "confidence_scores": scores}])
    found = load_benchmark(name, tmp_path, targets="more.json", **options)
    assert found.queries[0].targets == (target, others[0])
    assert [query.targets for query in found.queries[1:]] == [query.targets for query in plain.queries[1:]]
    assert "several targets of more.json for 1 queries" in found.protocol.note
    for changes, match in (
        ({"confidence_scores": {"X": 0.9}}, "'X' is not in the gallery"),
        ({"threshold": 2}, "row 0: 2 is not a threshold"),
        ({"reference_image_name": "Y"}, "has no row of these queries"),
    ):
        official.write_json(tmp_path, "more.json", [row | {"confidence_scores": scores} | changes])
        with pytest.raises(DataError, match=match):
            load_benchmark(name, tmp_path, targets="more.json", **options)


def test_a_long_list_is_read_in_parts(tmp_path, monkeypatch):
    from union_igrot.storage import text  # noqa: PLC0415

    rows = [{"number": at, "text": "ü" * (at % 50)} for at in range(300)]
    file = tmp_path / "rows.json"
    for block, indent in itertools.product((128, 1 << 20), (None, 2)):
        monkeypatch.setattr(text, "_BLOCK", block)
        file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert list(text.read_json_items(file)) == rows
    for broken, match in ((b"[1, 2", "row 2: not JSON"), (b"[1 2]", "row 1"), (b"{}", "row 0"), (b"[1]]", "row 1")):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=match):
            list(text.read_json_items(file))
