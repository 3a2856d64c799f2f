"""A sweep's table: which results share a row, what is averaged, what the files hold, and published results."""

import csv
import io
import math
import statistics
from dataclasses import replace
from pathlib import Path

import official
import pytest
from rich.console import Console

from small_results import method, result
from union_igrot.datasets.loading import load_benchmark
from union_igrot.datasets.registry import find_benchmark
from union_igrot.evaluation.results import SeenImages, TagMetric
from union_igrot.reporting.sweep_results import (
    HIDDEN_SPLITS,
    SweepJob,
    print_sweep,
    published_for,
    published_results,
    sweep_rows,
    sweep_table,
    varying_settings,
    write_sweep,
)
from union_igrot.types import Protocol

PROTOCOL = Protocol(metrics=("mAP@10", "R@1"), primary="mAP@10")


def one(name, value, benchmark="circo", **more):
    tags = {"new": TagMetric(4, value + 2)}
    return method(name, value, benchmark, {"R@1": math.nan}, PROTOCOL, **({"n_queries": 10, "by_tag": tags} | more))


def job(number, settings, *methods):
    return SweepJob(number, str(number), tuple(settings), result(*methods))


def trained_jobs():
    """Two targets under three seeds; the baselines are the same everywhere, chance follows the seed."""
    jobs = []
    for target, gain in (("frozen", 0.0), ("union", 5.0)):
        for seed in range(3):
            values = {"chance": 1 + seed / 10, "image": 20.0, "trained": 40 + gain + seed}
            methods = [one(name, value, seed=seed) for name, value in values.items()]
            jobs.append(job(len(jobs), (f"target={target}", f"seed={seed}", "data.queries=10"), *methods))
    return jobs


def with_trained(one, **changes):
    *others, trained = one.result.methods
    return replace(one, result=result(*others, replace(trained, **changes)))


def table(jobs, command):
    return {(row.model, row.method): row for row in sweep_rows(jobs, command)}


def test_runs_with_different_seeds_are_averaged():
    found = table(trained_jobs(), "train")
    assert list(found) == [
        ("tiny", "image alone"),
        ("tiny", "trained: target=frozen"),
        ("tiny", "trained: target=union"),
        ("", "chance"),
    ]
    column = ("circo", "val")
    metric = found["tiny", "trained: target=union"].metric(column, "mAP@10")
    assert (metric.value, metric.runs) == (46.0, 3)
    assert metric.deviation == pytest.approx(statistics.stdev([45, 46, 47]))
    plain = found["tiny", "image alone"].metric(column, "mAP@10")
    assert (plain.value, plain.interval, plain.runs) == (20.0, (19.0, 21.0), 1)
    assert found["", "chance"].metric(column, "mAP@10").value == pytest.approx(1.1)
    assert found["", "chance"].metric(column, "R@1") is None
    assert found["tiny", "trained: target=frozen"].tag(column, "new").value == 43.0
    assert found["tiny", "image alone"].metric(("other", "val"), "mAP@10") is None


def test_evaluations_of_one_checkpoint_share_a_row():
    jobs = [
        job(n, (f"checkpoint={name}", f"data={data}"), one("sum", 3.0, data), one("trained", value, data))
        for n, (name, data, value) in enumerate([("tiny", "circo", 4.0), ("tiny", "cirr", 5.0), ("a/b", "cirr", 6.0)])
    ]
    found = table(jobs, "eval")
    assert list(found) == [("tiny", "image + text"), ("tiny", "trained: tiny"), ("tiny", "trained: a/b")]
    assert set(found["tiny", "trained: tiny"].results) == {("circo", "val"), ("cirr", "val")}
    assert list(table(jobs, "train"))[1:] == [  # there, each job has a model of its own
        ("tiny", "trained: tiny data=circo"),
        ("tiny", "trained: tiny data=cirr"),
        ("tiny", "trained: a/b data=cirr"),
    ]


def test_baselines_with_different_metrics_have_separate_rows():
    jobs = [
        job(n, ("data=circo", f"data.prompt={prompt}"), one("text", value), one("image", 9.0))
        for n, (prompt, value) in enumerate([("union", 4.0), ("searle", 5.0)])
    ]
    found = table(jobs, "eval")
    assert list(found) == [
        ("tiny", "image alone"),
        ("tiny", "text alone: data.prompt=union"),
        ("tiny", "text alone: data.prompt=searle"),
    ]


def test_a_failed_job_is_named_and_changes_no_line():
    done = job(0, ("checkpoint=tiny",), one("image", 1.0), one("trained", 2.0))
    failed = SweepJob(1, "", ("checkpoint=lost",), error="lost is not a saved model")
    assert varying_settings([done, failed]) == ["checkpoint"]
    assert list(table([done, failed], "eval")) == [("tiny", "image alone"), ("tiny", "trained: tiny")]
    out = io.StringIO()
    print_sweep([done, failed], "eval", Path("folder"), Console(file=out, width=80))
    assert "job 1 (checkpoint=lost) failed: lost is not a saved model" in out.getvalue()
    assert "1 of 2 jobs done" in out.getvalue()


def test_the_first_table_has_no_parts():
    parts = [one("image", 1.0, "iq_a"), one("image", 3.0, "iq_b"), one("image", 2.0, "iq_mean", parts=("iq_a", "iq_b"))]
    heads = sweep_table([job(0, (), *parts)], "eval").head
    assert [cell.text for cell in heads] == ["model", "method", "iq_mean\nval\nmAP@10"]


def test_the_csv_has_every_metric(tmp_path):
    jobs = trained_jobs()
    seen = {"seen_images": SeenImages(1, 2), "seen_classes": ("cup",)}
    jobs[0] = with_trained(jobs[0], **seen)
    write_sweep(tmp_path, jobs, "train")
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    ours = [line for line in table if line["source"] == "this sweep"]
    assert len(ours) == 6 * 3 * 3  # jobs, methods; two metrics and a tag
    first = ours[6]
    assert {name: first[name] for name in ("run", "model", "benchmark", "split", "method", "metric", "n_queries")} == {
        **{"run": "0", "model": "tiny", "benchmark": "circo", "split": "val", "method": "trained"},
        **{"metric": "mAP@10", "n_queries": "10"},
    }
    assert [first[name] for name in ("percent", "low95", "high95")] == ["40.0000", "39.0000", "41.0000"]
    assert [first[name] for name in ("seen_classes", "seen_queries", "seen_gallery")] == ["1", "1", "2"]
    assert [first[name] for name in ("backbone_hash", "heads_hash", "seed")] == ["f" * 8, "h", "0"]
    assert first["settings"] == "target=frozen seed=0 data.queries=10"
    assert "torch=2" in first["versions"]
    assert "protocol official" in first["protocol"]
    assert ours[7]["percent"] == ours[7]["low95"] == ""  # a metric without a value
    assert (ours[8]["metric"], ours[8]["percent"], ours[8]["n_queries"]) == ("mAP@10 [new]", "42.0000", "4")
    published = [line for line in table if line["source"].startswith("published: ")]
    assert {line["split"] for line in published} == {"test", "not stated"}
    assert any(line["method"].startswith("TransAgg + UNION") and line["percent"] == "34.5" for line in published)


def test_the_markdown_lists_chance_and_published_rows_last(tmp_path):
    jobs = trained_jobs()
    jobs[5] = with_trained(jobs[5], seen_classes=("cup", "a|b"))
    failed = SweepJob(6, "", ("target=|", "seed=0", "data.queries=10"), error="broken | pipe")
    write_sweep(tmp_path, [*jobs, failed], "train")
    text = (tmp_path / "results.md").read_text()
    head, _, rest = text.partition("## circo · val")
    order = ["image alone", "target=frozen", "target=union", "chance", "published: MagicLens", "TransAgg + UNION"]
    assert [head.index(name) for name in order] == sorted(head.index(name) for name in order)
    assert "| tiny | trained: target=union | 46.0 ± 1.0 (3) * |" in head
    assert "| tiny | image alone | 20.0 [19.0, 21.0] |" in head
    assert "34.5 (not stated)" in head
    assert "published: the UNION authors' README; reference left out; texts use shared_concept |" in rest
    assert "protocol official; AP divided by min(k, R), step rule" in rest
    assert "trained: target=union: \\* the heads were trained on 2 of the classes" in rest
    assert "| new (4) |" in rest
    assert "failed: broken \\| pipe" in rest
    tables = [line for line in text.splitlines() if line.startswith("|")]
    unescaped = [line.replace("\\|", "").count("|") for line in tables]
    for before, rule, count in zip(tables, tables[1:], unescaped[1:], strict=False):
        if set(rule) <= set("| -:"):
            assert unescaped[tables.index(before)] == count


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_cuts_no_metric_off(width):
    jobs = [
        job(n, (f"checkpoint={'x' * 30}{n}",), *(one("trained", 12.3, f"benchmark_{i}") for i in range(8)))
        for n in range(2)
    ]
    out = io.StringIO()
    print_sweep(jobs, "eval", Path("folder"), Console(file=out, width=width))
    shown = out.getvalue()
    assert "…" not in shown
    assert shown.count("12.3") == 16
    assert max(map(len, shown.splitlines()[:-1])) <= width


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys(one.benchmark for one in published_results()))
def test_names_are_those_of_our_rows(name, tmp_path):
    plain = name.removesuffix("_mean").removesuffix("_all_seen")
    official.WRITERS[plain](tmp_path, with_images=False)
    part = find_benchmark(plain).parts[0] if name.endswith("_mean") else {}
    protocol = load_benchmark(plain, tmp_path, check_images=False, **part).protocol
    for one in published_results():
        if one.benchmark == name:
            assert set(one.metrics) <= set(protocol.metrics), one
            assert one.split in find_benchmark(plain).splits or (one.split == "not stated" and name in HIDDEN_SPLITS), (
                one
            )


def test_published_results_are_unique_percentages_with_a_source():
    keys = [(one.method, one.backbone, one.benchmark, one.split) for one in published_results()]
    assert len(keys) == len(set(keys))
    for one in published_results():
        assert one.metrics, one
        assert all(0 < value < 100 for value in one.metrics.values()), one
        assert one.source, one
        depths = [value for name, value in one.metrics.items() if name.startswith(("R@", "Rs@"))]
        assert depths == sorted(depths) or one.benchmark == "cirr", one  # recall grows with k
        if one.benchmark == "cirr":
            for kind in ("R@", "Rs@"):
                rising = [value for name, value in one.metrics.items() if name.startswith(kind)]
                assert rising == sorted(rising), one


def test_published_rows_of_other_splits():
    def union(benchmark, split):
        return [one.metrics for one in published_for(benchmark, split) if one.method.startswith("TransAgg + UNION")]

    assert union("circo", "val") == [{"mAP@10": 34.5, "mAP@50": 38.5}]
    assert union("cirr", "val") == [{"R@10": 77.6, "R@50": 92.9}]
    assert union("sketchy", "zeroshot0") == [{"mAP@200": 82.7, "P@200": 79.9}]
    assert union("sketchy", "zeroshot1") == []
    assert published_for("shapes_cir", "test") == []
