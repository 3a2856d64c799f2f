"""Many shards, many keys, large shards: what must not grow with them."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from union_igrot.features.store import FeatureStore
from union_igrot.types import Features


def one(number: int) -> Features:
    return Features(torch.full((1, 4), float(number)))


def names(*range_of: int) -> list[str]:
    return [f"image {i}" for i in range(*range_of)]


def test_thousands_of_shards_do_not_use_up_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("union_igrot.features.store._OPEN_SHARDS", 8)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store = FeatureStore(tmp_path, "f")
    for number in range(60):
        store.add(names(number, number + 1), one(number))
    descriptors = len(list(Path("/dev/fd").iterdir()))
    got = store.get(names(60)).pooled
    assert len(list(Path("/dev/fd").iterdir())) <= descriptors
    assert len(store._maps) <= 8
    assert torch.equal(got, torch.cat([one(number).pooled for number in range(60)]))


def test_thirty_thousand_keys_from_forty_shards_in_a_moment(tmp_path):
    store, features = FeatureStore(tmp_path, "f"), Features(torch.randn(1000, 64))
    for number in range(40):
        store.add(names(number * 1000, number * 1000 + 1000), features)
    rows = np.random.default_rng(0).integers(0, 40_000, 30_000)
    keys = [f"image {row}" for row in rows]
    start = time.perf_counter()
    got = store.get(keys)
    assert time.perf_counter() - start < 1.0
    assert torch.equal(got.pooled, features.pooled[torch.from_numpy(rows % 1000)])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_few_rows_do_not_read_the_whole_shard(tmp_path):
    def resident() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    store = FeatureStore(tmp_path, "f")
    store.add(names(16_384), Features(torch.zeros(16_384, 1024)))  # 64 MiB
    before = resident()
    reader = FeatureStore(tmp_path, "f")
    reader.get(names(0, 16_384, 2048))
    assert resident() - before < 32 * 2**20
