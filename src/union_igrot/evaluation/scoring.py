"""Embeddings to metrics, under a benchmark's protocol: exclusions, subsets, conventions.

Knows rankings and metrics. Does not know models, how anything was encoded or how metrics
are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from union_igrot.errors import DataError
from union_igrot.evaluation.ranking import RankedChunk, rank_chunks
from union_igrot.metrics.functional import parse_metric
from union_igrot.metrics.retrieval import RetrievalMetrics
from union_igrot.types import Benchmark, Protocol, Ranking, Scores

KEPT = 50
"""Answers of each query that are kept for images and submission files."""
_TABLE_BYTES = 2**28
_SUBSET_ROWS = 1024


@dataclass(frozen=True)
class Relevance:
    """A benchmark's ids as gallery positions.

    Attributes:
        targets: For each query the positions that answer it, each once, in the benchmark's order.
        exclude: For each query the positions that are not ranked.
        subset: For each query its subset without excluded ones, in gallery order, filled up
            with -1; or None where no query has one.
        labels: A number for each query's class, or None where a query has none.
    """

    targets: list[Int[Tensor, " _"]]
    exclude: list[list[int]]
    subset: Int[Tensor, "queries subset"] | None
    labels: Int[Tensor, " queries"] | None

    @classmethod
    def of(cls, benchmark: Benchmark) -> "Relevance":
        """Look up every id of a benchmark once; ids that queries share are looked up once."""
        at = {item.id: position for position, item in enumerate(benchmark.gallery)}
        # The ids stand beside their positions so that they live on: no other tuple gets their `id`.
        known: dict[int, tuple[Sequence[str], Tensor]] = {}
        targets, exclude, subsets = [], [], []
        for query in benchmark.queries:
            if id(query.targets) not in known:
                places = torch.tensor([at[name] for name in dict.fromkeys(query.targets)], dtype=torch.long)
                known[id(query.targets)] = (query.targets, places)
            targets.append(known[id(query.targets)][1])
            gone = {at[name] for name in query.exclude} if benchmark.protocol.exclude_reference else set()
            exclude.append(sorted(gone))
            subsets.append(sorted({at[name] for name in query.subset} - gone) if query.subset else [])
        widest = max(map(len, subsets))
        subset = torch.tensor([row + [-1] * (widest - len(row)) for row in subsets]) if widest else None
        classes = sorted({query.label for query in benchmark.queries if query.label is not None})
        number = {label: place for place, label in enumerate(classes)}
        numbers = [number.get(query.label, -1) if query.label is not None else -1 for query in benchmark.queries]
        return cls(targets, exclude, subset, None if -1 in numbers else torch.tensor(numbers))


def score(
    benchmark: Benchmark,
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    positions: Int[Tensor, " queries"] | None = None,
) -> Scores:
    """Rank each query's candidates and compute the protocol's metrics.

    Scores are dot products in float32, computed in chunks; ties are broken by gallery order,
    or against the model where the protocol is pessimistic.

    Args:
        benchmark: Whose queries and gallery were embedded.
        queries: Query embeddings.
        gallery: Gallery embeddings, in the gallery's order.
        positions: Which queries of the benchmark the rows are; all, in order, where None.
            Under distributed training each process gives its own, and metrics of all come back.

    Returns:
        One value a query and metric, in the order of the queries, and the first answers of
        the given rows: `KEPT`, or as many as every query has candidates.

    Raises:
        DataError: Where an embedding is not finite, or the protocol asks for subsets or classes
            that the benchmark does not have.
    """
    relevance = Relevance.of(benchmark)
    rows = torch.arange(len(queries)) if positions is None else positions.cpu()
    if benchmark.protocol.candidates == "subset":
        return _score_subsets(benchmark.protocol, relevance, queries, gallery, rows)
    return _score_gallery(benchmark.protocol, relevance, queries, gallery, rows)


def _score_gallery(
    protocol: Protocol, relevance: Relevance, queries: Tensor, gallery: Tensor, rows: Int[Tensor, " queries"]
) -> Scores:
    if protocol.ties != "gallery order":
        raise DataError("pessimistic ties are for subsets; choose candidates=subset or ties by gallery order")
    figures = MetricTable(protocol, queries.device, len(queries))
    # Of all queries, so that every process keeps equally many.
    keep = min(KEPT, len(gallery) - max(map(len, relevance.exclude)))
    first = torch.empty(len(queries), keep, dtype=torch.long)
    cosines = torch.empty(len(queries), keep)
    wide = 0 if relevance.subset is None else relevance.subset.shape[1]
    subsets = torch.empty(len(queries), wide, dtype=torch.long)
    answers = _Answers(relevance.targets, queries.device)
    depth = _depth(protocol, len(gallery))
    for chunk in rank_chunks(queries, gallery, [relevance.exclude[row] for row in rows.tolist()]):
        part = rows[chunk.queries]
        places = answers.of(part)
        found = _look_for(places, chunk, depth)
        single = None if protocol.recall_targets == "all" else _look_for(places[:, :1], chunk, depth)
        best = chunk.first(keep)
        subset_hits = None
        if relevance.subset is not None:
            ordered = _ordered_subset(chunk, relevance.subset[part])
            subsets[chunk.queries] = ordered.cpu()
            subset_hits = _within(ordered, places) & (ordered >= 0)
        figures.add(found, part, relevance.labels, subset_hits, single)
        first[chunk.queries] = best[:, :keep].cpu()
        cosines[chunk.queries] = chunk.scores.gather(1, best[:, :keep]).cpu()
    return Scores(figures.values(), Ranking(first, cosines), subsets if wide else None)


def _score_subsets(
    protocol: Protocol, relevance: Relevance, queries: Tensor, gallery: Tensor, rows: Int[Tensor, " queries"]
) -> Scores:
    """Rank each query's own candidates alone (GeneCIS)."""
    if relevance.subset is None:
        raise DataError("each query ranks its own subset, but no query has one; give Query.subset")
    figures = MetricTable(protocol, queries.device, len(queries))
    ordered = torch.empty(len(queries), relevance.subset.shape[1], dtype=torch.long)
    cosines = torch.empty(ordered.shape)
    for begin in range(0, len(queries), _SUBSET_ROWS):
        span = slice(begin, begin + _SUBSET_ROWS)
        part = rows[span]
        subset = relevance.subset[part].to(queries.device)
        scores = torch.einsum("qd,qsd->qs", queries[span].float(), gallery[subset.clamp(min=0)].float())
        if not scores.isfinite().all():
            raise DataError("an embedding holds nan or infinity; look for a broken model or image")
        scores = scores.masked_fill(subset < 0, float("-inf"))
        hits = torch.zeros(subset.shape, dtype=torch.bool, device=subset.device)
        for row, query in enumerate(part.tolist()):
            hits[row] = torch.isin(subset[row], relevance.targets[query].to(subset.device))
        # Two stable sorts: by what decides ties, then by score.
        ties = hits.long() if protocol.ties == "pessimistic" else subset
        by_tie = ties.argsort(dim=1, stable=True)
        order = by_tie.gather(1, scores.gather(1, by_tie).argsort(dim=1, descending=True, stable=True))
        figures.add(Found(hits.gather(1, order), hits.sum(1)), part, relevance.labels)
        ordered[span], cosines[span] = subset.gather(1, order).cpu(), scores.gather(1, order).cpu()
    return Scores(figures.values(), Ranking(ordered, cosines), ordered)


class Found(NamedTuple):
    """What rankings hold of what was looked for.

    Attributes:
        hits: True where an answer is, whole rankings or as deep as the metrics look.
        n_relevant: How many candidates answer each query, wherever they are ranked.
    """

    hits: Bool[Tensor, "chunk depth"]
    n_relevant: Int[Tensor, " chunk"]


class MetricTable:
    """The protocol's metrics over any number of chunks and processes."""

    def __init__(self, protocol: Protocol, device: torch.device, queries: int) -> None:
        self._protocol = protocol
        alone = protocol.recall_targets == "first"
        single = tuple(name for name in protocol.metrics if alone and name.startswith("R@"))
        rest = tuple(name for name in protocol.metrics if name not in single)
        self._all, self._first = (
            RetrievalMetrics(
                names,
                protocol.ap_norm,
                protocol.ap_rule,
                recall=protocol.recall,
                precision_cut=protocol.precision_cut,
                expected=queries,
                sync_on_compute=True,
            ).to(device)
            if names
            else None
            for names in (rest, single)
        )

    def add(
        self,
        found: Found,
        part: Int[Tensor, " chunk"],
        labels: Int[Tensor, " queries"] | None,
        subset_hits: Bool[Tensor, "chunk subset"] | None = None,
        first: Found | None = None,
    ) -> None:
        """Take the rankings of some queries: of all their targets, in their subsets, of each one's first target."""
        at = part.to(found.hits.device)
        classes = None if labels is None else labels[part].to(at.device)
        if self._all is not None:
            self._all.update(found.hits, found.n_relevant, at, subset_hits, classes)
        if self._first is not None and first is not None:
            self._first.update(first.hits, first.n_relevant, at, None, classes)

    def values(self) -> dict[str, Float[Tensor, " queries"]]:
        """Return every query's values, of all processes, in the protocol's order, with its means."""
        found: dict[str, Tensor] = {}
        for figures in (self._all, self._first):
            found |= {} if figures is None else figures.values()
        protocol = self._protocol
        values = {name: found[name].double().cpu() for name in protocol.metrics}
        if protocol.unanswered == "zero":
            values = {name: x if name.startswith("Rs@") else x.nan_to_num(0.0) for name, x in values.items()}
        for names in protocol.means:
            values[f"({' + '.join(names)})/{len(names)}"] = torch.stack([values[name] for name in names]).mean(0)
        return values


class _Answers:
    """Which gallery items answer a query, side by side; one row serves all queries that share their targets."""

    def __init__(self, targets: Sequence[Int[Tensor, " _"]], device: torch.device) -> None:
        self._targets, self._device = targets, device
        kinds = {id(places): places for places in targets}
        self._table: Tensor | None = None
        if 8 * len(kinds) * max(map(len, kinds.values())) <= _TABLE_BYTES:
            number = {key: place for place, key in enumerate(kinds)}
            self._table = _side_by_side(list(kinds.values())).to(device)
            self._kind = torch.tensor([number[id(places)] for places in targets], device=device)

    def of(self, part: Int[Tensor, " chunk"]) -> Int[Tensor, "chunk most"]:
        """Return the positions that answer some queries, -1 behind."""
        if self._table is not None:
            return self._table[self._kind[part.to(self._device)]]
        return _side_by_side([self._targets[query] for query in part.tolist()]).to(self._device)


def _side_by_side(rows: list[Int[Tensor, " _"]]) -> Int[Tensor, "rows most"]:
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _depth(protocol: Protocol, gallery: int) -> int | None:
    """Return how many first answers the metrics look at; None where they look at the whole ranking."""
    cuts = [k for kind, k in map(parse_metric, protocol.metrics) if kind != "Rs"]
    return None if None in cuts else min(gallery, max((k for k in cuts if k is not None), default=1))


def _look_for(places: Int[Tensor, "chunk most"], chunk: RankedChunk, depth: int | None) -> Found:
    """Find items in each ranking.

    Args:
        places: Positions of the items, -1 behind.
        chunk: The rankings.
        depth: How far to look; the whole rankings where None.
    """
    n, width = chunk.scores.shape
    inside = places.clamp(min=0)
    counted = (places >= 0) & (chunk.scores.gather(1, inside) > -torch.inf)  # neither filled up nor excluded
    # What does not count is marked in one column more, which is cut off.
    marks = torch.zeros(n, width + 1, dtype=torch.bool, device=places.device)
    where = inside if depth is not None else chunk.ranks(inside) - 1
    marks.scatter_(1, torch.where(counted, where, width), value=True)
    return Found(marks[:, :width] if depth is None else marks.gather(1, chunk.first(depth)), counted.sum(1))


def _within(ordered: Int[Tensor, "chunk subset"], places: Int[Tensor, "chunk most"]) -> Bool[Tensor, "chunk subset"]:
    """Say which positions of a row are among its places."""
    found: Tensor = (ordered[:, :, None] == places[:, None, :]).any(2)
    return found


def _ordered_subset(chunk: RankedChunk, subset: Int[Tensor, "chunk subset"]) -> Int[Tensor, "chunk subset"]:
    """Order each query's subset as its whole ranking; -1 behind, where it is smaller than others."""
    subset = subset.to(chunk.scores.device)
    scores = chunk.scores.gather(1, subset.clamp(min=0)).masked_fill(subset < 0, -torch.inf)
    return subset.gather(1, scores.argsort(dim=1, descending=True, stable=True))
