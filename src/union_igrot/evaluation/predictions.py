"""Rankings that some other method wrote, scored under a benchmark's protocol without any model.

Knows lists of gallery ids. Does not know files or embeddings.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from union_igrot.errors import DataError
from union_igrot.evaluation.scoring import Found, MetricTable, Relevance
from union_igrot.metrics.functional import parse_metric
from union_igrot.types import Benchmark, Ranking, Scores


def score_predictions(benchmark: Benchmark, rankings: Sequence[Sequence[str]]) -> tuple[Benchmark, Scores]:
    """Score lists of answers.

    Args:
        benchmark: Whose queries were answered.
        rankings: For each query gallery ids, best first, of at least the depth of one metric.
            Lists that hold nothing but the query's subset are taken as subset rankings (CIRR).

    Returns:
        The benchmark with the metrics whose depth the lists reach (`mAP` without a depth is never
        among them), and their values.

    Raises:
        DataError: Where the lists are too short for every metric, or not one a query.
    """
    if len(rankings) != len(benchmark.queries):
        raise DataError(f"{len(rankings)} lists for {len(benchmark.queries)} queries; give one a query, in order")
    depth = min(map(len, rankings))
    pairs = list(zip(benchmark.queries, rankings, strict=True))
    subsets = all(query.subset is not None and set(names) <= set(query.subset) for query, names in pairs)
    parsed = {name: parse_metric(name) for name in benchmark.protocol.metrics}
    kept = tuple(
        name
        for name, (kind, k) in parsed.items()
        if k is not None and ((kind == "Rs" and subsets) or (kind != "Rs" and not subsets and k <= depth))
    )
    if not kept:
        raise DataError(f"the shortest list has {depth} answers, too few for {', '.join(parsed)}; give longer lists")
    means = tuple(names for names in benchmark.protocol.means if set(names) <= set(kept))
    protocol = replace(benchmark.protocol, metrics=kept, primary=kept[0], means=means)
    relevance = Relevance.of(benchmark)
    at = {item.id: place for place, item in enumerate(benchmark.gallery)}
    positions = torch.tensor([[at[name] for name in names[:depth]] for names in rankings])
    figures = MetricTable(protocol, positions.device, len(pairs))
    for row, (query, _) in enumerate(pairs):
        gone = torch.tensor(
            [at[name] for name in query.exclude] if protocol.exclude_reference else [], dtype=torch.long
        )
        answers = relevance.targets[row]
        ranked = positions[row][~torch.isin(positions[row], gone)]
        hits = torch.isin(ranked, answers)[None]
        part = torch.tensor([row])
        first = (ranked == answers[0])[None] if len(answers) else torch.zeros_like(hits)
        counts = torch.tensor([len(answers)])
        single = Found(first, counts.clamp(max=1))
        figures.add(Found(hits, counts), part, relevance.labels, hits if subsets else None, single)
    scores = Scores(figures.values(), Ranking(positions, torch.zeros(positions.shape)))
    return replace(benchmark, protocol=protocol), scores
