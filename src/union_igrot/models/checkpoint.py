"""The files of a saved model: `model.json`, `heads.safetensors` and what may lie beside them.

Knows the format and reads it whole or says what is wrong with it. Nothing half-written is ever
left under a final name. Does not know models, backbones or hubs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from union_igrot.errors import CheckpointError
from union_igrot.storage.atomic import write_atomic

FORMAT = 1
NOTES, HEADS, PICTURES, README = "model.json", "heads.safetensors", "training_images.txt", "README.md"


@dataclass(frozen=True)
class SavedModel:
    """What a saved model's files say.

    Attributes:
        backbone: Name of the backbone.
        fingerprint: Hash of the backbone that the heads belong to.
        own: How the backbone is built whose weights lie in the folder; None where they are its name's.
        heads: Hash of the heads' weights.
        kinds: Kind of each head, by `fusion`, `target` and `projector`.
        options: Keyword arguments of each head.
        card: What a reader has to know of the training.
        state: The heads' weights, in 32 bits.
        images: Identities of the images trained on; None where they are not recorded or not copied along.
        readme: The model card that lies beside; None where there is none.
    """

    backbone: str
    fingerprint: str
    own: dict[str, Any] | None
    heads: str
    kinds: dict[str, str]
    options: dict[str, dict[str, Any]]
    card: dict[str, Any]
    state: dict[str, Tensor]
    images: frozenset[str] | None
    readme: str | None


def read_saved(folder: Path) -> SavedModel:
    """Read a saved model's files.

    Raises:
        CheckpointError: Where one is missing, damaged or of a later format.
    """
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        state = {name: x.float() for name, x in load_file(folder / HEADS).items()}
        options = {"fusion": dict(notes["fusion"]), "target": dict(notes["target"])}
        options["projector"] = dict(notes.get("projector") or {"kind": "none"})
        kinds = {side: str(taken.pop("kind")) for side, taken in options.items()}
        name, fingerprint, heads = (str(notes[key]) for key in ("backbone", "backbone_fingerprint", "heads"))
        own, card = notes.get("backbone_weights"), dict(notes.get("card") or {})
        own = None if own is None else dict(own)
        version, count = int(notes.get("format", FORMAT)), notes.get("training_images")
        readme = (folder / README).read_text(encoding="utf-8") if (folder / README).is_file() else None
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a saved model ({error}); give a folder with {NOTES} and {HEADS}"
        ) from None
    if version > FORMAT:
        raise CheckpointError(
            f"{folder} is in format {version}, this version reads up to {FORMAT}; install a later union-igrot"
        )
    images = _read_training_images(folder, count)
    return SavedModel(name, fingerprint, own, heads, kinds, options, card, state, images, readme)


def _read_training_images(folder: Path, count: int | None) -> frozenset[str] | None:
    if count is None or not (folder / PICTURES).is_file():
        return None
    try:
        found = frozenset((folder / PICTURES).read_text().split())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / PICTURES} cannot be read ({error}); copy the model again") from None
    if len(found) != count:
        raise CheckpointError(f"{folder}: {PICTURES} names {len(found)} images, {NOTES} {count}; copy both again")
    return found


def write_saved(
    folder: Path, notes: Mapping[str, Any], state: Mapping[str, Tensor], images: frozenset[str] | None
) -> None:
    """Write a model's files, the description last.

    Args:
        folder: An existing folder.
        notes: What `model.json` says beside the format and the number of images.
        state: The heads' weights.
        images: Identities of the images trained on, or None.
    """
    count = None if images is None else len(images)
    text = json.dumps({"format": FORMAT, **notes, "training_images": count}, indent=2) + "\n"
    write_tensors(folder / HEADS, state)
    if images is None:
        (folder / PICTURES).unlink(missing_ok=True)
    else:
        write_atomic(folder / PICTURES, "".join(f"{name}\n" for name in sorted(images)))
    write_atomic(folder / NOTES, text)


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, readable for everyone."""
    tensors = {name: x.contiguous() for name, x in state.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary))
