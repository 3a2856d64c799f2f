"""A backbone's own weights in a folder: written, and built again from there alone.

Needed where the weights are not those that the backbone's name stands for: an encoder was
tuned, or came inside another's file. Knows how each kind of backbone is built without its
name's files. Does not know heads or downloads.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from union_igrot.errors import CheckpointError, first_line
from union_igrot.models.backbones.base import Backbone, weights_hash
from union_igrot.models.backbones.factory import build_backbone
from union_igrot.models.backbones.weights import fill, read_state_dict
from union_igrot.storage.atomic import write_atomic
from union_igrot.types import Preprocess

FILE, WORDS = "backbone.safetensors", "tokenizer"
"""Weights by the network's own names, so that they also serve as `model.weights`; and what texts are cut by."""
_INNER = "network."


def write_weights(backbone: Backbone, folder: Path, *, half: bool = False) -> tuple[str, dict[str, Any]]:
    """Write a backbone's weights, and the files of its tokenizer where that is not part of the code.

    Args:
        backbone: What is written.
        folder: An existing folder.
        half: Whether to write 16-bit weights.

    Returns:
        The fingerprint of what was written, and how the backbone is built again, in plain values.
    """
    state, seen = {}, set()
    for name, x in backbone.state_dict().items():
        kept = (x.half() if half and x.is_floating_point() else x).cpu().contiguous()
        # safetensors refuses two names for one memory.
        state[name] = kept.clone() if kept.untyped_storage().data_ptr() in seen else kept
        seen.add(kept.untyped_storage().data_ptr())
    inner = {name.removeprefix(_INNER): x for name, x in state.items()}
    write_atomic(folder / FILE, lambda temporary: save_file(inner, temporary))
    words = folder / f"{WORDS}.partial"
    shutil.rmtree(words, ignore_errors=True)
    words.mkdir()
    backbone.save_tokenizer(words)
    shutil.rmtree(folder / WORDS, ignore_errors=True)
    if any(words.iterdir()):
        words.rename(folder / WORDS)
    else:
        words.rmdir()
    own = {name: x.to(backbone.state_dict()[name].dtype) for name, x in state.items()}
    fingerprint = f"{weights_hash(own)}-{backbone.preprocess.fingerprint()}"
    return fingerprint, {"file": FILE, **backbone.architecture(), "preprocess": asdict(backbone.preprocess)}


def remove_weights(folder: Path) -> None:
    """Remove what `write_weights` wrote, where a model without weights of its own takes the folder over."""
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / WORDS, ignore_errors=True)


def build_again(name: str, notes: Mapping[str, Any], folder: Path) -> Backbone:
    """Build a backbone from what `write_weights` wrote and returned.

    Args:
        name: The backbone's name.
        notes: How it is built.
        folder: Where its files lie.

    Raises:
        ConfigError: Where the name or the layout is not known.
        CheckpointError: Where a file is missing, damaged or does not fit.
    """
    kind = notes.get("kind")
    try:
        if kind == "open_clip":
            from union_igrot.models.backbones.open_clip import restore_open_clip  # noqa: PLC0415 - heavy, only what is used

            backbone: Backbone = restore_open_clip(name, notes["config"], _preprocess(notes), folder / WORDS)
        elif kind is not None:
            from union_igrot.models.backbones.hf import restore_hf  # noqa: PLC0415 - heavy, only what is used

            backbone = restore_hf(name, str(kind), notes["config"], _preprocess(notes), folder / WORDS)
        else:
            backbone = build_backbone(name)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: model.json does not say how its backbone is built ({type(error).__name__}: "
            f"{first_line(error)}); copy the model again"
        ) from None
    return put_weights(backbone, folder)


def put_weights(backbone: Backbone, folder: Path) -> Backbone:
    """Fill a backbone with the weights in a folder.

    Raises:
        CheckpointError: Where the file is missing, damaged or does not fit.
    """
    fill(backbone, _own_names(backbone, read_state_dict(folder / FILE)), str(folder / FILE))
    return backbone


def _own_names(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = backbone.state_dict()
    return {f"{_INNER}{name}" if f"{_INNER}{name}" in own else name: x for name, x in state.items()}


def _preprocess(notes: Mapping[str, Any]) -> Preprocess:
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in notes["preprocess"].items()}
    return Preprocess(**given)
