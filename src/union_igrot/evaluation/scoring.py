"""From embeddings, or rankings of other methods, to metrics under a benchmark's protocol."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.fusion import FusedQueries
from union_igrot.evaluation.ranking import RankedChunk, rank_chunks
from union_igrot.evaluation.results import query_classes
from union_igrot.metrics.names import ParsedMetric, is_rank, parse_metric
from union_igrot.metrics.retrieval import RetrievalMetrics
from union_igrot.metrics.ties import TieGroups
from union_igrot.types import Benchmark, Protocol, Ranking, Scores

RANKING_DEPTH = 50
"""Results of each query that are kept for contact sheets and submission files."""
_TABLE_BYTES = 2**28
_SUBSET_BYTES = 2**27


@dataclass(frozen=True)
class Relevance:
    """A benchmark's ids as gallery positions.

    Attributes:
        targets: For each query the positions of its targets, without repetitions, in the benchmark's order.
        exclude: For each query the positions that are not ranked.
        subset: For each query its subset without excluded items, in gallery order; None if no query has one.
        labels: The class index of each query; None if a query has no class.
    """

    targets: list[Int[Tensor, " _"]]
    exclude: list[list[int]]
    subset: list[Int[Tensor, " _"]] | None
    labels: Int[Tensor, " queries"] | None

    @classmethod
    def of(cls, benchmark: Benchmark) -> "Relevance":
        """Look up the ids of a benchmark; a tuple of ids that queries share is looked up once."""
        at = {item.id: position for position, item in enumerate(benchmark.gallery)}
        # Keeping the ids alive ensures that no other tuple gets their `id`.
        known: dict[int, tuple[Sequence[str], Tensor]] = {}
        narrowed: dict[tuple[int, frozenset[int]], Tensor] = {}
        targets, exclude, subsets = [], [], []
        for query in benchmark.queries:
            if id(query.targets) not in known:
                positions = torch.tensor([at[name] for name in dict.fromkeys(query.targets)], dtype=torch.long)
                known[id(query.targets)] = (query.targets, positions)
            targets.append(known[id(query.targets)][1])
            excluded = {at[name] for name in query.exclude} if benchmark.protocol.exclude_reference else set()
            exclude.append(sorted(excluded))
            key = (id(query.subset), frozenset(excluded))
            if key not in narrowed:  # queries of one instance share thousands of candidates (i-CIR)
                inside = {at[name] for name in query.subset or ()} - excluded
                narrowed[key] = torch.tensor(sorted(inside), dtype=torch.long)
            subsets.append(narrowed[key])
        return cls(targets, exclude, subsets if any(map(len, subsets)) else None, query_classes(benchmark))


def metric_limits(benchmark: Benchmark) -> dict[str, str]:
    """Describe metrics that cannot vary, or cannot reach 100 %, whatever the ranking.

    Args:
        benchmark: The benchmark; the numbers of its candidates and relevant images decide.

    Returns:
        By name of such a metric a phrase, such as `is at most 12.0`.
    """
    protocol, relevance = benchmark.protocol, Relevance.of(benchmark)
    found: dict[str, list[tuple[int, int]]] = {"gallery": [], "subset": [], "first": []}
    for row, targets in enumerate(relevance.targets):
        excluded, relevant = set(relevance.exclude[row]), targets.tolist()
        count, size = sum(at not in excluded for at in relevant), len(benchmark.gallery) - len(excluded)
        inside = targets[:0] if relevance.subset is None else relevance.subset[row]
        within = (len(inside), int(torch.isin(targets, inside).sum()))
        found["subset"].append(within)
        found["gallery"].append(within if protocol.candidates == "subset" else (size, count))
        found["first"].append((size, int(bool(relevant) and relevant[0] not in excluded)))
    limits = {}
    for name in protocol.metrics:
        metric = parse_metric(name)
        if metric.family.unit == "rank":
            continue
        first = metric.family.first_target and protocol.recall_targets == "first"
        kind = "subset" if metric.family.ranking == "subset" else "first" if first else "gallery"
        sizes = Counter(pair for pair in found[kind] if pair[1])
        if sizes and (limit := _limit(metric, sizes, protocol)):
            limits[name] = limit
    return limits


def _limit(metric: ParsedMetric, sizes: Mapping[tuple[int, int], int], protocol: Protocol) -> str:
    """Compare a metric of the worst and the best rankings; `sizes` counts pairs of candidates and relevant ones."""
    options = {option: getattr(protocol, convention) for option, convention in metric.family.conventions.items()}
    widest = max(size for size, _ in sizes)
    rank = torch.arange(widest)
    bounds = []
    for size, count in sizes:
        masks = torch.stack([(rank >= size - count) & (rank < size), rank < count])
        values: Tensor = metric.family.function()(masks, torch.tensor([count, count]), metric.k, **options)
        bounds.append(values)
    lowest, highest = torch.stack(bounds).double().unbind(1)
    weights = torch.tensor(list(sizes.values()), dtype=torch.float64)
    mean = 100 * float((highest * weights).sum() / weights.sum())
    if (highest - lowest).abs().max() < 1e-9:
        return f"is always {mean:.1f}"
    if metric.k is not None and metric.k >= widest and metric.family.cutoff == "optional":
        return f"equals {metric.kind}"
    return f"is at most {mean:.1f}" if (highest < 1 - 1e-4).all() else ""


def score(
    benchmark: Benchmark,
    queries: Float[Tensor, "queries dim"] | FusedQueries,
    gallery: Float[Tensor, "gallery dim"],
    positions: Int[Tensor, " queries"] | None = None,
) -> Scores:
    """Rank each query's candidates and compute the protocol's metrics.

    Scores are dot products in float32, computed in chunks. Under expected ties, a query gets the mean of its values
    over all orders of candidates with equal scores; otherwise these are ordered as in the gallery, or against the
    model if the protocol is pessimistic.

    Args:
        benchmark: Whose queries and gallery were embedded.
        queries: Query embeddings; of a fusion of scores both embeddings of each query.
        gallery: Gallery embeddings, in the gallery's order.
        positions: Which queries of the benchmark the rows are; None means all, in order. Under distributed training
            each process passes its own rows and gets the metrics of all queries.

    Returns:
        One value per query and metric, in the order of the queries, and the first results of the given rows:
        `RANKING_DEPTH`, or as many as every query has candidates.

    Raises:
        DataError: If an embedding is not finite, or the protocol needs subsets or classes that the benchmark does not
            have.
    """
    if is_rank(benchmark.protocol.primary):
        raise ConfigError(f"invalid value for primary: {benchmark.protocol.primary!r} (expected a metric in percent)")
    relevance = Relevance.of(benchmark)
    fused, queries = (queries, queries.images) if isinstance(queries, FusedQueries) else (None, queries)
    rows = torch.arange(len(queries)) if positions is None else positions.cpu()
    if benchmark.protocol.candidates == "subset":
        return _score_subsets(benchmark.protocol, relevance, queries, gallery, rows, fused)
    return _score_gallery(benchmark.protocol, relevance, queries, gallery, rows, fused)


def _score_gallery(
    protocol: Protocol,
    relevance: Relevance,
    queries: Tensor,
    gallery: Tensor,
    rows: Int[Tensor, " queries"],
    fused: FusedQueries | None,
) -> Scores:
    metrics = MetricAccumulator(protocol, queries.device, len(queries))
    # The minimum over all queries, so that every process keeps equally many.
    keep = min(RANKING_DEPTH, len(gallery) - max(map(len, relevance.exclude)))
    first = torch.empty(len(queries), keep, dtype=torch.long)
    cosines = torch.empty(len(queries), keep)
    wide = 0 if relevance.subset is None else max(map(len, relevance.subset))
    subsets = torch.full((len(queries), wide), -1)
    own = None if relevance.subset is None else _TargetTable(relevance.subset, queries.device)
    targets = _TargetTable(relevance.targets, queries.device)
    depth = _depth(protocol, len(gallery))
    for chunk in rank_chunks(queries, gallery, [relevance.exclude[row] for row in rows.tolist()], fused=fused):
        part = rows[chunk.queries]
        items = targets.of(part)
        find = _find_late if protocol.ties == "pessimistic" else _find
        found = find(items, chunk, depth)
        single = None if protocol.recall_targets == "all" else find(items[:, :1], chunk, depth)
        tied = TiedRankings() if protocol.ties != "expected" else _find_ties(items, chunk)
        best = chunk.first(keep)
        subset_hits = None
        if own is not None:
            ordered = _ordered_subset(chunk, own.of(part))
            subsets[chunk.queries, : ordered.shape[1]] = ordered.cpu()
            subset_hits = _within(ordered, items) & (ordered >= 0)
            if protocol.ties == "expected":
                scores = chunk.scores.gather(1, ordered.clamp(min=0)).masked_fill(ordered < 0, -torch.inf)
                tied = tied._replace(subset=_subset_ties(scores, subset_hits))
        metrics.add(found, part, relevance.labels, subset_hits, single, tied)
        first[chunk.queries] = best[:, :keep].cpu()
        cosines[chunk.queries] = chunk.scores.gather(1, best[:, :keep]).cpu()
    return Scores(metrics.values(), Ranking(first, cosines), subsets if wide else None)


def _score_subsets(
    protocol: Protocol,
    relevance: Relevance,
    queries: Tensor,
    gallery: Tensor,
    rows: Int[Tensor, " queries"],
    fused: FusedQueries | None,
) -> Scores:
    """Rank each query's own candidates alone (GeneCIS, i-CIR)."""
    if relevance.subset is None:
        raise DataError("the protocol ranks each query's own subset, but no query has one; set Query.subset")
    metrics = MetricAccumulator(protocol, queries.device, len(queries))
    wide = max(map(len, relevance.subset))
    keep = min(RANKING_DEPTH, wide)
    ordered = torch.full((len(queries), keep), -1)
    cosines = torch.full(ordered.shape, -torch.inf)
    for at in _subset_blocks([relevance.subset[query] for query in rows.tolist()], 4 * wide * gallery.shape[1]):
        span = torch.tensor(at)
        part = rows[span]
        own = [relevance.subset[query] for query in part.tolist()]
        subset, here = _padded(own).to(queries.device), span.to(queries.device)
        shared = all(one is own[0] for one in own)
        items = gallery[subset[0] if shared else subset.clamp(min=0)].float()
        sides = (queries, fused.texts) if fused else (queries,)
        found = [torch.einsum("qd,sd->qs" if shared else "qd,qsd->qs", side[here].float(), items) for side in sides]
        scores = fused.combine(found[0], found[1], subset >= 0) if fused else found[0]
        if not scores.isfinite().all():
            raise DataError("an embedding contains nan or infinity; look for a broken model or image")
        scores = scores.masked_fill(subset < 0, float("-inf"))
        hits = torch.zeros(subset.shape, dtype=torch.bool, device=subset.device)
        for row, query in enumerate(part.tolist()):
            hits[row] = torch.isin(subset[row], relevance.targets[query].to(subset.device))
        # Two stable sorts: by what decides ties, then by score.
        ties = hits.long() if protocol.ties == "pessimistic" else subset
        by_tie = ties.argsort(dim=1, stable=True)
        order = by_tie.gather(1, scores.gather(1, by_tie).argsort(dim=1, descending=True, stable=True))
        tied = TiedRankings(_subset_ties(scores, hits)) if protocol.ties == "expected" else TiedRankings()
        metrics.add(HitMasks(hits.gather(1, order), hits.sum(1)), part, relevance.labels, tied=tied)
        order = order[:, :keep]
        ordered[span, : order.shape[1]] = subset.gather(1, order).cpu()
        cosines[span, : order.shape[1]] = scores.gather(1, order).cpu()
    return Scores(metrics.values(), Ranking(ordered, cosines), ordered)


def _subset_blocks(subsets: Sequence[Tensor], row_bytes: int) -> list[list[int]]:
    """Divide queries into blocks that share their subset, and those of other queries that fit the budget."""
    shared: defaultdict[int, list[int]] = defaultdict(list)
    for row, subset in enumerate(subsets):
        shared[id(subset)].append(row)
    alone = [rows[0] for rows in shared.values() if len(rows) == 1]
    step = max(1, min(1024, _SUBSET_BYTES // row_bytes))
    blocks = [rows[at : at + 1024] for rows in shared.values() if len(rows) > 1 for at in range(0, len(rows), 1024)]
    return blocks + [alone[at : at + step] for at in range(0, len(alone), step)]


class HitMasks(NamedTuple):
    """Where some rankings contain relevant candidates.

    Attributes:
        hits: True at relevant candidates, for whole rankings or to the depth that the metrics need.
        n_relevant: Number of relevant candidates of each query, at any rank.
    """

    hits: Bool[Tensor, "chunk depth"]
    n_relevant: Int[Tensor, " chunk"]


class TiedRankings(NamedTuple):
    """Ties with all targets, with the first target alone and within the subset, if orders are averaged over."""

    all: TieGroups | None = None
    first: TieGroups | None = None
    subset: TieGroups | None = None


class MetricAccumulator:
    """The protocol's metrics over any number of chunks and processes."""

    def __init__(self, protocol: Protocol, device: torch.device, queries: int) -> None:
        self._protocol = protocol
        parsed = {name: parse_metric(name) for name in protocol.metrics}
        first = protocol.recall_targets == "first"
        single = tuple(name for name, metric in parsed.items() if first and metric.family.first_target)
        rest = tuple(name for name in parsed if name not in single)
        self._parsed = parsed
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
        found: HitMasks,
        part: Int[Tensor, " chunk"],
        labels: Int[Tensor, " queries"] | None,
        subset_hits: Bool[Tensor, "chunk subset"] | None = None,
        first: HitMasks | None = None,
        tied: TiedRankings = TiedRankings(),  # noqa: B008 - immutable
    ) -> None:
        """Add the rankings of some queries: with all targets, within the subsets, with the first target alone."""
        at = part.to(found.hits.device)
        classes = None if labels is None else labels[part].to(at.device)
        if self._all is not None:
            self._all.update(found.hits, found.n_relevant, at, subset_hits, classes, tied.all, tied.subset)
        if self._first is not None and first is not None:
            self._first.update(first.hits, first.n_relevant, at, None, classes, tied.first)

    def _in_subset(self, name: str) -> bool:
        return self._parsed[name].family.ranking == "subset"

    def values(self) -> dict[str, Float[Tensor, " queries"]]:
        """Return the values of every query of all processes, in the protocol's order, followed by its means."""
        found: dict[str, Tensor] = {}
        for metrics in (self._all, self._first):
            found |= {} if metrics is None else metrics.values()
        protocol = self._protocol
        values = {name: found[name].double().cpu() for name in protocol.metrics}
        if protocol.unanswered == "zero":
            values = {name: x if self._in_subset(name) else x.nan_to_num(0.0) for name, x in values.items()}
        for names in protocol.means:
            values[f"({' + '.join(names)})/{len(names)}"] = torch.stack([values[name] for name in names]).mean(0)
        return values


def score_predictions(benchmark: Benchmark, rankings: Sequence[Sequence[str]]) -> tuple[Benchmark, Scores]:
    """Score predicted rankings.

    Args:
        benchmark: The benchmark that was ranked.
        rankings: For each query gallery ids, best first, at least as many as the smallest cut-off of a metric. Lists
            that contain nothing but the query's subset count as subset rankings (CIRR).

    Returns:
        The benchmark with the metrics that the lists are long enough for (never `mAP` without a cut-off), and their
        values.

    Raises:
        DataError: If the lists are too short for every metric, or their number is not that of the queries.
    """
    if len(rankings) != len(benchmark.queries):
        raise DataError(f"there are {len(rankings)} lists for {len(benchmark.queries)} queries; pass one per query")
    depth = min(map(len, rankings))
    pairs = list(zip(benchmark.queries, rankings, strict=True))
    subsets = all(query.subset is not None and set(names) <= set(query.subset) for query, names in pairs)
    parsed = {name: parse_metric(name) for name in benchmark.protocol.metrics}
    kept = tuple(
        name
        for name, metric in parsed.items()
        if metric.k is not None
        and (subsets if metric.family.ranking == "subset" else not subsets and metric.k <= depth)
    )
    if not kept:
        raise DataError(f"the shortest list has {depth} ids, too few for {', '.join(parsed)}; pass longer lists")
    means = tuple(names for names in benchmark.protocol.means if set(names) <= set(kept))
    primary = benchmark.protocol.primary
    primary = primary if primary in kept else kept[0]
    short = [name for name, metric in parsed.items() if metric.k is not None and metric.k > depth]
    note = benchmark.protocol.note + (f"; lists of {depth} ids are too short for {', '.join(short)}" if short else "")
    protocol = replace(benchmark.protocol, metrics=kept, primary=primary, means=means, note=note)
    relevance = Relevance.of(benchmark)
    at = {item.id: position for position, item in enumerate(benchmark.gallery)}
    positions = torch.tensor([[at[name] for name in names[:depth]] for names in rankings])
    metrics = MetricAccumulator(protocol, positions.device, len(pairs))
    for row, (query, _) in enumerate(pairs):
        excluded = [at[name] for name in query.exclude] if protocol.exclude_reference else []
        targets = relevance.targets[row]
        ranked = positions[row][~torch.isin(positions[row], torch.tensor(excluded, dtype=torch.long))]
        hits = torch.isin(ranked, targets)[None]
        part = torch.tensor([row])
        first = (ranked == targets[0])[None] if len(targets) else torch.zeros_like(hits)
        counts = torch.tensor([len(targets)])
        single = HitMasks(first, counts.clamp(max=1))
        metrics.add(HitMasks(hits, counts), part, relevance.labels, hits if subsets else None, single)
    scores = Scores(metrics.values(), Ranking(positions, torch.zeros(positions.shape)))
    return replace(benchmark, protocol=protocol), scores


class _TargetTable:
    """The targets of queries as a padded table; queries that share their targets share a row."""

    def __init__(self, targets: Sequence[Int[Tensor, " _"]], device: torch.device) -> None:
        self._targets, self._device = targets, device
        kinds = {id(items): items for items in targets}
        self._table: Tensor | None = None
        if 8 * len(kinds) * max(map(len, kinds.values())) <= _TABLE_BYTES:
            number = {key: index for index, key in enumerate(kinds)}
            self._table = _padded(list(kinds.values())).to(device)
            self._kind = torch.tensor([number[id(items)] for items in targets], device=device)

    def of(self, part: Int[Tensor, " chunk"]) -> Int[Tensor, "chunk most"]:
        """Return the targets of some queries, padded with -1."""
        if self._table is not None:
            return self._table[self._kind[part.to(self._device)]]
        return _padded([self._targets[query] for query in part.tolist()]).to(self._device)


def _padded(rows: list[Int[Tensor, " _"]]) -> Int[Tensor, "rows most"]:
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _depth(protocol: Protocol, gallery: int) -> int | None:
    """Return the largest cut-off of the metrics; None if one needs the whole ranking."""
    cuts = [metric.k for metric in map(parse_metric, protocol.metrics) if metric.family.ranking == "gallery"]
    return None if None in cuts else min(gallery, max((k for k in cuts if k is not None), default=1))


def _find(items: Int[Tensor, "chunk most"], chunk: RankedChunk, depth: int | None) -> HitMasks:
    """Find items, padded with -1, in each ranking to a depth, or in the whole ranking."""
    n, width = chunk.scores.shape
    inside = items.clamp(min=0)
    counted = (items >= 0) & (chunk.scores.gather(1, inside) > -torch.inf)  # neither padding nor excluded
    # Whatever does not count is marked in an additional column, which is cut off.
    marks = torch.zeros(n, width + 1, dtype=torch.bool, device=items.device)
    where = inside if depth is not None else chunk.ranks(inside) - 1
    marks.scatter_(1, torch.where(counted, where, width), value=True)
    return HitMasks(marks[:, :width] if depth is None else marks.gather(1, chunk.first(depth)), counted.sum(1))


def _find_late(items: Int[Tensor, "chunk most"], chunk: RankedChunk, depth: int | None) -> HitMasks:
    """Find items as `_find` does, each behind all other candidates with its score."""
    n, width = chunk.scores.shape
    counted = (items >= 0) & (chunk.scores.gather(1, items.clamp(min=0)) > -torch.inf)
    ties = TieGroups.of(*chunk.better_and_equal(items.clamp(min=0)), counted)
    # The j-th of h hits among n tied candidates after `start` others is at start + n - h + j.
    nth = torch.arange(items.shape[1], device=items.device).expand_as(items)
    before = ties.hits.cumsum(1) - ties.hits
    group = torch.searchsorted(before + ties.hits, nth.contiguous(), right=True).clamp(max=items.shape[1] - 1)
    last = (ties.start + ties.size - ties.hits - before).gather(1, group)
    marks = torch.zeros(n, width + 1, dtype=torch.bool, device=items.device)
    marks.scatter_(1, torch.where(nth < ties.n_relevant[:, None], last + nth, width), value=True)
    return HitMasks(marks[:, : width if depth is None else depth], counted.sum(1))


def _find_ties(items: Int[Tensor, "chunk most"], chunk: RankedChunk) -> TiedRankings:
    """Count the ties of items, padded with -1, in each whole ranking."""
    inside = items.clamp(min=0)
    counted = (items >= 0) & (chunk.scores.gather(1, inside) > -torch.inf)
    better, equal = chunk.better_and_equal(inside)
    first = TieGroups.of(better[:, :1], equal[:, :1], counted[:, :1])
    return TiedRankings(TieGroups.of(better, equal, counted), first)


def _subset_ties(scores: Float[Tensor, "chunk subset"], hits: Bool[Tensor, "chunk subset"]) -> TieGroups:
    """Count the ties of the relevant candidates of small rankings; other entries have the score minus infinity."""
    rising = scores.sort(dim=1).values
    below, not_above = torch.searchsorted(rising, scores), torch.searchsorted(rising, scores, right=True)
    return TieGroups.of(scores.shape[1] - not_above, not_above - below, hits & (scores > -torch.inf))


def _within(ordered: Int[Tensor, "chunk subset"], items: Int[Tensor, "chunk most"]) -> Bool[Tensor, "chunk subset"]:
    """Return which positions of each row are among its items."""
    found: Tensor = (ordered[:, :, None] == items[:, None, :]).any(2)
    return found


def _ordered_subset(chunk: RankedChunk, subset: Int[Tensor, "chunk subset"]) -> Int[Tensor, "chunk subset"]:
    """Order each query's subset as in its whole ranking; a smaller subset is padded with -1."""
    subset = subset.to(chunk.scores.device)
    scores = chunk.scores.gather(1, subset.clamp(min=0)).masked_fill(subset < 0, -torch.inf)
    return subset.gather(1, scores.argsort(dim=1, descending=True, stable=True))
