"""Results survive their file, and are short when shown."""

import csv
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from small_results import method, result
from small_runs import Run
from small_world import cir_benchmark, extractor, trainable
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.evaluate import evaluate_benchmark
from union_igrot.evaluation.results import EvaluationResult, SeenImages, TagMetric, write_results
from union_igrot.metrics.statistics import Difference, Interval
from union_igrot.types import Protocol


def test_the_file_of_a_run_is_read_and_written_unchanged(small_run: Run):
    path = small_run.folder / "results.json"
    found = EvaluationResult.load(path)
    assert found.to_json() == path.read_text(encoding="utf-8")
    assert [one.title for one in found.benchmarks] == ["shapes_cir · test", "shapes_sbir · test"]
    assert {one.main.method for one in found.benchmarks} == {"trained"}
    assert found.methods[-1].checkpoint.endswith("model")


def test_every_field_survives():
    one = method(
        "trained",
        40.0,
        metrics={"R@1": math.nan},
        by_tag={"new": TagMetric(4, math.nan)},
        seen_classes=("cup",),
        seen_images=SeenImages(1, 2),
        differences={"chance": {"mAP@10": Difference(1.0, 0.5, 2.0)}},
        parts=("a", "b"),
        arithmetic={"device": "cpu"},
        n_skipped=3,
        n_truncated=2,
    )
    text = result(one).to_json()
    assert "NaN" not in text
    (again,) = EvaluationResult.from_json(text).methods
    assert EvaluationResult((again,)).to_json() == text
    assert math.isnan(again.metrics["R@1"])
    assert (again.protocol, again.seen_images, again.differences) == (one.protocol, one.seen_images, one.differences)
    assert (again.is_seen, again.parts, again.n_skipped, again.n_truncated) == (True, ("a", "b"), 3, 2)


@pytest.mark.parametrize("content", ["", "{", "3", '[{"method": "x"}]', '["x"]'])
def test_an_invalid_file_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json.*union-train") as told:
        EvaluationResult.load(tmp_path / "results.json")
    assert "\n" not in str(told.value)
    with pytest.raises(DataError, match=r"cannot read .*lost"):
        EvaluationResult.load(tmp_path / "lost")


@pytest.mark.slow
def test_reprs_are_short(tmp_path):
    model = trainable()
    found = evaluate_benchmark(model, cir_benchmark(), extractor(tmp_path, model.backbone))
    for value in (found, found.methods[-1], found.scored[0]):
        assert len(repr(value)) < 200
    (scored,) = found.scored
    assert set(scored.scores) == {one.method for one in found.methods}
    assert len(scored.scores["trained"].ranking.positions) == len(scored.benchmark.queries)
    both = found + result(method("trained", 1.0, "other"))
    assert [one.key[0] for one in both.benchmarks] == [scored.benchmark.name, "other"]
    assert both.scored == found.scored


def test_pandas_gets_one_record_per_metric(monkeypatch):
    value = result(method("chance", 1.0), method("trained", 40.0))
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    records = value.to_pandas()
    assert [(one["method"], one["metric"]) for one in records] == [
        *(("chance", "R@1"), ("chance", "mAP@10"), ("trained", "R@1"), ("trained", "mAP@10"))
    ]
    assert records[3] | {"percent": 40.0, "low95": 39.0, "high95": 41.0} == records[3]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        value.to_pandas()


def test_written_values_are_plain_json():
    values = json.loads(result(method("trained", 40.0)).to_json())
    assert isinstance(values, list)
    assert "gain95" not in values[0]
    assert values[0]["ci95"]["mAP@10"] == [39.0, 41.0]


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


def test_json_and_csv_files(tmp_path):
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
        "value": "50.0000",
        "unit": "percent",
        "low95": "25.0000",
        "high95": "75.1235",
        "seed": "7",
    }


def test_a_failed_write_keeps_the_old_results(tmp_path):
    write_results(tmp_path, result(ONE))
    with pytest.raises(TypeError):
        write_results(tmp_path, result(replace(ONE, model={"backbone": object()})))
    assert EvaluationResult.load(tmp_path / "results.json") == result(ONE)
