"""Files of a saved model: `model.json`, `heads.safetensors`, and the weights of a backbone that was changed.

The weights of a backbone are saved if they are not those that its name stands for: an encoder was tuned, or the weights
came with a checkpoint of the reference.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from union_igrot.errors import CheckpointError, ConfigError, UnionError, first_line
from union_igrot.models.backbones.base import Backbone, PreprocessChoice, weights_hash
from union_igrot.models.backbones.weights import load_strict, read_state_dict
from union_igrot.models.factory import build_backbone, build_projector, build_query_head, build_target_head
from union_igrot.models.heads.query import QueryHead, VisionProjector
from union_igrot.models.heads.target import TargetHead
from union_igrot.storage.files import expand_user, write_atomic
from union_igrot.types import Preprocess

FORMAT = 1
MODEL_FILE, HEADS_FILE = "model.json", "heads.safetensors"
IMAGES_FILE, README_FILE = "training_images.txt", "README.md"
CALIBRATION_FILE = "calibration.safetensors"
"""Embeddings of training queries by task."""
BACKBONE_FILE, TOKENIZER_FOLDER = "backbone.safetensors", "tokenizer"
"""The backbone's weights, by the network's own names, so that they also serve as `model.weights`; its tokenizer."""
_NETWORK = "network."
_MOST_BYTES = 2**24  # of a text file; real ones are a hundred times smaller, and JSON may need 24 times as much memory
_MOST_BYTES_PER_IMAGE = 100  # of the list of training images, which has 17 each
_MOST_BYTES_OF_IMAGES = 2**28  # 15 million images
_MOST_LAYERS, _MOST, _MOST_PIXELS = 1000, 10**9, 4096
_LAYERS = re.compile(r"layer|depth|block")
_OPTIONAL = {"training_images": int, "backbone_weights": dict, "preprocess": str}
_TYPES = {
    **dict.fromkeys(("backbone", "backbone_fingerprint", "heads"), str),
    **dict.fromkeys(("card", "fusion", "target", "projector"), dict),
    **{"format": int, **_OPTIONAL},
}
"""Types of the fields of `model.json`."""


@dataclass(frozen=True)
class SavedModel:
    """Contents of a saved model's files.

    Attributes:
        description: Contents of `model.json`, checked, with what earlier versions did not write; values are not null.
        state: The heads' weights, in 32 bits.
        images: Identities of the training images; None if they are not recorded, or the file was not copied.
        readme: The model card, or None.
        calibration: Embeddings of training queries by task, or None.
    """

    description: dict[str, Any]
    state: dict[str, Tensor]
    images: frozenset[str] | None
    readme: str | None
    calibration: dict[str, Tensor] | None


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the folder of a saved model: the path itself, or `model/` in the folder of a run."""
    folder = expand_user(path)
    inner = folder / "model"
    return inner if inner.is_dir() and not (folder / MODEL_FILE).is_file() else folder


def read_checkpoint(folder: Path) -> SavedModel:
    """Read a saved model's files, and check the types and ranges of its description.

    Raises:
        CheckpointError: If one is missing, damaged or of a later format, or they do not belong together.
    """
    try:
        saved = json.loads(_read_small_file(folder / MODEL_FILE))
        if not isinstance(saved, dict):
            raise ValueError(f"{MODEL_FILE} holds {type(saved).__name__}, not an object")
        if not (folder / HEADS_FILE).is_file():
            raise FileNotFoundError(f"no file {folder / HEADS_FILE}")
        earlier = {"format": FORMAT, "card": {}, "projector": {"kind": "none"}}
        saved = earlier | {name: value for name, value in saved.items() if value is not None}
        for name, kind in _TYPES.items():
            if name in saved or name not in _OPTIONAL:
                _check_type(saved, name, kind)
        if saved.get("preprocess") not in (None, *get_args(PreprocessChoice)):
            raise ValueError(f"preprocess in {MODEL_FILE} is {saved['preprocess']!r}, not model or pad")
        _check_options(saved.get("backbone_weights", {}), "backbone_weights")
        for head in ("fusion", "target", "projector"):
            _check_type(saved[head], "kind", str)
            _check_options(saved[head], head)
        state = {name: x.float() for name, x in load_file(folder / HEADS_FILE).items()}
        readme = _read_small_file(folder / README_FILE) if (folder / README_FILE).is_file() else None
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a saved model ({error}); give a folder with {MODEL_FILE} and {HEADS_FILE}"
        ) from None
    if (version := saved["format"]) > FORMAT:
        raise CheckpointError(
            f"{folder} is in format {version} (expected at most {FORMAT}); install a later union-igrot"
        )
    if weights_hash(state) != saved["heads"]:
        raise CheckpointError(f"{folder}: {HEADS_FILE} does not match {MODEL_FILE}; copy both again")
    images = _read_training_images(folder, saved.get("training_images"))
    return SavedModel(saved, state, images, readme, _read_calibration(folder))


def _read_calibration(folder: Path) -> dict[str, Tensor] | None:
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        found = {task: x.float() for task, x in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} ({first_line(error)}); copy the model again") from None
    if not all(x.ndim == 2 and len(x) and x.isfinite().all() for x in found.values()):
        raise CheckpointError(f"{path} does not hold embeddings of queries; copy the model again")
    return found


def _read_small_file(path: Path) -> str:
    if not path.is_file():  # a named pipe would wait for ever
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {_MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def _check_type(saved: Mapping[str, Any], name: str, kind: type) -> None:
    value = saved[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} in {MODEL_FILE} is of type {type(value).__name__}, not {kind.__name__}")


def _check_options(options: Mapping[str, Any], path: str) -> None:
    """Raise ValueError for reserved names and for numbers out of any range."""
    if (reserved := {"width", "sizes"} & options.keys()) and "." not in path and path != "backbone_weights":
        raise ValueError(f"{path} in {MODEL_FILE} must not set {', '.join(reserved)}")
    for name, value in options.items():
        if isinstance(value, dict):
            _check_options(value, f"{path}.{name}")
            continue
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int | float)]
        most = _MOST_LAYERS if _LAYERS.search(name) else _MOST
        if not all(abs(x) <= most for x in numbers) or (isinstance(value, list) and len(value) > _MOST_LAYERS):
            raise ValueError(f"{path}.{name} in {MODEL_FILE} is out of range")


def _read_training_images(folder: Path, count: int | None) -> frozenset[str] | None:
    if count is None or not (folder / IMAGES_FILE).is_file():
        return None
    try:
        if (size := (folder / IMAGES_FILE).stat().st_size) > min(
            _MOST_BYTES_PER_IMAGE * max(count, 1), _MOST_BYTES_OF_IMAGES
        ):
            raise ValueError(f"{size:,} bytes for {count:,} images")
        found = frozenset((folder / IMAGES_FILE).read_text().split())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / IMAGES_FILE} ({error}); copy the model again") from None
    if len(found) != count:
        raise CheckpointError(
            f"{folder / IMAGES_FILE} lists {len(found)} images (expected {count}, as in {MODEL_FILE}); copy both again"
        )
    return found


def build_heads(saved: SavedModel, width: int, folder: Path) -> tuple[QueryHead, TargetHead, VisionProjector | None]:
    """Build the heads of a saved model and load their weights.

    Args:
        saved: The saved model.
        width: Width of the joint space.
        folder: Its folder, for errors.

    Raises:
        CheckpointError: If the description is invalid or does not fit the weights.
    """

    def build() -> nn.ModuleDict:
        heads = {
            "fusion": build_query_head(width=width, **saved.description["fusion"]),
            "target": build_target_head(width=width, **saved.description["target"]),
        }
        projector = build_projector(width=width, **saved.description["projector"])
        return nn.ModuleDict(heads if projector is None else {**heads, "projector": projector})

    try:
        heads = _build_within(build, saved.state, folder, HEADS_FILE)
    except ConfigError as error:
        raise CheckpointError(f"cannot build the heads of {folder / MODEL_FILE}: {error}") from None
    load_strict(heads, saved.state, str(folder / HEADS_FILE), f"copy it and {MODEL_FILE} again")
    modules: Any = heads
    return modules["fusion"], modules["target"], modules["projector"] if "projector" in heads else None


def _build_within(build: Callable[[], nn.Module], state: Mapping[str, Tensor], folder: Path, file: str) -> Any:
    """Build a module that has as many weights as a file; first without memory, to be sure."""
    count = _weight_count(state.values())
    try:
        with torch.device("meta"):
            described = _weight_count(build().state_dict().values())
    except UnionError:
        raise
    except Exception as error:
        if "meta" not in str(error):
            raise CheckpointError(
                f"{folder / MODEL_FILE} does not describe how to build its model ({type(error).__name__}: "
                f"{first_line(error)}); copy the model again"
            ) from None
        described = count  # a module of another package that cannot be built there
    if described > 2 * count + 2**20:
        raise CheckpointError(
            f"{folder / MODEL_FILE} describes a model of {described:,} weights, but {file} holds {count:,}; copy both "
            "again"
        )
    return build()


def _weight_count(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def write_checkpoint(
    folder: Path,
    description: Mapping[str, Any],
    state: Mapping[str, Tensor],
    images: frozenset[str] | None,
    readme: str,
    calibration: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's files, the description last.

    Args:
        folder: An existing folder.
        description: Contents of `model.json` except the format and the number of images.
        state: The heads' weights.
        images: Identities of the training images, or None.
        readme: The model card.
        calibration: Embeddings of training queries by task, written in 16 bits, or None.
    """
    count = None if images is None else len(images)
    text = json.dumps({"format": FORMAT, **description, "training_images": count}, indent=2) + "\n"
    _write_tensors(folder / HEADS_FILE, state)
    if images is None:
        (folder / IMAGES_FILE).unlink(missing_ok=True)
    else:
        write_atomic(folder / IMAGES_FILE, "".join(f"{name}\n" for name in sorted(images)))
    if calibration is None:
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    else:
        _write_tensors(folder / CALIBRATION_FILE, {task: x.half().cpu() for task, x in calibration.items()})
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
    fingerprint = backbone.fingerprint({name: x.to(own[name].dtype) for name, x in state.items()})
    return fingerprint, {"file": BACKBONE_FILE, **backbone.architecture(), "preprocess": asdict(backbone.preprocess)}


def remove_backbone(folder: Path) -> None:
    """Remove the files that `save_backbone` wrote, before another model is saved in the folder."""
    (folder / BACKBONE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)


def restore_backbone(
    name: str, built: Mapping[str, Any], folder: Path, preprocess: PreprocessChoice | None = None
) -> Backbone:
    """Build a backbone from the files and values of `save_backbone`.

    Args:
        name: Name of the backbone.
        built: The values returned by `save_backbone`.
        folder: The folder of its files.
        preprocess: The choice of preprocessing of a backbone whose name says how it is built.

    Raises:
        ConfigError: If the name or the architecture is unknown.
        CheckpointError: If a file is missing, damaged or does not fit.
    """
    kind, tokenizer = built.get("kind"), folder / TOKENIZER_FOLDER
    if kind is None:
        return load_backbone_weights(build_backbone(name, preprocess=preprocess), folder)
    state = read_state_dict(folder / BACKBONE_FILE)
    if odd := [path.name for path in tokenizer.glob("*") if not path.is_file()]:
        raise CheckpointError(f"{tokenizer} holds {odd[0]}, which is not a file; copy the model again")
    try:
        config, resized = dict(built["config"]), _saved_preprocess(built["preprocess"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MODEL_FILE} does not describe how to build its backbone ({type(error).__name__}: "
            f"{first_line(error)}); copy the model again"
        ) from None

    def build() -> Backbone:
        if kind == "open_clip":
            from union_igrot.models.backbones.open_clip import restore_open_clip  # noqa: PLC0415 - heavy

            return restore_open_clip(name, config, resized, tokenizer)
        from union_igrot.models.backbones.hf import restore_hf  # noqa: PLC0415 - heavy

        return restore_hf(name, str(kind), config, resized, tokenizer)

    return load_backbone_weights(_build_within(build, state, folder, BACKBONE_FILE), folder, state)


def load_backbone_weights(backbone: Backbone, folder: Path, state: Mapping[str, Tensor] | None = None) -> Backbone:
    """Load the weights that `save_backbone` wrote into a backbone; `state` are those weights, if they have been read.

    Raises:
        CheckpointError: If the file is missing, damaged or does not fit.
    """
    own = backbone.state_dict()
    state = read_state_dict(folder / BACKBONE_FILE) if state is None else state
    named = {f"{_NETWORK}{name}" if f"{_NETWORK}{name}" in own else name: x for name, x in state.items()}
    load_strict(backbone, named, str(folder / BACKBONE_FILE))
    backbone.is_described_by_name = True
    return backbone


def _saved_preprocess(saved: Mapping[str, Any]) -> Preprocess:
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
    preprocess = Preprocess(**given)
    numbers = (*preprocess.mean, *preprocess.std, preprocess.pad_ratio)
    if not (isinstance(preprocess.size, int) and 1 <= preprocess.size <= _MOST_PIXELS):
        raise ValueError(f"size {preprocess.size!r} of the preprocessing is out of range")
    if len(numbers) != 7 or not all(isinstance(x, int | float) and abs(x) <= _MOST for x in numbers):
        raise ValueError("mean, std or pad_ratio of the preprocessing are not numbers")
    if preprocess.fit not in ("squash", "crop", "pad") or preprocess.interpolation not in ("bicubic", "bilinear"):
        raise ValueError("fit or interpolation of the preprocessing is unknown")
    return preprocess
