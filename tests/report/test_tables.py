import io
from dataclasses import asdict

import pytest
from rich.console import Console

from union_igrot.report.tables import describe_protocol, gain_lines, print_results
from union_igrot.types import Protocol

METRICS = ("R@1", "R@5", "R@10", "R@50", "mAP@10", "mAP", "Rs@1", "Rs@2")
PROTOCOL = Protocol(metrics=METRICS, primary="mAP@10", exclude_reference=True, note="own pictures [/strange] [red]")


def row(method, value, benchmark="shapes_cir", skipped=0, **more):
    return {
        "benchmark": benchmark,
        "split": "test",
        "method": method,
        "n_queries": 2000,
        "n_gallery": 12345,
        "n_skipped": skipped,
        "seen_classes": [],
        "protocol": asdict(PROTOCOL),
        "metrics": dict.fromkeys(METRICS, value),
        "ci95": {name: [value, value] for name in METRICS},
        **more,
    }


def shown(rows, width=80):
    out = io.StringIO()
    print_results(rows, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("value", [0.0, 12.34, 99.94, 99.99, 100.0])
def test_eight_figures_and_the_interval_fit_into_80_columns(value):
    text = shown([row(name, value) for name in ("chance", "image", "text", "sum", "trained")])
    table = text[: text.index("percent")]
    assert "…" not in table
    for name in (*METRICS, "[low, high]", "image alone", "image + text", "2,000 queries x 12,345 pictures"):
        assert name in table
    figure = "100" if value > 99.95 else f"{value:.1f}"
    assert table.count(f"[{figure}, {figure}]") == 5
    assert "…" not in text


def test_the_protocol_stands_below_and_brackets_of_a_note_are_printed_as_they_are():
    text = " ".join(shown([row("trained", 1.0, skipped=3)]).split())
    assert "AP divided by min(k, R), step rule; micro average; reference left out; ties by gallery order" in text
    assert "own pictures [/strange] [red]" in text
    assert "3 items left out" in text
    assert "left out;" not in " ".join(shown([row("trained", 1.0)]).split()).replace("reference left out;", "")


@pytest.mark.parametrize(
    ("norm", "words"), [("min", "min(k, R)"), ("hits", "hits in the top k"), ("all", "divided by R,")]
)
def test_each_convention_of_average_precision_is_named(norm, words):
    assert words in describe_protocol({**asdict(PROTOCOL), "ap_norm": norm})


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 2, "better"), (-3, -0.1, "worse"), (-1, 1, "no clear difference")]
)
def test_a_difference_is_called_one_only_where_its_interval_leaves_zero_out(low, high, verdict):
    gain = {"sum": {"mAP@10": [0.5, low, high]}}
    (line,) = gain_lines(row("trained", 1.0, gain95=gain))
    assert line == f"trained - image + text: +0.5 [{low:+.1f}, {high:+.1f}] mAP@10, {verdict}"
    assert line in shown([row("sum", 0.5), row("trained", 1.0, gain95=gain)])


def test_each_benchmark_gets_a_table_of_its_own():
    text = shown([row("trained", 1.0), row("trained", 2.0, benchmark="shapes_sbir")])
    assert text.index("shapes_cir") < text.index("1.0 ") < text.index("shapes_sbir") < text.index("2.0 ")
