"""Names of metrics, and metrics of other packages."""

import re
from dataclasses import replace

import pytest
import torch

from small_world import cir_benchmark
from union_igrot.errors import ConfigError
from union_igrot.evaluation.scoring import score
from union_igrot.metrics import names
from union_igrot.metrics.names import MetricFamily, metric_families, parse_metric, register_metric


@pytest.mark.parametrize(
    ("name", "expected"),
    [("R@1", ("R", 1)), ("Rs@3", ("Rs", 3)), ("P@200", ("P", 200)), ("mAP", ("mAP", None)), ("mAP@10", ("mAP", 10))],
)
def test_metric_names(name, expected):
    assert parse_metric(name) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["", "R", "P", "Rs", "R@0", "R@01", "R@-1", "r@1", "map", "mAP@", "mAP@k", "R@1 ", "R@\u0661"]
)
def test_other_metric_names_are_errors(name):
    with pytest.raises(ConfigError, match=re.escape(repr(name)) + r".*R@k, Rs@k, P@k, mAP, mAP@k"):
        parse_metric(name)


def reciprocal_rank(hits, n_relevant, k, scale=1.0):
    ranks = torch.arange(1, hits[:, :k].shape[1] + 1)
    best = (hits[:, :k] / ranks).amax(1).double()
    return best.masked_fill(n_relevant == 0, torch.nan)


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(names, "_FAMILIES", dict(names._FAMILIES))
    return MetricFamily("MRR", reciprocal_rank, describe=lambda protocol: f"MRR of {protocol.name}")


def test_a_protocol_can_name_a_registered_metric(family):
    with pytest.raises(ConfigError, match="unknown metric 'MRR@5'"):
        parse_metric("MRR@5")
    register_metric(family)
    register_metric(family)
    assert parse_metric("MRR@5") == ("MRR", 5)
    with pytest.raises(ConfigError, match="MRR@k"):
        parse_metric("MRR")
    with pytest.raises(ConfigError, match="exists already"):
        register_metric(replace(family, cutoff="none"))
    benchmark = cir_benchmark()
    protocol = replace(benchmark.protocol, metrics=("R@5", "MRR@5"), primary="MRR@5")
    sides = (benchmark.queries, benchmark.gallery)
    queries, gallery = (torch.randn(len(side), 8, generator=torch.Generator().manual_seed(0)) for side in sides)
    found = score(replace(benchmark, protocol=protocol), queries, gallery).values
    hit = found["R@5"] == 1
    assert hit.any()
    assert ((found["MRR@5"] >= 0.2) == hit).all()


def test_an_installed_package_can_offer_a_metric(family, monkeypatch):
    class Entry:
        def load(self):
            return family

    monkeypatch.setattr(names, "entry_points", lambda group: [Entry()] if group == "union_igrot.metrics" else [])
    assert parse_metric("MRR@10").family is family
    assert family in metric_families()


@pytest.mark.parametrize("wrong", [{"name": "a@b"}, {"conventions": {"mode": "average"}}])
def test_a_family_is_checked(wrong):
    with pytest.raises(ConfigError):
        MetricFamily(**{"name": "MRR", "compute": reciprocal_rank, **wrong})
