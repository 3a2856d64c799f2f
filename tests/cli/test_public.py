"""The public benchmarks through the commands, on small files in their official layouts."""

import json
from dataclasses import replace
from pathlib import Path

import official
import pytest
from official import WRITERS

from small_world import cir_benchmark, extractor, trainable
from union_igrot.cli.eval import main as evaluate
from union_igrot.cli.train import main as train
from union_igrot.datasets.loading import load_benchmark
from union_igrot.datasets.submission import check_submission
from union_igrot.errors import ConfigError
from union_igrot.experiment import submit

pytestmark = pytest.mark.slow

EVALUATED = ["circo", "genecis", "lasco", "llavasco", "dtin", "tuberlin", "quickdraw", "fashioniq"]
PARTS = {"fashioniq": 4, "genecis": 5, "dtin": 5, "mmeb": 3}
ONE_PART = {"patterncom": ["data.attribute=color"], "circled": ["data.subset=cirr"]}  # which is faster
NEWER = [name for name in WRITERS if name not in (*EVALUATED, "cirr", "sketchy", "training_sketchy")]


def rows(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", ["cirr", "sketchy", *EVALUATED, *NEWER])
def test_each_is_evaluated(name, tmp_path, capsys):
    WRITERS[name](tmp_path / "data")
    out = tmp_path / "out"
    given = [f"data={name}", f"data.root={tmp_path / 'data'}", *ONE_PART.get(name, [])]
    evaluate([*given, f"output_dir={out}", "progress=false"])
    found = rows(out)
    assert {row["method"] for row in found} == {"chance", "image", "text", "sum", "product", "trained"}
    parts = {row["benchmark"] for row in found}
    if name in PARTS:
        assert f"{name}_mean" in parts
        assert len(parts) == PARTS[name]
        trained = {row["benchmark"]: row["metrics"] for row in found if row["method"] == "trained"}
        whole = trained.pop(f"{name}_mean")
        for metric, value in whole.items():
            assert value == pytest.approx(sum(part[metric] for part in trained.values()) / len(trained))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"{part} · " in page for part in parts)
    assert "the image cannot be opened" not in page
    assert page.count("<img") >= 10
    for row in found:
        assert row["n_queries"] > 0
        for metric, value in row["metrics"].items():
            assert value is None or 0 <= value <= 100, metric
    assert "protocol official" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["cirr", "circo", "llavasco", "sketchy", "dtin"])
def test_each_is_evaluated_as_in_the_published_code(name, tmp_path, capsys):
    WRITERS[name](tmp_path / "data")
    out = tmp_path / "out"
    settings = [f"data={name}", "data.preset=union_reference", f"data.root={tmp_path / 'data'}", "progress=false"]
    evaluate([*settings, f"output_dir={out}"])
    for row in rows(out):
        assert row["protocol"]["name"] == "union_reference"
        if name in ("sketchy", "dtin"):
            assert (row["protocol"]["ap_norm"], row["protocol"]["ap_rule"]) == ("hits", "trapezoid")
        for metric, value in row["metrics"].items():
            assert value is None or 0 <= value <= 100, metric
    assert "protocol union_reference" in " ".join(capsys.readouterr().out.split())


def test_averaged_texts_are_named_with_the_metrics(tmp_path, capsys):
    WRITERS["fashioniq"](tmp_path / "data")
    settings = ["data=fashioniq", "data.prompt=searle", f"data.root={tmp_path / 'data'}", "progress=false"]
    evaluate([*settings, f"output_dir={tmp_path / 'out'}"])
    note = "unit embeddings of both orders averaged"
    assert all(note in row["protocol"]["prompt"] for row in rows(tmp_path / "out"))
    printed = " ".join(capsys.readouterr().out.split())
    assert note in printed
    assert "gallery=original" in printed


def test_invalid_data_is_one_line(tmp_path, refused):
    WRITERS["tuberlin"](tmp_path / "data")
    next((tmp_path / "data" / "png_ready").rglob("zero0.png")).unlink()
    given = (f"data.root={tmp_path / 'data'}", f"output_dir={tmp_path / 'out'}")
    printed = refused(evaluate, "data=tuberlin", *given)
    assert printed.startswith("union-eval: ")
    assert "zero0.png" in printed


@pytest.mark.parametrize("name", ["training_sketchy", "llavasco"])
def test_training_on_the_datasets_of_the_paper(name, tmp_path, monkeypatch):
    options = {"training_sketchy": ["data.build=12"], "llavasco": []}[name]
    # Two classes are held out for validation, and at least two are trained on.
    monkeypatch.setattr(official, "CLASSES", (*official.CLASSES, "owl", "tree"))
    WRITERS[name](tmp_path / "data")
    small = ["recipe.epochs=1", "recipe.batch_size=4", "strategy=cpu", "progress=false", "logger=none"]
    train([f"data={name}", f"data.root={tmp_path / 'data'}", f"output_dir={tmp_path / 'out'}", *options, *small])
    assert (tmp_path / "out" / "model" / "heads.safetensors").is_file()
    assert rows(tmp_path / "out")


ANNOTATIONS = Path(__file__).parents[3] / "shared" / "data" / "annotations"
CIRCO_FILE = Path(__file__).parents[3] / "shared" / "golden" / "circo_val_predictions.json"


@pytest.mark.skipif(not CIRCO_FILE.is_file(), reason="../shared holds CIRCO's example submission and annotations")
def test_a_file_of_predictions_is_scored_as_the_official_evaluator_does(tmp_path):
    data = ["data=circo", f"data.root={ANNOTATIONS / 'circo'}", "data.check_images=false"]
    evaluate([*data, f"predictions={CIRCO_FILE}", f"output_dir={tmp_path / 'out'}"])
    (row,) = rows(tmp_path / "out")
    official = {"mAP@5": 0.4861111, "mAP@10": 0.5177670, "mAP@25": 0.5400354, "mAP@50": 0.6020392}
    recall = {"R@5": 0.91, "R@10": 0.91, "R@25": 1.36, "R@50": 3.64}
    assert {name: row["metrics"][name] for name in official} == pytest.approx(official, abs=1e-6)
    assert {name: row["metrics"][name] for name in recall} == pytest.approx(recall, abs=5e-3)
    assert row["method"] == "predictions"


@pytest.mark.parametrize(("name", "split"), [("cirr", "test1"), ("circo", "test")])
def test_hidden_splits_write_submission_files(name, split, tmp_path, capsys):
    WRITERS[name](tmp_path / "data", size=60)
    out = tmp_path / "out"
    settings = [f"data={name}", f"data.root={tmp_path / 'data'}", f"data.split={split}", "progress=false"]
    evaluate([*settings, "query_expansion=3", f"output_dir={out}"])
    assert "expanded: each query plus" in capsys.readouterr().out
    files = sorted(out.glob("*.json"))
    benchmark = load_benchmark(name, tmp_path / "data", split)
    assert len(files) == {"cirr": 2, "circo": 1}[name]
    for file in files:
        assert check_submission(file, benchmark) == []


def test_a_hidden_split_without_a_server_is_refused_before_anything_is_encoded(tmp_path):
    hidden = replace(cir_benchmark(), queries=tuple(replace(q, targets=()) for q in cir_benchmark().queries))
    model = trainable()
    with pytest.raises(ConfigError, match="noise_cir val are not published, and no server scores it"):
        submit(model, hidden, extractor(tmp_path, model.backbone), tmp_path)
    assert model.backbone.image_batches == []
