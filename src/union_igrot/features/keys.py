"""Which row of which shard holds a key.

Knows digests of keys and places. Does not know what lies there.
"""

import hashlib
from collections.abc import Sequence
from typing import final

import numpy as np
from jaxtyping import Int64, UInt64


def digests_of(keys: Sequence[str]) -> UInt64[np.ndarray, "keys 2"]:
    """Hash keys to the first 16 bytes of their SHA-256.

    Lone surrogates (file names in an unknown encoding) are allowed.
    """
    data = b"".join(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:16] for key in keys)
    return np.frombuffer(bytearray(data), dtype=np.uint64).reshape(len(keys), 2)


@final
class Index:
    """Places by digest: sorted runs, each more than twice as long as the next, so that a small addition stays cheap.

    A place is any number >= 0. Where a digest was inserted twice, the first is found.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[UInt64[np.ndarray, "rows 2"], Int64[np.ndarray, " rows"]]] = []

    def insert(self, digests: UInt64[np.ndarray, "rows 2"], places: Int64[np.ndarray, " rows"]) -> None:
        """Add entries."""
        while self._runs and len(self._runs[-1][1]) <= 2 * len(places):
            older = self._runs.pop()
            digests, places = np.concatenate([older[0], digests]), np.concatenate([older[1], places])
        order = np.argsort(digests[:, 0], kind="stable")
        self._runs.append((np.asfortranarray(digests[order]), places[order]))  # each half contiguous, to search fast

    def find(self, digests: UInt64[np.ndarray, "keys 2"]) -> Int64[np.ndarray, " keys"]:
        """Return the place of each digest, -1 where there is none."""
        found = np.full(len(digests), -1, dtype=np.int64)
        for run, places in self._runs:
            wanted = np.flatnonzero(found < 0)
            at = np.searchsorted(run[:, 0], digests[wanted, 0])
            while wanted.size:
                inside = at < len(run)
                wanted, at = wanted[inside], at[inside]
                near = run[at, 0] == digests[wanted, 0]
                wanted, at = wanted[near], at[near]
                equal = run[at, 1] == digests[wanted, 1]
                found[wanted[equal]] = places[at[equal]]
                wanted, at = wanted[~equal], at[~equal] + 1  # digests that share their first half: look on
        return found
