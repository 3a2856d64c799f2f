"""The Python interface: each documented call, short reprs, and the public names with their types."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

import union_igrot as ui
from small_runs import Run, figures, rows_of
from small_world import cir_benchmark, sbir_benchmark, triplets
from union_igrot.cli.config import compose, plain, read_option
from union_igrot.errors import UnionError
from union_igrot.experiment import NOT_HASHED, build_model, hashed_settings, head_sizes
from union_igrot.types import Ranking, Scores

NAMES = (
    "Backbone Benchmark EvaluationResult FeatureExtractor Features Gallery IGROTDataModule IGROTModel InfoNCE Learner "
    "Protocol Query QueryHead Recipe TargetHead TrainingSet Triplet average_precision evaluate load precision_at_k "
    "rank recall_at_k train"
)
SMALL = {"triplets": 64, "pairs": 64, "val_queries": 24, "queries": 24}


@pytest.fixture(scope="module")
def model():
    return ui.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def images():
    return [item.image.open() for item in ui.shapes_sbir("test", 4, 0, gallery=20).gallery]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def test_public_names():
    assert set(dir(ui)) >= set(NAMES.split())


def test_an_unknown_name_suggests_close_ones():
    with pytest.raises(AttributeError, match="load_benchmark"):
        ui.load_benchmarks  # noqa: B018


def test_deprecated_names_still_work(model):
    with pytest.warns(DeprecationWarning, match="image_batch"):
        old = ui.picture_batch([torch.zeros(3, 20, 20)], model.preprocess)
    assert old.equal(ui.image_batch([torch.zeros(3, 20, 20)], model.preprocess))
    assert ui.Encoder is ui.FeatureExtractor


def test_queries_of_mixed_kinds_and_a_single_text_are_encoded(model, files, images):
    array, tensor = np.asarray(images[2]), torch.from_numpy(np.array(images[3])).permute(2, 0, 1)
    mixed = [str(files[0]), files[1], images[1], array, tensor]
    texts = ["in red", None, "in blue", "", "larger"]
    found = model.encode_queries(mixed, texts)
    assert (found.shape, found.dtype, found.requires_grad) == ((5, model.backbone.dim), torch.float32, False)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    single = [model.encode_queries(image, text)[0] for image, text in zip(mixed, texts, strict=True)]
    torch.testing.assert_close(torch.stack(single), found, atol=1e-5, rtol=0)
    assert model.encode_queries(texts="a red circle").shape == (1, model.backbone.dim)


@pytest.mark.parametrize(
    ("name", "advice"), [("encode", "did you mean encode_queries"), ("similarity", "it has .*save")]
)
def test_what_a_model_does_not_have_suggests_what_it_has(model, name, advice):
    with pytest.raises(AttributeError, match=rf"^'IGROTModel' object has no attribute '{name}'; {advice}"):
        getattr(model, name)
    assert not hasattr(model, "_none")


@pytest.mark.slow
def test_a_gallery_is_encoded_in_batches_by_workers_with_a_bar(model, files, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    found = model.encode_gallery(files, batch_size=8, workers=1, progress=True)
    assert "encoding" in capfd.readouterr().err
    assert (found.device.type, found.requires_grad) == ("cpu", False)
    torch.testing.assert_close(found, model.encode_gallery(files, workers=0), atol=1e-5, rtol=0)
    with files[0].open("rb") as file:  # read here, not by a worker
        torch.testing.assert_close(model.encode_gallery([file], workers=1), found[:1], atol=1e-5, rtol=0)


def test_images_and_texts_come_from_tables_and_generators(model, files):
    expected = model.encode_queries(files[:2], ["in red", None])
    tables = (np.array([str(one) for one in files[:2]]), np.array(["in red", np.nan], dtype=object))
    assert model.encode_queries(*tables).equal(expected)
    assert model.encode_queries(iter(files[:2]), (text for text in ("in red", None))).equal(expected)


WRONG = """
from pathlib import Path

import torch

import union_igrot as ui

model = ui.load("tiny", torch.device("cpu"))
vectors, world = torch.eye(3, model.backbone.dim), ui.shapes_cir("val", 2)


def benchmark(image, targets):
    queries, gallery = [ui.Query("q", image, None, targets)], [ui.GalleryItem("bb", image)]
    return ui.Benchmark("own", "test", "sbir", queries, gallery, ui.Protocol())


calls = {
    "k: 2.5 (expected an integer >= 1)": lambda: ui.rank(vectors, vectors, 2.5),
    "k: True": lambda: ui.rank(vectors, vectors, True),
    "list of gallery positions": lambda: ui.rank(vectors, vectors, exclude=[0, 1, 2]),
    "excludes position 9": lambda: ui.rank(vectors, vectors, exclude=[[9], [], []]),
    "queries: list": lambda: ui.rank([1.0], vectors),
    "name: NoneType": lambda: ui.load(None),
    "weights: int": lambda: ui.load("tiny", weights=3),
    "device: int": lambda: ui.load("tiny", 0),
    "'CLIP' (did you mean base?)": lambda: ui.load("CLIP"),
    "'openai/clip-vit-large-patch14' (did you mean large?)": lambda: ui.load("openai/clip-vit-large-patch14"),
    "'Tiny_Union' (did you mean tiny-union?)": lambda: ui.load("Tiny_Union"),
    "is a folder": lambda: model.encode_gallery("."),
    "is a web address": lambda: model.encode_gallery([Path("https://host/a.jpg")]),
    "path of the image is empty": lambda: model.encode_gallery(""),
    "images: dict": lambda: model.encode_gallery({"a": "a.png"}),
    "images: int": lambda: model.encode_gallery(3),
    "an image: tuple": lambda: model.encode_queries([("a.png", "in red")]),
    "pass its .image": lambda: model.encode_gallery(world.gallery),
    "batch_size: '8'": lambda: model.encode_gallery([], batch_size="8"),
    "workers: -1": lambda: model.encode_gallery([], workers=-1),
    "texts: bytes": lambda: model.encode_queries(texts=b"red"),
    "texts: int": lambda: model.encode_queries(texts=["red", 3]),
    "got 1 images and 2 texts": lambda: model.encode_queries(torch.zeros(3, 9, 9), ["a", "b"]),
    "model: str": lambda: ui.evaluate("tiny", "shapes"),
    "benchmark: str": lambda: ui.evaluate(model, ["shapes"]),
    "is empty": lambda: ui.evaluate(model, []),
    "seed: 'a'": lambda: ui.evaluate(model, world, seed="a"),
    "data: NoneType": lambda: ui.train(None),
    "'clip' (did you mean base?)": lambda: ui.train("shapes", "clip"),
    "backbone: IGROTModel": lambda: ui.train("shapes", model),
    "recipe: dict": lambda: ui.train("shapes", recipe={"epochs": 1}),
    "b.png is text (expected pathlib.Path": lambda: ui.evaluate(model, benchmark("b.png", ("bb",))),
    "not the text 'b'": lambda: benchmark("b.png", "b"),
    "seed: -1": lambda: ui.train("shapes", seed=-1),
    "workers: 'a'": lambda: ui.train("shapes", workers="a"),
    "columns: list": lambda: ui.Gallery.open("memory:", model).add("a.png", columns=["a"]),
    "photos.faiss' is not the name of an index": lambda: ui.Gallery.open("photos.faiss", model),
    "loss: str": lambda: ui.train("shapes", loss="infonce"),
    "split: 'train' (expected val or test)": lambda: ui.evaluate(model, "shapes", split="train"),
    "queries: '9' (expected an integer >= 1)": lambda: ui.evaluate(model, "shapes", queries="9"),
    "root of folder: None": lambda: ui.evaluate(model, "folder"),
    "recipe=Recipe(epochs=...)": lambda: ui.train("shapes", epochs=3),
    "argument of encode_queries: text (did you mean texts?)": lambda: model.encode_queries(text="red"),
    "argument of encode_gallery: paths (expected images, batch_size": lambda: model.encode_gallery(paths=["a.png"]),
    "argument of load: devices (did you mean device?)": lambda: ui.load(devices="cpu"),
    "argument of rank: top_k (expected queries, gallery, k": lambda: ui.rank(vectors, vectors, top_k=3),
    "argument of search: txt (did you mean text?)": lambda: ui.Gallery.open("memory:", model).search(txt="red"),
    "Gallery.open(uri) opens a gallery": lambda: ui.Gallery("memory:"),
    "epochs of the recipe: 0": lambda: ui.train("shapes", recipe=ui.Recipe(epochs=0)),
    "uri: NoneType": lambda: ui.Gallery.open(None),
    "model: int": lambda: ui.Gallery.open("memory:", 3),
    "images: NoneType": lambda: ui.Gallery.open("memory:", model).add(None),
    "http:/host/a.jpg: is a web address": lambda: ui.Gallery.open("memory:", model).add("http://host/a.jpg"),
    "command trian (did you mean train?)": lambda: ui.compose("trian"),
}
for expected, call in calls.items():
    try:
        print("no error, but expected:", expected, call())
    except ui.UnionError as error:
        if expected not in str(error):
            print(f"{error} / {expected}")
    except Exception as error:
        print(f"{error!r} / {expected}")
"""


@pytest.mark.slow
def test_what_cannot_be_meant_is_one_line_that_names_it(tmp_path):
    # In a process without the checks of types that tests have.
    path = {"PYTHONPATH": str(Path(ui.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WRONG], cwd=tmp_path, env=os.environ | path, capture_output=True, check=False
    )
    assert (done.stdout + done.stderr, done.returncode) == (b"", 0)


def test_rank_takes_tensors_and_arrays(model, files):
    gallery = model.encode_gallery(files)
    hits = ui.rank(gallery, gallery, k=3)
    assert hits.positions[:, 0].tolist() == list(range(len(files)))
    arrays = ui.rank(gallery.numpy(), gallery.numpy(), k=3)
    assert arrays.positions.equal(hits.positions)
    assert arrays.scores.equal(hits.scores)
    assert ui.rank(gallery.numpy()[0], gallery, k=1).positions.tolist() == [[0]]
    assert ui.rank(gallery[:6], gallery[:6]).positions.shape == (6, 6)
    assert ui.rank(gallery[:2], gallery[:6], exclude=[[0, 1], []]).positions.shape == (2, 4)
    wrong = (gallery[None], gallery[:, :3], gallery.int(), gallery.int().numpy())
    for queries in wrong:
        with pytest.raises(UnionError):
            ui.rank(queries, gallery)


@pytest.mark.slow
def test_evaluate_takes_a_name_a_benchmark_or_several(model, tmp_path):
    options = {"cache_dir": tmp_path, "progress": False, "workers": 0}
    named = ui.evaluate(model, "shapes", queries=20, **options)
    benchmarks = [ui.shapes_cir("test", 20, 0, distractors=40), ui.shapes_sbir("test", 20, 0, gallery=20)]
    several = ui.evaluate(model, benchmarks, **options)
    single = ui.evaluate(model, benchmarks[1], **options)
    metrics = [(one.benchmark, one.method, one.metrics) for one in named.methods]
    assert metrics == [(one.benchmark, one.method, one.metrics) for one in several.methods]
    assert metrics[len(metrics) // 2 :] == [(one.benchmark, one.method, one.metrics) for one in single.methods]
    assert "shapes_sbir" in str(single)
    assert "<table" in single._repr_html_()
    assert len(single.to_pandas()) == sum(len(one.metrics) for one in single.methods)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (("circle",), {}, "circle"),
        (("shapes",), {"querys": 3}, "querys"),
        (("circo",), {"root": "nowhere"}, "nowhere"),
        ((cir_benchmark(),), {"root": "data"}, "root"),
    ],
)
def test_a_wrong_benchmark_or_option_is_named(model, tmp_path, arguments, options, named):
    with pytest.raises(UnionError, match=named):
        ui.evaluate(model, *arguments, cache_dir=tmp_path, **options)


@pytest.mark.slow
def test_train_does_what_the_command_does(small_run: Run, tmp_path, capsys):
    cache = next(one.removeprefix("cache_dir=") for one in small_run.settings if one.startswith("cache_dir="))
    folder, recipe = tmp_path / "run", ui.Recipe(epochs=1)
    options = {"device": "cpu", "cache_dir": cache, "progress": False, **SMALL}
    model = ui.train("shapes", backbone="tiny", recipe=recipe, output_dir=folder, **options)
    assert figures(rows_of(folder)) == figures(small_run.rows)
    assert {path.name for path in folder.iterdir()} == {path.name for path in small_run.folder.iterdir()}
    assert model.fingerprint() == ui.load(folder).fingerprint() == ui.load(small_run.folder).fingerprint()
    assert (model.training, capsys.readouterr().out) == (False, "")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>union_igrot.train: shapes_cir, shapes_sbir</title>" in page
    assert "recipe=Recipe(epochs=1)" in page
    with pytest.raises(UnionError, match="other settings"):
        ui.train("shapes", backbone="tiny", recipe=recipe, output_dir=folder, seed=1, **options)


@pytest.mark.slow
def test_train_takes_read_data_and_built_parts(tmp_path):
    backbone, loss = ui.load("tiny").backbone, ui.InfoNCE(10.0, symmetric=True)
    model = ui.train(
        triplets(),
        backbone,
        fusion={"kind": "transagg", "layers": 1, "heads": 2},
        target="frozen",
        recipe=ui.Recipe(epochs=1, batch_size=16),
        loss=loss,
        validation=[cir_benchmark(), sbir_benchmark()],
        evaluate=False,
        output_dir=tmp_path / "run",
        device="cpu",
        logger="none",
        workers=0,
        progress=False,
    )
    assert (model.fusion.options["layers"], model.target.kind, model.metadata["data"]) == (1, "frozen", "noise")
    assert not (tmp_path / "run" / "results.json").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stage"] == "done"


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        ("circo", {}, "evaluation only"),
        ("shapes", {"tripletts": 3}, "tripletts"),
        ("shapes", {"device": "cuda:9"}, "not available"),
        ("shapes", {"validation": cir_benchmark()}, "validation"),
        (triplets(), {}, "validation is required"),
        (triplets(), {"root": "data"}, "root"),
        ("shapes", {"target": "onion", "triplets": 4, "pairs": 4, "val_queries": 1, "queries": 20}, "onion"),
    ],
)
def test_a_wrong_argument_of_train_is_named_and_leaves_no_folder(tmp_path, data, options, named):
    with pytest.raises(UnionError, match=named):
        ui.train(data, output_dir=tmp_path / "a" / "run", **{"device": "cpu", "progress": False, **options})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("tiny", 128),
        ("base", 512),
        ("large", 768),
        ("siglip2", 768),
        ("blip", 256),
        ("openclip_h", 1024),
        ("tinyclip", 512),
    ],
)
def test_heads_have_the_sizes_of_the_configuration(name, dim):
    assert head_sizes(name, dim).items() <= read_option("model", name).items()


def test_defaults_are_those_of_the_command():
    assert ui.Recipe(**read_option("recipe", "default")) == ui.Recipe()
    chosen = compose("train")
    assert (chosen.target.kind, chosen.loss.kind) == (signature(ui.train).parameters["target"].default, "bank")


@pytest.mark.slow
def test_training_starts_from_trained_heads(small_run: Run):
    settings = plain(compose("train", [*small_run.settings, f"checkpoint={small_run.folder}"]))
    assert build_model(settings, {}).fingerprint() == ui.load(small_run.folder).fingerprint()
    assert hashed_settings({**settings, "checkpoint": None}).keys() == settings.keys() - {"checkpoint"} - NOT_HASHED
    assert "preprocess" not in hashed_settings(settings)["model"]  # as in runs of earlier versions
    chosen = {**settings, "model": {**settings["model"], "preprocess": "pad"}}
    assert hashed_settings(chosen)["model"]["preprocess"] == "pad"
    assert build_model({**chosen, "checkpoint": None}, {}).preprocess.fit == "pad"
    with pytest.raises(UnionError, match=r"has target \{'kind': 'residual'.*expected that of this training"):
        build_model({**settings, "target": {"kind": "frozen"}}, {})


def test_a_model_is_saved_and_pushed(model, tmp_path, monkeypatch):
    assert ui.load(model.save(tmp_path / "saved")).fingerprint() == model.fingerprint()
    pushed = {}

    def push(folder, name, **_):
        pushed[name] = sorted(path.name for path in folder.iterdir())
        return f"https://hub.example/{name}"

    monkeypatch.setattr("union_igrot.models.model.push_folder", push)
    assert model.push_to_hub("user/name").endswith("user/name")
    assert {"heads.safetensors", "model.json", "README.md"} <= set(pushed["user/name"])


def test_a_gallery_is_filled_and_searched(model, files, tmp_path):
    pytest.importorskip("lance")
    gallery = ui.Gallery.open(tmp_path / "photos.lance", model)
    gallery.add(files)
    hits = gallery.search(image=files[3], text="in blue", k=5)
    assert len(hits) == 5
    assert len(repr(gallery)) < 200
    assert "\n" not in repr(gallery)


def public_objects(model):
    benchmark = ui.shapes_cir("test", 4, 0)
    long = replace(benchmark.queries[0], id="q" * 500, text="larger " * 100, targets=("x",) * 500)
    ranking = Ranking(torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5, 3))
    features = ui.Features(torch.zeros(200, 128), torch.zeros(200, 50, 128), torch.ones(200, 50, dtype=torch.bool))
    metrics = tuple(f"R@{k}" for k in range(1, 60))
    yield from (benchmark, long, benchmark.gallery[0], ui.Protocol(metrics=metrics, primary="R@1", note="n" * 400))
    yield from (triplets(), triplets().triplets[0], ranking, features, Scores({"mAP": torch.zeros(5)}, ranking))
    yield from (model, model.backbone, model.fusion, model.target, model.preprocess, ui.InfoNCE())
    yield from (ui.Recipe(), ui.Recipe(epochs=9, schedule="restarts", monitor="val/shapes_cir/mAP@10"))
    yield ui.evaluate(model, cir_benchmark(), progress=False, workers=0)


@pytest.mark.slow
def test_reprs_are_one_short_line(model):
    for one in public_objects(model):
        assert len(repr(one)) < 200, repr(one)
        assert "\n" not in repr(one)
        assert repr(one).startswith(type(one).__name__), repr(one)
