"""The index of keys against a dictionary."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.features.store import KeyIndex, hash_keys

halves = st.sampled_from([0, 1, 2, 2**63, 2**64 - 1])  # few values: digests often share one half, or both


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(runs=st.lists(st.lists(st.tuples(halves, halves), min_size=1, max_size=6), max_size=6))
def test_index_finds_the_first_of_each_digest(runs):
    index, stored, position = KeyIndex(), {}, 0
    for run in runs:
        index.insert(np.array(run, dtype=np.uint64), np.arange(position, position + len(run)))
        for digest in run:
            stored.setdefault(digest, position)
            position += 1
    everything = [(high, low) for high in (0, 1, 2, 3, 2**63, 2**64 - 1) for low in (0, 1, 2, 3, 2**63, 2**64 - 1)]
    found = index.find(np.array(everything, dtype=np.uint64))
    assert found.tolist() == [stored.get(digest, -1) for digest in everything]


def test_many_small_insertions_keep_few_runs():
    index = KeyIndex()
    digests = hash_keys([str(i) for i in range(3000)])
    for i in range(3000):
        index.insert(digests[i : i + 1], np.array([i]))
    assert len(index._runs) <= 12
    assert index.find(digests).tolist() == list(range(3000))
    assert index.find(hash_keys(["other"])).tolist() == [-1]


def test_digests_are_the_first_half_of_sha256():
    assert hash_keys(["a", "ü"])[1].tobytes() == hashlib.sha256("ü".encode()).digest()[:16]
    assert hash_keys([]).shape == (0, 2)
