"""A sweep's table: which rows share a line, what is averaged, and what the files hold."""

import csv
import io
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from union_igrot.reporting.sweep_report import print_sweep, write_sweep
from union_igrot.reporting.sweeps import Job, headline_columns, lines, settings_that_differ
from union_igrot.types import Protocol

VERSIONS = {"union-igrot": "0", "torch": "2"}


def row(method, value, benchmark="circo", split="val", metric="mAP@10", seed=0, backbone="tiny", **more):
    model = {} if method == "chance" else {"backbone": backbone, "backbone_fingerprint": "f" * 8, "heads": "h"}
    return {
        "benchmark": benchmark,
        "split": split,
        "method": method,
        "n_queries": 10,
        "n_gallery": 20,
        "protocol": asdict(Protocol(metrics=(metric, "R@1"), primary=metric)),
        "metrics": {metric: value, "R@1": None},
        "ci95": {metric: [value - 1, value + 1], "R@1": [None, None]},
        "by_tag": {"new": {"n_queries": 4, metric: value + 2}},
        "seen_classes": [],
        "seen_images": None,
        "model": model,
        "versions": VERSIONS,
        "seed": seed,
        **more,
    }


def trained_jobs():
    """Two targets under three seeds; the baselines are the same everywhere, chance follows the seed."""
    jobs = []
    for target, gain in (("frozen", 0.0), ("union", 5.0)):
        for seed in range(3):
            rows = [
                row("chance", 1 + seed / 10, seed=seed),
                row("image", 20.0, seed=seed),
                row("trained", 40 + gain + seed, seed=seed),
            ]
            jobs.append(Job(len(jobs), str(len(jobs)), (f"target={target}", f"seed={seed}", "data.queries=10"), rows))
    return jobs


def table(jobs, command):
    return {(line.model, line.method): line for line in lines(jobs, command)}


def test_runs_that_differ_in_their_seed_are_averaged_and_baselines_stand_once():
    found = table(trained_jobs(), "train")
    assert list(found) == [
        ("tiny", "image alone"),
        ("tiny", "trained: target=frozen"),
        ("tiny", "trained: target=union"),
        ("", "chance"),
    ]
    column = ("circo", "val")
    figure = found["tiny", "trained: target=union"].figure(column, "mAP@10")
    assert (figure.value, figure.runs) == (46.0, 3)
    assert figure.deviation == pytest.approx(statistics.stdev([45, 46, 47]))
    plain = found["tiny", "image alone"].figure(column, "mAP@10")
    assert (plain.value, plain.low, plain.high, plain.runs) == (20.0, 19.0, 21.0, 1)
    assert found["", "chance"].figure(column, "mAP@10").value == pytest.approx(1.1)
    assert found["", "chance"].figure(column, "R@1") is None
    assert found["tiny", "trained: target=frozen"].tag(column, "new").value == 43.0
    assert found["tiny", "image alone"].figure(("other", "val"), "mAP@10") is None


def test_evaluations_of_one_checkpoint_share_a_line_over_benchmarks():
    jobs = [
        Job(n, str(n), (f"checkpoint={name}", f"data={data}"), [row("sum", 3.0, data), row("trained", value, data)])
        for n, (name, data, value) in enumerate([("tiny", "circo", 4.0), ("tiny", "cirr", 5.0), ("a/b", "cirr", 6.0)])
    ]
    found = table(jobs, "eval")
    assert list(found) == [("tiny", "image + text"), ("tiny", "trained: tiny"), ("tiny", "trained: a/b")]
    assert set(found["tiny", "trained: tiny"].rows) == {("circo", "val"), ("cirr", "val")}
    assert list(table(jobs, "train"))[1:] == [  # there, each job has a model of its own
        ("tiny", "trained: tiny data=circo"),
        ("tiny", "trained: tiny data=cirr"),
        ("tiny", "trained: a/b data=cirr"),
    ]


def test_baselines_whose_figures_differ_are_told_apart():
    def job(number, prompt, value):
        return Job(
            number, str(number), ("data=circo", f"data.prompt={prompt}"), [row("text", value), row("image", 9.0)]
        )

    found = table([job(0, "union", 4.0), job(1, "searle", 5.0)], "eval")
    assert list(found) == [
        ("tiny", "image alone"),
        ("tiny", "text alone: data.prompt=union"),
        ("tiny", "text alone: data.prompt=searle"),
    ]


def test_a_failed_job_is_named_and_changes_no_line():
    done = Job(0, "0", ("checkpoint=tiny",), [row("image", 1.0), row("trained", 2.0)])
    failed = Job(1, "", ("checkpoint=lost",), (), "lost is not a saved model")
    assert settings_that_differ([done, failed]) == ["checkpoint"]
    assert list(table([done, failed], "eval")) == [("tiny", "image alone"), ("tiny", "trained: tiny")]
    out = io.StringIO()
    print_sweep([done, failed], "eval", Path("folder"), Console(file=out, width=80))
    assert "job 1 (checkpoint=lost) failed: lost is not a saved model" in out.getvalue()
    assert "1 of 2 jobs done" in out.getvalue()


def test_parts_stand_in_tables_of_their_own_and_not_in_the_first():
    rows = [row("image", 1.0, "iq_a"), row("image", 3.0, "iq_b"), row("image", 2.0, "iq_mean", parts=["iq_a", "iq_b"])]
    assert headline_columns([Job(0, "0", (), rows)]) == [("iq_mean", "val")]


def test_the_csv_holds_every_figure_ours_and_published(tmp_path):
    jobs = trained_jobs()
    seen = {"seen_images": {"queries": 1, "gallery": 2}, "seen_classes": ["cup"]}
    jobs[0].rows[2].update(seen)
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


def test_the_markdown_sets_chance_and_published_rows_beneath(tmp_path):
    jobs = trained_jobs()
    jobs[5].rows[2]["seen_classes"] = ["cup", "a|b"]
    write_sweep(tmp_path, [*jobs, Job(6, "", ("target=|", "seed=0", "data.queries=10"), (), "broken | pipe")], "train")
    text = (tmp_path / "results.md").read_text()
    head, _, rest = text.partition("## circo · val")
    order = ["image alone", "target=frozen", "target=union", "chance", "published: MagicLens", "TransAgg + UNION"]
    assert [head.index(name) for name in order] == sorted(head.index(name) for name in order)
    assert "| tiny | trained: target=union | 46.0 ± 1.0 (3) * |" in head
    assert "| tiny | image alone | 20.0 [19.0, 21.0] |" in head
    assert "34.5 (not stated)" in head
    assert "published: the UNION authors' README; reference left out; texts use shared_concept |" in rest
    assert "protocol official; AP divided by min(k, R), step rule" in rest
    assert "trained: target=union: \\* 2 of the classes were trained on" in rest
    assert "| new (4) |" in rest
    assert "failed: broken \\| pipe" in rest
    tables = [line for line in text.splitlines() if line.startswith("|")]
    unescaped = [line.replace("\\|", "").count("|") for line in tables]
    for before, rule, count in zip(tables, tables[1:], unescaped[1:], strict=False):
        if set(rule) <= set("| -:"):
            assert unescaped[tables.index(before)] == count


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_cuts_no_figure_off(width):
    jobs = [
        Job(n, str(n), (f"checkpoint={'x' * 30}{n}",), [row("trained", 12.3, f"benchmark_{i}") for i in range(8)])
        for n in range(2)
    ]
    out = io.StringIO()
    print_sweep(jobs, "eval", Path("folder"), Console(file=out, width=width))
    shown = out.getvalue()
    assert "…" not in shown
    assert shown.count("12.3") == 16
    assert max(map(len, shown.splitlines()[:-1])) <= width
