"""Files of weights to state dicts, without running what is inside a file.

Reads safetensors, pickled state dicts (`weights_only=True`) and TorchScript archives such as OpenAI's CLIP files.
"""

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from union_igrot.errors import CheckpointError, first_line, one_line

LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    OSError,  # no such file or repository, no network: most of what the hub's libraries raise is one
    cast(type[Exception], HfHubHTTPError.__mro__[1]),  # errors of the hub's HTTP client, whichever it is
    StrictDataclassError,  # a configuration of other types
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AssertionError,
    EOFError,
    ImportError,  # a tokenizer whose package is not installed
    RuntimeError,  # torch about archives, a wrong checksum
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What transformers, OpenCLIP and timm raise if a file is missing, damaged or odd, or cannot be downloaded."""
WEIGHTS_OPTION = "weights=PATH (beside model=NAME, model.weights=PATH)"
"""How weights of one's own are given to a command."""
_LISTED = 6
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip.", "net.")
_LFS_POINTER = b"version https://git-lfs"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What training programs put beside the weights and what runs no code: options, losses and metrics.
_SAFE: list[Any] = [
    argparse.Namespace,
    type(np.dtype),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "bBhHiIlLqQefd?"},
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file.

    A TorchScript archive is read as data: its tensors are taken from it by a reader that builds nothing else, and its
    program is neither compiled nor run (`torch.jit.load` would compile it).

    Args:
        path: A safetensors file, a pickled state dict, or a TorchScript archive.

    Returns:
        Tensors by name, on the CPU, in the file's own dtypes. Wrappers (`state_dict`, `model`) and the prefix `module.`
        are removed.

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind, or would run code on loading.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give a .safetensors, .pt or .pth file of weights")
    try:
        found = _load_file(path)
    except LIBRARY_ERRORS as error:
        if named := re.search(r"GLOBAL (\S+) was not|`([\w.]+)`.*add_safe_globals", str(error)):
            thing = next(filter(None, named.groups()))
            raise CheckpointError(
                f"{path} cannot be read as weights: it holds a Python object ({thing}), and loading it could run code; "
                "save model.state_dict() alone"
            ) from None
        reason = f"{type(error).__name__}: {first_line(error).removeprefix('Weights only load failed. ')}"
        reason = reason if "weights_only" not in reason else "damaged, or not a state dict"
        raise CheckpointError(f"{path} cannot be read as weights ({reason}); {replace_advice(path)}") from None
    return unwrap_state_dict(found, str(path))


def replace_advice(path: Path) -> str:
    """Return what to do about a damaged file: one of the hub's cache is deleted, as nothing else replaces it."""
    if Path(constants.HF_HUB_CACHE) in path.parents:
        return f"it is in the cache: delete {path.resolve()} and run the command again to download it"
    return "copy the file again"


def check_content(path: Path) -> bytes:
    """Return the first bytes of a file of weights.

    Raises:
        CheckpointError: If the file is a Git-LFS pointer or a web page.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not the weights; run `git lfs pull`, or download the file")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself")
    return start


def _load_file(path: Path) -> object:
    start = check_content(path)
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and not zipfile.is_zipfile(path)):
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED and "/code/" not in member.filename:  # never read
                    raise CheckpointError(
                        f"{path} holds a compressed member ({member.filename}); files of torch.save hold none: "
                        "save the weights again"
                    )
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_script(archive)
    with torch.serialization.safe_globals(_SAFE):
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrap_state_dict(found: object, source: str) -> dict[str, Tensor]:
    """Remove what training programs put around a state dict.

    Args:
        found: A state dict, or a mapping that holds one under a usual name (`state_dict`, `model`) or beside nothing
            but other values.
        source: What to call it in an error.

    Returns:
        Its tensors by name, without a common prefix `module.`.

    Raises:
        CheckpointError: If it holds something else than tensors.
    """
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if isinstance(found, Mapping) and not any(isinstance(x, Tensor) for x in found.values()):
        inner = [x for x in found.values() if isinstance(x, Mapping) and x and all(map(_is_plain, x.values()))]
        found = inner[0] if len(inner) == 1 else found
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{source} holds no state dict but {type(found).__name__}; save `model.state_dict()`")
    if odd := [str(name) for name, x in found.items() if not _is_plain(x) or not isinstance(name, str)]:
        raise CheckpointError(
            f"{source} holds entries that are sparse, quantized, complex, without values, or not tensors: "
            f"{summarize_names(odd)}; save a plain state dict"
        )
    return _without_prefix(found, "module.") or dict(found)


def _is_plain(x: Any) -> bool:
    dense = isinstance(x, Tensor) and x.layout == torch.strided
    return dense and not (x.is_quantized or x.is_meta or x.is_complex())


def _without_prefix(state: Mapping[str, Tensor], prefix: str, *, partial: bool = False) -> dict[str, Tensor]:
    """Return the tensors below a prefix; none if some lack it, unless `partial` is set."""
    below = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    return below if partial or len(below) == len(state) else {}


def remove_prefixes(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Remove prefixes of training programs (`_orig_mod.`, `model.`, `clip.`), if the names below are the wanted ones.

    Args:
        state: Tensors by name.
        names: The names of a network.

    Returns:
        The state dict below the prefixes, without what is beside it; unchanged if it fits no better.
    """
    best = dict(state)
    for prefix in _PREFIXES:
        below = _without_prefix(state, prefix, partial=True)
        if below:
            below = remove_prefixes(below, names)
            if len(below.keys() & set(names)) > len(best.keys() & set(names)):
                best = below
    return best


def load_strict(network: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = "") -> None:
    """Copy a state dict into a network; every tensor of both has to have its counterpart.

    Args:
        network: The network; keeps its own dtypes.
        state: Tensors by the network's own names; 16-bit ones are widened.
        source: What to call the state dict in an error.
        hint: What to do next, at the end of an error.

    Raises:
        CheckpointError: If a tensor is missing, unknown or of another shape; lists them.
    """
    own = network.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"missing {summarize_names(missing)}")
    if unknown := [name for name in state if name not in own]:
        problems.append(f"not known {summarize_names(unknown)}")
    shapes = [(n, tuple(state[n].shape), tuple(x.shape)) for n, x in own.items() if n in state]
    if unlike := [f"{name} {given} for {expected}" for name, given, expected in shapes if given != expected]:
        problems.append(f"of another shape {summarize_names(unlike)}")
    if problems:
        raise CheckpointError(f"{source} does not fit: {'; '.join(problems)}" + (f"; {hint}" if hint else ""))
    network.load_state_dict({name: x.to(own[name].dtype) for name, x in state.items()})


def summarize_names(names: Iterable[str]) -> str:
    """Return the first few of many names, and how many more there are."""
    names = [one_line(name, 100) for name in sorted(names)]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"[{', '.join(names[:_LISTED])}{more}]"


@final
class _ScriptModule:
    """A module of a TorchScript archive: its attributes by name."""

    attributes: dict[str, Any]

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return all tensors below, by dotted name."""
        found: dict[str, Tensor] = {}
        for name, x in self.attributes.items():
            if isinstance(x, Tensor):
                found[prefix + name] = x
            elif isinstance(x, _ScriptModule):
                found |= x.tensors(f"{prefix}{name}.")
        return found


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """Return a tensor of a storage; the copy checks the bounds."""
    if prod(size) == 0:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, offset).clone()


@final
class _ScriptUnpickler(pickle.Unpickler):
    """Unpickles the data of a TorchScript archive and refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return modules, tensors and storages; nothing that could run."""
        if module.partition(".")[0] == "__torch__":
            return _ScriptModule
        if module == "torch" and name in _STORAGES:
            return name
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not expected")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Read one storage of the archive."""
        _, kind, key, _, _ = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            dtype = _STORAGES[kind]
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _read_script(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rsplit("/", 1)[0]
    module = _ScriptUnpickler(archive, root).load()
    if not isinstance(module, _ScriptModule):
        raise pickle.UnpicklingError("the archive holds no module")
    return module.tensors()
