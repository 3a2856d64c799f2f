"""`union-compare` on two runs."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_world import cir_benchmark, sbir_benchmark
from union_igrot.cli.compare import main as compare
from union_igrot.evaluation.results import ScoredBenchmark, read_query_values, write_query_values
from union_igrot.types import Ranking, Scores

EMPTY = Ranking(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))


def run(folder, benchmark, shift=0.0):
    """Write the values of every query, as a run does: `shift` better than the values of all runs."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name in benchmark.protocol.metrics:
        values[name] = 0.5 * torch.rand(len(benchmark.queries), generator=generator, dtype=torch.float64) + shift
    methods = ("chance", "trained")
    scores = {method: Scores({name: x.clone() for name, x in values.items()}, EMPTY) for method in methods}
    write_query_values(folder, ScoredBenchmark(benchmark, scores))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    return run(tmp_path / "outputs/new", cir_benchmark(), 0.2), run(tmp_path / "outputs/old", cir_benchmark())


def test_two_runs_are_compared_by_position(two_runs, capsys):
    compare([str(folder) for folder in two_runs])
    shown = capsys.readouterr().out
    assert "noise_cir · val · 23 queries · trained" in shown
    lines = [line.split() for line in shown.splitlines()]
    head = next(line for line in lines if line[:1] == ["metric"])
    assert head[:3] == ["metric", "new", "old"]
    names = [line[0] for line in lines if line and re.fullmatch(r"(R|P|mAP|Rs)(@\d+)?", line[0])]
    assert names == ["R@1", "R@5", "P@3", "mAP", "mAP@5", "Rs@1", "Rs@2"]
    assert "+20.0 [+20.0, +20.0]  < 0.001" in shown
    assert "new is better than old: +20.0 [+20.0, +20.0] mAP, p < 0.001" in shown
    compare([f"first={two_runs[1]}", f"second={two_runs[0]}", "method=chance"])
    assert "old is worse than new: -20.0" in capsys.readouterr().out
    compare([str(two_runs[0])] * 2)
    assert "no clear difference between them: +0.0 [+0.0, +0.0] mAP, p = 1.000" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    compare([str(run(tmp_path / name / "run", cir_benchmark(), n)) for n, name in enumerate("ab")])
    assert "a/run is worse than b/run" in capsys.readouterr().out


def test_few_classes_are_resampled_and_noted(tmp_path, capsys):
    folders = [run(tmp_path / name, sbir_benchmark(), shift) for name, shift in (("a", 0.2), ("b", 0.0))]
    compare(list(map(str, folders)))
    assert "p = 0.1" in capsys.readouterr().out.replace("\n", " ")


def test_files_of_older_runs_are_compared(two_runs, capsys):
    for folder in two_runs:
        (file,) = folder.glob("*.safetensors")
        identity = read_query_values(file).identity
        save_file(load_file(file), file, metadata={"queries": identity})
    compare([str(folder) for folder in two_runs])
    assert "new is better than old: +20.0" in capsys.readouterr().out


def test_runs_that_cannot_be_compared(two_runs, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "empty: has no queries-*.safetensors" in refused(compare, two_runs[0], tmp_path / "empty")
    other = run(tmp_path / "other", sbir_benchmark())
    assert "no benchmark in common" in refused(compare, two_runs[0], other)
    changed = cir_benchmark()
    changed = replace(changed, queries=tuple(replace(query, text="x") for query in changed.queries))
    assert "the queries of the two runs differ" in refused(compare, two_runs[0], run(tmp_path / "changed", changed))
    assert "method=image in common (expected one of chance, trained)" in refused(compare, *two_runs, "method=image")
