"""Registered metrics as one `torchmetrics.Metric`, accumulated over batches and processes."""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.functional import average
from union_igrot.metrics.names import ParsedMetric, parse_metric
from union_igrot.metrics.ties import TieGroups, sampled_values
from union_igrot.types import ApNorm, ApRule, Average, PrecisionCut, RecallMode


@final
class RetrievalMetrics(Metric):
    """Recall, precision, average precision and registered metrics over any number of batches and processes.

    Takes hit masks: torchmetrics' own retrieval metrics take scores and count every candidate with a score of 0 or less
    as irrelevant, which cosines often are.

    The states are the queries' values and positions, so that a query which a distributed sampler repeats to fill the
    last batch is counted once. They are stored in preallocated blocks: small tensors that live on between the large
    ones of each batch would fragment the heap. `expected` is a hint at the number of queries.

    Raises:
        ConfigError: If there is no metric, or one that is unknown.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    # While synchronized, each of these is one tensor, which dim_zero_cat passes through.
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
            raise ConfigError("there is no metric to compute; pass at least one, such as R@10")
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
        ties: TieGroups | None = None,
        subset_ties: TieGroups | None = None,
    ) -> None:
        """Add the rankings of some queries.

        Args:
            hits: Rankings as hit masks, at least as deep as the largest k (whole for mAP).
            n_relevant: Number of relevant candidates of each query in its whole ranking.
            positions: Positions of the queries in the benchmark, which identify them.
            subset_hits: Whole rankings of the queries' subsets, needed for `Rs@k`. A query whose row has no hit gets
                nan.
            labels: The class index of each query, needed for `macro`.
            ties: The ties of the whole rankings; a query with relevant and other candidates of one score then gets the
                expected value over all orders of these.
            subset_ties: The ties of the subset rankings.

        Raises:
            DataError: If subset rankings or labels are missing, or the masks are too short for a metric.
        """
        within = [name for name, parsed in self.metrics.items() if parsed.family.ranking == "subset"]
        if subset_hits is None and within:
            raise DataError(f"{within[0]} needs subset rankings; pass subset_hits or drop {within[0]}")
        if labels is None and self.averaging == "macro":
            raise DataError("a macro average needs the classes of the queries; pass labels or use micro")
        columns = []
        for metric in self.metrics.values():
            in_subset = metric.family.ranking == "subset"
            values = self._values_of(metric, hits, n_relevant, subset_hits)
            columns.append(self._with_ties(metric, values, subset_ties if in_subset else ties))
        begin = self._reserve(len(positions))
        rows = slice(begin, begin + len(positions))
        for i, column in enumerate(columns):
            self.rows[-1][rows, i] = column
        self.positions[-1][rows] = positions
        self.labels[-1][rows] = 0 if labels is None else labels

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the mean of each metric over the queries of all processes, 0..1; queries with nan are skipped.

        Raises:
            DataError: If there is no query.
        """
        rows, labels = self._by_position()
        return {name: average(rows[:, i], labels, self.averaging) for i, name in enumerate(self.metrics)}

    def values(self) -> dict[str, Float[Tensor, " queries"]]:
        """Return each query's values, 0..1 or nan, in the order of the queries' positions.

        With several processes, every process has to call this, since it synchronizes.

        Raises:
            DataError: If there is no query.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            rows, _ = self._by_position()
        return {name: rows[:, i] for i, name in enumerate(self.metrics)}

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all processes; see `torchmetrics.Metric.sync`."""
        # torchmetrics would replace an empty state by a tensor of another type and shape, which a process without
        # queries could not exchange with the others.
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        values = torch.empty(0, len(self.metrics), dtype=self._real, device=self.device)
        for state, filler in ((self.rows, values), (self.positions, empty), (self.labels, empty)):
            if isinstance(state, list) and not state:
                state.append(filler)
        super().sync(*args, **options)

    @property
    def _real(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _reserve(self, more: int) -> int:
        """Return the first free row of the last block, after adding a block if `more` rows do not fit.

        A row is free if its position is -1. Blocks grow, so that they stay few.
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
        family = metric.family
        options = {option: getattr(self, convention) for option, convention in family.conventions.items()}
        if family.ranking == "subset" and subset_hits is not None:
            hits, n_relevant = subset_hits, subset_hits.sum(1)
        values: Tensor = family.function()(hits, n_relevant, metric.k, **options)
        return values

    def _with_ties(
        self, metric: ParsedMetric, values: Float[Tensor, " queries"], ties: TieGroups | None
    ) -> Float[Tensor, " queries"]:
        """Replace the values of ambiguous rankings by their expectation."""
        rows = None if ties is None else ties.ambiguous
        if ties is None or rows is None or not rows.any():
            return values
        family = metric.family
        options = {option: getattr(self, convention) for option, convention in family.conventions.items()}
        tied, expected = TieGroups(*(tensor[rows].cpu() for tensor in ties)), family.expected_function()
        found = None if expected is None else expected(tied, metric.k, **options)
        if found is None:
            found = sampled_values(family.function(), tied, metric.k, options)
        values = values.clone()
        values[rows] = found.to(values)
        return values

    def _by_position(self) -> tuple[Float[Tensor, "queries metrics"], Int[Tensor, " queries"]]:
        """Sort by position, without free rows and repeated queries."""
        if isinstance(self.positions, list) and not self.positions:
            raise DataError("there is no query to average over; call update first")
        positions, order = dim_zero_cat(self.positions).sort(stable=True)
        free = int((positions < 0).sum())
        positions, order = positions[free:], order[free:]
        if not len(positions):
            raise DataError("there is no query to average over; call update first")
        new = torch.ones_like(positions, dtype=torch.bool)
        new[1:] = positions[1:] != positions[:-1]
        kept = order[new]
        return dim_zero_cat(self.rows)[kept], dim_zero_cat(self.labels)[kept]
