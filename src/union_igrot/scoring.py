"""Embeddings to figures, under a benchmark's protocol: exclusions, subsets, conventions.

Knows rankings and metrics. Does not know models, how anything was encoded or how figures
are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.index.exact import RankedChunk, rank_chunks
from union_igrot.metrics.retrieval import RetrievalFigures
from union_igrot.types import Benchmark, Protocol, Ranking, Scores

KEPT = 50
"""Answers of each query that are kept for pictures and submission files."""
_TABLE_BYTES = 2**28
_SUBSET_ROWS = 1024


@dataclass(frozen=True)
class Relevance:
    """A benchmark's ids as gallery positions.

    Attributes:
        targets: For each query the positions that answer it.
        exclude: For each query the positions that are not ranked.
        subset: For each query its subset without excluded ones, filled up with -1; or None
            where no query has one.
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
                places = torch.tensor([at[name] for name in query.targets], dtype=torch.long)
                known[id(query.targets)] = (query.targets, places)
            targets.append(known[id(query.targets)][1])
            gone = {at[name] for name in query.exclude} if benchmark.protocol.exclude_reference else set()
            exclude.append(sorted(gone))
            subsets.append([at[name] for name in query.subset or () if at[name] not in gone])
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
    """Rank each query's candidates and compute the protocol's figures.

    Scores are dot products in float32, computed in chunks; ties are broken by gallery order,
    or against the model where the protocol is pessimistic.

    Args:
        benchmark: Whose queries and gallery were embedded.
        queries: Query embeddings.
        gallery: Gallery embeddings, in the gallery's order.
        positions: Which queries of the benchmark the rows are; all, in order, where None.
            Under distributed training each process gives its own, and figures of all come back.

    Returns:
        One value a query and figure, in the order of the queries, and the first answers of
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
    figures = FigureTable(protocol, queries.device)
    # Of all queries, so that every process keeps equally many.
    keep = min(KEPT, len(gallery) - max(map(len, relevance.exclude)))
    first = torch.empty(len(queries), keep, dtype=torch.long)
    cosines = torch.empty(len(queries), keep)
    wide = 0 if relevance.subset is None else relevance.subset.shape[1]
    subsets = torch.empty(len(queries), wide, dtype=torch.long)
    answers = _Answers(relevance.targets, len(gallery), queries.device)
    for chunk in rank_chunks(queries, gallery, [relevance.exclude[row] for row in rows.tolist()]):
        part = rows[chunk.queries]
        relevant = answers.of(part)
        hits = relevant.gather(1, chunk.positions)
        hits &= torch.arange(len(gallery), device=hits.device) < chunk.candidates[:, None]
        subset_hits = None
        if relevance.subset is not None:
            ordered = _ordered_subset(chunk, relevance.subset[part])
            subsets[chunk.queries] = ordered.cpu()
            subset_hits = relevant.gather(1, ordered.clamp(min=0)) & (ordered >= 0)
        one = None if protocol.recall_targets == "all" else _first_hits(chunk, relevance.targets, part)
        figures.add(hits, part, relevance.labels, subset_hits, one)
        best = chunk.positions[:, :keep]
        first[chunk.queries] = best.cpu()
        cosines[chunk.queries] = torch.einsum("qd,qkd->qk", queries[chunk.queries].float(), gallery[best].float()).cpu()
    return Scores(figures.values(), Ranking(first, cosines), subsets if wide else None)


def _score_subsets(
    protocol: Protocol, relevance: Relevance, queries: Tensor, gallery: Tensor, rows: Int[Tensor, " queries"]
) -> Scores:
    """Rank each query's own candidates alone (GeneCIS)."""
    if relevance.subset is None:
        raise DataError("each query ranks its own subset, but no query has one; give Query.subset")
    figures = FigureTable(protocol, queries.device)
    ordered = torch.empty(len(queries), relevance.subset.shape[1], dtype=torch.long)
    cosines = torch.empty(ordered.shape)
    for begin in range(0, len(queries), _SUBSET_ROWS):
        span = slice(begin, begin + _SUBSET_ROWS)
        part = rows[span]
        subset = relevance.subset[part].to(queries.device)
        scores = torch.einsum("qd,qsd->qs", queries[span].float(), gallery[subset.clamp(min=0)].float())
        if not scores.isfinite().all():
            raise DataError("an embedding holds nan or infinity; look for a broken model or picture")
        scores = scores.masked_fill(subset < 0, float("-inf"))
        hits = torch.zeros(subset.shape, dtype=torch.bool, device=subset.device)
        for row, query in enumerate(part.tolist()):
            hits[row] = torch.isin(subset[row], relevance.targets[query].to(subset.device))
        # Two stable sorts: by what decides ties, then by score.
        ties = hits.long() if protocol.ties == "pessimistic" else subset
        by_tie = ties.argsort(dim=1, stable=True)
        order = by_tie.gather(1, scores.gather(1, by_tie).argsort(dim=1, descending=True, stable=True))
        figures.add(hits.gather(1, order), part, relevance.labels, None, None)
        ordered[span], cosines[span] = subset.gather(1, order).cpu(), scores.gather(1, order).cpu()
    return Scores(figures.values(), Ranking(ordered, cosines), ordered)


class FigureTable:
    """The protocol's figures over any number of chunks and processes."""

    def __init__(self, protocol: Protocol, device: torch.device) -> None:
        self._protocol = protocol
        alone = protocol.recall_targets == "first"
        single = tuple(name for name in protocol.metrics if alone and name.startswith("R@"))
        rest = tuple(name for name in protocol.metrics if name not in single)
        self._all, self._first = (
            RetrievalFigures(
                names,
                protocol.ap_norm,
                protocol.ap_rule,
                recall=protocol.recall,
                precision_cut=protocol.precision_cut,
                sync_on_compute=True,
            ).to(device)
            if names
            else None
            for names in (rest, single)
        )

    def add(
        self,
        hits: Bool[Tensor, "chunk depth"],
        part: Int[Tensor, " chunk"],
        labels: Int[Tensor, " queries"] | None,
        subset_hits: Bool[Tensor, "chunk subset"] | None,
        first_hits: Bool[Tensor, "chunk depth"] | None,
        n_relevant: Int[Tensor, " chunk"] | None = None,
    ) -> None:
        """Take the rankings of some queries; `n_relevant` is needed where they are cut."""
        at = part.to(hits.device)
        classes = None if labels is None else labels[part].to(hits.device)
        if self._all is not None:
            self._all.update(hits, hits.sum(1) if n_relevant is None else n_relevant, at, subset_hits, classes)
        if self._first is not None and first_hits is not None:
            single = first_hits.sum(1) if n_relevant is None else n_relevant.clamp(max=1)
            self._first.update(first_hits, single, at, None, classes)

    def values(self) -> dict[str, Float[Tensor, " queries"]]:
        """Give every query's values, of all processes, in the protocol's order, with its means."""
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
    """Which gallery items answer a query, as masks; one mask serves all queries that share their targets."""

    def __init__(self, targets: Sequence[Int[Tensor, " _"]], gallery: int, device: torch.device) -> None:
        self._targets, self._gallery, self._device = targets, gallery, device
        kinds = {id(places): number for number, places in reversed(list(enumerate(targets)))}
        self._table: Tensor | None = None
        if len(kinds) < len(targets) and len(kinds) * gallery <= _TABLE_BYTES:
            number = {key: place for place, key in enumerate(kinds)}
            self._table = torch.zeros(len(kinds), gallery, dtype=torch.bool)
            for key, example in kinds.items():
                self._table[number[key], targets[example]] = True
            self._table = self._table.to(device)
            self._kind = torch.tensor([number[id(places)] for places in targets], device=device)

    def of(self, part: Int[Tensor, " chunk"]) -> Bool[Tensor, "chunk gallery"]:
        """Give the masks of some queries."""
        if self._table is not None:
            return self._table[self._kind[part.to(self._device)]]
        masks = torch.zeros(len(part), self._gallery, dtype=torch.bool)
        for row, query in enumerate(part.tolist()):
            masks[row, self._targets[query]] = True
        return masks.to(self._device)


def _first_hits(
    chunk: RankedChunk, targets: Sequence[Int[Tensor, " _"]], part: Int[Tensor, " chunk"]
) -> Bool[Tensor, "chunk gallery"]:
    """Mark the one target that recall looks for; no mark where a query has none."""
    device = chunk.positions.device
    single = torch.tensor([int(targets[query][0]) if len(targets[query]) else -1 for query in part.tolist()])
    hits = chunk.positions == single.to(device)[:, None]
    return hits & (torch.arange(hits.shape[1], device=device) < chunk.candidates[:, None])


def _ordered_subset(chunk: RankedChunk, subset: Int[Tensor, "chunk subset"]) -> Int[Tensor, "chunk subset"]:
    """Order each query's subset as its whole ranking; -1 behind, where it is smaller than others."""
    subset = subset.to(chunk.positions.device)
    ranks = torch.empty_like(chunk.positions)
    places = torch.arange(chunk.positions.shape[1], device=ranks.device).expand_as(chunk.positions)
    ranks.scatter_(1, chunk.positions, places)
    rank = ranks.gather(1, subset.clamp(min=0)).masked_fill(subset < 0, chunk.positions.shape[1])
    return subset.gather(1, rank.argsort(dim=1, stable=True))
