"""Metrics that cannot vary, intervals of few classes, and benchmarks without anything to tell apart."""

from dataclasses import replace

import pytest

from small_results import method, result
from small_world import LinearBackbone, Noise, extractor, sbir_benchmark, trainable
from union_igrot.datasets.loading import benchmark_warning, refuse_indistinct
from union_igrot.errors import DataError
from union_igrot.evaluation.evaluate import evaluate_benchmark
from union_igrot.evaluation.results import EvaluationResult
from union_igrot.evaluation.scoring import metric_limits
from union_igrot.evaluation.tables import difference_lines, metrics_table
from union_igrot.metrics.statistics import Difference
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, TrainingSet, Triplet


def benchmark(gallery, targets, metrics, **protocol):
    items = [GalleryItem(f"g{n}", Noise(n)) for n in range(gallery)]
    queries = [Query(f"q{n}", Noise(100 + n), "x", names, ("g0",)) for n, names in enumerate(targets)]
    return Benchmark("b", "val", "cir", queries, items, Protocol(metrics=metrics, primary=metrics[0], **protocol))


METRICS = ("mAP", "mAP@5", "mAP@20", "P@2", "P@5", "P@20", "R@1", "R@9", "R@20")
TARGETS = [("g1", "g2", "g3"), ("g4", "g5")]


def test_metrics_that_cannot_vary_or_reach_100_are_found():
    assert metric_limits(benchmark(12, TARGETS, METRICS)) == {
        "mAP@20": "equals mAP",
        "P@5": "is at most 50.0",
        "P@20": "is always 12.5",
        "R@20": "is always 100.0",
    }
    excluded = metric_limits(benchmark(11, TARGETS, METRICS, exclude_reference=True))
    assert excluded["R@9"] == "is always 100.0"
    assert metric_limits(benchmark(100, [("g1",), tuple(f"g{n}" for n in range(1, 60))], ("P@50", "R@50"))) == {}
    first = benchmark(12, TARGETS, ("R@20", "mAP"), recall_targets="first")
    assert metric_limits(first) == {"R@20": "is always 100.0"}


def test_limited_metrics_are_marked_and_never_bold():
    chance, trained = (
        method(name, value, metrics={"R@1": value}, limits={"R@1": "is always 100.0"}, n_classes=4)
        for name, value in (("chance", 1.0), ("trained", 2.0))
    )
    trained = replace(trained, differences={"chance": {"mAP@10": Difference(1.0, 0.5, 2.0)}})
    value = result(chance, trained)
    table = metrics_table(value.benchmarks[0])
    assert [cell.text for cell in table.head] == ["method", "R@1†", "mAP@10"]
    assert [cell.kind for cell in table.rows[1].cells] == ["", "best"]
    assert table.rows[1].cells[1].below == "[1.0, 3.0]‡"
    assert "over classes and their queries" in table.caption
    assert difference_lines(trained) == ["trained - chance: +1.0 [+0.5, +2.0]‡ mAP@10, better"]
    text = " ".join(str(value).split())
    assert "† with so few candidates or relevant images R@1 is always 100.0" in text
    assert "‡ of only 4 classes: intervals and verdicts are rough" in text
    assert EvaluationResult.from_json(value.to_json()) == value


@pytest.mark.slow
def test_classes_reach_the_result(tmp_path):
    backbone = LinearBackbone()
    one = sbir_benchmark(classes=4)
    found = evaluate_benchmark(trainable("sum", "frozen", backbone), one, extractor(tmp_path, backbone))
    assert {method.n_classes for method in found.methods} == {4}
    assert "P@5" not in found.methods[0].limits


@pytest.mark.parametrize(
    ("gallery", "targets", "reason"),
    [
        (3, [("g1", "g2")], "every candidate is relevant"),
        (3, [("g1", "g2")] * 2, "every candidate is relevant"),
        (5, [("g1", "g2")] * 2, "all 2 queries have the same targets"),
        (5, [("g1", "g2")], ""),
        (5, [("g1",), ("g2",)], ""),
        (5, [(), ()], ""),
    ],
)
def test_a_benchmark_without_anything_to_tell_apart_has_a_warning(gallery, targets, reason):
    one = benchmark(gallery, targets, ("mAP",), exclude_reference=True)
    warning = benchmark_warning(one)
    assert reason in warning
    assert bool(reason) == bool(warning)
    if reason:
        with pytest.raises(DataError, match=f"b val: .*{reason}.*gallery.txt"):
            refuse_indistinct(TrainingSet("t", ()), [one])


def test_training_triplets_need_two_groups_per_task():
    def triplets(*groups, task="sbir"):
        return TrainingSet("t", [Triplet(Noise(n), None, Noise(n), group, task) for n, group in enumerate(groups)])

    refuse_indistinct(triplets("a", "b"), [])
    with pytest.raises(DataError, match="t train: all triplets have one class, 'a'"):
        refuse_indistinct(triplets("a", "a"), [])
    with pytest.raises(DataError, match="t train: all triplets have one target, 'a'"):
        refuse_indistinct(triplets("a", "a", task="cir"), [])


def test_warnings_are_above_the_table_in_text_html_and_json():
    value = result(method("trained", 100.0, warnings=("x val: every candidate is relevant <b>",)))
    text = str(value)
    assert text.index("warning: x val: every candidate is relevant") < text.index("method")
    assert "every candidate is relevant &lt;b&gt;" in value._repr_html_()
    assert '"warnings"' in value.to_json()
    assert EvaluationResult.from_json(value.to_json()) == value
