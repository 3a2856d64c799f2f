"""Rankings of other methods, given as lists of gallery ids, scored under a benchmark's protocol."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from union_igrot.errors import DataError
from union_igrot.evaluation.scoring import HitMasks, MetricAccumulator, Relevance
from union_igrot.metrics.names import parse_metric
from union_igrot.types import Benchmark, Ranking, Scores


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
    protocol = replace(benchmark.protocol, metrics=kept, primary=kept[0], means=means)
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
