"""Files of a saved model: `model.json`, `heads.safetensors`, and the weights of a backbone that was changed.

The weights of a backbone are saved if they are not those that its name stands for: an encoder was tuned, or the weights
came with a checkpoint of the reference.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from union_igrot.errors import CheckpointError, first_line
from union_igrot.models.backbones.base import Backbone, weights_hash
from union_igrot.models.backbones.weights import load_strict, read_state_dict
from union_igrot.models.factory import build_backbone
from union_igrot.storage.atomic import write_atomic
from union_igrot.storage.paths import expand_user
from union_igrot.types import Preprocess

FORMAT = 1
MODEL_FILE, HEADS_FILE, IMAGES_FILE, README_FILE = (
    "model.json",
    "heads.safetensors",
    "training_images.txt",
    "README.md",
)
BACKBONE_FILE, TOKENIZER_FOLDER = "backbone.safetensors", "tokenizer"
"""The backbone's weights, by the network's own names, so that they also serve as `model.weights`; its tokenizer."""
_NETWORK = "network."


@dataclass(frozen=True)
class SavedModel:
    """Contents of a saved model's files.

    Attributes:
        backbone: Name of the backbone.
        fingerprint: Hash of the backbone that the heads belong to.
        backbone_weights: How to build the backbone whose weights are in the folder; None for the weights of its name.
        heads: Hash of the heads' weights.
        kinds: Kind of each head, by `fusion`, `target` and `projector`.
        options: Keyword arguments of each head.
        metadata: Facts on the training ("card" in `model.json`).
        state: The heads' weights, in 32 bits.
        images: Identities of the training images; None if they are not recorded, or the file was not copied.
        readme: The model card, or None.
    """

    backbone: str
    fingerprint: str
    backbone_weights: dict[str, Any] | None
    heads: str
    kinds: dict[str, str]
    options: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
    state: dict[str, Tensor]
    images: frozenset[str] | None
    readme: str | None


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the folder of a saved model: the path itself, or `model/` in the folder of a run."""
    folder = expand_user(path)
    inner = folder / "model"
    return inner if inner.is_dir() and not (folder / MODEL_FILE).is_file() else folder


def read_checkpoint(folder: Path) -> SavedModel:
    """Read a saved model's files.

    Raises:
        CheckpointError: If one is missing, damaged or of a later format.
    """
    try:
        saved = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
        state = {name: x.float() for name, x in load_file(folder / HEADS_FILE).items()}
        options = {"fusion": dict(saved["fusion"]), "target": dict(saved["target"])}
        options["projector"] = dict(saved.get("projector") or {"kind": "none"})
        kinds = {head: str(given.pop("kind")) for head, given in options.items()}
        name, fingerprint, heads = (str(saved[key]) for key in ("backbone", "backbone_fingerprint", "heads"))
        weights, metadata = saved.get("backbone_weights"), dict(saved.get("card") or {})
        weights = None if weights is None else dict(weights)
        version, count = int(saved.get("format", FORMAT)), saved.get("training_images")
        readme = (folder / README_FILE).read_text(encoding="utf-8") if (folder / README_FILE).is_file() else None
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a saved model ({error}); give a folder with {MODEL_FILE} and {HEADS_FILE}"
        ) from None
    if version > FORMAT:
        raise CheckpointError(
            f"{folder} is in format {version} (expected at most {FORMAT}); install a later union-igrot"
        )
    images = _read_training_images(folder, count)
    return SavedModel(name, fingerprint, weights, heads, kinds, options, metadata, state, images, readme)


def _read_training_images(folder: Path, count: int | None) -> frozenset[str] | None:
    if count is None or not (folder / IMAGES_FILE).is_file():
        return None
    try:
        found = frozenset((folder / IMAGES_FILE).read_text().split())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / IMAGES_FILE} ({error}); copy the model again") from None
    if len(found) != count:
        raise CheckpointError(
            f"{folder / IMAGES_FILE} lists {len(found)} images (expected {count}, as in {MODEL_FILE}); copy both again"
        )
    return found


def write_checkpoint(
    folder: Path,
    description: Mapping[str, Any],
    state: Mapping[str, Tensor],
    images: frozenset[str] | None,
    readme: str,
) -> None:
    """Write a model's files, the description last.

    Args:
        folder: An existing folder.
        description: Contents of `model.json` except the format and the number of images.
        state: The heads' weights.
        images: Identities of the training images, or None.
        readme: The model card.
    """
    count = None if images is None else len(images)
    text = json.dumps({"format": FORMAT, **description, "training_images": count}, indent=2) + "\n"
    _write_tensors(folder / HEADS_FILE, state)
    if images is None:
        (folder / IMAGES_FILE).unlink(missing_ok=True)
    else:
        write_atomic(folder / IMAGES_FILE, "".join(f"{name}\n" for name in sorted(images)))
    write_atomic(folder / README_FILE, readme)
    write_atomic(folder / MODEL_FILE, text)


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    tensors = {name: x.contiguous() for name, x in state.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary))


def save_backbone(backbone: Backbone, folder: Path, *, half: bool = False) -> tuple[str, dict[str, Any]]:
    """Write a backbone's weights, and the files of its tokenizer if that is not part of the code.

    Args:
        backbone: The backbone.
        folder: An existing folder.
        half: Whether to write 16-bit weights.

    Returns:
        The fingerprint of the written weights, and the values from which `restore_backbone` builds the backbone.
    """
    own = backbone.state_dict()
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in own.items():
        kept = (x.half() if half and x.is_floating_point() else x).cpu().contiguous()
        # safetensors refuses two names for one memory.
        state[name] = kept.clone() if kept.untyped_storage().data_ptr() in seen else kept
        seen.add(kept.untyped_storage().data_ptr())
    _write_tensors(folder / BACKBONE_FILE, {name.removeprefix(_NETWORK): x for name, x in state.items()})
    partial = folder / f"{TOKENIZER_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    backbone.save_tokenizer(partial)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    if any(partial.iterdir()):
        partial.rename(folder / TOKENIZER_FOLDER)
    else:
        partial.rmdir()
    written = {name: x.to(own[name].dtype) for name, x in state.items()}
    fingerprint = f"{weights_hash(written)}-{backbone.preprocess.fingerprint()}"
    return fingerprint, {"file": BACKBONE_FILE, **backbone.architecture(), "preprocess": asdict(backbone.preprocess)}


def remove_backbone(folder: Path) -> None:
    """Remove the files that `save_backbone` wrote, before another model is saved in the folder."""
    (folder / BACKBONE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)


def restore_backbone(name: str, built: Mapping[str, Any], folder: Path) -> Backbone:
    """Build a backbone from the files and values of `save_backbone`.

    Args:
        name: Name of the backbone.
        built: The values returned by `save_backbone`.
        folder: The folder of its files.

    Raises:
        ConfigError: If the name or the architecture is unknown.
        CheckpointError: If a file is missing, damaged or does not fit.
    """
    kind, tokenizer = built.get("kind"), folder / TOKENIZER_FOLDER
    try:
        if kind == "open_clip":
            from union_igrot.models.backbones.open_clip import restore_open_clip  # noqa: PLC0415 - heavy

            backbone: Backbone = restore_open_clip(name, built["config"], _preprocess(built), tokenizer)
        elif kind is not None:
            from union_igrot.models.backbones.hf import restore_hf  # noqa: PLC0415 - heavy

            backbone = restore_hf(name, str(kind), built["config"], _preprocess(built), tokenizer)
        else:
            backbone = build_backbone(name)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MODEL_FILE} does not describe how to build its backbone ({type(error).__name__}: "
            f"{first_line(error)}); copy the model again"
        ) from None
    return load_backbone_weights(backbone, folder)


def load_backbone_weights(backbone: Backbone, folder: Path) -> Backbone:
    """Load the weights that `save_backbone` wrote into a backbone.

    Raises:
        CheckpointError: If the file is missing, damaged or does not fit.
    """
    own = backbone.state_dict()
    state = read_state_dict(folder / BACKBONE_FILE)
    named = {f"{_NETWORK}{name}" if f"{_NETWORK}{name}" in own else name: x for name, x in state.items()}
    load_strict(backbone, named, str(folder / BACKBONE_FILE))
    return backbone


def _preprocess(built: Mapping[str, Any]) -> Preprocess:
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in built["preprocess"].items()}
    return Preprocess(**given)
