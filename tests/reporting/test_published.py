"""Published results join ours: names of benchmarks, splits and metrics are those of the readers."""

import official
import pytest

from union_igrot.datasets.loading import load_benchmark
from union_igrot.datasets.registry import find_benchmark
from union_igrot.reporting.sweep_results import HIDDEN_SPLITS, published_for, published_results


@pytest.mark.parametrize("name", dict.fromkeys(one.benchmark for one in published_results()))
def test_names_are_those_of_our_rows(name, tmp_path):
    plain = name.removesuffix("_mean")
    official.WRITERS[plain](tmp_path, with_images=False)
    part = find_benchmark(plain).parts[0] if name.endswith("_mean") else {}
    protocol = load_benchmark(plain, tmp_path, check_images=False, **part).protocol
    for one in published_results():
        if one.benchmark == name:
            assert set(one.metrics) <= set(protocol.metrics), one
            assert one.split in find_benchmark(plain).splits or (one.split == "not stated" and name in HIDDEN_SPLITS), (
                one
            )


def test_each_is_said_once_in_percent_with_its_source():
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


def test_lenient_average_precision_is_told_where_it_exceeds_precision():
    """Strict AP@k is at most P@k where every class has k photos: a row that breaks it says why."""
    broken = [
        one
        for one in published_results()
        if one.benchmark == "sketchy" and one.metrics["mAP@200"] > one.metrics["P@200"]
    ]
    assert {one.method for one in broken} == {"TransAgg, 5K pairs", "TransAgg + UNION, 5K"}
    assert all("lenient" in one.note for one in broken)


def test_the_authors_row_is_there_and_other_splits_only_where_ours_is_hidden():
    def union(benchmark, split):
        return [one.metrics for one in published_for(benchmark, split) if one.method.startswith("TransAgg + UNION")]

    assert union("circo", "val") == [{"mAP@10": 34.5, "mAP@50": 38.5}]
    assert union("cirr", "val") == [{"R@10": 77.6, "R@50": 92.9}]
    assert union("sketchy", "zeroshot0") == [{"mAP@200": 82.7, "P@200": 79.9}]
    assert union("sketchy", "zeroshot1") == []
    assert published_for("shapes_cir", "test") == []
