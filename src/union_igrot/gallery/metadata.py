"""The metadata of an index: which model it was made with, and the calibration of its scores.

A row holds its embedding and, for composed queries and for sketches, minus the weighted mean of its greatest cosines to
training queries; a query holds a 1 for its own task, and a query of several terms their weighted sum. The dot product
is the calibrated score of an evaluation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation.calibration import NEIGHBORS, neighbor_means
from union_igrot.gallery.engines.factory import MEMORY, open_index
from union_igrot.gallery.ingest.entries import Listing
from union_igrot.models.backbones.base import PreprocessChoice, weights_hash, without_settings
from union_igrot.models.factory import build_backbone
from union_igrot.models.foreign import FOREIGN, foreign_model
from union_igrot.models.model import BUNDLED, IGROTModel, baseline, load, model_fingerprint
from union_igrot.models.registry import is_backbone, names_backbone
from union_igrot.storage.files import expand_user, is_folder

KEY: Final = "calibration"
"""Name of the calibration in the metadata of an index; an index without one has none."""
TASKS: Final = ("cir", "sbir")
"""Tasks, in the order of their dimensions."""


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


FORMAT: Final = 1
EARLIER: Final = "earlier_fingerprint"
"""Name of the fingerprint of the same model by an earlier version; not stored."""
DEFAULT_CHECKPOINT: Final = "photos"
"""Model of a new index."""


def index_metadata(model: IGROTModel, checkpoint: str | None, weights: str | Path | None = None) -> dict[str, Any]:
    """Return the metadata for an index of a model: its fingerprint, its description and where it is loaded from.

    This hashes all weights.

    Args:
        model: The model.
        checkpoint: The name that `load_checkpoint` returns; None if the model was made otherwise.
        weights: The explicit weights of its backbone, if any.
    """
    described = model.describe()
    fingerprint = model_fingerprint(described)
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "model": described, "checkpoint": checkpoint}
    earlier = model.backbone.earlier_fingerprint(described["backbone_fingerprint"])
    if weights is None and earlier is not None:
        metadata[EARLIER] = model_fingerprint({**described, "backbone_fingerprint": earlier})
    return metadata if weights is None else {**metadata, "weights": str(expand_user(weights).absolute())}


def check_metadata(stored: Mapping[str, Any], expected: Mapping[str, Any], uri: str) -> None:
    """Check the stored metadata of an index against those of a model; raise a CheckpointError that names both."""
    if stored.get("fingerprint") == expected["fingerprint"]:
        return
    if "fingerprint" not in stored:
        raise CheckpointError(f"{uri} does not say which model it was made with; make it again with union-index")
    if "weights" not in stored and stored["fingerprint"] == expected.get(EARLIER):
        return
    before, now = (str(one.get("model", {}).get("backbone_fingerprint")) for one in (stored, expected))
    same = before == without_settings(now)  # as far as an earlier version recorded it
    age = " (its version did not record activation and tokenizer, which may differ)" if same else ""
    raise _other_model(uri, stored, f"{_model_name(expected['model'])}{age}")


def _other_model(uri: str, stored: Mapping[str, Any], given: str) -> CheckpointError:
    name, made_with = stored.get("checkpoint"), _model_name(stored.get("model", {}))
    made_with = f"checkpoint={name} ({made_with})" if name else made_with
    return CheckpointError(
        f"{uri} was made with {made_with}, not with {given}; use that model, which needs no checkpoint, or index again "
        "under another name"
    )


def check_calibration(stored: Mapping[str, Any], weight: float | None, uri: str) -> None:
    """Compare the calibration of an index with a setting; a difference is a ConfigError."""
    if weight is not None and weight != stored_weight(stored):
        raise ConfigError(
            f"{uri} was made with calibration={stored_weight(stored):g}, not {weight:g}; leave the setting out, or "
            "index again under another name"
        )


def read_metadata(uri: str) -> dict[str, Any]:
    """Return the metadata of an index, empty if it does not exist yet."""
    if uri == MEMORY:
        return {}
    try:
        with open_index(uri) as index:
            return dict(index.metadata)
    except ConfigError:  # it does not exist yet, or creating it raises this error
        return {}


def check_text_column(listing: Listing, column: str) -> None:
    """Refuse a column to embed in a new index if no listed image has a text in it."""
    columns = ({**entry.found, **entry.columns} for entry in listing.entries)
    named = {name for values in columns for name, value in values.items() if value is not None}
    if column not in named:
        known = ", ".join(sorted(named)) or "none"
        raise ConfigError(f"invalid value for embed_text: {column} (columns of {listing.source}: {known})")


def _model_name(described: Mapping[str, Any]) -> str:
    kinds = [str(described.get(side, {}).get("kind", "?")) for side in ("fusion", "target")]
    return (
        f"backbone {described.get('backbone')} {described.get('backbone_fingerprint')} "
        f"and heads {' + '.join(kinds)} {described.get('heads')}"
        + (f", preprocess={described['preprocess']}" if "preprocess" in described else "")
    )


def load_checkpoint(
    checkpoint: str | Path, weights: str | Path | None = None, preprocess: PreprocessChoice | None = None
) -> tuple[IGROTModel, str]:
    """Load a model by name.

    Args:
        checkpoint: `photos`, `tiny`, the folder of a run, its `model/` or any saved model, a model on a hub, a
            backbone, or `foreign:NAME/WIDTH`.
        weights: Weights of its backbone; None for the default ones.
        preprocess: Preprocessing of a backbone, see `build_backbone`.

    Returns:
        The model, and the name to store: for a folder its absolute path.

    Raises:
        CheckpointError: If there is no such model.
    """
    if str(checkpoint).startswith(FOREIGN):
        return foreign_model(str(checkpoint)), str(checkpoint)
    folder = expand_user(checkpoint)
    if str(checkpoint) in BUNDLED or not is_folder(folder) or names_backbone(str(checkpoint)):
        return load(str(checkpoint), weights=weights, preprocess=preprocess), str(checkpoint)
    return load(folder, weights=weights, preprocess=preprocess), str(folder.absolute())


def model_of_index(
    recorded: Mapping[str, Any],
    uri: str,
    checkpoint: str | Path | None = None,
    weights: str | Path | None = None,
    preprocess: PreprocessChoice | None = None,
) -> tuple[IGROTModel, str]:
    """Load a model for an index by name; without one the model it was made with, or that of a new index.

    Args:
        recorded: The metadata of the index; empty if it does not exist yet.
        uri: Its location.
        checkpoint: As for `load_checkpoint`, or None.
        weights: Weights of the backbone; None for the recorded or default ones.
        preprocess: Preprocessing of a backbone; None for the recorded or default one.

    Returns:
        As `load_checkpoint`.

    Raises:
        ConfigError: If the index does not name its model, or the package of the default one is not installed.
        CheckpointError: If the model does not exist, or is another backbone than that of the index.
    """
    described = recorded.get("model", {})
    if checkpoint is not None or not recorded:
        checkpoint = DEFAULT_CHECKPOINT if checkpoint is None else checkpoint
        if names_backbone(str(checkpoint)) and described.get("backbone") not in (str(checkpoint), None):
            raise _other_model(uri, recorded, f"backbone {checkpoint}")  # before its weights are fetched
        return load_checkpoint(checkpoint, weights, preprocess)
    if not (name := recorded.get("checkpoint")):
        raise ConfigError(f"{uri} does not say where its model is ({_model_name(described)}); pass the model")
    if name == "tiny" and described.get("target", {}).get("kind") == "union":
        name = "tiny-union"  # the heads that were bundled as tiny when the index was made
    weights = weights or recorded.get("weights")
    preprocess = preprocess or described.get("preprocess")
    if is_backbone(str(name)):  # not a folder of that name, as folders are stored by their absolute path
        return baseline(build_backbone(str(name), weights, preprocess), "sum"), str(name)
    return load_checkpoint(str(name), weights, preprocess)
