"""Engines are selected by URI; errors for URIs that cannot be opened."""

import importlib.util
from importlib.metadata import EntryPoint

import pytest
import torch

from small_gallery import names, noise_image
from small_world import trainable
from toy_engine import ToyIndex
from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines import factory
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import MemoryIndex, open_index, register_engine
from union_igrot.gallery.gallery import Gallery


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("photos", "'photos' is not the name of an index .expected photos.lance"),
        ("photos.lance.txt", "is not the name of an index"),
        ("", "is not the name of an index"),
        ("memory:mine", "is not the name of an index"),
        ("http://host/photos.lance", "is not the name of an index"),
        ("memory:", "cannot be opened again"),
        ("milvus://", r"milvus://\[user:password@\]host"),
        ("milvus+tls://host", r"milvus\+tls:// with"),
        ("milvus://host/photos.lance", "the collection of letters"),
        ("milvus://host:99999/photos", "milvus://"),
        ("milvus+lite:photos.db", "is not the name of an index"),
    ],
)
def test_an_invalid_uri_is_a_one_line_error(uri, message):
    if uri.startswith("milvus"):
        pytest.importorskip("pymilvus")
    with pytest.raises(ConfigError, match=message):
        open_index(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("photos.lance", r'photos.lance needs lance; pip install "union-igrot\[gallery\]"'),
        ("s3://bucket/photos.lance", r"union-igrot\[gallery\]"),
        ("milvus://host/photos", r"union-igrot\[milvus\]"),
    ],
)
def test_the_error_for_a_missing_package_names_the_extra(uri, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=message):
        open_index(uri)


def test_each_index_in_memory_is_new():
    first, second = (open_index("memory:", dim=2, metadata={"a": 1}, create=True) for _ in range(2))
    first.upsert(Rows(["a"], torch.ones(1, 2), {}))
    assert (len(first), len(second), second.metadata) == (1, 0, {"a": 1})
    with pytest.raises(ConfigError, match="dim is None"):
        open_index("memory:", create=True)
    with pytest.raises(ConfigError, match="dim is 0"):
        MemoryIndex(0)


def test_an_engine_of_another_package_serves_a_gallery(tmp_path):
    model = trainable().eval()
    uri = f"toy:{tmp_path}"
    with Gallery.open(uri, model) as gallery:
        gallery.add([noise_image(number) for number in range(4)], names(4), {"year": [1, 2, 3, None]})
        assert gallery.search(noise_image(2), k=2).ids[0] == "p2"
        assert gallery.search(noise_image(2), where="year < 3", exclude="p0").ids == ["p1"]
        assert gallery.delete("p3") == 1
    assert Gallery.open(uri, model, create=False).ids("year is not null") == ["p0", "p1", "p2"]


def test_an_engine_is_loaded_from_its_entry_point(monkeypatch):
    entry = EntryPoint(".toys", "toy_engine:ToyIndex", "union_igrot.engines")
    monkeypatch.setattr(
        factory, "entry_points", lambda group, name: [entry] if (group, name) == (entry.group, entry.name) else []
    )
    monkeypatch.setattr(factory, "_ENGINES", dict(factory._ENGINES))
    assert len(open_index("any/where.toys", dim=2, create=True)) == 0
    with pytest.raises(ConfigError, match="is not the name of an index"):
        open_index("s3://bucket/where.toys", dim=2, create=True)
    with pytest.raises(ConfigError, match="invalid name of an engine: 'a b'"):
        register_engine("a b", ToyIndex)


def test_an_unreachable_server_is_a_one_line_error(monkeypatch):
    pytest.importorskip("pymilvus")
    from union_igrot.gallery.engines import milvus  # noqa: PLC0415 - needs the client

    monkeypatch.setattr(milvus, "_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(DataError, match=r"milvus://127.0.0.1:9/photos: .*check that the server") as caught:
        open_index("milvus://ann:secret@127.0.0.1:9/photos")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
