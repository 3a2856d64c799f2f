"""A sweep's table through the commands: the results of every job, none lost by another's failure."""

import csv
import json

import pytest
from official import WRITERS

from small_results import method, result
from small_runs import Run
from union_igrot.cli.command import run_command
from union_igrot.cli.config import compose
from union_igrot.cli.eval import main as evaluate
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.results import write_results
from union_igrot.types import Protocol

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swept(place):
    (folder,) = (place / "multirun" / "eval").glob("*/*")
    return folder


def table(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def job(config, fresh):
    """Write one metric; job 1 fails."""
    if config.seed == 1:
        raise DataError("nothing there; add images")
    fresh.mkdir(parents=True, exist_ok=True)
    protocol = Protocol(metrics=("R@1",), primary="R@1")
    write_results(fresh, result(method("trained", float(config.seed), "b", protocol=protocol)))
    return fresh


def test_a_failed_job_loses_no_other(place, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command("eval", job, ["-m", "seed=range(4)"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "union-eval: nothing there; add images\n"
    assert "job 1 (seed=1) failed: nothing there; add images" in printed.out
    assert "3 of 4 jobs done" in printed.out
    folder = swept(place)
    assert [(line["run"], line["percent"]) for line in table(folder)] == [
        *(("0", "0.0000"), ("2", "2.0000"), ("3", "3.0000"))
    ]
    assert "failed: nothing there" in (folder / "results.md").read_text()
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []


def test_an_internal_error_in_a_job_is_noted_and_loses_no_other(place, capsys):
    def buggy(config, fresh):
        if config.seed == 0:
            raise ZeroDivisionError("by zero")
        return job(config, fresh)

    with pytest.raises(SystemExit) as stopped:
        run_command("eval", buggy, ["-m", "seed=0,2"])
    assert stopped.value.code == 70
    printed = capsys.readouterr()
    assert "internal error, please report this traceback" in printed.err
    assert "failed: by zero" in printed.out
    assert [line["percent"] for line in table(swept(place))] == ["2.0000"]


def test_results_in_another_folder_are_found(place):
    """As when an interrupted training of an earlier sweep is resumed."""
    other = place / "earlier" / "5"
    run_command("eval", lambda config, _: job(config, other), ["-m", "seed=3"])
    assert [(line["run"], line["percent"]) for line in table(swept(place))] == [(str(other), "3.0000")]


def test_a_sweep_without_metrics_writes_no_table(place):
    run_command("eval", lambda *_: None, ["-m", "seed=0,1"])
    assert {path.name for path in swept(place).iterdir()} == {"jobs", "multirun.yaml", "0", "1"}


def test_checkpoints_and_benchmarks_in_one_table(small_run: Run, place, monkeypatch, capsys):
    for name in ("sketchy", "circo"):
        WRITERS[name](place / "data" / name)
    monkeypatch.setenv("UNION_DATA", str(place / "data"))
    with pytest.raises(SystemExit):
        evaluate(["-m", f"checkpoint=tiny,{small_run.folder},lost", "data=sketchy,circo", "progress=false"])
    folder = swept(place)
    found = table(folder)
    ours = [line for line in found if line["source"] == "this sweep"]
    trained = {(line["checkpoint"], line["benchmark"]) for line in ours if line["method"] == "trained"}
    assert trained == {(name, data) for name in ("tiny", str(small_run.folder)) for data in ("sketchy", "circo")}
    for line in ours:
        rows = json.loads((folder / line["run"] / "results.json").read_text())
        (row,) = (row for row in rows if row["method"] == line["method"])
        if "[" not in line["metric"]:
            assert float(line["percent"]) == pytest.approx(row["metrics"][line["metric"]], abs=1e-4)
    assert {line["benchmark"] for line in found if line["source"].startswith("published")} == {"circo", "sketchy"}
    shown = capsys.readouterr().out
    last = shown[shown.index("model ") :]
    assert last.count("image alone") == last.count("chance") == 1
    assert "trained: tiny" in last
    assert "4 of 6 jobs done" in last


def test_a_backbone_alone_is_evaluated_without_trained_heads(place, capsys):
    WRITERS["sketchy"](place / "data")
    evaluate(["model=tiny", "data=sketchy", f"data.root={place / 'data'}", "progress=false", "output_dir=out"])
    rows = json.loads((place / "out" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["chance", "image", "text", "sum", "product"]
    assert (place / "out" / "contact-sketchy.png").is_file()
    assert "checkpoint: null" in (place / "out" / "config.yaml").read_text()
    assert "trained - " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "printed"),
    [
        (["model=base", "checkpoint=tiny"], "give one of the two"),
        (["model=base", "checkpoint=runs/a"], "give one of the two"),
        (["model=runs/a"], "checkpoint=FOLDER"),
        (["model=tiny", "model.projector=mlp"], "trains nothing"),
        (["model=tiny", "weights=conftest.py"], "use model.weights"),
        (["model=tiny", "predictions=conftest.py"], "without a model"),
    ],
)
def test_contradictions_to_a_backbone_alone_are_errors(overrides, printed, place):
    (place / "conftest.py").touch()
    with pytest.raises(ConfigError, match=printed):
        compose("eval", overrides)
    assert "model" not in compose("eval", ["checkpoint=runs/a"])
