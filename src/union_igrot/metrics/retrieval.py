"""Registered metrics as one `torchmetrics.Metric`, accumulated over batches and processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.functional import TieGroups, average, sampled_values, widest_float
from union_igrot.metrics.names import ParsedMetric, parse_metric
from union_igrot.types import Protocol


class RankedHits(NamedTuple):
    """Where some rankings contain relevant candidates.

    Attributes:
        hits: True at relevant candidates, at least as deep as the largest k (whole rankings for mAP).
        n_relevant: Number of relevant candidates of each query, at any rank.
        ties: The ties of the rankings; a query with relevant and other candidates of one score then gets the expected
            value over all orders of these.
    """

    hits: Bool[Tensor, "queries depth"]
    n_relevant: Int[Tensor, " queries"]
    ties: TieGroups | None = None


@final
class RetrievalMetrics(Metric):
    """Recall, precision, average precision and registered metrics over any number of batches and processes.

    Takes hit masks: torchmetrics' own retrieval metrics take scores and count every candidate with a score of 0 or less
    as irrelevant, which cosines often are.

    The states are the queries' values and positions, so that a query which a distributed sampler repeats to fill the
    last batch is counted once. They are stored in preallocated blocks: small tensors that live on between the large
    ones of each batch would fragment the heap.

    Args:
        metrics: Names of the metrics.
        protocol: Its conventions hold; its own metrics do not matter here.
        expected: A hint at the number of queries.
        **options: Options of `torchmetrics.Metric`.

    Raises:
        ConfigError: If there is no metric, or one that is unknown.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    # While synchronized, each of these is one tensor, which dim_zero_cat passes through.
    rows: list[Tensor]
    positions: list[Tensor]

    def __init__(
        self, metrics: Sequence[str], protocol: Protocol | None = None, expected: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        if not metrics:
            raise ConfigError("there is no metric to compute; pass at least one, such as R@10")
        self.metrics: dict[str, ParsedMetric] = {name: parse_metric(name) for name in metrics}
        self.protocol = protocol or Protocol()
        self.expected = expected
        for state in ("rows", "positions"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(
        self,
        found: RankedHits,
        positions: Int[Tensor, " queries"],
        subset: RankedHits | None = None,
        first: RankedHits | None = None,
    ) -> None:
        """Add the rankings of some queries.

        Args:
            found: Where all targets are.
            positions: Positions of the queries in the benchmark, which identify them.
            subset: Whole rankings of the queries' subsets, needed for `Rs@k`. A query whose row has no hit gets nan.
            first: Where the first target of each query is, for protocols whose recall counts it alone.

        Raises:
            DataError: If a ranking is missing, or the masks are too short for a metric.
        """
        rankings = {"gallery": found, "subset": subset, "first": first}
        columns = []
        for name, metric in self.metrics.items():
            kind = metric.ranking(self.protocol)
            ranked = rankings[kind]
            if ranked is None:
                raise DataError(f"{name} needs {kind} rankings; pass {kind} or drop {name}")
            columns.append(self._values_of(metric, ranked))
        begin = self._reserve(len(positions))
        rows = slice(begin, begin + len(positions))
        for i, column in enumerate(columns):
            self.rows[-1][rows, i] = column
        self.positions[-1][rows] = positions

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the mean of each metric over the queries of all processes, 0..1; queries with nan are skipped.

        Raises:
            DataError: If there is no query.
        """
        rows = self._by_position()
        return {name: average(rows[:, i]) for i, name in enumerate(self.metrics)}

    def values(self) -> dict[str, Float[Tensor, " queries"]]:
        """Return each query's values, 0..1 or nan, in the order of the queries' positions.

        With several processes, every process has to call this, since it synchronizes.

        Raises:
            DataError: If there is no query.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            rows = self._by_position()
        return {name: rows[:, i] for i, name in enumerate(self.metrics)}

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all processes; see `torchmetrics.Metric.sync`."""
        # torchmetrics would replace an empty state by a tensor of another type and shape, which a process without
        # queries could not exchange with the others.
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        values = torch.empty(0, len(self.metrics), dtype=widest_float(self.device), device=self.device)
        for state, filler in ((self.rows, values), (self.positions, empty)):
            if isinstance(state, list) and not state:
                state.append(filler)
        super().sync(*args, **options)

    def _reserve(self, more: int) -> int:
        """Return the first free row of the last block, after adding a block if `more` rows do not fit.

        A row is free if its position is -1. Blocks grow, so that they stay few.
        """
        if self.positions:
            free = int((self.positions[-1] < 0).sum())
            if free >= more:
                return len(self.positions[-1]) - free
        size = max(more, self.expected, sum(map(len, self.positions)))
        self.rows.append(
            torch.full((size, len(self.metrics)), torch.nan, dtype=widest_float(self.device), device=self.device)
        )
        self.positions.append(torch.full((size,), -1, dtype=torch.int64, device=self.device))
        return 0

    def _values_of(self, metric: ParsedMetric, ranked: RankedHits) -> Float[Tensor, " queries"]:
        """Return a metric of each query; the expected one of ambiguous rankings."""
        family, options = metric.family, metric.family.options(self.protocol)
        values: Tensor = family.function()(ranked.hits, ranked.n_relevant, metric.k, **options)
        if ranked.ties is None or not (rows := ranked.ties.ambiguous).any():
            return values
        tied, expected = TieGroups(*(tensor[rows].cpu() for tensor in ranked.ties)), family.expected_function()
        found = None if expected is None else expected(tied, metric.k, **options)
        if found is None:
            found = sampled_values(family.function(), tied, metric.k, options)
        return values.masked_scatter(rows, found.to(values))

    def _by_position(self) -> Float[Tensor, "queries metrics"]:
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
        return dim_zero_cat(self.rows)[kept]
