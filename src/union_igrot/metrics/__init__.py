"""Retrieval metrics of ranks and hit masks, their registry, and statistics over queries."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.metrics.functional import (
        average as average,
        average_precision as average_precision,
        precision_at_k as precision_at_k,
        recall_at_k as recall_at_k,
    )
    from union_igrot.metrics.names import (
        MetricFamily as MetricFamily,
        metric_families as metric_families,
        parse_metric as parse_metric,
        register_metric as register_metric,
    )
    from union_igrot.metrics.retrieval import RetrievalMetrics as RetrievalMetrics
    from union_igrot.metrics.statistics import (
        bootstrap_interval as bootstrap_interval,
        bootstrap_intervals as bootstrap_intervals,
        paired_interval as paired_interval,
        randomization_test as randomization_test,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
