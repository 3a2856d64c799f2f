"""Files of weights to state dicts, without ever running what is inside a file.

Reads safetensors, pickled state dicts (`weights_only=True`) and TorchScript archives such as
OpenAI's CLIP files. Knows nothing of architectures: names of tensors are left as they are,
but for wrappers around a whole state dict.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast, final

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from union_igrot.errors import CheckpointError, first_line

LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    OSError,  # no such file or repository, no network: most of what the hub's libraries raise is one
    cast(
        type[Exception], HfHubHTTPError.__mro__[1]
    ),  # the HTTP client's own errors, whichever client the hub's library speaks with
    StrictDataclassError,  # a configuration of other types
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AssertionError,
    EOFError,
    ImportError,  # a tokenizer that needs a package which is not there
    RuntimeError,  # torch about archives, a checksum that does not fit
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What transformers, OpenCLIP and timm raise where a file is missing, damaged or odd, or cannot be fetched."""
WEIGHTS = "weights=PATH (beside model=NAME, model.weights=PATH)"
"""How a person names weights of their own to a command."""
_LISTED = 6
_WRAPPERS = ("state_dict", "model_state_dict", "model")
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


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file.

    A TorchScript archive is read as data alone: its tensors are taken from the archive by a
    reader that builds nothing else, and its program is neither compiled nor run
    (`torch.jit.load` would do the first, and its files count as code).

    Args:
        path: A safetensors file, a pickled state dict, or a TorchScript archive.

    Returns:
        Tensors by name, on the CPU, in the file's own types. Wrappers (`state_dict`, `model`)
        and the prefix `module.` are taken off.

    Raises:
        CheckpointError: Where the file is absent, damaged, not of these kinds or would need
            code of its own to be opened.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give a .safetensors, .pt or .pth file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _read_script(path) if _is_script(path) else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {first_line(error)}; copy the file again") from None
    except (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); copy it again"
        ) from None
    return unwrap_state_dict(found, str(path))


def unwrap_state_dict(found: object, where: str) -> dict[str, Tensor]:
    """Take off what training programs put around a state dict.

    Args:
        found: A state dict, or one under the key `state_dict`, `model_state_dict` or `model`.
        where: What to call it in an error.

    Returns:
        Its tensors by name, without a common prefix `module.`.

    Raises:
        CheckpointError: Where it holds something else than tensors.
    """
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{where} holds no state dict but {type(found).__name__}; save `model.state_dict()`")
    odd = [str(name) for name, x in found.items() if not isinstance(x, Tensor) or not isinstance(name, str)]
    if odd:
        raise CheckpointError(
            f"{where} holds entries that are not tensors: {summarize_names(odd)}; save a plain state dict"
        )
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): x for name, x in found.items()}
    return dict(found)


def load_strict(network: nn.Module, state: Mapping[str, Tensor], where: str, hint: str = "") -> None:
    """Copy a state dict into a network, every tensor of both accounted for.

    Args:
        network: What is filled; keeps its own types.
        state: Tensors by the network's own names; 16-bit ones are widened.
        where: What to call the state dict in an error.
        hint: What to do next, at the end of an error.

    Raises:
        CheckpointError: Where a tensor is missing, not known or of another shape; lists them.
    """
    own = network.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"missing {summarize_names(missing)}")
    if unknown := [name for name in state if name not in own]:
        problems.append(f"not known {summarize_names(unknown)}")
    shapes = [(n, tuple(state[n].shape), tuple(x.shape)) for n, x in own.items() if n in state]
    if unlike := [f"{name} {given} for {wanted}" for name, given, wanted in shapes if given != wanted]:
        problems.append(f"of another shape {summarize_names(unlike)}")
    if problems:
        raise CheckpointError(f"{where} does not fit: {'; '.join(problems)}" + (f"; {hint}" if hint else ""))
    network.load_state_dict({name: x.to(own[name].dtype) for name, x in state.items()})


def summarize_names(names: Iterable[str]) -> str:
    """Name the first few of many, and say how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"[{', '.join(names[:_LISTED])}{more}]"


def _is_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


@final
class _Part:
    """Stands for a module of a TorchScript archive; holds what the archive says of it."""

    parts: dict[str, Any]

    def __setstate__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return all tensors below, by dotted name."""
        found: dict[str, Tensor] = {}
        for name, x in self.parts.items():
            if isinstance(x, Tensor):
                found[prefix + name] = x
            elif isinstance(x, _Part):
                found |= x.tensors(f"{prefix}{name}.")
        return found


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """Lay a tensor over a storage; the copy checks the bounds."""
    if prod(size) == 0:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, offset).clone()


@final
class _ScriptReader(pickle.Unpickler):
    """Unpickles the data of a TorchScript archive; whatever is not data is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Know modules, tensors and storages, and nothing that could run."""
        if module.partition(".")[0] == "__torch__":
            return _Part
        if module == "torch" and name in _STORAGES:
            return name
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _view,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the archive asks for {module}.{name}, which weights do not need")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Read one storage of the archive."""
        _, kind, key, _, _ = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            dtype = _STORAGES[kind]
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _read_script(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rsplit("/", 1)[0]
        module = _ScriptReader(archive, root).load()
    if not isinstance(module, _Part):
        raise pickle.UnpicklingError("the archive holds no module")
    return module.tensors()
