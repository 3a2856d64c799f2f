"""The feature store: features of one frozen backbone by key, on disk, shared by any number of processes.

Each addition is a shard, one safetensors file; an index in memory leads from keys to their rows.
"""

import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, UInt64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.models.backbones.base import Backbone
from union_igrot.storage.cache import ADVICE, check_manifest, default_root, feature_folder, make_room, write_cached
from union_igrot.storage.files import log, move_aside, remove_temporary
from union_igrot.storage.locks import acquire_shared, lock_path, note_use
from union_igrot.storage.sizes import format_size
from union_igrot.types import Features

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


def map_shard(path: Path, verified: Collection[str] = ()) -> Shard | None:
    """Map a shard's arrays without reading them, but for those to verify.

    Args:
        path: The file.
        verified: Arrays to compare with their checksums; shards of older versions have none, but must be finite.

    Returns:
        The shard, or None if it does not exist or is damaged; a damaged one is moved aside and logged.

    Raises:
        DataError: If the system refuses to read it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            checksums, names = file.metadata() or {}, set(file.keys())
            shard = {name: file.get_tensor(name) for name in _FIELDS if name in names}
        _check_arrays(shard)
        for name in shard.keys() & set(verified):
            checksum = checksums.get(f"crc32.{name}")
            if checksum is None and not bool(shard[name].isfinite().all()):
                raise ValueError(f"{name} holds numbers that are not finite")
            if checksum not in (None, f"{zlib.crc32(shard[name].reshape(-1).numpy().view(np.uint8)):08x}"):
                raise ValueError(f"the checksum of {name} does not match")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}); check the disk and the permissions") from error
    except (SafetensorError, ValueError) as error:
        move_aside(path, error)
        return None
    return shard


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


Dtype = Literal["float32", "float16"]

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16}
_OPEN_SHARDS: Final = 1024  # mapped at once; far below the 65,530 maps that Linux gives a process


@final
class FeatureStore:
    """Features of one backbone by key, on disk, shared by any number of processes.

    What a key stands for must never change under one fingerprint: if a key was added twice (by two processes at once,
    or again with tokens), the first that this store has seen is returned. Arrays are compared with their checksums
    when they are first used; a damaged shard is moved aside and logged, and its keys are missing again. An instance
    belongs to one thread; a pickled one opens the same folder again.

    Args:
        root: The cache folder; see `default_root`.
        fingerprint: Names backbone weights, preprocessing and precision; letters, digits, `_` and `-`.
        dtype: How numbers are stored. Part of the folder: one fingerprint has one dtype.
        backbone: Name of the backbone, shown to people; written when the folder is created.
        limit: Largest size of the features of all backbones, in bytes; None for no limit. Before an addition would
            exceed it, the least recently used fingerprints that no process has open are removed. If all that is left
            is in use it may still be exceeded, which is logged once.

    Raises:
        ConfigError: If the folder cannot be created, the fingerprint cannot name one, or the folder has another dtype
            or format.
        DataError: If the folder cannot be read or written.
    """

    def __init__(
        self, root: Path, fingerprint: str, dtype: Dtype = "float32", *, backbone: str = "", limit: int | None = None
    ) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"invalid dtype of the feature store: {dtype!r} (expected {' or '.join(_DTYPES)})")
        self.root, self.fingerprint, self.dtype = root, fingerprint, dtype
        self.folder = feature_folder(root, fingerprint)
        self.backbone, self.limit, self._warned = backbone, limit, False
        self._lock = lock_path(self.folder)
        self._width: int | None = None
        self._verified: set[tuple[str, bool]] = set()  # shard, and whether with its tokens
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # Under the lock, as the next process may write as soon as it is released.
            self._held, alone = acquire_shared(self._lock, partial(remove_temporary, self.folder, all_of_them=True))
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the cache folder {self.folder} ({error.strerror}); {ADVICE}") from error
        notes = {"backbone": backbone} if backbone else {}
        check_manifest(self.folder / "manifest.json", {"format": 1, "dtype": dtype}, notes)
        if not alone:
            remove_temporary(self.folder, all_of_them=False)
        self._read_folder()

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        root: Path | None = None,
        *,
        dtype: Dtype = "float32",
        precision: str = "float32",
        limit: int | None = None,
    ) -> "FeatureStore":
        """Open the store of a backbone's features.

        Args:
            backbone: The backbone.
            root: The cache folder; the default one if None.
            dtype: How numbers are stored.
            precision: Precision of the backbone while it encodes; features of another precision are kept apart.
            limit: As for `FeatureStore`.
        """
        kind = dtype if precision == "float32" else f"{dtype}-{precision}"
        name = f"{backbone.fingerprint()}-{kind}"
        return cls(default_root() if root is None else root, name, dtype, backbone=backbone.name, limit=limit)

    def close(self) -> None:
        """Let other processes prune this fingerprint. Also done when the store is collected or the process ends."""
        self._held.release()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[partial["FeatureStore"], tuple[Path, str, Dtype], dict[str, Any]]:
        # A worker process opens its own lock and maps.
        opened = partial(FeatureStore, backbone=self.backbone, limit=self.limit)
        return opened, (self.root, self.fingerprint, self.dtype), {"_verified": self._verified}

    def missing(self, keys: Sequence[str], tokens: bool = False) -> list[int]:
        """Return the positions of the keys that are not stored, in order, each key once.

        Args:
            keys: Any strings.
            tokens: Whether an entry stored without tokens counts as missing.
        """
        digests = hash_keys(keys)
        absent = np.flatnonzero(self._find(digests, tokens) < 0)
        first: dict[bytes, int] = {}
        for position in absent.tolist():
            first.setdefault(digests[position].tobytes(), position)
        return list(first.values())

    def add(self, keys: Sequence[str], features: Features) -> None:
        """Store features under their keys; when this returns they are on disk and survive a kill.

        Numbers are rounded to the store's dtype. `pooled_at` is stored only with tokens, trailing columns that are
        padding in every item are not.

        Raises:
            DataError: If the disk is full or cannot be written (nothing stored before is touched), keys and features
                do not fit each other or the store, or a number is not finite or beyond float16's range.
        """
        self._check(keys, features)
        if not keys:
            return
        arrays = self._pack(features) | {"digests": torch.from_numpy(hash_keys(keys).view(np.uint8))}
        self._check_pooled("the addition", arrays["pooled"])
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors"  # sorts by time: the oldest is found first
        pieces = serialize(arrays)
        if self.limit is not None:
            self._make_room(self.limit, sum(map(len, pieces)))
        write_cached(self.folder / name, pieces)
        self._verified.add((name, True))
        self._add_shards([name])
        note_use(self._lock)

    def get(self, keys: Sequence[str], tokens: bool = False) -> Features:
        """Read features.

        Args:
            keys: Any strings that were added, also repeated.
            tokens: Whether to read tokens, mask and `pooled_at`, or only `pooled`.

        Returns:
            One float32 item per key, in the order of `keys`, bit for bit what was added, rounded to the store's dtype.
            Tokens are as long as the longest item of the request; padding (mask False) holds what was added, or zero
            beyond what was stored.

        Raises:
            DataError: If a key is not stored (with tokens, if requested), the message naming the first; if only some
                entries have `pooled_at`; if a shard has been damaged or removed since.
        """
        positions = self._find(hash_keys(keys), tokens)
        absent = np.flatnonzero(positions < 0)
        if absent.size:
            raise DataError(
                f"{absent.size} of {len(keys)} keys are not in the feature store {self.folder}"
                f"{' with tokens' if tokens else ''}, the first is {keys[absent[0]]!r}; add what missing() lists"
            )
        groups = list(self._group(positions))
        pooled = torch.empty(len(keys), self._width or 0)
        for at, rows, shard in groups:
            pooled[at] = shard["pooled"][rows].float()
        return self._with_tokens(pooled, groups) if tokens else Features(pooled)

    def rounded(self, features: Features) -> Features:
        """Return features as `get` would after `add`, but for trailing padding; on the device they are on.

        Raises:
            DataError: If a number is beyond float16's range.
        """
        if self.dtype == "float32":
            return features
        tokens = None if features.tokens is None else self._round(features.tokens).float()
        return Features(self._round(features.pooled).float(), tokens, features.mask, features.pooled_at)

    def refresh(self) -> None:
        """See what other processes have added; `missing` and `get` do so when they do not find a key."""
        try:
            names = {path.name for path in self.folder.iterdir() if path.suffix == ".safetensors"}
        except OSError as error:
            raise DataError(f"cannot read {self.folder} ({error.strerror}); run again to create it again") from error
        self._add_shards(sorted(names - self._known))

    def _read_folder(self) -> None:
        self._shards: list[str] = []
        self._known: set[str] = set()
        self._maps: dict[int, Shard] = {}
        self._indexes = {False: KeyIndex(), True: KeyIndex()}  # by whether a row has tokens, too
        self.refresh()

    def _make_room(self, limit: int, needed: int) -> None:
        taken = make_room(self.root, needed, limit)
        if taken > limit and not self._warned:
            self._warned = True
            log.warning(
                "the cache %s takes %s, more than its limit of %s: all of it is in use",
                self.root,
                format_size(taken),
                format_size(limit),
            )

    def _find(self, digests: UInt64[np.ndarray, "keys 2"], tokens: bool) -> Int64[np.ndarray, " keys"]:
        """Return the shard and row of each key as one number, -1 if it is absent or its shard is damaged."""
        positions = self._indexes[tokens].find(digests)
        if (positions < 0).any():
            self.refresh()
            positions = self._indexes[tokens].find(digests)
        intact = [self._verify(self._shards[n], tokens) for n in np.unique(positions[positions >= 0] >> 32)]
        if not all(intact):
            self._read_folder()
            return self._find(digests, tokens)
        return positions

    def _verify(self, name: str, tokens: bool) -> bool:
        if {(name, tokens), (name, True)} & self._verified:
            return True
        arrays = ("digests", "pooled", *(("tokens", "mask", "pooled_at") if tokens else ()))
        intact = map_shard(self.folder / name, arrays) is not None
        if intact:
            self._verified.add((name, tokens))
        return intact

    def _add_shards(self, names: Sequence[str]) -> None:
        """Take shards into the index, the oldest first."""
        added: list[str] = []
        found: list[tuple[UInt64[np.ndarray, "rows 2"], Int64[np.ndarray, " rows"], bool]] = []
        for name in names:
            shard = map_shard(self.folder / name)
            if shard is None:
                continue
            self._check_pooled(str(self.folder / name), shard["pooled"])
            digests = shard["digests"].numpy().view(np.uint64)
            positions = (len(self._shards) + len(added) << 32) + np.arange(len(digests))  # shard and row in one number
            found.append((digests, positions, "tokens" in shard))
            added.append(name)
        self._shards += added
        self._known.update(added)
        for tokens, index in self._indexes.items():
            if chosen := [entry for entry in found if entry[2] or not tokens]:
                index.insert(np.concatenate([e[0] for e in chosen]), np.concatenate([e[1] for e in chosen]))

    def _check_pooled(self, source: str, pooled: Tensor) -> None:
        if pooled.dtype != _DTYPES[self.dtype]:
            raise ConfigError(
                f"{source} holds {pooled.dtype}, the store was opened with dtype={self.dtype}; "
                "use its dtype, or delete the folder"
            )
        if self._width not in (None, pooled.shape[1]):
            raise DataError(
                f"{source} holds features of width {pooled.shape[1]}, other shards of {self.folder} {self._width}; "
                "one fingerprint must name one backbone: use another, or delete the folder and encode again"
            )
        self._width = pooled.shape[1]

    def _group(self, positions: Int64[np.ndarray, " keys"]) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        """Return for each shard: positions in the request, rows in the shard (ascending), its arrays."""
        order = np.argsort(positions, kind="stable")
        numbers, first = np.unique(positions[order] >> 32, return_index=True)
        for number, at in zip(numbers.tolist(), np.split(order, first[1:]), strict=False):
            if number not in self._maps:
                path = self.folder / self._shards[number]
                shard = map_shard(path)
                if shard is None:
                    raise DataError(f"{path} has been damaged or removed while in use; run again to encode it again")
                if len(self._maps) >= _OPEN_SHARDS:
                    self._maps.clear()
                self._maps[number] = shard
            yield torch.from_numpy(at), torch.from_numpy(positions[at] & 0xFFFFFFFF), self._maps[number]

    def _with_tokens(self, pooled: Tensor, groups: Sequence[tuple[Tensor, Tensor, Shard]]) -> Features:
        has_position = {"pooled_at" in shard for _, _, shard in groups}
        if len(has_position) > 1:
            raise DataError("only some of these keys have pooled_at; get them in separate calls")
        mask = torch.zeros(len(pooled), max((s["mask"].shape[1] for _, _, s in groups), default=0), dtype=torch.bool)
        pooled_at = torch.zeros(len(pooled), dtype=torch.int64) if has_position == {True} else None
        for at, rows, shard in groups:
            mask[at, : shard["mask"].shape[1]] = shard["mask"][rows]
            if pooled_at is not None:
                pooled_at[at] = shard["pooled_at"][rows]
        length = _used_length(mask, pooled_at)
        tokens = torch.zeros(len(pooled), length, pooled.shape[1])
        for at, rows, shard in groups:
            stored = min(length, shard["tokens"].shape[1])
            tokens[at, :stored] = shard["tokens"][:, :stored][rows].float()
        return Features(pooled, tokens, mask[:, :length].contiguous(), pooled_at)

    def _check(self, keys: Sequence[str], features: Features) -> None:
        pooled, tokens, mask, at = features.pooled, features.tokens, features.mask, features.pooled_at
        if len(keys) != len(features) or len(set(keys)) != len(keys):
            raise DataError(f"{len(keys)} keys ({len(set(keys))} different) for {len(features)} items; give one each")
        if (tokens is None) != (mask is None):
            raise DataError("tokens and mask come together; give both or neither")
        if tokens is not None and at is not None and bool(((at < 0) | (at >= tokens.shape[1])).any()):
            raise DataError(f"pooled_at reaches from {at.min()} to {at.max()}, but there are {tokens.shape[1]} tokens")
        finite = (
            pooled.isfinite().all(1) if tokens is None else pooled.isfinite().all(1) & tokens.isfinite().all((1, 2))
        )
        if not bool(finite.all()):
            first = keys[int(finite.int().argmin())]
            raise DataError(
                f"{int((~finite).sum())} of {len(keys)} features are not finite, the first of {first!r}; check the "
                "backbone's weights, and use precision float32"
            )

    def _pack(self, features: Features) -> dict[str, Tensor]:
        arrays = {"pooled": self._round(features.pooled).cpu()}
        if features.tokens is not None and features.mask is not None:
            mask = features.mask.detach().cpu()
            if features.pooled_at is not None:
                arrays["pooled_at"] = features.pooled_at.detach().to("cpu", torch.int64)
            length = _used_length(mask, arrays.get("pooled_at"))
            arrays["tokens"] = self._round(features.tokens[:, :length]).cpu()
            arrays["mask"] = mask[:, :length]
        return arrays

    def _round(self, values: Tensor) -> Tensor:
        rounded = values.detach().to(_DTYPES[self.dtype])
        if self.dtype == "float16" and bool((rounded.isinf() & ~values.detach().isinf()).any()):
            raise DataError("a feature is beyond float16's range (65504); store this backbone with dtype=float32")
        return rounded


def _used_length(mask: Bool[Tensor, "batch length"], pooled_at: Int[Tensor, " batch"] | None) -> int:
    """Count the columns up to the last that holds a real token or the position `pooled` was read from."""
    real = mask.any(dim=0).nonzero()
    used = int(real.max()) + 1 if len(real) else 0
    return used if pooled_at is None or not len(pooled_at) else max(used, int(pooled_at.max()) + 1)
