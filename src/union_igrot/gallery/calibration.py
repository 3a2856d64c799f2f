"""Calibration of a gallery's scores: two further dimensions in its index, one per task, and in its queries.

A row holds its embedding and, for composed queries and for sketches, minus the weighted mean of its greatest cosines to
training queries; a query holds a 1 for its own task, and a query of several terms their weighted sum. The dot product
is the calibrated score of an evaluation.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation.calibration import NEIGHBORS, neighbor_means
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.model import IGROTModel

KEY: Final = "calibration"
"""Name of the calibration in the metadata of an index; an index without one has none."""
TASKS: Final = ("cir", "sbir")
"""Tasks, in the order of their dimensions."""

QueryTask = Literal["cir", "sbir"] | None
"""The task of a query with an image and a text, an image alone, or neither, which is not calibrated."""


def describe_calibration(model: IGROTModel, weight: float) -> dict[str, Any]:
    """Return the calibration of a new index for its metadata; nothing for a weight of 0.

    Args:
        model: The model of the index, with training queries.
        weight: Weight of the mean cosine, at least 0.

    Raises:
        ConfigError: If the weight is below 0.
        DataError: If the model has no training queries.
    """
    if not weight >= 0:
        raise ConfigError(f"invalid value for calibration: {weight} (expected a number >= 0)")
    if not weight:
        return {}
    if not model.calibration:
        raise DataError(
            "the model has no training queries for calibration; choose a model that was trained with this version, or "
            "leave out calibration"
        )
    return {KEY: {"weight": weight, "neighbors": NEIGHBORS, "queries": _hash(model.calibration)}}


def stored_weight(metadata: Mapping[str, Any]) -> float:
    """Return the weight of an index's calibration, 0 for none."""
    return float(metadata.get(KEY, {}).get("weight", 0.0))


def extra_width(metadata: Mapping[str, Any]) -> int:
    """Return how many dimensions the rows of an index have beyond the embedding."""
    return len(TASKS) if KEY in metadata else 0


def widen_rows(
    embeddings: Float[Tensor, "rows dim"], model: IGROTModel, metadata: Mapping[str, Any]
) -> Float[Tensor, "rows wide"]:
    """Append the calibration of an index to embeddings of gallery images.

    Raises:
        CheckpointError: If the model's training queries are not those of the index.
    """
    if KEY not in metadata or not len(embeddings):
        return embeddings
    stored, known = metadata[KEY], model.calibration or {}
    if _hash(known) != stored["queries"]:
        raise CheckpointError(
            "the index was calibrated with other training queries than the model has; use the model it was made with, "
            "with its calibration.safetensors"
        )
    columns = [
        -stored["weight"] * neighbor_means(embeddings, known[task], stored["neighbors"])
        if task in known
        else embeddings.new_zeros(len(embeddings))
        for task in TASKS
    ]
    return torch.cat([embeddings, torch.stack(columns, dim=1).to(embeddings.dtype)], dim=1)


def widen_queries(
    embeddings: Float[Tensor, "queries dim"], tasks: Float[Tensor, "queries tasks"], metadata: Mapping[str, Any]
) -> Float[Tensor, "queries wide"]:
    """Append the tasks of queries, as `embed_gallery_queries` returns them, if the index is calibrated."""
    return torch.cat([embeddings, tasks], dim=1) if KEY in metadata else embeddings


def _hash(queries: Mapping[str, Tensor]) -> str:
    return weights_hash({task: x.half() for task, x in queries.items()})
