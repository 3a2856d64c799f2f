"""What is particular to Lance: versions, writers at once, mapped vectors, the approximate index, and kills."""

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
from killing import FORKS, kill_many  # noqa: E402 - needs what was looked for above

from lance_tables import ids, made, some  # noqa: E402
from union_igrot.gallery.engines import lance as engine  # noqa: E402

KILLS = 25


def test_what_is_there_is_opened_as_it_is(uri):
    with pytest.raises(ConfigError, match=r"there is no index .*photos\.lance; make one"):
        open_index(uri)
    with pytest.raises(ConfigError, match="dim is None"):
        open_index(uri, create=True)
    made(uri, metadata={"model": "tiny"})
    assert made(uri, metadata={"model": "another"}).metadata == {"model": "tiny"}
    with pytest.raises(ConfigError, match="holds embeddings of width 4, not 5"):
        open_index(uri, dim=5)
    with pytest.raises(ConfigError, match="cannot be stored as JSON"):
        made(uri.replace("photos", "more"), metadata={"x": {1, 2}})


def test_what_is_no_index_of_ours_is_left_alone(tmp_path):
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "foreign.lance"))
    with pytest.raises(ConfigError, match="is a Lance table but not an index"):
        made(str(tmp_path / "foreign.lance"))
    (tmp_path / "file.lance").write_text("not a table")
    with pytest.raises(ConfigError, match="is a file"):
        made(str(tmp_path / "file.lance"))


def test_a_table_that_is_damaged_is_one_line(uri):
    index = made(uri)
    index.upsert(some("abc"))
    for path in Path(uri, "data").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"photos\.lance: ") as caught:
        open_index(uri).fetch(["a"])
    assert "\n" not in str(caught.value)
    assert ".rs:" not in str(caught.value)


def test_an_object_store_that_is_wrongly_named_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_ENDPOINT", "http://no port: here")
    with pytest.raises(DataError, match=r"s3://photos/a\.lance: ") as caught:
        open_index("s3://photos/a.lance", dim=4, create=True)
    assert "\n" not in str(caught.value)


def test_a_write_that_clashes_is_done_again_on_what_the_other_left(uri, monkeypatch):
    one, other = made(uri), made(uri)
    one.upsert(some(["old"]))
    find_ids = engine._find_ids
    clashes = []

    def and_meanwhile(table, names, columns):
        found = find_ids(table, names, columns)
        if len(clashes) < 3 and names[0] == "new":
            clashes.append(1)
            if len(clashes) == 1:
                other.upsert(Rows(["new"], torch.full((1, 4), 7.0), {"who": ["other"]}))
            elif len(clashes) == 2:
                other.upsert(Rows(["new", "more"], torch.full((2, 4), 8.0), {"colour": ["red", "blue"]}))
            else:
                other.delete(["old"])
        return found

    monkeypatch.setattr(engine, "_find_ids", and_meanwhile)
    one.upsert(Rows(["new", "own"], torch.full((2, 4), 9.0), {"who": ["one", "one"]}))
    assert len(clashes) == 3
    for index in (one, other, open_index(uri)):
        (found,) = index.scan(["id", "who", "colour"])
        rows = dict(zip(found["id"], zip(found["who"], found["colour"], strict=True), strict=True))
        assert rows.pop("old", None) is None or index is one
        assert found["id"].index("new") < found["id"].index("own")
        assert rows == {"new": ("one", None), "more": (None, "blue"), "own": ("one", None)}
        assert index.fetch(["new"]).vectors.tolist() == [[9.0] * 4]


def test_a_write_that_always_clashes_ends_with_a_line(uri, monkeypatch):
    index = made(uri)
    monkeypatch.setattr(engine, "_RETRY_SECONDS", 0.05)

    def never(*_):
        raise OSError("Too many concurrent writers. Attempted 0 retries., /home/someone/rust/lance/src/x.rs:103:9")

    monkeypatch.setattr(engine.LanceIndex, "_merge_rows", never)
    with pytest.raises(DataError, match=r"photos\.lance: Too many concurrent writers. Attempted 0 retries\.$"):
        index.upsert(some("a"))


def write_groups(uri, who, groups, failures):
    try:
        with open_index(uri) as index:
            for step in range(groups):
                names = [f"shared {i}" for i in range(6)] + [f"{who} {step}"]
                stamp = 1000 * who + step
                index.upsert(
                    Rows(names, torch.full((7, 4), float(stamp)), {"stamp": [stamp] * 7, f"by {who}": [True] * 7})
                )
                if step % 4 == 3:
                    index.delete([f"{who} {step - 1}"])
    except BaseException as error:
        failures.append(error)
        raise


def check_groups(index):
    """One version: what was written together is seen together."""
    seen = [pair for batch in index.scan(["id", "stamp"]) for pair in zip(batch["id"], batch["stamp"], strict=True)]
    shared = {stamp for name, stamp in seen if name.startswith("shared")}
    assert len(shared) <= 1
    assert len({name for name, _ in seen}) == len(seen)
    return seen


def check_all_written(uri, groups):
    index = open_index(uri)
    seen = dict(check_groups(index))
    gone = {f"{who} {step - 1}" for who in (1, 2) for step in range(3, groups, 4)}
    expected = {f"{who} {step}" for who in (1, 2) for step in range(groups)} - gone
    assert set(seen) == expected | {f"shared {i}" for i in range(6)}
    assert seen["shared 0"] in (1000 + groups - 1, 2000 + groups - 1)
    for name, stamp in seen.items():
        assert index.fetch([name]).vectors.tolist() == [[float(stamp)] * 4]


def test_two_writers_and_a_reader_at_once(uri):
    made(uri).upsert(some(["first"]))
    made(uri).delete(["first"])
    failures = []
    writers = [threading.Thread(target=write_groups, args=(uri, who, 8, failures)) for who in (1, 2)]
    for writer in writers:
        writer.start()
    reader = open_index(uri)
    while any(writer.is_alive() for writer in writers):
        check_groups(reader)
        reader.search(torch.ones(1, 4), 3, mode="exact")
    assert not failures
    check_all_written(uri, 8)


@pytest.mark.slow
def test_two_processes_write_while_one_reads_and_one_optimises(uri):
    made(uri)
    writers = [FORKS.Process(target=write_groups, args=(uri, who, 40, [])) for who in (1, 2)]
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
def test_no_kill_loses_or_doubles_a_row(uri, tmp_path):
    tally = kill_many(uri, tmp_path / "log.jsonl", KILLS)
    assert sum(tally.kills.values()) == KILLS
    assert tally.acknowledged > KILLS


def test_vectors_are_read_once_for_each_version(uri, monkeypatch):
    index = made(uri)
    index.upsert(some("abcd"))
    index.search(torch.ones(1, 4), 1)
    first = index._snapshot.vectors(4)
    index.search(torch.ones(1, 4), 2, where="id > 'a'")
    assert index._snapshot.vectors(4) is first
    index.upsert(some("e", seed=1))
    assert len(index.search(torch.ones(1, 4), 9)[0].ids) == 5
    assert len(index._snapshot.vectors(4)) == 5


def test_exact_search_beyond_the_memory_names_the_way_out(uri, monkeypatch):
    index = made(uri)
    index.upsert(some([f"p{i}" for i in range(300)]))
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


def test_rows_of_one_place_stand_by_their_ids(uri):
    """Two writers that began at one version give the same places."""
    index = made(uri)
    index.upsert(Rows(["b", "d"], torch.ones(2, 4), {}))
    table = index._latest()
    again = table.to_table().set_column(0, table.schema.field("id"), pa.array(["c", "a"]))
    lance.write_dataset(again, uri, mode="append")
    assert ids(index) == ["b", "c", "a", "d"]
    (hits,) = index.search(torch.ones(1, 4), 3)
    assert hits.ids == ["b", "c", "a"]


def test_many_small_writes_are_brought_together(uri, monkeypatch):
    monkeypatch.setattr(engine, "_WRITES_PER_COMPACTION", 5)
    index = made(uri)
    for step in range(12):
        index.upsert(some([f"p{step}"], seed=step))
    assert len(index._latest().get_fragments()) <= 4
    assert ids(index) == [f"p{step}" for step in range(12)]


def test_a_tidying_that_others_always_outrun_is_left_for_later(uri, monkeypatch, caplog):
    index = made(uri)
    index.upsert(some("abc"))
    monkeypatch.setattr(engine, "_RETRY_SECONDS", 0.2)

    class Outrun:
        @staticmethod
        def compact_files(**_):
            raise OSError("Retryable commit conflict")

    monkeypatch.setattr(lance.LanceDataset, "optimize", Outrun)
    index._compact(None)
    assert "not merged yet" in caplog.text


def test_old_versions_go_after_an_hour(uri, monkeypatch):
    index = made(uri)
    for step in range(4):
        index.upsert(some("abc", seed=step))
    index.optimize()
    assert len(index._latest().versions()) > 4
    monkeypatch.setattr(engine, "_KEPT", timedelta(microseconds=1))
    index.optimize()
    assert len(index._latest().versions()) <= 2
    assert ids(index) == list("abc")


def test_the_approximate_index_fits_the_size(uri, monkeypatch):
    index = made(uri, dim=16)
    index.optimize()  # of nothing
    assert engine.ann_index(index._latest()) is None
    index.upsert(some([f"p{i}" for i in range(400)], 16))
    index.optimize()
    assert engine.ann_index(index._latest()) == ("vector_ivf_flat_20", "IVF_FLAT", 20, 400)
    index.upsert(some([f"q{i}" for i in range(100)], 16, seed=1))
    index.optimize()  # a few rows more are put into what there is
    assert engine.ann_index(index._latest()) == ("vector_ivf_flat_20", "IVF_FLAT", 20, 500)
    monkeypatch.setattr(engine, "FLAT_ROWS", 1000)
    index.upsert(some([f"r{i}" for i in range(1500)], 16, seed=2))
    index.optimize()  # many, and the index is made anew, of the other kind
    assert engine.ann_index(index._latest()) == ("vector_ivf_rq_44", "IVF_RQ", 44, 2000)
    queries = some([str(i) for i in range(20)], 16, seed=3).vectors
    exact, near = (index.search(queries, 10, mode=how) for how in ("exact", "ann"))
    assert sum(len(set(a.ids) & set(b.ids)) for a, b in zip(exact, near, strict=True)) >= 190


def test_the_approximate_index_gives_as_many_answers_as_are_asked_for(uri):
    index = made(uri, dim=8)
    index.upsert(some([f"p{i}" for i in range(6000)], 8))
    index.optimize()
    for k in (1, 1000, 5000, 6000):  # at k = 5000, the least number of partitions holds fewer
        assert len(index.search(some("q", 8, seed=1).vectors, k, mode="ann")[0].ids) == k


def test_the_approximate_index_finds_answers_where_most_pictures_are_equal(uri):
    index = made(uri, dim=16)
    vectors = some([f"p{i}" for i in range(5000)], 16).vectors
    vectors[1000:] = vectors[0]
    index.upsert(Rows([f"p{i}" for i in range(5000)], vectors, {}))
    index.optimize()
    for k in (10, 1100):
        for hits in index.search(some([str(i) for i in range(30)], 16, seed=3).vectors, k, mode="ann"):
            assert len(hits.ids) == k


def test_single_rows_added_one_by_one_leave_few_files(uri):
    index = made(uri)
    index.upsert(some([f"p{i}" for i in range(300)]))
    index.optimize()
    for step in range(30):
        index.upsert(some([f"q{step}"], seed=step))
        index.optimize()
    assert len(index._latest().get_fragments()) <= 8
    assert engine.ann_index(index._latest()).rows == len(index) == 330


def test_auto_takes_the_approximate_index_where_the_gallery_is_large(uri, monkeypatch):
    index = made(uri)
    index.upsert(some([f"p{i}" for i in range(50)]))
    asked = []
    near = engine.search_ann
    monkeypatch.setattr(engine, "search_ann", lambda *given: (asked.append(1), near(*given))[1])
    monkeypatch.setattr(engine, "AUTO_EXACT", 10)
    index.search(torch.ones(1, 4), 1)
    assert not asked  # there is none yet
    index.optimize()
    index.search(torch.ones(1, 4), 1)
    index.search(torch.ones(1, 4), 1, mode="exact")
    assert len(asked) == 1
    monkeypatch.setattr(engine, "AUTO_EXACT", 100)
    index.search(torch.ones(1, 4), 1)
    assert len(asked) == 1


def test_rows_without_a_clash_keep_the_order_of_a_large_write(uri):
    names = [f"p{i}" for i in random.Random(0).sample(range(9000), 9000)]
    index = made(uri, dim=2)
    index.upsert(Rows(names, torch.ones(len(names), 2), {"n": list(range(len(names)))}))
    assert ids(index) == names
    (hits,) = index.search(torch.ones(1, 2), 9000)
    assert hits.ids == names
    assert index.delete(names[:8000]) == 8000
    assert ids(index, "n >= 8990") == names[8990:]
