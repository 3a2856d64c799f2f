"""FeatureStore against a dictionary: what was added is returned, and what does not fit is refused."""

import errno
import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from union_igrot.errors import ConfigError, DataError, UnionError
from union_igrot.features.store import FeatureStore
from union_igrot.storage.cache import check_manifest
from union_igrot.types import Features


def make(rows: int, length: int | None = None, dim: int = 4, seed: int = 0, placed: bool = True) -> Features:
    """Random features; each mask has at least one real token, the longest fills the length."""
    draw = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, dim, generator=draw)
    if length is None:
        return Features(pooled)
    lengths = torch.randint(1, length + 1, (rows,), generator=draw)
    lengths[:1] = length
    mask = torch.arange(length) < lengths[:, None]
    return Features(pooled, torch.randn(rows, length, dim, generator=draw), mask, lengths - 1 if placed else None)


def names(*range_of: int, prefix: str = "image") -> list[str]:
    return [f"{prefix} {i}" for i in range(*range_of)]


def rounded(values: Tensor, dtype: str) -> Tensor:
    return values.half().float() if dtype == "float16" else values


def shards(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


additions = st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(1, 6)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(additions=additions, data=st.data(), dtype=st.sampled_from(["float32", "float16"]), reopen=st.booleans())
def test_get_returns_what_was_added(tmp_path_factory, additions, data, dtype, reopen):
    store = FeatureStore(tmp_path_factory.mktemp("root"), "f", dtype)
    stored: dict[str, tuple[Features, int]] = {}
    for number, (rows, length) in enumerate(additions):
        features, keys = make(rows, length, seed=number), names(rows, prefix=str(number))
        store.add(keys, features)
        stored |= {key: (features, row) for row, key in enumerate(keys)}
    if reopen:
        store = FeatureStore(store.root, "f", dtype)

    requested = data.draw(st.lists(st.sampled_from(sorted(stored)), max_size=12))
    got = store.get(requested)
    assert got.pooled.dtype == torch.float32
    assert got.tokens is got.mask is got.pooled_at is None
    for row, key in enumerate(requested):
        features, at = stored[key]
        assert torch.equal(got.pooled[row], rounded(features.pooled[at], dtype))

    requested = [key for key in requested if stored[key][0].tokens is not None]
    got = store.get(requested, tokens=True)
    longest = max((int(stored[key][0].mask[stored[key][1]].sum()) for key in requested), default=0)
    assert got.tokens.shape == (len(requested), longest, 4 if len(store._shards) else 0)
    assert got.tokens.dtype == torch.float32
    for row, key in enumerate(requested):
        features, at = stored[key]
        real = int(features.mask[at].sum())
        assert torch.equal(got.pooled[row], rounded(features.pooled[at], dtype))
        assert torch.equal(got.tokens[row, :real], rounded(features.tokens[at, :real], dtype))
        assert got.mask[row].tolist() == [True] * real + [False] * (longest - real)
        assert got.tokens[row, features.tokens.shape[1] :].count_nonzero() == 0
        if got.pooled_at is not None:
            assert got.pooled_at[row] == features.pooled_at[at]
    assert (got.pooled_at is None) == (not requested)


def test_padding_within_one_addition_is_returned(tmp_path):
    store, features = FeatureStore(tmp_path, "f"), make(6, 5)
    store.add(names(6), features)
    got = store.get(names(6), tokens=True)
    assert torch.equal(got.tokens, features.tokens)
    assert torch.equal(got.mask, features.mask)


def test_trailing_padding_is_not_stored(tmp_path):
    features = make(3, 4)
    wide = Features(
        features.pooled,
        torch.cat([features.tokens, torch.randn(3, 73, 4)], dim=1),
        torch.cat([features.mask, torch.zeros(3, 73, dtype=torch.bool)], dim=1),
        features.pooled_at,
    )
    store = FeatureStore(tmp_path, "f")
    store.add(names(3), wide)
    assert load_file(shards(store)[0])["tokens"].shape == (3, 4, 4)
    assert torch.equal(store.get(names(3), tokens=True).tokens, features.tokens)
    short = int(features.mask[2].sum())
    assert store.get(["image 2"], tokens=True).tokens.shape == (1, short, 4)


def test_the_token_that_pooled_was_read_from_is_stored_even_at_padding(tmp_path):
    features = make(2, 3, placed=False)
    mask = torch.tensor([[True, False, False], [True, False, False]])
    store = FeatureStore(tmp_path, "f")
    store.add(["a", "b"], Features(features.pooled, features.tokens, mask, torch.tensor([2, 0], dtype=torch.int32)))
    got = store.get(["a"], tokens=True)
    assert torch.equal(got.tokens[0, got.pooled_at[0]], features.tokens[0, 2])
    assert store.get(["b"], tokens=True).tokens.shape == (1, 1, 4)


def test_missing_lists_each_key_once_in_order(tmp_path):
    store = FeatureStore(tmp_path, "f")
    store.add(["plain"], make(1))
    store.add(["full"], make(1, 2))
    keys = ["new", "plain", "full", "new", "newer", "plain"]
    assert store.missing(keys) == [0, 4]
    assert store.missing(keys, tokens=True) == [0, 1, 4]
    assert store.missing([]) == []
    store.add(["plain"], make(1, 3, seed=7))
    assert store.missing(keys, tokens=True) == [0, 4]
    assert torch.equal(store.get(["plain"], tokens=True).tokens, make(1, 3, seed=7).tokens)


def test_of_a_key_added_twice_the_first_is_returned_before_and_after_reopening(tmp_path):
    store = FeatureStore(tmp_path, "f")
    store.add(["k"], make(1, seed=1))
    for seed in range(2, 6):
        store.add(["k", "x" * seed], make(2, seed=seed))
    for again in (store, FeatureStore(tmp_path, "f")):
        assert torch.equal(again.get(["k"]).pooled, make(1, seed=1).pooled)


def test_any_string_is_a_key(tmp_path):
    keys = ["", "\n", "a/b\\c", "猫", os.fsdecode(b"\xff.jpg"), "x" * 100_000, "\0", "\0\0"]
    store = FeatureStore(tmp_path, "f")
    store.add(keys, make(len(keys)))
    assert torch.equal(FeatureStore(tmp_path, "f").get(keys[::-1]).pooled, make(len(keys)).pooled.flip(0))


def test_get_names_the_first_key_that_is_not_stored(tmp_path):
    store = FeatureStore(tmp_path, "f")
    store.add(["a"], make(1))
    with pytest.raises(DataError, match=r"2 of 3 keys.*first is 'dog.jpg'"):
        store.get(["a", "dog.jpg", "cat.jpg"])
    with pytest.raises(DataError, match="with tokens, the first is 'a'"):
        store.get(["a"], tokens=True)


def test_empty_requests_and_additions(tmp_path):
    store = FeatureStore(tmp_path, "f")
    assert store.get([]).pooled.shape == (0, 0)
    store.add([], Features(torch.empty(0, 4)))
    assert shards(store) == []
    store.add(["a"], make(1, 2))
    got = store.get([], tokens=True)
    assert (got.pooled.shape, got.tokens.shape, got.mask.shape) == ((0, 4), (0, 0, 4), (0, 0))


def test_small_numbers_are_returned_bit_for_bit_and_others_than_finite_refused(tmp_path):
    pooled = torch.tensor([[-0.0, 1e-45, 3e38]])
    store = FeatureStore(tmp_path, "f")
    store.add(["a"], Features(pooled))
    assert store.get(["a"]).pooled.numpy().tobytes() == pooled.numpy().tobytes()
    for odd in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"1 of 2 features are not finite, the first of 'c'"):
            store.add(["b", "c"], Features(torch.tensor([[0.0, 0.0, 0.0], [0.0, odd, 0.0]])))
        tokens = torch.tensor([[[0.0, 0.0, odd]]])
        with pytest.raises(DataError, match="not finite"):
            store.add(["b"], Features(pooled, tokens, torch.ones(1, 1, dtype=torch.bool)))


def test_other_precisions_and_gradients_are_accepted(tmp_path):
    pooled = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    store = FeatureStore(tmp_path, "f")
    store.add(["a", "b"], Features(pooled))
    assert torch.equal(store.get(["a", "b"]).pooled, pooled.detach().float())


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    store = FeatureStore(tmp_path, "f", "float16")
    with pytest.raises(DataError, match="float16's range"):
        store.add(["a"], Features(torch.tensor([[1.0, 70_000.0]])))


@pytest.mark.parametrize(
    ("keys", "features", "message"),
    [
        (["a"], make(2), "1 keys"),
        (["a", "a"], make(2), "1 different"),
        (["a"], make(1, dim=5), "width 5"),
        (["a"], Features(torch.zeros(1, 4), tokens=torch.zeros(1, 2, 4)), "come together"),
        (
            ["a"],
            Features(torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2])),
            "pooled_at reaches",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, keys, features, message):
    store = FeatureStore(tmp_path, "f")
    store.add(["first"], make(1))
    with pytest.raises(DataError, match=message):
        store.add(keys, features)
    assert len(shards(store)) == 1


def test_entries_with_and_without_pooled_at_are_requested_separately(tmp_path):
    store = FeatureStore(tmp_path, "f")
    store.add(["a"], make(1, 2))
    store.add(["b"], make(1, 2, placed=False))
    with pytest.raises(DataError, match="separate calls"):
        store.get(["a", "b"], tokens=True)
    assert store.get(["b"], tokens=True).pooled_at is None


def test_a_shard_is_a_plain_safetensors_file(tmp_path):
    store, features = FeatureStore(tmp_path, "f", "float16"), make(3, 5)
    store.add(names(3), features)
    read = load_file(shards(store)[0])
    assert torch.equal(read["tokens"], features.tokens.half())
    assert torch.equal(read["pooled"], features.pooled.half())
    assert torch.equal(read["mask"], features.mask)
    assert torch.equal(read["pooled_at"], features.pooled_at)


def test_another_store_sees_an_addition(tmp_path):
    one, other = FeatureStore(tmp_path, "f"), FeatureStore(tmp_path, "f")
    one.add(["a"], make(1))
    other.add(["b"], make(1, seed=1))
    assert other.missing(["a", "b", "c"]) == [2]
    one.refresh()
    assert torch.equal(one.get(["b", "a"]).pooled, torch.cat([make(1, seed=1).pooled, make(1).pooled]))


def test_fingerprints_do_not_share(tmp_path):
    FeatureStore(tmp_path, "f").add(["a"], make(1))
    assert FeatureStore(tmp_path, "g").missing(["a"]) == [0]


@pytest.mark.parametrize("fingerprint", ["", "a/b", "..", ".hidden", "a b", "x" * 129])
def test_a_fingerprint_names_a_folder(tmp_path, fingerprint):
    with pytest.raises(ConfigError, match="fingerprint"):
        FeatureStore(tmp_path, fingerprint)


def test_one_fingerprint_has_one_dtype(tmp_path):
    FeatureStore(tmp_path, "f", "float16").add(["a"], make(1))
    with pytest.raises(ConfigError, match=r"float16.*float32"):
        FeatureStore(tmp_path, "f", "float32")
    (tmp_path / "features/f/manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"float16.*float32"):
        FeatureStore(tmp_path, "f", "float32")


def test_a_later_format_is_refused(tmp_path):
    store = FeatureStore(tmp_path, "f")
    (store.folder / "manifest.json").write_text(json.dumps({"format": 2, "dtype": "float32"}))
    with pytest.raises(ConfigError, match="'format': 2"):
        FeatureStore(tmp_path, "f")


def test_shards_of_two_widths_are_two_backbones(tmp_path):
    store, other = FeatureStore(tmp_path, "f"), FeatureStore(tmp_path, "f")
    store.add(["a"], make(1, dim=4))
    other.add(["b"], make(1, dim=5))
    with pytest.raises(DataError, match="one backbone"):
        store.refresh()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "short", "half", "last byte", "garbage", "other arrays", "other dtype"])
def test_a_damaged_shard_is_moved_aside_and_its_keys_are_missing_again(tmp_path, caplog, damage):
    store = FeatureStore(tmp_path, "f")
    store.add(["a", "b"], make(2, 3))
    store.add(["c"], make(1, 3, seed=1))
    path = shards(store)[0]
    store.close()
    whole, arrays = path.read_bytes(), load_file(path)
    path.unlink()
    if damage == "other arrays":
        save_file({name: part for name, part in arrays.items() if name != "mask"}, path)
    elif damage == "other dtype":
        save_file(arrays | {"mask": arrays["mask"].to(torch.uint8)}, path)
    else:
        cut = {"empty": 0, "short": 5, "half": len(whole) // 2, "last byte": len(whole) - 1, "garbage": 0}[damage]
        path.write_bytes(whole[:cut] + (b"\xff" * 500 if damage == "garbage" else b""))

    with caplog.at_level(logging.ERROR, logger="union_igrot.storage"):
        store = FeatureStore(tmp_path, "f")
    assert [record.name for record in caplog.records] == ["union_igrot.storage"]
    assert path.name in caplog.text
    assert path.with_name(path.name + ".broken").exists()
    assert store.missing(["a", "b", "c"]) == [0, 1]
    store.add(["a", "b"], make(2, 3))
    caplog.clear()
    again = FeatureStore(tmp_path, "f")
    assert not caplog.records
    assert torch.equal(again.get(["a", "b"], tokens=True).tokens, make(2, 3).tokens)


def flip(path: Path, name: str) -> None:
    """Change one byte of an array of a shard."""
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin + json.loads(content[8:begin])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["pooled", "digests", "tokens", "mask", "pooled_at"])
def test_a_changed_byte_is_noticed_at_the_first_use_and_the_shard_named(tmp_path, caplog, name):
    store = FeatureStore(tmp_path, "f")
    store.add(["a", "b"], make(2, 3))
    store.add(["c"], make(1, 3, seed=1))
    path = shards(store)[0]
    flip(path, name)
    with caplog.at_level(logging.ERROR, logger="union_igrot.storage"):
        store = FeatureStore(tmp_path, "f")
        if name not in ("pooled", "digests"):  # pooled features alone do not need the other arrays
            assert store.missing(["a", "b", "c"]) == []
            assert torch.equal(store.get(["a", "b"]).pooled, make(2, 3).pooled)
        assert store.missing(["a", "b", "c"], tokens=True) == [0, 1]
    assert f"the checksum of {name} does not match" in caplog.text
    assert path.name in caplog.text
    assert path.with_name(path.name + ".broken").exists()
    store.add(["a", "b"], make(2, 3))
    assert torch.equal(FeatureStore(tmp_path, "f").get(["a", "b"], tokens=True).tokens, make(2, 3).tokens)


def test_damage_is_noticed_by_get_too(tmp_path):
    FeatureStore(tmp_path, "f").add(["a"], make(1))
    store = FeatureStore(tmp_path, "f")
    flip(shards(store)[0], "pooled")
    with pytest.raises(DataError, match="1 of 1 keys are not in the feature store"):
        store.get(["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_shards_of_older_versions_have_no_checksums_but_must_be_finite(tmp_path, caplog, value):
    store = FeatureStore(tmp_path, "f")
    for key in "ab":
        store.add([key], make(1, 2))
    for path in shards(store):
        save_file(load_file(path), path)  # without checksums
    assert torch.equal(FeatureStore(tmp_path, "f").get(["a", "b"], tokens=True).pooled[1:], make(1).pooled)
    arrays = load_file(path)
    arrays["pooled"][0, 1] = value
    save_file(arrays, path)
    assert FeatureStore(tmp_path, "f").missing(["a", "b"]) == [1]
    assert f"{path} is damaged (pooled holds numbers that are not finite)" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\x00\xff"])
def test_a_damaged_manifest_loses_nothing(tmp_path, caplog, text):
    store = FeatureStore(tmp_path, "f")
    store.add(["a"], make(1))
    (store.folder / "manifest.json").write_text(text)
    assert torch.equal(FeatureStore(tmp_path, "f").get(["a"]).pooled, make(1).pooled)
    assert "manifest.json is damaged" in caplog.text
    assert json.loads((store.folder / "manifest.json").read_text()) == {"format": 1, "dtype": "float32"}


def test_a_shard_removed_while_in_use_is_an_error(tmp_path):
    store = FeatureStore(tmp_path, "f")
    store.add(["a"], make(1))
    shards(store)[0].unlink()
    with pytest.raises(DataError, match="removed while in use"):
        store.get(["a"])
    store = FeatureStore(tmp_path, "f")
    store.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="cannot read"):
        store.missing(["a"])


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no room"), (errno.EIO, "cannot write")])
def test_a_full_or_failing_disk_is_one_clear_error_and_does_no_damage(tmp_path, monkeypatch, code, message):
    store = FeatureStore(tmp_path, "f")
    store.add(["a"], make(1))
    before = sorted(path.name for path in store.folder.iterdir())

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UnionError, match=message) as caught:
            store.add(["b"], make(1, seed=1))
    for part in (str(store.folder), "UNION_CACHE", "cache_dir", *(["prune", "bytes"] if message == "no room" else [])):
        assert part in str(caught.value)
    assert sorted(path.name for path in store.folder.iterdir()) == before
    assert store.missing(["a", "b"]) == [1]
    store.add(["b"], make(1, seed=1))
    assert torch.equal(FeatureStore(tmp_path, "f").get(["b"]).pooled, make(1, seed=1).pooled)


def test_an_interrupted_addition_leaves_nothing(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path, "f")
    before = sorted(store.folder.iterdir())

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.add(["a"], make(1))
    assert sorted(store.folder.iterdir()) == before


def test_a_pickled_store_opens_the_same_folder(tmp_path):
    store = FeatureStore(tmp_path, "f", "float16")
    store.add(["a"], make(1))
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.get(["a"]).pooled, make(1).pooled.half().float())


def test_thousands_of_shards_do_not_use_up_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("union_igrot.features.store._OPEN_SHARDS", 8)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store = FeatureStore(tmp_path, "f")
    for number in range(60):
        store.add(names(number, number + 1), Features(torch.full((1, 4), float(number))))
    descriptors = len(list(Path("/dev/fd").iterdir()))
    got = store.get(names(60)).pooled
    assert len(list(Path("/dev/fd").iterdir())) <= descriptors
    assert len(store._maps) <= 8
    assert torch.equal(got, torch.cat([torch.full((1, 4), float(number)) for number in range(60)]))


@pytest.mark.slow
def test_thirty_thousand_keys_from_forty_shards(tmp_path):
    store, features = FeatureStore(tmp_path, "f"), Features(torch.randn(1000, 64))
    for number in range(40):
        store.add(names(number * 1000, number * 1000 + 1000), features)
    rows = np.random.default_rng(0).integers(0, 40_000, 30_000)
    keys = [f"image {row}" for row in rows]
    got = store.get(keys)
    assert torch.equal(got.pooled, features.pooled[torch.from_numpy(rows % 1000)])


@pytest.mark.slow
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


def test_a_store_that_opens_spares_the_files_of_one_that_opens_beside_it(tmp_path, monkeypatch):
    beside = []

    def other_process_writes(manifest, *arguments):
        beside.append(manifest.with_name(f"another.{'0f' * 16}.tmp"))
        beside[-1].touch()
        check_manifest(manifest, *arguments)

    monkeypatch.setattr("union_igrot.features.store.check_manifest", other_process_writes)
    store = FeatureStore(tmp_path, "f")
    assert beside[0].is_file()
    del store
    monkeypatch.undo()
    FeatureStore(tmp_path, "f")
    assert not beside[0].exists()
