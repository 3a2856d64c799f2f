"""From embeddings, or rankings of other methods, to metrics under a benchmark's protocol."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.fusion import FusedQueries
from union_igrot.evaluation.ranking import RankedChunk, better_and_equal, rank_chunks
from union_igrot.metrics.functional import TieGroups
from union_igrot.metrics.names import ParsedMetric, is_rank, parse_metric
from union_igrot.metrics.retrieval import RankedHits, RetrievalMetrics
from union_igrot.types import Benchmark, Protocol, Ranking, Scores

RANKING_DEPTH = 50
"""Results of each query that are kept for contact sheets and submission files."""
_SUBSET_BYTES = 2**27


@dataclass(frozen=True)
class Relevance:
    """A benchmark's ids as gallery positions.

    Attributes:
        targets: For each query the positions of its targets, without repetitions, in the benchmark's order.
        exclude: For each query the positions that are not ranked.
        subset: For each query its subset without excluded items, in gallery order; None if no query has one.
    """

    targets: list[Int[Tensor, " _"]]
    exclude: list[list[int]]
    subset: list[Int[Tensor, " _"]] | None

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
        return cls(targets, exclude, subsets if any(map(len, subsets)) else None)


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
        sizes = Counter(pair for pair in found[metric.ranking(protocol)] if pair[1])
        if sizes and (limit := _limit(metric, sizes, protocol)):
            limits[name] = limit
    return limits


def _limit(metric: ParsedMetric, sizes: Mapping[tuple[int, int], int], protocol: Protocol) -> str:
    """Compare a metric of the worst and the best rankings; `sizes` counts pairs of candidates and relevant ones."""
    options = metric.family.options(protocol)
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
    if not isinstance(queries, FusedQueries):
        queries = FusedQueries(queries)
    rows = torch.arange(len(queries.images)) if positions is None else positions.cpu()
    over = _score_subsets if benchmark.protocol.candidates == "subset" else _score_gallery
    return over(benchmark.protocol, Relevance.of(benchmark), queries, gallery, rows)


def _score_gallery(
    protocol: Protocol, relevance: Relevance, queries: FusedQueries, gallery: Tensor, rows: Int[Tensor, " queries"]
) -> Scores:
    """Rank the whole gallery for some queries, `rows`, and compute the protocol's metrics."""
    count, device = len(rows), queries.images.device
    metrics = _metrics(protocol, device, count)
    # The minimum over all queries, so that every process keeps equally many.
    keep = min(RANKING_DEPTH, len(gallery) - max(map(len, relevance.exclude)))
    ranking = Ranking(torch.empty(count, keep, dtype=torch.long), torch.empty(count, keep))
    subsets = torch.full((count, max(map(len, relevance.subset or []), default=0)), -1)
    depth = _depth(protocol, len(gallery))
    exclude = [relevance.exclude[row] for row in rows.tolist()]
    for chunk in rank_chunks(queries.images, gallery, exclude, fused=queries):
        part = rows[chunk.queries]
        items = _padded([relevance.targets[row] for row in part.tolist()]).to(device)
        found = _find(items, chunk, depth, protocol.ties)
        first = _find(items[:, :1], chunk, depth, protocol.ties) if protocol.recall_targets == "first" else None
        within = None
        if relevance.subset is not None:
            subset = _padded([relevance.subset[row] for row in part.tolist()]).to(device)
            scores = chunk.scores.gather(1, subset.clamp(min=0)).masked_fill(subset < 0, -torch.inf)
            order, within = _rank_small(scores, _among(subset, items.unbind()) & (subset >= 0), protocol.ties)
            subsets[chunk.queries, : subset.shape[1]] = subset.gather(1, order).cpu()
        metrics.update(found, part.to(device), within, first)
        best = chunk.first(keep)
        ranking.positions[chunk.queries] = best.cpu()
        ranking.scores[chunk.queries] = chunk.scores.gather(1, best).cpu()
    return Scores(_values(metrics, protocol), ranking, subsets if subsets.shape[1] else None)


def _score_subsets(
    protocol: Protocol, relevance: Relevance, queries: FusedQueries, gallery: Tensor, rows: Int[Tensor, " queries"]
) -> Scores:
    """Rank each query's own candidates alone (GeneCIS, i-CIR)."""
    subsets = relevance.subset
    if subsets is None:
        raise DataError("the protocol ranks each query's own subset, but no query has one; set Query.subset")
    device, count, wide = queries.images.device, len(rows), max(map(len, subsets))
    metrics = _metrics(protocol, device, count)
    ordered = torch.full((count, min(RANKING_DEPTH, wide)), -1)
    cosines = torch.full(ordered.shape, -torch.inf)
    blocks = _subset_blocks([subsets[query] for query in rows.tolist()], 4 * wide * gallery.shape[1])
    for at in blocks:
        span = torch.tensor(at)
        part = rows[span]
        own = [subsets[query] for query in part.tolist()]
        subset, here = _padded(own).to(device), span.to(device)
        shared = all(one is own[0] for one in own)
        items = gallery[subset[0] if shared else subset.clamp(min=0)].float()
        formula = "qd,sd->qs" if shared else "qd,qsd->qs"
        sides = [queries.images] if queries.texts is None else [queries.images, queries.texts]
        found = [torch.einsum(formula, side[here].float(), items) for side in sides]
        scores = found[0] if queries.texts is None else queries.combine(found[0], found[1], subset >= 0)
        if not scores.isfinite().all():
            raise DataError("an embedding contains nan or infinity; look for a broken model or image")
        scores = scores.masked_fill(subset < 0, -torch.inf)
        targets = [relevance.targets[query].to(device) for query in part.tolist()]
        order, ranked = _rank_small(scores, _among(subset, targets), protocol.ties)
        single = _among(subset, [one[:1] for one in targets]) if protocol.recall_targets == "first" else None
        first = None if single is None else _rank_small(scores, single, protocol.ties)[1]
        metrics.update(ranked, part.to(device), ranked, first)
        order = order[:, : ordered.shape[1]]
        ordered[span, : order.shape[1]] = subset.gather(1, order).cpu()
        cosines[span, : order.shape[1]] = scores.gather(1, order).cpu()
    return Scores(_values(metrics, protocol), Ranking(ordered, cosines), ordered)


def _subset_blocks(subsets: Sequence[Tensor], row_bytes: int) -> list[list[int]]:
    """Divide queries into blocks that share their subset, and those of other queries that fit the budget."""
    shared: defaultdict[int, list[int]] = defaultdict(list)
    for row, subset in enumerate(subsets):
        shared[id(subset)].append(row)
    alone = [rows[0] for rows in shared.values() if len(rows) == 1]
    step = max(1, min(1024, _SUBSET_BYTES // row_bytes))
    blocks = [rows[at : at + 1024] for rows in shared.values() if len(rows) > 1 for at in range(0, len(rows), 1024)]
    return blocks + [alone[at : at + step] for at in range(0, len(alone), step)]


def _metrics(protocol: Protocol, device: torch.device, queries: int) -> RetrievalMetrics:
    return RetrievalMetrics(protocol.metrics, protocol, queries, sync_on_compute=True).to(device)


def _values(metrics: RetrievalMetrics, protocol: Protocol) -> dict[str, Float[Tensor, " queries"]]:
    """Return the values of every query of all processes, in the protocol's order, followed by its means."""
    values = {name: values.double().cpu() for name, values in metrics.values().items()}
    if protocol.unanswered == "zero":
        inside = {name for name in values if parse_metric(name).family.ranking == "subset"}
        values = {name: x if name in inside else x.nan_to_num(0.0) for name, x in values.items()}
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
    metrics = _metrics(protocol, positions.device, len(pairs))
    for row, (targets, excluded) in enumerate(zip(relevance.targets, relevance.exclude, strict=True)):
        ranked = positions[row][~torch.isin(positions[row], torch.tensor(excluded, dtype=torch.long))]
        hits, first = torch.isin(ranked, targets)[None], torch.isin(ranked, targets[:1])[None]
        counts = torch.tensor([len(targets)])
        within = RankedHits(hits, hits.sum(1)) if subsets else None
        single = RankedHits(first, counts.clamp(max=1))
        metrics.update(RankedHits(hits, counts), torch.tensor([row]), within, single)
    scores = Scores(_values(metrics, protocol), Ranking(positions, torch.zeros(positions.shape)))
    return replace(benchmark, protocol=protocol), scores


def _padded(rows: list[Int[Tensor, " _"]]) -> Int[Tensor, "rows most"]:
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _depth(protocol: Protocol, gallery: int) -> int | None:
    """Return the largest cut-off of the metrics; None if one needs the whole ranking."""
    cuts = [metric.k for metric in map(parse_metric, protocol.metrics) if metric.family.ranking == "gallery"]
    return None if None in cuts else min(gallery, max((k for k in cuts if k is not None), default=1))


def _find(items: Int[Tensor, "chunk most"], chunk: RankedChunk, depth: int | None, ties: str) -> RankedHits:
    """Find items, padded with -1, in each ranking to a depth, or in the whole ranking.

    Pessimistic ties put each item behind all other candidates with its score.
    """
    n, width = chunk.scores.shape
    inside = items.clamp(min=0)
    counted = (items >= 0) & (chunk.scores.gather(1, inside) > -torch.inf)  # neither padding nor excluded
    groups = (
        None
        if ties == "gallery order"
        else TieGroups.of(*better_and_equal(chunk.scores, chunk.scores.gather(1, inside)), counted)
    )
    count, by_rank = counted.sum(1), depth is None or ties == "pessimistic"
    where = inside
    if ties == "pessimistic" and groups is not None:
        # The j-th of h hits among n tied candidates after `start` others is at start + n - h + j.
        nth = torch.arange(items.shape[1], device=items.device).expand_as(items)
        before = groups.hits.cumsum(1) - groups.hits
        group = torch.searchsorted(before + groups.hits, nth.contiguous(), right=True).clamp(max=items.shape[1] - 1)
        where = (groups.start + groups.size - groups.hits - before).gather(1, group) + nth
        counted = nth < count[:, None]
    elif by_rank:
        where = chunk.ranks(inside) - 1
    # Whatever does not count is marked in an additional column, which is cut off.
    marks = torch.zeros(n, width + 1, dtype=torch.bool, device=items.device)
    marks.scatter_(1, torch.where(counted, where, width), value=True)
    hits = marks[:, : width if depth is None else depth] if by_rank else marks.gather(1, chunk.first(depth or width))
    return RankedHits(hits, count, groups if ties == "expected" else None)


def _rank_small(
    scores: Float[Tensor, "chunk subset"], hits: Bool[Tensor, "chunk subset"], ties: str
) -> tuple[Int[Tensor, "chunk subset"], RankedHits]:
    """Order subsets, which are in gallery order; padding has the score minus infinity and is no hit."""
    if ties == "pessimistic":  # two stable sorts: by relevance, then by score
        late = hits.long().argsort(dim=1, stable=True)
        order = late.gather(1, scores.gather(1, late).argsort(dim=1, descending=True, stable=True))
    else:
        order = scores.argsort(dim=1, descending=True, stable=True)
    groups = None
    if ties == "expected":
        groups = TieGroups.of(*better_and_equal(scores, scores), hits)
    return order, RankedHits(hits.gather(1, order), hits.sum(1), groups)


def _among(subset: Int[Tensor, "chunk subset"], items: Sequence[Int[Tensor, " _"]]) -> Bool[Tensor, "chunk subset"]:
    """Return which positions of each row are among its items."""
    return torch.stack([torch.isin(row, wanted) for row, wanted in zip(subset, items, strict=True)])
