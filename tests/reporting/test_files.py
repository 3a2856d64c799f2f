import csv
import json

import pytest

from union_igrot.reporting.files import write_results
from union_igrot.storage.atomic import write_atomic

ROW = {
    "benchmark": "b",
    "split": "test",
    "method": "trained",
    "n_queries": 3,
    "n_gallery": 9,
    "metrics": {"R@1": 100 / 3, "mAP": 50.0},
    "ci95": {"R@1": [0.0, 100.0], "mAP": [25.0, 75.12345]},
    "seed": 7,
    "extra": {"kept": "in json"},
}


def test_json_holds_whole_rows_and_csv_a_line_a_figure(tmp_path):
    write_results(tmp_path, [ROW, {**ROW, "method": "chance, plain"}])
    assert json.loads((tmp_path / "results.json").read_text()) == [ROW, {**ROW, "method": "chance, plain"}]
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
        "split": "test",
        "method": "trained",
        "n_queries": "3",
        "n_gallery": "9",
        "metric": "mAP",
        "percent": "50.0000",
        "low95": "25.0000",
        "high95": "75.1235",
        "seed": "7",
    }


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path):
    write_atomic(tmp_path / "a.txt", "ä" * 10_000)
    write_atomic(tmp_path / "a.txt", "kurz")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "kurz"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_results(tmp_path, [ROW])
    with pytest.raises(TypeError):
        write_results(tmp_path, [{**ROW, "extra": object()}])
    assert json.loads((tmp_path / "results.json").read_text()) == [ROW]
