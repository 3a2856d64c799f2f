"""Shards: the arrays of one addition in one safetensors file, mapped into memory when read.

Knows their layout. Does not know which shards there are, nor which is asked for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.storage.atomic import move_aside

Shard = Mapping[str, Tensor]
"""`digests` (rows, 16), `pooled` (rows, dim); where kept `tokens` (rows, length, dim), `mask` (rows, length) and
`pooled_at` (rows)."""

_FIELDS: Final = ("pooled_at", "pooled", "tokens", "digests", "mask")  # widest numbers first: each array stays aligned
_CODES: Final = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def serialize(shard: Shard) -> list[bytes | memoryview]:
    """Return the pieces of a safetensors file without copying an array.

    Source: the format section of https://github.com/huggingface/safetensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes | memoryview] = []
    end = 0
    for name in _FIELDS:
        if name in shard:
            array = shard[name].contiguous().numpy()
            start, end = end, end + array.nbytes
            code = _CODES[shard[name].dtype]
            header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
            pieces.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def map_shard(path: Path) -> Shard | None:
    """Map a shard's arrays without reading them.

    Returns:
        The shard, or None where there is none (any more): a damaged one is moved aside, with a line in the log.

    Raises:
        DataError: Where the system does not let it be read, which says nothing of the shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            shard = {name: file.get_tensor(name) for name in _FIELDS if name in names}
        _verify(shard)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}); check the disk and the permissions") from error
    except (SafetensorError, ValueError) as error:
        move_aside(path, error)
        return None
    return shard


def _verify(shard: Shard) -> None:
    given = {name: (part.dtype, tuple(part.shape)) for name, part in shard.items()}
    if "pooled" not in shard or given["pooled"][0] not in (torch.float32, torch.float16):
        raise ValueError("no pooled features")
    kind = shard["pooled"].dtype
    rows, width = shard["pooled"].shape
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "digests": (torch.uint8, (rows, 16)),
        "pooled": (kind, (rows, width)),
    }
    if "tokens" in shard or "mask" in shard:
        length = shard["mask"].shape[-1] if "mask" in shard else 0
        expected |= {"tokens": (kind, (rows, length, width)), "mask": (torch.bool, (rows, length))}
    if "pooled_at" in shard:
        expected["pooled_at"] = (torch.int64, (rows,))
    if given != expected:
        raise ValueError(f"arrays {given} where {expected} belong")
