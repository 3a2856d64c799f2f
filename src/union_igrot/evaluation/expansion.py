"""Query expansion: each query is moved towards its own best results, and the gallery is searched again.

It needs neither training nor labels, but a second search. Source: the average query expansion of Chum et al., Total
Recall (ICCV 2007), with a weight below 1.
"""

from typing import Final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from union_igrot.errors import check_count
from union_igrot.evaluation.scoring import score
from union_igrot.types import Benchmark

WEIGHT: Final = 0.5
"""Weight of the mean of the best results beside the query; chosen on validation data of the generated world."""


def expand_queries(
    benchmark: Benchmark, queries: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"], count: int
) -> Float[Tensor, "queries dim"]:
    """Add to each query half the unit mean of its first results, which are images of the gallery itself.

    Args:
        benchmark: Its protocol decides what a query's candidates are.
        queries: Unit embeddings of the queries.
        gallery: Unit embeddings of the gallery.
        count: Number of results, from 1; at most `scoring.RANKING_DEPTH` are used.

    Returns:
        Unit embeddings.
    """
    count = check_count("query_expansion", count)
    best = score(benchmark, queries, gallery).ranking.positions[:, :count].to(gallery.device)
    found = (best >= 0).float()  # a query with fewer candidates has -1 behind them
    total = F.embedding_bag(best.clamp(min=0), gallery.float(), mode="sum", per_sample_weights=found)
    return F.normalize(queries.float() + WEIGHT * F.normalize(total, dim=-1), dim=-1)


def describe_expansion(count: int) -> str:
    """Return how queries were expanded, for the lines below a table."""
    return f"each query plus {WEIGHT:g} times the unit mean of its first {count} results, searched again"
