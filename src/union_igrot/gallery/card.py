"""Which model an index belongs to, written beside it, so that no other is ever asked of it.

Knows models and the card of an index. Does not know rows or searches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.model import IGROTModel, load_model

FORMAT: Final = 1


def card_of(model: IGROTModel, checkpoint: str | None) -> dict[str, Any]:
    """Give what is kept with an index: the model's fingerprint, its description, and where it is loaded from."""
    described = model.describe()
    return {"format": FORMAT, "fingerprint": model.fingerprint(), "model": described, "checkpoint": checkpoint}


def check_card(card: Mapping[str, Any], model: IGROTModel, uri: str) -> None:
    """Refuse a model that an index was not made with.

    Raises:
        CheckpointError: Naming both.
    """
    if card.get("fingerprint") == model.fingerprint():
        return
    if "fingerprint" not in card:
        raise CheckpointError(f"{uri} does not say which model it was made with; make it again with union-index")
    made, where = _named(card.get("model", {})), card.get("checkpoint")
    raise CheckpointError(
        f"{uri} was made with {made}" + (f" (checkpoint {where})" if where else "") + f", not with "
        f"{_named(model.describe())}; search it with the model it was made with, or index again under another name"
    )


def _named(described: Mapping[str, Any]) -> str:
    kinds = [str(described.get(side, {}).get("kind", "?")) for side in ("fusion", "target")]
    return (
        f"backbone {described.get('backbone')} {described.get('backbone_fingerprint')} "
        f"and heads {' + '.join(kinds)} {described.get('heads')}"
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
    folder = Path(checkpoint).expanduser()
    if str(checkpoint) == "tiny" or not folder.is_dir():
        return load_model(str(checkpoint), weights), str(checkpoint)
    inner = folder / "model"
    return load_model(inner if inner.is_dir() else folder, weights), str(folder.absolute())


def load_named(card: Mapping[str, Any], uri: str, weights: str | Path | None = None) -> tuple[IGROTModel, str]:
    """Load the model that an index says it was made with.

    Raises:
        ConfigError: Where it does not say which.
        CheckpointError: Where that model is not there any more.
    """
    where = card.get("checkpoint")
    if not where:
        raise ConfigError(f"{uri} does not say where its model lies ({_named(card.get('model', {}))}); name it")
    return load_checkpoint(str(where), weights)
