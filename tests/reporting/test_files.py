import csv
from dataclasses import replace

import pytest

from small_results import method, result
from union_igrot.evaluation.results import EvaluationResult, write_results
from union_igrot.metrics.statistics import Interval
from union_igrot.types import Protocol

ONE = method(
    "trained",
    50.0,
    "b",
    protocol=Protocol(metrics=("R@1", "mAP"), primary="mAP"),
    metrics={"R@1": 100 / 3},
    intervals={"R@1": Interval(0.0, 100.0), "mAP": Interval(25.0, 75.12345)},
    n_queries=3,
    n_gallery=9,
    seed=7,
)


def test_json_holds_whole_rows_and_csv_a_line_a_metric(tmp_path):
    both = result(ONE, replace(ONE, method="chance, plain"))
    write_results(tmp_path, both)
    assert EvaluationResult.load(tmp_path / "results.json") == both
    with (tmp_path / "results.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [(line["method"], line["metric"]) for line in table] == [
        ("trained", "R@1"),
        ("trained", "mAP"),
        ("chance, plain", "R@1"),
        ("chance, plain", "mAP"),
    ]
    assert table[1] == {
        "benchmark": "b",
        "split": "val",
        "method": "trained",
        "n_queries": "3",
        "n_gallery": "9",
        "metric": "mAP",
        "percent": "50.0000",
        "low95": "25.0000",
        "high95": "75.1235",
        "seed": "7",
    }


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_results(tmp_path, result(ONE))
    with pytest.raises(TypeError):
        write_results(tmp_path, result(replace(ONE, model={"backbone": object()})))
    assert EvaluationResult.load(tmp_path / "results.json") == result(ONE)
