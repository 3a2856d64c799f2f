"""Shards of a feature store, one safetensors file per addition, and the index from keys to their rows."""

import hashlib
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from union_igrot.errors import DataError
from union_igrot.storage.atomic import move_aside

Shard = Mapping[str, Tensor]
"""`digests` (rows, 16), `pooled` (rows, dim) and optionally `tokens` (rows, length, dim), `mask` (rows, length) and
`pooled_at` (rows)."""

_FIELDS: Final = ("pooled_at", "pooled", "tokens", "digests", "mask")  # widest numbers first: each array stays aligned
_CODES: Final = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK: Final = 2**20


def serialize(shard: Shard) -> list[bytes | memoryview]:
    """Return the pieces of a safetensors file, without copying an array; its metadata hold a CRC-32 per array.

    Source: the format section of https://github.com/huggingface/safetensors.
    """
    metadata = {"format": "pt"}
    header: dict[str, object] = {"__metadata__": metadata}
    pieces: list[bytes | memoryview] = []
    end = 0
    for name in (name for name in _FIELDS if name in shard):
        array = shard[name].contiguous().numpy()
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _CODES[shard[name].dtype], "shape": list(array.shape), "data_offsets": [start, end]}
        pieces.append(array.reshape(-1).view(np.uint8).data)
        metadata[f"crc32.{name}"] = f"{zlib.crc32(pieces[-1]):08x}"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def map_shard(path: Path) -> Shard | None:
    """Map a shard's arrays without reading them.

    Returns:
        The shard, or None if it does not exist or is damaged; a damaged one is moved aside and logged.

    Raises:
        DataError: If the system refuses to read it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            shard = {name: file.get_tensor(name) for name in _FIELDS if name in names}
        _check_arrays(shard)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}); check the disk and the permissions") from error
    except (SafetensorError, ValueError) as error:
        move_aside(path, error)
        return None
    return shard


def verify_shard(path: Path, names: Collection[str]) -> bool:
    """Compare arrays of a shard with their checksums; shards of older versions have none, but must be finite.

    Returns:
        Whether the shard is intact; a damaged one is moved aside and logged.

    Raises:
        DataError: If the system refuses to read it.
    """
    try:
        # Not through the mapping, so that the arrays do not count as memory of this process.
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
            checksums = header.get("__metadata__", {})
            for name in header.keys() & set(names):
                start, end = header[name]["data_offsets"]
                file.seek(begin + start)
                checksum, left = 0, end - start
                while chunk := file.read(min(left, _CHUNK)):
                    checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
                if f"{checksum:08x}" != checksums.get(f"crc32.{name}", f"{checksum:08x}"):
                    raise ValueError(f"the checksum of {name} does not match")
        if "crc32.pooled" not in checksums:
            shard = map_shard(path) or {}
            for name in {"pooled", "tokens"} & set(names) & set(shard):
                if not bool(shard[name].isfinite().all()):
                    raise ValueError(f"{name} holds numbers that are not finite")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the disk and the permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        move_aside(path, error)
        return False
    return True


def _check_arrays(shard: Shard) -> None:
    given = {name: (array.dtype, tuple(array.shape)) for name, array in shard.items()}
    if "pooled" not in shard or given["pooled"][0] not in (torch.float32, torch.float16):
        raise ValueError("no pooled features")
    dtype = shard["pooled"].dtype
    rows, width = shard["pooled"].shape
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "digests": (torch.uint8, (rows, 16)),
        "pooled": (dtype, (rows, width)),
    }
    if "tokens" in shard or "mask" in shard:
        length = shard["mask"].shape[-1] if "mask" in shard else 0
        expected |= {"tokens": (dtype, (rows, length, width)), "mask": (torch.bool, (rows, length))}
    if "pooled_at" in shard:
        expected["pooled_at"] = (torch.int64, (rows,))
    if given != expected:
        raise ValueError(f"arrays {given} (expected {expected})")


def hash_keys(keys: Sequence[str]) -> UInt64[np.ndarray, "keys 2"]:
    """Hash keys to the first 16 bytes of their SHA-256.

    Lone surrogates (file names in an unknown encoding) are allowed.
    """
    data = b"".join(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:16] for key in keys)
    return np.frombuffer(bytearray(data), dtype=np.uint64).reshape(len(keys), 2)


@final
class KeyIndex:
    """Positions by digest: sorted runs, each more than twice as long as the next, so that small additions stay cheap.

    A position is any number >= 0. If a digest was inserted twice, the first position is found.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[UInt64[np.ndarray, "rows 2"], Int64[np.ndarray, " rows"]]] = []

    def insert(self, digests: UInt64[np.ndarray, "rows 2"], positions: Int64[np.ndarray, " rows"]) -> None:
        """Add entries."""
        while self._runs and len(self._runs[-1][1]) <= 2 * len(positions):
            older = self._runs.pop()
            digests, positions = np.concatenate([older[0], digests]), np.concatenate([older[1], positions])
        order = np.argsort(digests[:, 0], kind="stable")
        self._runs.append((np.asfortranarray(digests[order]), positions[order]))  # each half contiguous, to search fast

    def find(self, digests: UInt64[np.ndarray, "keys 2"]) -> Int64[np.ndarray, " keys"]:
        """Return the position of each digest, -1 if it is absent."""
        found = np.full(len(digests), -1, dtype=np.int64)
        for run, positions in self._runs:
            wanted = np.flatnonzero(found < 0)
            at = np.searchsorted(run[:, 0], digests[wanted, 0])
            while wanted.size:
                inside = at < len(run)
                wanted, at = wanted[inside], at[inside]
                near = run[at, 0] == digests[wanted, 0]
                wanted, at = wanted[near], at[near]
                equal = run[at, 1] == digests[wanted, 1]
                found[wanted[equal]] = positions[at[equal]]
                wanted, at = wanted[~equal], at[~equal] + 1  # digests may share their first half
        return found
