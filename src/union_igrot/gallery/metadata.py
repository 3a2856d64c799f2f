"""Which model an index belongs to, written beside it, so that no other is ever asked of it.

Knows models, indexes and their cards. Does not know rows or searches.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.factory import open_index
from union_igrot.models.backbones.factory import build_backbone, is_backbone
from union_igrot.models.model import IGROTModel, baseline, load, model_fingerprint
from union_igrot.storage.paths import expand_user

FORMAT: Final = 1


def index_metadata(model: IGROTModel, checkpoint: str | None, weights: str | Path | None = None) -> dict[str, Any]:
    """Return what is kept with an index: the model's fingerprint, its description, and where it is loaded from.

    All weights are hashed for it, once.

    Args:
        model: The model.
        checkpoint: What `load_checkpoint` says it was loaded from; None where it was made otherwise.
        weights: Weights of its backbone, where they were named.
    """
    described = model.describe()
    fingerprint = model_fingerprint(described)
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "model": described, "checkpoint": checkpoint}
    return metadata if weights is None else {**metadata, "weights": str(expand_user(weights).absolute())}


def check_metadata(metadata: Mapping[str, Any], asked: Mapping[str, Any], uri: str) -> None:
    """Refuse a model that an index was not made with.

    Args:
        metadata: The index's.
        asked: The model's, from `index_metadata`.
        uri: The index, for the error.

    Raises:
        CheckpointError: Naming both.
    """
    if metadata.get("fingerprint") == asked["fingerprint"]:
        return
    if "fingerprint" not in metadata:
        raise CheckpointError(f"{uri} does not say which model it was made with; make it again with union-index")
    made, where = _named(metadata.get("model", {})), metadata.get("checkpoint")
    raise CheckpointError(
        f"{uri} was made with {made}" + (f" (checkpoint {where})" if where else "") + f", not with "
        f"{_named(asked['model'])}; search it with the model it was made with, or index again under another name"
    )


def open_or_create(uri: str, dim: int, metadata: Mapping[str, Any]) -> VectorIndex:
    """Open the index of a model, or make it.

    Args:
        uri: Where it lies.
        dim: Width of the model's embeddings.
        metadata: The model's, from `index_metadata`.

    Raises:
        CheckpointError: Where it was made with another model.
        UnionError: Where it cannot be opened or made.
    """
    uri = os.path.expanduser(uri)  # noqa: PTH111 - a URI of an object store is no path
    index = open_index(uri, dim=dim, metadata=metadata, create=True)
    try:
        check_metadata(index.metadata, metadata, index.uri)  # another process may have made it
    except BaseException:
        index.close()
        raise
    return index


def _named(described: Mapping[str, Any]) -> str:
    kinds = [str(described.get(side, {}).get("kind", "?")) for side in ("fusion", "target")]
    return (
        f"backbone {described.get('backbone')} {described.get('backbone_fingerprint')} "
        f"and heads {' + '.join(kinds)} {described.get('heads')}"
    )


def check_backbone_name(uri: str, name: str) -> None:
    """Refuse a backbone alone whose name is not that of an index's, before its weights are fetched.

    Args:
        uri: The index, which need not be there.
        name: What is to be loaded.

    Raises:
        CheckpointError: Where the index was made with another backbone; names both.
    """
    if not is_backbone(name) or Path(name).is_dir() or uri == "memory:":
        return
    try:
        with open_index(uri) as index:
            described = index.metadata.get("model", {})
    except ConfigError:  # there is none yet, or what is wrong with its name is told when it is made
        return
    if described.get("backbone") not in (name, None):
        raise CheckpointError(
            f"{uri} was made with {_named(described)}, not with backbone {name}; search it with the model it was made "
            "with, or index again under another name"
        )


def load_checkpoint(checkpoint: str | Path, weights: str | Path | None = None) -> tuple[IGROTModel, str]:
    """Load a model by name.

    Args:
        checkpoint: `tiny`, a folder written by a training (its `model/` or the run itself) or by `save`, or a model
            on a hub.
        weights: Weights of its backbone; its default ones where None.

    Returns:
        The model, and the name to keep: of a folder its absolute path.

    Raises:
        CheckpointError: Where there is no such model.
    """
    folder = expand_user(checkpoint)
    if str(checkpoint) == "tiny" or not folder.is_dir():
        return load(str(checkpoint), weights), str(checkpoint)
    inner = folder / "model"
    return load(inner if inner.is_dir() else folder, weights), str(folder.absolute())


def load_recorded_model(
    metadata: Mapping[str, Any], uri: str, weights: str | Path | None = None
) -> tuple[IGROTModel, str]:
    """Load the model that an index says it was made with.

    Raises:
        ConfigError: Where it does not say which.
        CheckpointError: Where that model is not there any more.
    """
    where = metadata.get("checkpoint")
    if not where:
        raise ConfigError(f"{uri} does not say where its model lies ({_named(metadata.get('model', {}))}); name it")
    weights = weights or metadata.get("weights")
    if is_backbone(str(where)):  # and no folder of that name: of one the whole path is kept
        return baseline(build_backbone(str(where), weights), "sum"), str(where)
    return load_checkpoint(str(where), weights)
