"""The feature store: features of one frozen backbone by key, kept on disk and shared by any number of processes.

Knows keys, features and the shards that hold them. Does not know what a key stands for, how features are computed or
what they are used for.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, UInt64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.features.keys import Index, digests_of
from union_igrot.features.shards import Shard, map_shard, serialize
from union_igrot.models.backbones.base import Backbone
from union_igrot.storage.atomic import log, remove_temporary
from union_igrot.storage.cache import ADVICE, check_manifest, default_root, feature_folder, make_room, write_cached
from union_igrot.storage.locks import acquire_shared, lock_path, note_use
from union_igrot.storage.sizes import format_size
from union_igrot.types import Features

Dtype = Literal["float32", "float16"]

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16}
_OPEN_SHARDS: Final = 1024  # mapped at once; far below the 65,530 maps that Linux gives a process


@final
class FeatureStore:
    """Features of one backbone by key, on disk, shared by any number of processes.

    What a key stands for must never change under one fingerprint: where a key was added twice (by two processes at
    once, or again with tokens), the first that this store has seen answers. An instance belongs to one thread; a
    pickled one opens the same folder again.

    Args:
        root: The cache folder; see `default_root`.
        fingerprint: Names backbone weights, preprocessing and precision; letters, digits, `_` and `-`.
        dtype: How numbers are kept. Part of the folder: one fingerprint has one dtype.
        backbone: Name of the backbone, shown to people; noted when the folder is made.
        limit: What the features of all backbones may take, in bytes; None for no limit. Before an addition would
            exceed it, the least recently used fingerprints that nobody has open are removed. Where all that is left
            is in use it may still be exceeded, and the log says so once.

    Raises:
        ConfigError: Where the folder cannot be made or the fingerprint cannot name one, and where the folder keeps
            another dtype or format.
        DataError: Where the folder cannot be read or written.
    """

    def __init__(
        self, root: Path, fingerprint: str, dtype: Dtype = "float32", *, backbone: str = "", limit: int | None = None
    ) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"the store's dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}")
        self.root, self.fingerprint, self.dtype = root, fingerprint, dtype
        self.folder = feature_folder(root, fingerprint)
        self.backbone, self.limit, self._told = backbone, limit, False
        self._lock = lock_path(self.folder)
        self._width: int | None = None
        self._shards: list[str] = []
        self._known: set[str] = set()
        self._maps: dict[int, Shard] = {}
        self._all = Index()
        self._full = Index()  # only entries with tokens
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._held, alone = acquire_shared(self._lock)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the cache folder {self.folder} ({error.strerror}); {ADVICE}") from error
        notes = {"backbone": backbone} if backbone else {}
        check_manifest(self.folder / "manifest.json", {"format": 1, "dtype": dtype}, notes)
        remove_temporary(self.folder, all_of_them=alone)
        self.refresh()

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

    def __reduce__(self) -> tuple[partial["FeatureStore"], tuple[Path, str, Dtype]]:
        # A worker process opens its own lock and maps.
        opened = partial(FeatureStore, backbone=self.backbone, limit=self.limit)
        return opened, (self.root, self.fingerprint, self.dtype)

    def missing(self, keys: Sequence[str], tokens: bool = False) -> list[int]:
        """Find what has still to be encoded.

        Args:
            keys: Any strings.
            tokens: Whether an entry kept without tokens counts as missing.

        Returns:
            Positions of the keys that are not stored, in order, each key once.
        """
        digests = digests_of(keys)
        absent = np.flatnonzero(self._find(digests, tokens) < 0)
        first: dict[bytes, int] = {}
        for position in absent.tolist():
            first.setdefault(digests[position].tobytes(), position)
        return list(first.values())

    def add(self, keys: Sequence[str], features: Features) -> None:
        """Keep features under their keys; when this returns they are on disk and survive a kill.

        Numbers are rounded to the store's dtype. `pooled_at` is kept only with tokens. Trailing columns that are
        padding in every item are not kept.

        Raises:
            DataError: Where the disk is full or cannot be written, and then nothing stored before is touched;
                where keys and features do not fit each other or the store, or a number is beyond float16's range.
        """
        self._check(keys, features)
        if not keys:
            return
        parts = self._pack(features) | {"digests": torch.from_numpy(digests_of(keys).view(np.uint8))}
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors"  # sorts by time: the oldest answers
        pieces = serialize(parts)
        if self.limit is not None:
            self._keep_below(self.limit, sum(map(len, pieces)))
        write_cached(self.folder / name, pieces)
        self._admit([name])
        note_use(self._lock)

    def get(self, keys: Sequence[str], tokens: bool = False) -> Features:
        """Read features back.

        Args:
            keys: Any strings that were added; one may stand several times.
            tokens: Whether tokens, mask and `pooled_at` are read too; else only `pooled`.

        Returns:
            One float32 item a key, in the order of `keys`, bit for bit what was added, rounded to the store's dtype.
            Tokens are as long as the longest item of the request; padding (mask False) holds what was added, or zero
            beyond what was kept.

        Raises:
            DataError: Where a key is not stored (with tokens, if asked for), the message naming the first; where some
                entries have `pooled_at` and others have not; where a shard has been damaged or removed since.
        """
        place = self._find(digests_of(keys), tokens)
        absent = np.flatnonzero(place < 0)
        if absent.size:
            raise DataError(
                f"{absent.size} of {len(keys)} keys are not in the feature store {self.folder}"
                f"{' with tokens' if tokens else ''}, the first is {keys[absent[0]]!r}; add what missing() lists"
            )
        groups = list(self._group(place))
        pooled = torch.empty(len(keys), self._width or 0)
        for at, rows, shard in groups:
            pooled[at] = shard["pooled"][rows].float()
        return self._with_tokens(pooled, groups) if tokens else Features(pooled)

    def rounded(self, features: Features) -> Features:
        """Return features as `get` would after `add`, but for trailing padding; on the device they are on.

        Raises:
            DataError: Where a number is beyond float16's range.
        """
        tokens = None if features.tokens is None else self._round(features.tokens).float()
        return Features(self._round(features.pooled).float(), tokens, features.mask, features.pooled_at)

    def refresh(self) -> None:
        """See what other processes have added; `missing` and `get` do so when they do not find a key."""
        try:
            names = {path.name for path in self.folder.iterdir() if path.suffix == ".safetensors"}
        except OSError as error:
            raise DataError(f"cannot read {self.folder} ({error.strerror}); run again to make it anew") from error
        self._admit(sorted(names - self._known))

    def _keep_below(self, limit: int, needed: int) -> None:
        taken = make_room(self.root, needed, limit)
        if taken > limit and not self._told:
            self._told = True
            log.warning(
                "the cache %s takes %s, more than its limit of %s: all of it is in use",
                self.root,
                format_size(taken),
                format_size(limit),
            )

    def _find(self, digests: UInt64[np.ndarray, "keys 2"], tokens: bool) -> Int64[np.ndarray, " keys"]:
        index = self._full if tokens else self._all
        place = index.find(digests)
        if (place < 0).any():
            self.refresh()
            place = index.find(digests)
        return place

    def _admit(self, names: Sequence[str]) -> None:
        """Take shards into the index, the oldest first."""
        admitted: list[str] = []
        found: list[tuple[UInt64[np.ndarray, "rows 2"], Int64[np.ndarray, " rows"], bool]] = []
        for name in names:
            shard = map_shard(self.folder / name)
            if shard is None:
                continue
            self._belongs(name, shard)
            digests = shard["digests"].numpy().view(np.uint64)
            place = (len(self._shards) + len(admitted) << 32) + np.arange(len(digests))  # shard and row in one number
            found.append((digests, place, "tokens" in shard))
            admitted.append(name)
        self._shards += admitted
        self._known.update(admitted)
        for index, chosen in ((self._all, found), (self._full, [entry for entry in found if entry[2]])):
            if chosen:
                index.insert(np.concatenate([e[0] for e in chosen]), np.concatenate([e[1] for e in chosen]))

    def _belongs(self, name: str, shard: Shard) -> None:
        pooled = shard["pooled"]
        if pooled.dtype != _DTYPES[self.dtype]:
            raise ConfigError(
                f"{self.folder / name} keeps {pooled.dtype}, the store was opened with dtype={self.dtype}; "
                "open it with the dtype it keeps, or delete the folder"
            )
        if self._width not in (None, pooled.shape[1]):
            raise DataError(
                f"{self.folder / name} holds features of width {pooled.shape[1]}, other shards {self._width}; "
                "one fingerprint must name one backbone: delete the folder and encode anew"
            )
        self._width = pooled.shape[1]

    def _group(self, place: Int64[np.ndarray, " keys"]) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        """Return for each shard concerned: positions in the request, rows in the shard (ascending), its arrays."""
        order = np.argsort(place, kind="stable")
        numbers, first = np.unique(place[order] >> 32, return_index=True)
        for number, at in zip(numbers.tolist(), np.split(order, first[1:]), strict=False):
            if number not in self._maps:
                path = self.folder / self._shards[number]
                shard = map_shard(path)
                if shard is None:
                    raise DataError(f"{path} has been damaged or removed while in use; run again to encode it anew")
                if len(self._maps) >= _OPEN_SHARDS:
                    self._maps.clear()
                self._maps[number] = shard
            yield torch.from_numpy(at), torch.from_numpy(place[at] & 0xFFFFFFFF), self._maps[number]

    def _with_tokens(self, pooled: Tensor, groups: Sequence[tuple[Tensor, Tensor, Shard]]) -> Features:
        placed = {"pooled_at" in shard for _, _, shard in groups}
        if len(placed) > 1:
            raise DataError("some of these keys have pooled_at and others have not; get them in separate calls")
        mask = torch.zeros(len(pooled), max((s["mask"].shape[1] for _, _, s in groups), default=0), dtype=torch.bool)
        pooled_at = torch.zeros(len(pooled), dtype=torch.int64) if placed == {True} else None
        for at, rows, shard in groups:
            mask[at, : shard["mask"].shape[1]] = shard["mask"][rows]
            if pooled_at is not None:
                pooled_at[at] = shard["pooled_at"][rows]
        length = _used(mask, pooled_at)
        tokens = torch.zeros(len(pooled), length, pooled.shape[1])
        for at, rows, shard in groups:
            kept = min(length, shard["tokens"].shape[1])
            tokens[at, :kept] = shard["tokens"][:, :kept][rows].float()
        return Features(pooled, tokens, mask[:, :length].contiguous(), pooled_at)

    def _check(self, keys: Sequence[str], features: Features) -> None:
        pooled, tokens, mask, at = features.pooled, features.tokens, features.mask, features.pooled_at
        if len(keys) != len(features) or len(set(keys)) != len(keys):
            raise DataError(f"{len(keys)} keys ({len(set(keys))} different) for {len(features)} items; give one each")
        if self._width not in (None, pooled.shape[1]):
            raise DataError(
                f"features of width {pooled.shape[1]}, but {self.folder} keeps {self._width}: "
                "one fingerprint must name one backbone"
            )
        if (tokens is None) != (mask is None):
            raise DataError("tokens and mask come together; give both or neither")
        if tokens is not None and at is not None and bool(((at < 0) | (at >= tokens.shape[1])).any()):
            raise DataError(f"pooled_at reaches from {at.min()} to {at.max()}, but there are {tokens.shape[1]} tokens")

    def _pack(self, features: Features) -> dict[str, Tensor]:
        parts = {"pooled": self._round(features.pooled).cpu()}
        if features.tokens is not None and features.mask is not None:
            mask = features.mask.detach().cpu()
            if features.pooled_at is not None:
                parts["pooled_at"] = features.pooled_at.detach().to("cpu", torch.int64)
            length = _used(mask, parts.get("pooled_at"))
            parts["tokens"] = self._round(features.tokens[:, :length]).cpu()
            parts["mask"] = mask[:, :length]
        return parts

    def _round(self, values: Tensor) -> Tensor:
        rounded = values.detach().to(_DTYPES[self.dtype])
        if self.dtype == "float16" and bool((rounded.isinf() & ~values.detach().isinf()).any()):
            raise DataError("a feature is beyond float16's range (65504); keep this backbone with dtype=float32")
        return rounded


def _used(mask: Bool[Tensor, "batch length"], pooled_at: Int[Tensor, " batch"] | None) -> int:
    """Count the columns up to the last that holds a real token or the position `pooled` was read from."""
    real = mask.any(dim=0).nonzero()
    used = int(real.max()) + 1 if len(real) else 0
    return used if pooled_at is None or not len(pooled_at) else max(used, int(pooled_at.max()) + 1)
