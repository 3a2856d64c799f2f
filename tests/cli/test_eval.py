import json
import shutil

import pytest

from small_runs import SMALL_DATA, Run, figures, rows_of
from union_igrot.cli.eval import main as evaluate

pytestmark = pytest.mark.slow


def cache_of(run: Run) -> str:
    return next(setting for setting in run.settings if setting.startswith("cache_dir="))


def test_a_run_folder_gives_the_metrics_of_its_training(small_run: Run, tmp_path, capsys):
    evaluate([f"checkpoint={small_run.folder}", *SMALL_DATA, cache_of(small_run), f"output_dir={tmp_path / 'out'}"])
    assert figures(rows_of(tmp_path / "out")) == figures(small_run.rows)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"results.json", "results.csv", "config.yaml", "contact-shapes_cir.png", "contact-shapes_sbir.png"}
    assert "curve.png" not in names
    assert "trained" in capsys.readouterr().out


def test_without_a_folder_results_go_below_where_the_user_stands(small_run: Run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate([f"checkpoint={small_run.folder}", *SMALL_DATA, cache_of(small_run), "data.split=val"])
    (found,) = (tmp_path / "outputs" / "eval").glob("*/*/results.json")
    assert {row["split"] for row in json.loads(found.read_text())} == {"val"}


def test_the_embedded_default_is_used_where_no_checkpoint_is_given(small_run: Run, tmp_path):
    evaluate([*SMALL_DATA, cache_of(small_run), f"output_dir={tmp_path / 'out'}"])
    trained = [row for row in rows_of(tmp_path / "out") if row["method"] == "trained"]
    assert [row["model"]["backbone"] for row in trained] == ["tiny", "tiny"]
    assert trained[0]["model"]["heads"] != small_run.rows[-1]["model"]["heads"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, place, refused):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write output_dir" in refused(evaluate, f"output_dir={tmp_path / place}")


def test_a_backbone_alone_is_no_checkpoint(refused):
    said = refused(evaluate, "checkpoint=base", *SMALL_DATA)
    assert said == "union-eval: checkpoint=base has no trained heads; model=... evaluates a backbone alone\n"


@pytest.mark.parametrize("damage", ["missing", "description", "weights"])
def test_a_checkpoint_that_cannot_be_read_is_one_clear_line(small_run: Run, tmp_path, damage, refused):
    folder = tmp_path / "model"
    if damage != "missing":
        shutil.copytree(small_run.folder / "model", folder)
        name = "model.json" if damage == "description" else "heads.safetensors"
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    line = refused(evaluate, f"checkpoint={folder}", *SMALL_DATA, cache_of(small_run))
    assert line.startswith("union-eval: ")
    assert str(folder) in line
