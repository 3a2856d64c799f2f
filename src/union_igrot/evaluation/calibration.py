"""Calibration by nearest neighbors: gallery images that are near to many queries get a lower score.

From every score the mean cosine of the gallery image to its nearest training queries is subtracted, with a weight. It
corrects for images that are near to everything. Training queries are of the training classes, so this also moves the
balance between classes that were trained on and others: a zero-shot protocol leaves it off.

Source: the nearest-neighbor normalization of Chowdhury et al., arXiv 2410.24114, with a set of queries per task.

Query expansion moves each query towards its own best results and searches the gallery again. It needs neither training
nor labels. Source: the average query expansion of Chum et al., Total Recall (ICCV 2007), with a weight below 1.
"""

from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from union_igrot.errors import ConfigError, DataError, check_count
from union_igrot.evaluation.scoring import score
from union_igrot.models.devices import full_precision
from union_igrot.models.model import IGROTModel
from union_igrot.types import Benchmark

NEIGHBORS = 50
_ROWS = 2048


@torch.no_grad()
def neighbor_means(
    gallery: Float[Tensor, "gallery dim"], queries: Float[Tensor, "queries dim"], neighbors: int = NEIGHBORS
) -> Float[Tensor, " gallery"]:
    """Return for each gallery embedding the mean of its greatest cosines to a set of queries.

    Args:
        gallery: Gallery embeddings.
        queries: Query embeddings.
        neighbors: Number of cosines that are averaged; all if there are fewer queries.
    """
    some = F.normalize(queries.float(), dim=-1).to(gallery.device)
    k = min(neighbors, len(some))
    with full_precision(gallery.device):
        blocks = (F.normalize(rows.float(), dim=-1) @ some.T for rows in gallery.split(_ROWS))
        return torch.cat([cosines.topk(k, dim=1).values.mean(1) for cosines in blocks])


def calibrate(
    model: IGROTModel,
    task: str,
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    weight: float,
) -> tuple[Float[Tensor, "queries wide"], Float[Tensor, "gallery wide"], dict[str, Any]]:
    """Append a dimension to queries and gallery, so that their dot product is the calibrated score.

    Args:
        model: Its `calibration` holds the training queries.
        task: `cir` or `sbir`.
        queries: Query embeddings.
        gallery: Gallery embeddings.
        weight: Weight of the mean cosine, above 0; 0.25 was chosen on validation data of the generated world.

    Returns:
        Queries, gallery, and what `results.json` holds: the weight, and the numbers of neighbors and training queries.

    Raises:
        ConfigError: If the weight is not above 0.
        DataError: If the model has no training queries of the task.
    """
    if not weight > 0:
        raise ConfigError(f"invalid value for calibration: {weight} (expected a number > 0)")
    known = (model.calibration or {}).get(task)
    if known is None:
        raise DataError(
            f"the model has no training queries of task {task} for calibration; train it on that task with this "
            "version, or leave out calibration"
        )
    means = neighbor_means(gallery, known)
    wide = torch.cat([gallery.float(), -weight * means[:, None]], dim=1)
    ones = queries.new_ones(len(queries), 1, dtype=torch.float32)
    used = {"weight": weight, "neighbors": min(NEIGHBORS, len(known)), "queries": len(known)}
    return torch.cat([queries.float(), ones], dim=1), wide, used


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
