import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from small_runs import Run, figures, rows_of
from union_igrot.cli.config import compose
from union_igrot.cli.train import main as train
from union_igrot.models.factory import build_backbone
from union_igrot.models.model import IGROTModel

METHODS = ["chance", "image", "text", "sum", "product", "trained"]


@pytest.mark.slow
def test_everything_a_reader_needs_is_written(small_run: Run):
    names = {path.name for path in small_run.folder.iterdir()}
    assert names >= {"model", "results.json", "results.csv", "config.yaml", "logs", "run.json"}
    assert names >= {"contact-shapes_cir.png", "contact-shapes_sbir.png"}
    assert not [name for name in names if name.endswith((".partial", ".tmp"))]
    for image in small_run.folder.glob("*.png"):
        with Image.open(image) as opened:
            opened.load()
            assert len(opened.getcolors(2**24) or []) > 2, image.name
    assert json.loads((small_run.folder / "run.json").read_text())["stage"] == "done"


def test_result_rows_are_complete(small_run: Run):
    rows = small_run.rows
    assert [(row["benchmark"], row["method"]) for row in rows] == [
        (benchmark, method) for benchmark in ("shapes_cir", "shapes_sbir") for method in METHODS
    ]
    for row in rows:
        assert row.keys() >= {"split", "n_queries", "n_gallery", "protocol", "model", "seconds", "versions", "seed"}
        assert (row["split"], row["n_queries"], row["seed"]) == ("test", 24, 0)
        assert list(row["metrics"]) == list(row["protocol"]["metrics"]) == list(row["ci95"])
        for name, value in row["metrics"].items():
            low, high = row["ci95"][name]
            assert 0 <= low <= value <= high <= 100, name
        assert {"python", "torch", "union-igrot"} <= row["versions"].keys()
        assert all(seconds >= 0 for seconds in row["seconds"].values())
        assert (row["model"]["backbone"] is None) == (row["method"] == "chance")
    csv_lines = (small_run.folder / "results.csv").read_text().splitlines()
    assert len(csv_lines) == 1 + sum(len(row["metrics"]) for row in rows)


def test_the_configuration_is_kept_whole_and_gives_the_same_run_again(small_run: Run):
    kept = OmegaConf.load(small_run.folder / "config.yaml")
    assert kept == compose("train", list(small_run.settings))


def test_the_saved_model_is_the_one_that_was_evaluated(small_run: Run):
    model = IGROTModel.load(small_run.folder / "model")
    trained = [row for row in small_run.rows if row["method"] == "trained"]
    described = json.loads(json.dumps(model.describe()))
    assert all(row["model"] == {**described, "checkpoint": str(small_run.folder / "model")} for row in trained)
    assert model.metadata["samples"] == 128
    assert model.metadata["best"]["epoch"] == 0
    state = load_file(small_run.folder / "model" / "heads.safetensors")
    assert not [name for name in state if "backbone" in name]


def test_the_backbone_is_what_it_was(small_run: Run):
    assert rows_of(small_run.folder)[-1]["model"]["backbone_fingerprint"] == build_backbone("tiny").fingerprint()


@pytest.mark.slow
def test_the_same_command_gives_the_same_figures_to_the_last_digit(small_run: Run, tmp_path, capsys):
    settings = [s for s in small_run.settings_for(tmp_path / "again") if not s.startswith("cache_dir=")]
    train(settings)
    assert figures(rows_of(tmp_path / "again")) == figures(small_run.rows)
    out = capsys.readouterr().out
    for words in ("shapes_cir · test · 24 queries", "chance", "image alone", "text alone", "image + text", "trained"):
        assert words in out
    assert f"written to {tmp_path / 'again'}" in out


def interrupted_before_evaluation(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("union_igrot.experiment.evaluate_benchmark", stop)
        with pytest.raises(SystemExit) as stopped:
            train(run.settings_for(folder))
    assert stopped.value.code == 130


@pytest.mark.slow
def test_a_run_interrupted_at_its_evaluation_goes_on_without_training(small_run: Run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    interrupted_before_evaluation(small_run, folder, monkeypatch)
    assert capsys.readouterr().err.endswith("union-train: interrupted; run the same command again to resume\n")
    assert not (folder / "results.json").exists()
    heads = (folder / "model" / "heads.safetensors").stat()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("trained twice")

    with monkeypatch.context() as patch:
        patch.setattr("union_igrot.training.learner.fit", again)
        train(small_run.settings_for(folder))
    assert "resuming" in capsys.readouterr().err
    assert (folder / "model" / "heads.safetensors").stat().st_mtime_ns == heads.st_mtime_ns
    assert figures(rows_of(folder)) == figures(small_run.rows)


def test_a_folder_of_other_settings_is_refused_untouched(small_run: Run, refused):
    before = sorted((path, path.stat().st_mtime_ns) for path in small_run.folder.rglob("*") if path.name != ".lock")
    assert "contains a run of other settings" in refused(train, *small_run.settings, "seed=1")
    after = sorted((path, path.stat().st_mtime_ns) for path in small_run.folder.rglob("*") if path.name != ".lock")
    assert after == before


def images(root: Path, broken: bool = False) -> Path:
    """Class folders of small drawings: six classes, four photos and three sketches of each."""
    for number, label in enumerate(["bell", "cup", "drum", "fish", "house", "star"]):
        for kind, count in (("photos", 4), ("sketches", 3)):
            folder = root / kind / label
            folder.mkdir(parents=True)
            for copy in range(count):
                paper = "white" if kind == "sketches" else (30 * number, 90, 20 * copy)
                image = Image.new("RGB", (64 + copy, 56), paper)
                box = (8, 6 + copy, 20 + 5 * number, 40)
                ImageDraw.Draw(image).ellipse(box, outline="black", fill=None if kind == "sketches" else "yellow")
                image.save(folder / f"{copy}.{'png' if kind == 'sketches' else 'jpg'}")
    if broken:
        for path in sorted((root / "photos").rglob("3.jpg")):
            path.write_bytes(path.read_bytes()[:200])
    return root


FOLDER = ("data=folder", "data.pairs=40", "recipe.epochs=1", "strategy=cpu", "progress=false", "features.workers=0")


@pytest.mark.slow
def test_own_pictures_are_trained_on_and_reported_beside_chance(tmp_path, capsys):
    root = images(tmp_path / "mine")
    train([*FOLDER, f"data.root={root}", f"output_dir={tmp_path / 'run'}"])
    rows = rows_of(tmp_path / "run")
    assert [row["method"] for row in rows] == METHODS
    assert {row["benchmark"] for row in rows} == {"folder"}
    assert {row["n_skipped"] for row in rows} == {0}
    assert "chance" in capsys.readouterr().out


@pytest.mark.slow
def test_broken_pictures_end_the_run_in_one_line_or_are_counted(tmp_path, capsys):
    root = images(tmp_path / "mine", broken=True)
    options = [*FOLDER, f"data.root={root}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stopped:
        train(options)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"union-train: .*3\.jpg", said)
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    train([*options, "data.on_missing=skip"])
    assert all(row["n_skipped"] > 0 for row in rows_of(tmp_path / "run"))
    assert "left out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_trains_each_value_in_its_own_folder_and_averages_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [*FOLDER, f"data.root={images(tmp_path / 'mine')}"]
    train(["-m", "target=frozen,union", "seed=0,1", *settings])
    (sweep,) = (tmp_path / "multirun" / "train").glob("*/*")
    folders = sorted(sweep.glob("[0-9]"))
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    kinds = [IGROTModel.load(folder / "model").target.kind for folder in folders]
    assert kinds == ["frozen", "frozen", "union", "union"]
    assert Path.cwd() == tmp_path
    text = (sweep / "results.md").read_text()
    assert "| tiny | trained: target=union |" in text
    assert text.count("(2)") > 4
    assert "trained: target=frozen" in capsys.readouterr().out
    assert FOLDER[1] in text
    train([*settings, "target=union", "seed=1", "output_dir=alone"])
    assert figures(rows_of(tmp_path / "alone")) == figures(rows_of(folders[3]))
