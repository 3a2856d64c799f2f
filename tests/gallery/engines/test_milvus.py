"""The Milvus engine: rows and addresses, and tests on a server."""

import multiprocessing
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest
import torch
from torch.nn.functional import normalize

from index_locations import MILVUS, SERVER, new_location
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation.ranking import exact_topk
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index

pytest.importorskip("pymilvus", reason='the extra "milvus" is not installed')
from union_igrot.gallery.engines import milvus as engine


@pytest.fixture(params=[MILVUS])
def served(request, tmp_path):
    found = new_location(request.param, tmp_path)
    yield found
    found.remove()


def test_an_address_is_parsed():
    assert engine.parse_address("milvus://host/photos") == ("http://host:19530", "photos", "", "")
    assert engine.parse_address("milvus+tls://host:443/photos") == ("https://host:443", "photos", "", "")
    assert engine.parse_address("milvus://ann:a%40b@[::1]:7/p_1") == ("http://[::1]:7", "p_1", "ann", "a@b")


def test_a_version_is_parsed():
    assert [engine.parse_version(text) for text in ("v2.3.5-lite", "2.10.1", "unknown")] == [(2, 3), (2, 10), (0, 0)]


def test_rows_beyond_the_limits_are_refused():
    def entities(name, **columns):
        return list(
            engine.to_entities(Rows([name], torch.ones(1, 2), {key: [value] for key, value in columns.items()}))
        )

    (one,) = entities("a", year=2020, nothing=None, thumb=b"\x00\x01")
    assert one.pop("vector").tolist() == [1, 1]
    assert one == {"id": "a", "c_year": 2020, "c_thumb": "AAE="}
    with pytest.raises(DataError, match=r"the columns of 'a' take 80,0\d\d bytes, too many for Milvus"):
        entities("a", thumb=b"x" * 60_000)
    with pytest.raises(DataError, match="at most 65,535 bytes"):
        entities("\u00fc" * 40_000)


def test_requests_are_split_by_size():
    rows = Rows([str(i) for i in range(300)], torch.ones(300, 1000), {"text": ["x" * 60_000] * 300})
    requests = list(engine.split_requests(list(engine.to_entities(rows)), 1000))
    assert [one["id"] for request in requests for one in request] == rows.ids
    assert max(map(len, requests)) * 64_000 <= engine.REQUEST_BYTES
    assert len(requests) == 3
    assert list(engine.split_requests([], 3)) == []


def test_a_foreign_collection_is_refused(served):
    with pytest.raises(ConfigError, match=r"there is no index milvus://.*; make one"):
        open_index(served.uri)
    with pytest.raises(ConfigError, match="dim is None"):
        open_index(served.uri, create=True)
    index = served.create(4, {"model": "tiny"})
    with pytest.raises(ConfigError, match="holds embeddings of width 4, not 5"):
        open_index(served.uri, dim=5)
    assert open_index(served.uri, dim=4, metadata={"model": "other"}, create=True).metadata == {"model": "tiny"}
    client = index._client
    client.create_collection("foreign_one", dimension=4)
    try:
        with pytest.raises(ConfigError, match="is a Milvus collection but not an index"):
            open_index(served.uri.rsplit("/", 1)[0] + "/foreign_one")
    finally:
        client.drop_collection("foreign_one")


def test_exact_search_is_exact_while_the_server_builds_its_index(served, monkeypatch):
    """Milvus searches rows that it has not indexed yet by an approximation of its own."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(100, 64, generator=generator)
    vectors = normalize(centers.repeat(120, 1) + 0.7 * torch.randn(12_000, 64, generator=generator), dim=-1)
    queries = normalize(centers[:40] + 0.7 * torch.randn(40, 64, generator=generator), dim=-1)
    index = served.create(64)

    def check(rows):
        kept = [i for i in range(rows) if i % 10 == 3]
        expected = exact_topk(queries, vectors[kept], 10)
        found = index.search(queries, 10, where="tenth = 3", mode="exact")
        assert [hits.ids for hits in found] == [[str(kept[p]) for p in row] for row in expected.positions]

    def write(first, last):
        names = [str(i) for i in range(first, last)]
        index.upsert(Rows(names, vectors[first:last], {"tenth": [i % 10 for i in range(first, last)]}))

    write(0, 6000)
    check(6000)
    monkeypatch.setattr(engine, "AUTO_EXACT", 1000)
    index.optimize()
    assert index._index()["index_type"] == "IVF_FLAT"
    check(6000)
    write(6000, 12_000)
    check(12_000)
    assert len(index.search(queries, 10)) == 40  # approximate by now


def test_optimizing_a_small_index_does_not_wait(served):
    """The server never reports that a flat index is loaded; `union-index` ends with this call."""
    index = served.create(8)
    vectors = normalize(torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    index.upsert(Rows([str(i) for i in range(3000)], vectors, {}))
    index.optimize()
    assert index._index()["index_type"] == "FLAT"
    expected = exact_topk(vectors[:5], vectors, 10)
    found = index.search(vectors[:5], 10, mode="exact")
    assert [hits.ids for hits in found] == [[str(p) for p in row] for row in expected.positions.tolist()]


def test_an_index_that_was_created_by_hand_is_kept(served):
    """As docs/scale.md describes, for galleries that exceed the memory."""
    index = served.create(8)
    vectors = normalize(torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    index.upsert(Rows([str(i) for i in range(3000)], vectors, {}))
    index.optimize()
    client, name = index._client, index._name
    codes = client.prepare_index_params()
    codes.add_index("vector", index_type="IVF_PQ", metric_type="IP", params={"nlist": 16, "m": 8, "nbits": 8})
    client.release_collection(name)
    client.drop_index(name, "vector")
    client.create_index(name, codes)
    client.load_collection(name)
    again = served.reopen()
    again.optimize()
    assert again._index()["index_type"] == "IVF_PQ"
    expected = exact_topk(vectors[:20], vectors, 1).positions[:, 0].tolist()
    for mode in ("ann", "exact"):
        found = again.search(vectors[:20], 10, mode=mode)
        assert sum(str(expected_id) in hits.ids for expected_id, hits in zip(expected, found, strict=True)) >= 18


def test_a_kill_between_two_indexes_leaves_a_usable_collection(served):
    index = served.create(4)
    index.upsert(Rows(["a"], torch.ones(1, 4), {}))
    index._client.flush(index._name)
    index._client.release_collection(index._name)
    index._client.drop_index(index._name, "vector")
    assert served.reopen().search(torch.ones(1, 4), 1)[0].ids == ["a"]


def test_the_number_of_hits_is_limited(served, monkeypatch):
    index = served.create(2)
    index.upsert(Rows([str(i) for i in range(30)], torch.ones(30, 2), {"n": list(range(30))}))
    monkeypatch.setattr(engine, "MAX_HITS", 20)
    with pytest.raises(ConfigError, match=r"k: 25 .Milvus returns at most 20"):
        index.search(torch.ones(1, 2), 25)
    (hits,) = index.search(torch.ones(1, 2), 25, where="n < 15")
    assert hits.ids == [str(i) for i in range(15)]


def write_rows(uri, writer_id):
    with open_index(uri) as index:
        for step in range(5):
            index.upsert(
                Rows(
                    [f"{writer_id} {step}", "shared"],
                    torch.full((2, 4), float(writer_id)),
                    {"writer_id": [writer_id, writer_id]},
                )
            )


def test_two_processes_write_while_one_reads(served):
    index = served.create(4)
    start = multiprocessing.get_context("spawn").Process
    writers = [start(target=write_rows, args=(served.uri, writer_id)) for writer_id in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for hits in index.search(torch.ones(1, 4), 20, columns=["writer_id"]):
            assert hits.scores.tolist() == [4.0 * writer_id for writer_id in hits.columns["writer_id"]]
    assert [writer.exitcode for writer in writers] == [0, 0]
    names = [one for batch in served.reopen().scan(["id"]) for one in batch["id"]]
    assert sorted(names) == sorted([*(f"{writer_id} {step}" for writer_id in (1, 2) for step in range(5)), "shared"])


def test_a_lost_server_is_a_one_line_error(served, monkeypatch):
    index = served.create(4)

    def unavailable(*_, **__):
        raise sys.modules["pymilvus"].MilvusException(2, "server unavailable:\n connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(index._client, "search", unavailable)
        with pytest.raises(DataError, match="server unavailable: connection refused; check that the server"):
            index.search(torch.ones(1, 4), 1)


ENCRYPTED = """
import sys
import torch
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index

index = open_index(sys.argv[1], dim=4, metadata={"model": "tiny"}, create=True)
index.upsert(Rows(["a"], torch.ones(1, 4), {}))
print(open_index(sys.argv[1]).search(torch.ones(1, 4), 1)[0].ids, index.metadata)
index._client.drop_collection(index._name)
"""


def _forward(source, sink):
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def _encrypted_proxy(folder, host, port):
    """Accept encrypted connections and forward them, as the gateway of a cluster does; yield the port."""
    certificate = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2", "-nodes"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", *certificate, *files], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    opened = [socket.create_server(("127.0.0.1", 0))]

    def serve():
        with suppress(OSError):
            while True:
                plain, _ = opened[0].accept()
                opened.append(plain)
                with suppress(OSError):  # the client rejects the certificate, or closes the connection
                    encrypted = context.wrap_socket(plain, server_side=True)
                    upstream = socket.create_connection((host, port))
                    opened.extend((encrypted, upstream))
                    for pair in ((encrypted, upstream), (upstream, encrypted)):
                        threading.Thread(target=_forward, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield opened[0].getsockname()[1]
    for one in opened:
        one.close()


@pytest.mark.enable_socket
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_encrypted_connections_need_a_trusted_certificate(served, tmp_path):
    parts = urlsplit(SERVER)
    name = served.uri.rsplit("/", 1)[1]
    with _encrypted_proxy(tmp_path, parts.hostname, parts.port) as port:
        uri = f"milvus+tls://localhost:{port}/{name}"
        command = [sys.executable, "-W", "ignore", "-c", ENCRYPTED, uri]
        trusted = os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(tmp_path / "cert.pem")}
        done = subprocess.run(command, env=trusted, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout == "['a'] {'model': 'tiny'}\n", done.stderr
        with pytest.raises(DataError, match=r"milvus\+tls://localhost:\d+/.*check that the server"):
            open_index(uri)
