"""Tables and notes of results, on the terminal, as text, as HTML and as Markdown."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from small_results import method, result
from union_igrot.evaluation.results import BenchmarkResult, SeenImages, TagMetric
from union_igrot.evaluation.tables import (
    describe_protocol,
    difference_lines,
    format_percent,
    metrics_table,
    notes,
    overlap_lines,
    print_results,
)
from union_igrot.metrics.statistics import Difference, Interval
from union_igrot.types import Protocol

METRICS = ("R@1", "R@5", "R@10", "R@50", "mAP@10", "mAP", "Rs@1", "Rs@2")
PROTOCOL = Protocol(metrics=METRICS, primary="mAP@10", exclude_reference=True, note="own images [/strange] [red]")


def one(name, value, benchmark="shapes_cir", **more):
    spans = {metric: Interval(value, value) for metric in METRICS}
    return method(name, value, benchmark, **({"protocol": PROTOCOL, "intervals": spans} | more))


def shown(*methods, width=80):
    out = io.StringIO()
    print_results(result(*methods), Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("value", [0.0, 12.34, 99.94, 99.99, 100.0])
def test_eight_metrics_and_the_interval_fit_into_80_columns(value):
    text = shown(*(one(name, value) for name in ("chance", "image", "text", "sum", "trained")))
    table = text[: text.index("percent;")]
    assert table.count("method") == 1
    assert "…" not in table
    for name in (*METRICS, "[low, high]", "image alone", "image + text", "2,000 queries x 12,345 images"):
        assert name in table
    metric = "100" if value > 99.95 else f"{value:.1f}"
    assert table.count(f"[{metric}, {metric}]") == 5
    assert "…" not in text


def test_the_protocol_is_printed_below_verbatim():
    text = " ".join(shown(one("trained", 1.0, n_skipped=3)).split())
    assert "AP divided by min(k, R), step rule; micro average; reference left out; ties by expectation" in text
    assert "own images [/strange] [red]" in text
    assert "3 items left out" in text
    assert "left out;" not in " ".join(shown(one("trained", 1.0)).split()).replace("reference left out;", "")


@pytest.mark.parametrize(
    ("norm", "words"), [("min", "min(k, R)"), ("hits", "hits in the top k"), ("all", "divided by R,")]
)
def test_each_convention_of_average_precision_is_named(norm, words):
    assert words in describe_protocol(replace(PROTOCOL, ap_norm=norm))


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 2, "better"), (-3, -0.1, "worse"), (-1, 1, "no clear difference")]
)
def test_a_difference_is_clear_if_its_interval_excludes_zero(low, high, verdict):
    gain = {"sum": {"mAP@10": Difference(0.5, low, high)}}
    (line,) = difference_lines(one("trained", 1.0, differences=gain))
    assert line == f"trained - image + text: +0.5 [{low:+.1f}, {high:+.1f}] mAP@10, {verdict}"
    assert line in shown(one("sum", 0.5), one("trained", 1.0, differences=gain))


def test_each_benchmark_has_its_own_table():
    text = shown(one("trained", 1.0), one("trained", 2.0, "shapes_sbir"))
    assert text.index("shapes_cir") < text.index("1.0 ") < text.index("shapes_sbir") < text.index("2.0 ")


def test_wide_tables_are_divided():
    names = (*(f"R@{k}" for k in (1, 5, 10, 50, 100, 200)), *(f"P@{k}" for k in (1, 5, 10, 50, 100, 200)), "mAP")
    wide = one(
        "trained",
        12.3,
        protocol=Protocol(metrics=names, primary="R@10"),
        intervals=dict.fromkeys(names, Interval(1.0, 23.4)),
    )
    table, _, _ = shown(wide).partition("percent;")
    heads = [line.split() for line in table.splitlines() if line.startswith("method")]
    assert heads == [
        ["method", "R@1", "R@5", "R@10", "[low,", "high]", "R@50", "R@100", "R@200"],
        ["method", "P@1", "P@5", "P@10", "P@50", "P@100", "P@200", "mAP"],
    ]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
    narrow, _, _ = shown(wide, width=30).partition("percent;")
    assert [word for line in narrow.splitlines() if line.startswith("method") for word in line.split()[1:]] == [
        *("R@1", "R@5", "R@10", "[low,", "high]", "R@50", "R@100", "R@200"),
        *("P@1", "P@5", "P@10", "P@50", "P@100", "P@200", "mAP"),
    ]


@pytest.mark.parametrize(
    ("changes", "said", "not_said"),
    [
        ({"metrics": ("R@1",), "primary": "R@1"}, "micro average", "AP divided"),
        ({"metrics": ("R@1",), "primary": "R@1", "recall": "fraction"}, "share of the targets", "P@k"),
        ({"recall": "fraction", "metrics": ("mAP",), "primary": "mAP"}, "AP divided", "share of the targets"),
        ({"metrics": ("P@5",), "primary": "P@5", "precision_cut": "attainable"}, "P@k divided by min(k, R)", "AP"),
        ({"ties": "pessimistic"}, "ties against the model", "gallery order"),
        ({"ties": "gallery order"}, "ties by gallery order", "expectation"),
        ({"prompt": "find {condition}"}, "prompt 'find {condition}'", "prompt ''"),
        ({}, "protocol official", "prompt"),
    ],
)
def test_a_protocol_describes_only_what_its_metrics_use(changes, said, not_said):
    words = describe_protocol(Protocol(**changes))
    assert said in words
    assert not_said not in words


def test_overlap_with_training_is_described_and_marked():
    seen = one("trained", 5.0, seen_images=SeenImages(3, 1200), seen_classes=("cup", "tree"))
    text = " ".join(shown(one("chance", 1.0), seen).split())
    assert "trained * 5.0" in text
    assert "chance 1.0" in text
    assert "on the images of 3 of 2,000 queries and on 1,200 of 12,345 gallery images" in text
    assert "trained on 2 of the classes: these are not zero-shot (cup, tree)" in text
    clean = one("trained", 5.0, seen_images=SeenImages(0, 0))
    assert overlap_lines(clean) == ["the heads were trained on none of these images"]
    assert "*" not in shown(clean)
    assert "not recorded" in shown(one("trained", 5.0))
    assert "not recorded" not in shown(one("chance", 5.0))
    many = tuple(f"class{i:02d}" for i in range(40))
    assert "class23, ...)" in overlap_lines(one("trained", 5.0, seen_classes=many))[1]


def test_the_primary_metric_by_tag_is_one_sentence():
    tags = {"addition": TagMetric(1234, 56.78), "negation": TagMetric(5, math.nan)}
    assert "mAP@10 of trained by tag (queries): addition 56.8 (1,234), negation - (5)" in " ".join(
        shown(one("trained", 1.0, by_tag=tags)).split()
    )


def test_notes_of_parts_are_below_their_mean_only():
    gain = {"sum": {"mAP@10": Difference(0.5, 0.1, 2)}}
    parts = [one("trained", 1.0, f"iq_{name}", differences=gain) for name in ("dress", "shirt")]
    whole = one("trained", 2.0, "iq_mean", differences=gain, parts=("iq_dress", "iq_shirt"))
    text = shown(*parts, whole)
    assert text.count("percent;") == text.count("trained - image + text") == 1
    assert text.index("iq_shirt ·") < text.index("iq_mean ·") < text.index("percent;")
    assert "mean of the parts' means" in " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "said"), [(None, "-"), (float("nan"), "-"), (0.04, "0.0"), (99.95, "100.0"), (99.96, "100")]
)
def test_percentages_have_one_decimal(value, said):
    assert format_percent(value) == said


def test_methods_of_tuned_encoders_are_not_called_untrained():
    for tuned in (False, True):
        both = BenchmarkResult((one("sum", 1.0), one("trained", 2.0, model={"tuned": tuned})))
        assert ("tuned encoders" in " ".join(notes(both))) == tuned


def test_a_result_prints_itself_and_is_html_in_a_notebook():
    value = result(one("chance", 1.0), one("trained", 12.34), one("trained", 5.0, "x<b>"))
    text = str(value)
    assert "shapes_cir · val · 2,000 queries x 12,345 images" in text
    assert "12.3" in text
    assert "\x1b" not in text
    html = value._repr_html_()
    assert "<td" in html
    assert "x&lt;b&gt;" in html
    assert "<b>" not in html


def test_the_same_table_is_html_and_markdown():
    table = metrics_table(result(one("chance", 1.0), one("trained", 2.0, seen_classes=("cup",))).benchmarks[0])
    html = table.to_html()
    assert '<td class="best">2.0<span class="span">[2.0, 2.0]</span></td>' in html
    assert '<tr class="shown"><th scope="row">trained *</th>' in html
    head, rule, chance, trained = table.to_markdown()
    assert head.startswith("| method | R@1 |")
    assert "**mAP@10**" in head
    assert rule.count("---") == len(METRICS) + 1
    assert chance.startswith("| chance | 1.0 | 1.0 |")
    assert trained.count("[2.0, 2.0]") == 1  # of the primary metric alone
