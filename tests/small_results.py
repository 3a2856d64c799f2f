"""Results of methods that were never evaluated, for the tests of tables, sweeps and model cards."""

import math
from collections.abc import Mapping
from typing import Any

from union_igrot.evaluation.results import EvaluationResult, MethodResult
from union_igrot.metrics.statistics import Interval
from union_igrot.types import Protocol


def method(
    name: str,
    value: float,
    benchmark: str = "shapes_cir",
    metrics: Mapping[str, float] | None = None,
    protocol: Protocol | None = None,
    **more: Any,
) -> MethodResult:
    """A result whose primary metric is `value`, with an interval of one point to each side."""
    protocol = protocol or Protocol(metrics=("R@1", "mAP@10"), primary="mAP@10")
    values = dict.fromkeys(protocol.metrics, value) | {protocol.primary: value} | dict(metrics or {})
    bounds = {name: Interval(*((math.nan,) * 2 if math.isnan(x) else (x - 1, x + 1))) for name, x in values.items()}
    model = {} if name == "chance" else {"backbone": "tiny", "backbone_fingerprint": "f" * 8, "heads": "h"}
    plain = {"split": "val", "n_queries": 2000, "n_gallery": 12345, "model": model, "versions": {"torch": "2"}}
    plain |= {"benchmark": benchmark, "protocol": protocol, "metrics": values, "intervals": bounds}
    return MethodResult(method=name, **(plain | more))


def result(*methods: MethodResult) -> EvaluationResult:
    return EvaluationResult(methods)
