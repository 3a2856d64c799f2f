"""The metrics of an evaluation, gathered batch by batch and rank by rank.

The torchmetrics face of `functional`. Knows how values of many processes are put
together so that every query counts once. Does not know where hit masks come from.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.functional import (
    ParsedMetric,
    PrecisionCut,
    RecallMode,
    average,
    average_precision,
    parse_metric,
    precision_at_k,
    recall_at_k,
)
from union_igrot.types import ApNorm, ApRule, Average


@final
class RetrievalMetrics(Metric):
    """Recall, precision and average precision over any number of batches and processes.

    Built on hit masks: torchmetrics' own retrieval metrics take scores and count every
    candidate with a score of 0 or less as irrelevant, which cosines often are.

    The states are the queries' values and positions, so that a query which a distributed
    sampler hands out twice to fill the last batch is found and counted once. They are
    written into blocks made in advance: many small tensors that live on between the large
    ones of each batch would leave the heap in pieces that nothing fits in again.

    Args:
        metrics: Names of the metrics: `R@k`, `Rs@k`, `P@k`, `mAP`, `mAP@k`.
        ap_norm: Divisor of average precision.
        ap_rule: Area rule of average precision.
        averaging: Mean over queries (`micro`) or mean of the classes' means (`macro`).
        recall: Whether R@k is 1 with `any` hit or the `fraction` found.
        precision_cut: Convention of P@k.
        expected: How many queries are expected; more are taken too.
        **options: Passed to `torchmetrics.Metric`.

    Raises:
        ConfigError: Where there is no metric, or one that is unknown.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    # While synchronised each of these is one tensor, which dim_zero_cat passes through.
    rows: list[Tensor]
    positions: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        metrics: Sequence[str],
        ap_norm: ApNorm = "min",
        ap_rule: ApRule = "step",
        averaging: Average = "micro",
        recall: RecallMode = "any",
        precision_cut: PrecisionCut = "k",
        expected: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not metrics:
            raise ConfigError("there is no metric to compute; name one, such as R@10")
        self.metrics: dict[str, ParsedMetric] = {name: parse_metric(name) for name in metrics}
        self.ap_norm: ApNorm = ap_norm
        self.ap_rule: ApRule = ap_rule
        self.averaging: Average = averaging
        self.recall: RecallMode = recall
        self.precision_cut: PrecisionCut = precision_cut
        self.expected = expected
        for state in ("rows", "positions", "labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(
        self,
        hits: Bool[Tensor, "queries depth"],
        n_relevant: Int[Tensor, " queries"],
        positions: Int[Tensor, " queries"],
        subset_hits: Bool[Tensor, "queries subset"] | None = None,
        labels: Int[Tensor, " queries"] | None = None,
    ) -> None:
        """Add the rankings of some queries.

        Args:
            hits: Rankings as hit masks, at least as deep as the largest k (whole for mAP).
            n_relevant: How many relevant candidates each query has in all.
            positions: Positions of the queries in the benchmark, which tell them apart.
            subset_hits: Whole rankings of the queries' subsets, needed for `Rs@k`. A query
                whose row holds no hit has no subset metric (nan).
            labels: A number for the class of each query, needed for `macro`.

        Raises:
            DataError: Where subset rankings or labels are needed and missing, or the masks
                cannot give a metric (see `functional`).
        """
        if subset_hits is None and any(kind == "Rs" for kind, _ in self.metrics.values()):
            raise DataError("Rs@k is asked for and no subset rankings were given; give subset_hits or drop Rs@k")
        if labels is None and self.averaging == "macro":
            raise DataError("a macro average is asked for and no labels were given; give labels or choose micro")
        columns = [self._values_of(metric, hits, n_relevant, subset_hits) for metric in self.metrics.values()]
        begin = self._room_for(len(positions))
        places = slice(begin, begin + len(positions))
        for i, column in enumerate(columns):
            self.rows[-1][places, i] = column
        self.positions[-1][places] = positions
        self.labels[-1][places] = 0 if labels is None else labels

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the mean of each metric over the queries seen by all processes.

        Returns:
            For each metric's name a value 0..1; queries without a value (nan) are left out.

        Raises:
            DataError: Where there was no query.
        """
        rows, labels = self._by_position()
        return {name: average(rows[:, i], labels, self.averaging) for i, name in enumerate(self.metrics)}

    def values(self) -> dict[str, Float[Tensor, " queries"]]:
        """Return each query's values, in the order of the queries' positions.

        Every process has to call this where there are several: it synchronises.

        Returns:
            For each metric's name one value a query seen by any process, 0..1 or nan.

        Raises:
            DataError: Where there was no query.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            rows, _ = self._by_position()
        return {name: rows[:, i] for i, name in enumerate(self.metrics)}

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all processes; see `torchmetrics.Metric.sync`."""
        # torchmetrics would stand in for an empty state with a tensor of other type and
        # shape, which a process that got no query then cannot exchange with the rest.
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        values = torch.empty(0, len(self.metrics), dtype=self._real, device=self.device)
        for state, filler in ((self.rows, values), (self.positions, empty), (self.labels, empty)):
            if isinstance(state, list) and not state:
                state.append(filler)
        super().sync(*args, **options)

    @property
    def _real(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _room_for(self, more: int) -> int:
        """Return the first free place of the last block, which is a new one where `more` do not fit.

        A free place is one whose position is -1. Blocks grow, so that they stay few.
        """
        if self.positions:
            free = int((self.positions[-1] < 0).sum())
            if free >= more:
                return len(self.positions[-1]) - free
        size = max(more, self.expected, sum(map(len, self.positions)))
        self.rows.append(torch.full((size, len(self.metrics)), torch.nan, dtype=self._real, device=self.device))
        self.positions.append(torch.full((size,), -1, dtype=torch.int64, device=self.device))
        self.labels.append(torch.zeros(size, dtype=torch.int64, device=self.device))
        return 0

    def _values_of(
        self,
        metric: ParsedMetric,
        hits: Bool[Tensor, "queries depth"],
        n_relevant: Int[Tensor, " queries"],
        subset_hits: Bool[Tensor, "queries subset"] | None,
    ) -> Float[Tensor, " queries"]:
        if metric[0] == "mAP":
            return average_precision(hits, n_relevant, metric[1], self.ap_norm, self.ap_rule)
        if metric[0] == "P":
            return precision_at_k(hits, n_relevant, metric[1], self.precision_cut)
        if metric[0] == "Rs" and subset_hits is not None:
            return recall_at_k(subset_hits, subset_hits.sum(1), metric[1], self.recall)
        return recall_at_k(hits, n_relevant, metric[1], self.recall)

    def _by_position(self) -> tuple[Float[Tensor, "queries metrics"], Int[Tensor, " queries"]]:
        """Put the queries in order and drop free places and those that came twice."""
        if isinstance(self.positions, list) and not self.positions:
            raise DataError("there is no query to average over; call update with some rankings first")
        positions, order = dim_zero_cat(self.positions).sort(stable=True)
        taken = int((positions < 0).sum())
        positions, order = positions[taken:], order[taken:]
        if not len(positions):
            raise DataError("there is no query to average over; call update with some rankings first")
        new = torch.ones_like(positions, dtype=torch.bool)
        new[1:] = positions[1:] != positions[:-1]
        kept = order[new]
        return dim_zero_cat(self.rows)[kept], dim_zero_cat(self.labels)[kept]
