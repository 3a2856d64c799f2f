"""The Lance engine: versions, concurrent writers, the approximate index, and kills."""

import random
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index

lance = pytest.importorskip("lance", reason='the extra "gallery" is not installed')
pa = pytest.importorskip("pyarrow")
from killing import FORKS, kill_many  # noqa: E402 - after importorskip

from index_locations import random_rows, read_column  # noqa: E402
from union_igrot.gallery.engines import lance as engine  # noqa: E402

KILLS = 25


def create_index(uri, dim=4, **options):
    return open_index(uri, dim=dim, create=True, **options)


def test_an_existing_table_is_opened_unchanged(uri):
    with pytest.raises(ConfigError, match=r"there is no index .*photos\.lance; make one"):
        open_index(uri)
    with pytest.raises(ConfigError, match="dim is None"):
        open_index(uri, create=True)
    create_index(uri, metadata={"model": "tiny"})
    assert create_index(uri, metadata={"model": "another"}).metadata == {"model": "tiny"}
    with pytest.raises(ConfigError, match="holds embeddings of width 4, not 5"):
        open_index(uri, dim=5)
    with pytest.raises(ConfigError, match="cannot be stored as JSON"):
        create_index(uri.replace("photos", "more"), metadata={"x": {1, 2}})


def test_a_colon_in_a_relative_name_is_no_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_index("a:b.lance").close()
    assert (tmp_path / "a:b.lance").is_dir()
    assert len(open_index("a:b.lance")) == 0


def test_a_foreign_table_is_refused(tmp_path):
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "foreign.lance"))
    with pytest.raises(ConfigError, match="is a Lance table but not an index"):
        create_index(str(tmp_path / "foreign.lance"))
    (tmp_path / "file.lance").write_text("not a table")
    with pytest.raises(ConfigError, match="is a file"):
        create_index(str(tmp_path / "file.lance"))


def test_a_damaged_table_is_a_one_line_error(uri):
    index = create_index(uri)
    index.upsert(random_rows("abc"))
    for path in Path(uri, "data").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"photos\.lance: ") as caught:
        open_index(uri).fetch(["a"])
    assert "\n" not in str(caught.value)
    assert ".rs:" not in str(caught.value)


def test_an_invalid_object_store_is_a_one_line_error(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_ENDPOINT", "http://no port: here")
    with pytest.raises(DataError, match=r"s3://photos/a\.lance: ") as caught:
        open_index("s3://photos/a.lance", dim=4, create=True)
    assert "\n" not in str(caught.value)


def test_a_conflicting_write_is_repeated_on_the_other_result(uri, monkeypatch):
    one, other = create_index(uri), create_index(uri)
    one.upsert(random_rows(["old"]))
    find_ids = engine._find_ids
    conflicts = []

    def with_concurrent_write(table, names, columns):
        found = find_ids(table, names, columns)
        if len(conflicts) < 3 and names[0] == "new":
            conflicts.append(1)
            if len(conflicts) == 1:
                other.upsert(Rows(["new"], torch.full((1, 4), 7.0), {"writer_id": ["other"]}))
            elif len(conflicts) == 2:
                other.upsert(Rows(["new", "more"], torch.full((2, 4), 8.0), {"colour": ["red", "blue"]}))
            else:
                other.delete(["old"])
        return found

    monkeypatch.setattr(engine, "_find_ids", with_concurrent_write)
    one.upsert(Rows(["new", "own"], torch.full((2, 4), 9.0), {"writer_id": ["one", "one"]}))
    assert len(conflicts) == 3
    for index in (one, other, open_index(uri)):
        (found,) = index.scan(["id", "writer_id", "colour"])
        rows = dict(zip(found["id"], zip(found["writer_id"], found["colour"], strict=True), strict=True))
        assert rows.pop("old", None) is None or index is one
        assert found["id"].index("new") < found["id"].index("own")
        assert rows == {"new": ("one", None), "more": (None, "blue"), "own": ("one", None)}
        assert index.fetch(["new"]).vectors.tolist() == [[9.0] * 4]


def test_a_write_that_always_conflicts_is_an_error(uri, monkeypatch):
    index = create_index(uri)
    monkeypatch.setattr(engine, "_RETRY_SECONDS", 0.05)

    def conflicting(*_):
        raise OSError("Too many concurrent writers. Attempted 0 retries., /home/someone/rust/lance/src/x.rs:103:9")

    monkeypatch.setattr(engine.LanceIndex, "_merge_rows", conflicting)
    with pytest.raises(DataError, match=r"photos\.lance: Too many concurrent writers. Attempted 0 retries\.$"):
        index.upsert(random_rows("a"))


def write_groups(uri, writer_id, groups, failures):
    try:
        with open_index(uri) as index:
            for step in range(groups):
                names = [f"shared {i}" for i in range(6)] + [f"{writer_id} {step}"]
                stamp = 1000 * writer_id + step
                index.upsert(
                    Rows(names, torch.full((7, 4), float(stamp)), {"stamp": [stamp] * 7, f"by {writer_id}": [True] * 7})
                )
                if step % 4 == 3:
                    index.delete([f"{writer_id} {step - 1}"])
    except BaseException as error:
        failures.append(error)
        raise


def check_groups(index):
    """Check that rows of one write are seen together."""
    seen = [pair for batch in index.scan(["id", "stamp"]) for pair in zip(batch["id"], batch["stamp"], strict=True)]
    shared = {stamp for name, stamp in seen if name.startswith("shared")}
    assert len(shared) <= 1
    assert len({name for name, _ in seen}) == len(seen)
    return seen


def check_all_written(uri, groups):
    index = open_index(uri)
    seen = dict(check_groups(index))
    gone = {f"{writer_id} {step - 1}" for writer_id in (1, 2) for step in range(3, groups, 4)}
    expected = {f"{writer_id} {step}" for writer_id in (1, 2) for step in range(groups)} - gone
    assert set(seen) == expected | {f"shared {i}" for i in range(6)}
    assert seen["shared 0"] in (1000 + groups - 1, 2000 + groups - 1)
    for name, stamp in seen.items():
        assert index.fetch([name]).vectors.tolist() == [[float(stamp)] * 4]


def test_two_writers_and_a_reader_at_once(uri):
    create_index(uri).upsert(random_rows(["first"]))
    create_index(uri).delete(["first"])
    failures = []
    writers = [threading.Thread(target=write_groups, args=(uri, writer_id, 8, failures)) for writer_id in (1, 2)]
    for writer in writers:
        writer.start()
    reader = open_index(uri)
    while any(writer.is_alive() for writer in writers):
        check_groups(reader)
        reader.search(torch.ones(1, 4), 3, mode="exact")
    assert not failures
    check_all_written(uri, 8)


@pytest.mark.slow
def test_two_processes_write_while_another_reads_and_optimizes(uri):
    create_index(uri)
    writers = [FORKS.Process(target=write_groups, args=(uri, writer_id, 40, [])) for writer_id in (1, 2)]
    for writer in writers:
        writer.start()
    reader, reads = open_index(uri), 0
    while any(writer.is_alive() for writer in writers):
        check_groups(reader)
        reader.search(torch.ones(1, 4), 3, mode="exact")
        reads += 1
        if reads % 10 == 0:
            reader.optimize()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reads > 5
    check_all_written(uri, 40)


@pytest.mark.slow
def test_no_kill_loses_or_repeats_a_row(uri, tmp_path):
    tally = kill_many(uri, tmp_path / "log.jsonl", KILLS)
    assert sum(tally.kills.values()) == KILLS
    assert tally.acknowledged > KILLS


def test_exact_search_beyond_the_memory_limit_names_the_remedy(uri, monkeypatch):
    index = create_index(uri)
    index.upsert(random_rows([f"p{i}" for i in range(300)]))
    monkeypatch.setenv("UNION_EXACT_MEMORY", "4KB")
    with pytest.raises(ConfigError, match=r"search=ann .* UNION_EXACT_MEMORY"):
        index.search(torch.ones(1, 4), 1)
    index.optimize()
    assert len(index.search(torch.ones(1, 4), 3, mode="ann")[0].ids) == 3
    monkeypatch.setenv("UNION_EXACT_MEMORY", "much")
    with pytest.raises(ConfigError, match=r"UNION_EXACT_MEMORY: .*'much'"):
        index.search(torch.ones(1, 4), 1, mode="exact")
    monkeypatch.delenv("UNION_EXACT_MEMORY")
    assert engine.exact_memory() > 2**20
    assert len(index.search(torch.ones(1, 4), 3)[0].ids) == 3


def test_rows_of_one_position_are_ordered_by_id(uri):
    """Two writers that started from one version assign the same positions."""
    index = create_index(uri)
    index.upsert(Rows(["b", "d"], torch.ones(2, 4), {}))
    table = index._latest()
    again = table.to_table().set_column(0, table.schema.field("id"), pa.array(["c", "a"]))
    lance.write_dataset(again, uri, mode="append")
    assert read_column(index, "id") == ["b", "c", "a", "d"]
    (hits,) = index.search(torch.ones(1, 4), 3)
    assert hits.ids == ["b", "c", "a"]


def test_many_small_writes_are_compacted(uri, monkeypatch):
    monkeypatch.setattr(engine, "_WRITES_PER_COMPACTION", 5)
    index = create_index(uri)
    for step in range(12):
        index.upsert(random_rows([f"p{step}"], seed=step))
    assert len(index._latest().get_fragments()) <= 4
    assert read_column(index, "id") == [f"p{step}" for step in range(12)]


def test_a_compaction_that_always_conflicts_is_postponed(uri, monkeypatch, caplog):
    index = create_index(uri)
    index.upsert(random_rows("abc"))
    monkeypatch.setattr(engine, "_RETRY_SECONDS", 0.2)

    class AlwaysConflicts:
        @staticmethod
        def compact_files(**_):
            raise OSError("Retryable commit conflict")

    monkeypatch.setattr(lance.LanceDataset, "optimize", AlwaysConflicts)
    index._compact(None)
    assert "not merged yet" in caplog.text


def test_old_versions_are_removed_after_an_hour(uri, monkeypatch):
    index = create_index(uri)
    for step in range(4):
        index.upsert(random_rows("abc", seed=step))
    index.optimize()
    assert len(index._latest().versions()) > 4
    monkeypatch.setattr(engine, "_KEPT", timedelta(microseconds=1))
    index.optimize()
    assert len(index._latest().versions()) <= 2
    assert read_column(index, "id") == list("abc")


@pytest.mark.slow
def test_the_approximate_index_fits_the_size(uri, monkeypatch):
    index = create_index(uri, dim=16)
    index.optimize()
    assert engine.ann_index(index._latest()) is None
    index.upsert(random_rows([f"p{i}" for i in range(400)], 16))
    index.optimize()
    assert engine.ann_index(index._latest()) == ("vector_ivf_flat_20", "IVF_FLAT", 20, 400)
    index.upsert(random_rows([f"q{i}" for i in range(100)], 16, seed=1))
    index.optimize()  # a few more rows are added to the index
    assert engine.ann_index(index._latest()) == ("vector_ivf_flat_20", "IVF_FLAT", 20, 500)
    monkeypatch.setattr(engine, "FLAT_ROWS", 1000)
    index.upsert(random_rows([f"r{i}" for i in range(1500)], 16, seed=2))
    index.optimize()  # many: the index is rebuilt, of the other kind
    assert engine.ann_index(index._latest()) == ("vector_ivf_rq_44", "IVF_RQ", 44, 2000)
    queries = random_rows([str(i) for i in range(20)], 16, seed=3).vectors
    exact, near = (index.search(queries, 10, mode=mode) for mode in ("exact", "ann"))
    assert sum(len(set(a.ids) & set(b.ids)) for a, b in zip(exact, near, strict=True)) >= 190


@pytest.mark.slow
def test_approximate_search_returns_k_hits(uri):
    index = create_index(uri, dim=8)
    index.upsert(random_rows([f"p{i}" for i in range(6000)], 8))
    index.optimize()
    for k in (1, 1000, 5000, 6000):  # at k = 5000, the least number of partitions holds fewer
        assert len(index.search(random_rows("q", 8, seed=1).vectors, k, mode="ann")[0].ids) == k


@pytest.mark.slow
def test_approximate_search_returns_k_hits_if_most_vectors_are_equal(uri):
    index = create_index(uri, dim=16)
    vectors = random_rows([f"p{i}" for i in range(5000)], 16).vectors
    vectors[1000:] = vectors[0]
    index.upsert(Rows([f"p{i}" for i in range(5000)], vectors, {}))
    index.optimize()
    for k in (10, 1100):
        for hits in index.search(random_rows([str(i) for i in range(30)], 16, seed=3).vectors, k, mode="ann"):
            assert len(hits.ids) == k


@pytest.mark.slow
def test_single_rows_added_one_by_one_leave_few_files(uri):
    index = create_index(uri)
    index.upsert(random_rows([f"p{i}" for i in range(300)]))
    index.optimize()
    for step in range(14):
        index.upsert(random_rows([f"q{step}"], seed=step))
        index.optimize()
    assert len(index._latest().get_fragments()) <= 8
    assert engine.ann_index(index._latest()).rows == len(index) == 314


def test_auto_selects_by_the_number_of_rows(uri, monkeypatch):
    index = create_index(uri)
    index.upsert(random_rows([f"p{i}" for i in range(50)]))
    calls = []
    near = engine.search_ann
    monkeypatch.setattr(engine, "search_ann", lambda *given: (calls.append(1), near(*given))[1])
    monkeypatch.setattr(engine, "AUTO_EXACT", 10)
    index.search(torch.ones(1, 4), 1)
    assert not calls  # there is none yet
    index.optimize()
    index.search(torch.ones(1, 4), 1)
    index.search(torch.ones(1, 4), 1, mode="exact")
    assert len(calls) == 1
    monkeypatch.setattr(engine, "AUTO_EXACT", 100)
    index.search(torch.ones(1, 4), 1)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_large_write_keeps_its_order(uri):
    names = [f"p{i}" for i in random.Random(0).sample(range(4200), 4200)]
    index = create_index(uri, dim=2)
    index.upsert(Rows(names, torch.ones(len(names), 2), {"n": list(range(len(names)))}))
    assert read_column(index, "id") == names
    (hits,) = index.search(torch.ones(1, 2), 4200)
    assert hits.ids == names
    assert index.delete(names[:4000]) == 4000
    assert read_column(index, "id", "n >= 4190") == names[4190:]
