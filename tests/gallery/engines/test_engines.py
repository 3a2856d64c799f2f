"""What every engine has to do, built-in or of another package, here or on a server."""

import random
import sys

import numpy as np
import pytest
import torch
from filter_cases import KINDS, ROWS, filters
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from index_locations import ENGINES, new_location, random_rows, read_column
from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation import ranking
from union_igrot.evaluation.ranking import exact_topk
from union_igrot.gallery.engines.base import Rows, topk_of_rows
from union_igrot.gallery.engines.factory import MemoryIndex

METADATA = {"model": "tiny", "weights": ["a", 1, None, {"x": 0.5}], "пёс": "犬 'quoted' \"twice\""}
ODD_IDS = [
    "with blank",
    "it's",
    'say "hi"',
    "two\nlines",
    "tab\t",
    "пёс/犬.jpg",
    "\U0001f436",
    "a\\b",
    "100%",
    "$meta",
    "0",
    "x" * 3000,
]


def test_rows_are_written_read_replaced_and_removed(location):
    index = location.create(3, METADATA)
    assert (len(index), index.dim, index.metadata, index.columns) == (0, 3, METADATA, {})
    assert read_column(index, "id") == []
    assert [hits.ids for hits in index.search(torch.ones(2, 3), 5, columns=["id", "nope"])] == [[], []]
    assert index.delete(["a"]) == 0
    index.upsert(Rows([], torch.empty(0, 3), {}))
    index.upsert(Rows(["b", "a"], torch.eye(2, 3), {"class": ["dog", None], "year": [1, None]}))
    index.upsert(Rows(["c", "b"], torch.tensor([[0, 0, 2.0], [3, 0, 0]]), {"class": ["cat", "wolf"], "size": [1, 0.5]}))

    for now in (index, location.reopen()):
        assert (len(now), now.dim, now.metadata) == (3, 3, METADATA)
        assert now.columns == {"class": "str", "year": "int", "size": "float"}
        assert read_column(now, "id") == ["b", "a", "c"]  # b keeps its position
        assert read_column(now, "year") == [None, None, None]  # it was replaced as a whole
        assert read_column(now, "unknown") == [None, None, None]
        (found,) = now.scan(["size", "id", "class"])
        assert found == {"size": [0.5, None, 1.0], "id": ["b", "a", "c"], "class": ["wolf", None, "cat"]}
        rows = now.fetch(["c", "b", "c"])
        assert rows.ids == ["c", "b", "c"]
        assert rows.vectors.tolist() == [[0, 0, 2], [3, 0, 0], [0, 0, 2]]
        assert rows.columns == {"class": ["cat", "wolf", "cat"], "year": [None] * 3, "size": [1.0, 0.5, 1.0]}
        assert now.fetch([]).vectors.shape == (0, 3)
        (hits,) = now.search(torch.ones(1, 3), 9, columns=["class", "id", "size", "nope"])
        assert hits.ids == ["b", "c", "a"]
        assert hits.scores.tolist() == [3, 2, 1]
        assert hits.columns == {
            "class": ["wolf", "cat", None],
            "id": ["b", "c", "a"],
            "size": [0.5, 1.0, None],
            "nope": [None] * 3,
        }

    with pytest.raises(DataError, match=r"2 rows are not in .*: 'z', 'y'; scan\(\['id'\]\)"):
        index.fetch(["a", "z", "y"])
    assert index.delete(["b", "z", "b"]) == 1
    assert index.delete([]) == 0
    index.upsert(Rows(["b"], torch.ones(1, 3), {}))
    assert read_column(location.reopen(), "id") == ["a", "c", "b"]  # it is new


@pytest.mark.slow
def test_ids_and_column_names_are_any_text(location):
    index = location.create(4)
    names = ["class", "taken by", "größe-1", "犬", "order", "like", "Class"]
    columns = {name: [f"{name}: {one}" for one in ODD_IDS] for name in names}
    index.upsert(random_rows(ODD_IDS, **columns))
    assert read_column(index, "id") == ODD_IDS
    assert set(index.columns) == set(names)
    assert index.fetch(ODD_IDS[::-1]).ids == ODD_IDS[::-1]
    for one in ODD_IDS:
        quoted = one.replace("'", "''")
        assert read_column(index, "id", f"id = '{quoted}'") == [one]
        for name in names:
            assert read_column(index, "id", f"\"{name}\" in ('{name}: {quoted}', 'x')") == [one]
    (hits,) = index.search(torch.ones(1, 4), len(ODD_IDS), columns=names)
    for name in names:
        assert hits.columns[name] == [f"{name}: {one}" for one in hits.ids]
    assert index.delete(ODD_IDS[:5]) == 5
    assert read_column(index, "id") == ODD_IDS[5:]


def test_values_are_read_as_written(location):
    index = location.create(2)
    columns = {
        "whole": [2**63 - 1, -(2**63) + 1, 0, None],
        "number": [1e300, 5e-324, -0.0, None],
        "mixed": [1, 0.1, None, -7],
        "truth": [True, False, None, True],
        "text": ["", "a\n\"b'\\ \U0001f436", None, "null"],
        "bytes": [b"", bytes(range(256)) * 40, None, b"\x00"],
    }
    index.upsert(random_rows("abcd", 2, **columns, nothing=[None] * 4))
    found = location.reopen().fetch(list("abcd")).columns
    assert found == columns
    for name, kind in {
        "whole": int,
        "number": float,
        "mixed": float,
        "truth": bool,
        "text": str,
        "bytes": bytes,
    }.items():
        assert {type(value) for value in found[name]} == {kind, type(None)}
    assert "nothing" not in index.columns


INVALID_ROWS = [
    (Rows(["b", "c", "b"], torch.ones(3, 4), {}), "the id 'b' is repeated"),
    (Rows(["b", ""], torch.ones(2, 4), {}), "an id is empty"),
    (Rows(["b\udcff"], torch.ones(1, 4), {}), "not valid Unicode"),
    (Rows(["b"], torch.ones(1, 5), {}), "1x5 .expected 1x4"),
    (Rows(["b"], torch.ones(2, 4), {}), "2x4 .expected 1x4"),
    (Rows(["b", "c"], torch.tensor([[0.0] * 4, [0, float("nan"), 0, 0]]), {}), "the vector of 'c' holds nan"),
    (Rows(["b"], torch.full((1, 4), 1e300, dtype=torch.float64), {}), "holds nan or infinity"),
    (Rows(["b"], torch.ones(1, 4), {"year": ["x"]}), "the column 'year' holds int and cannot hold str"),
    (Rows(["b"], torch.ones(1, 4), {"year": [1.5]}), "holds int and cannot hold float"),
    (Rows(["b"], torch.ones(1, 4), {"year": [True]}), "holds int and cannot hold bool"),
    (Rows(["b", "c"], torch.ones(2, 4), {"new": ["x", 1]}), "cannot hold"),
    (Rows(["b"], torch.ones(1, 4), {"year": [2**63]}), "exceeds 64 bits"),
    (Rows(["b"], torch.ones(1, 4), {"new": [float("nan")]}), "pass None for a missing number"),
    (Rows(["b"], torch.ones(1, 4), {"new": ["\ud800"]}), "not valid Unicode"),
    (Rows(["b"], torch.ones(1, 4), {"new": ["x", "y"]}), "has 2 values for 1 rows"),
    *(
        (Rows(["b"], torch.ones(1, 4), {name: ["x"]}), "invalid column name")
        for name in ("id", "row", "vector", "_rowid", "a.b", 'a"b', "a`b", "a\nb", "a\\b", "")
    ),
]


def test_invalid_rows_are_refused_as_a_whole(location):
    index = location.create(4)
    index.upsert(random_rows("a", year=[2020]))
    for rows, message in INVALID_ROWS:
        with pytest.raises(DataError, match=message):
            index.upsert(rows)
    assert read_column(index, "id") == ["a"]
    assert index.columns == {"year": "int"}


def test_invalid_searches_are_refused(location):
    index = location.create(4)
    index.upsert(random_rows("ab", year=[1, None]))
    with pytest.raises(ConfigError, match="k: 0"):
        index.search(torch.ones(1, 4), 0)
    with pytest.raises(DataError, match=r"queries: 1x3 .index of width 4"):
        index.search(torch.ones(1, 3), 1)
    with pytest.raises(DataError, match="a query holds nan"):
        index.search(torch.full((1, 4), float("inf")), 1)
    with pytest.raises(ConfigError, match=r"there is no column 'yeer' .available: id, year"):
        index.search(torch.ones(1, 4), 1, where="yeer = 1")
    with pytest.raises(ConfigError, match="cannot be parsed"):
        index.scan(["id"], "year >")
    assert index.search(torch.empty(0, 4), 3) == []
    (hits,) = index.search(torch.ones(1, 4), 3, where="year > 5", columns=["year"])
    assert (hits.ids, hits.scores.shape, hits.columns) == ([], (0,), {"year": []})


@pytest.mark.slow
@pytest.mark.parametrize("dim", [3, 32])
def test_exact_search_equals_exact_topk(location, dim):
    index = location.create(dim)
    rows = random_rows([f"p{i}" for i in range(400)], dim, group=[i % 10 for i in range(400)])
    shuffled = random.Random(0).sample(range(400), 400)
    for at in range(0, 400, 130):  # written in pieces, some rows once before with another embedding
        chosen = shuffled[at : at + 130]
        ids = [f"p{i}" for i in chosen]
        if at == 130:
            index.upsert(Rows(ids[::2], -rows.vectors[chosen[::2]], {}))
        index.upsert(Rows(ids, rows.vectors[chosen], {"group": [i % 10 for i in chosen]}))
    gone = [f"p{i}" for i in range(0, 400, 7)]
    assert index.delete(gone) == len(gone)

    order = read_column(index, "id")
    assert sorted(order) == sorted(set(rows.ids) - set(gone))
    gallery = rows.vectors[[int(one[1:]) for one in order]]
    queries = normalize(torch.randn(5, dim, generator=torch.Generator().manual_seed(9)), dim=-1)
    for k in (1, 10, len(order), len(order) + 50):
        expected = exact_topk(queries, gallery, min(k, len(order)))
        found = index.search(queries, k, mode="exact", columns=["group"])
        assert [hits.ids for hits in found] == [[order[p] for p in row] for row in expected.positions]
        for hits, scores in zip(found, expected.scores, strict=True):
            torch.testing.assert_close(hits.scores, scores)
            assert hits.columns["group"] == [int(one[1:]) % 10 for one in hits.ids]
    chosen = [p for p, one in enumerate(order) if int(one[1:]) % 10 in (3, 4)]
    expected = exact_topk(queries, gallery[chosen], 10)
    found = index.search(queries, 10, where="group between 3 and 4", mode="auto")
    assert [hits.ids for hits in found] == [[order[chosen[p]] for p in row] for row in expected.positions]


def test_equal_scores_are_ordered_by_first_write(location):
    index = location.create(2)
    ids = [f"p{i}" for i in random.Random(1).sample(range(300), 300)]
    for at in range(0, 300, 100):
        index.upsert(Rows(ids[at : at + 100], torch.ones(100, 2), {}))
    index.upsert(Rows(ids[150:160], torch.ones(10, 2), {}))  # written again, they keep their positions
    index.upsert(Rows(["best"], torch.full((1, 2), 2.0), {}))
    for k in (1, 5, 20, 299, 301):
        (hits,) = index.search(torch.ones(1, 2), k, mode="exact")
        assert hits.ids == ["best", *ids][:k]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES[1:])
def test_filters_agree_with_a_slow_evaluation(kind, tmp_path_factory):
    location = new_location(kind, tmp_path_factory.mktemp("filters"))
    index = location.create(2)
    columns = {name: [row[name] for row in ROWS] for name in KINDS}
    index.upsert(Rows([row["id"] for row in ROWS], torch.ones(len(ROWS), 2), columns))
    prefixes_only = kind == "milvus" and not index._full_like

    @settings(max_examples=25, deadline=None)
    @given(filters(prefixes_only=prefixes_only))
    def agrees(case):
        text, holds = case
        assert read_column(index, "id", text) == [row["id"] for row in ROWS if holds(row) is True], text

    agrees()
    # An engine may take these for true of every row; they are not true without a value.
    for text in (
        "class not in ('') or class not in ('dog')",
        "class != 'dog' or class != 'cat'",
        "year < 3 or year >= 3",
    ):
        compared = text.partition(" ")[0]
        assert read_column(index, "id", text) == [row["id"] for row in ROWS if row[compared] is not None], text
    expected = [row["id"] for row in ROWS if row["class"] == "dog" or (row["year"] or 0) > 2020]
    (hits,) = index.search(torch.ones(1, 2), 60, where="class = 'dog' or year > 2020")
    assert hits.ids == expected
    location.remove()


@pytest.mark.slow
def test_approximate_search_agrees_with_exact_search(location, monkeypatch):
    if location.engine == "toy":
        pytest.skip("has no approximate index")
    index = location.create(16)
    if location.engine == "milvus":  # which then builds another index
        monkeypatch.setattr(sys.modules[type(index).__module__], "AUTO_EXACT", 1000)
    rows = random_rows([f"p{i}" for i in range(3000)], 16, group=[i % 10 for i in range(3000)])
    index.upsert(Rows(rows.ids[:2500], rows.vectors[:2500], {"group": rows.columns["group"][:2500]}))
    if location.engine != "milvus":  # which always has an index
        with pytest.raises(ConfigError, match="no approximate index"):
            index.search(torch.ones(1, 16), 1, mode="ann")
    index.optimize()
    if location.engine == "memory":
        return
    index.upsert(Rows(rows.ids[2500:], rows.vectors[2500:], {"group": rows.columns["group"][2500:]}))
    index.delete(rows.ids[:100])
    for now in (index, location.reopen()):
        queries = random_rows([str(i) for i in range(20)], 16, seed=3).vectors
        for where in (None, "group = 3"):
            exact = now.search(queries, 10, where=where, mode="exact")
            near = now.search(queries, 10, where=where, mode="ann", columns=["group"])
            recall = sum(len(set(a.ids) & set(b.ids)) for a, b in zip(exact, near, strict=True)) / 200
            assert recall >= 0.95
            for hits in near:
                vectors = now.fetch(hits.ids).vectors
                query = queries[near.index(hits)]
                torch.testing.assert_close(hits.scores, vectors @ query, atol=1e-5, rtol=1e-5)
                assert (hits.scores.diff() <= 0).all()
                assert hits.columns["group"] == [int(one[1:]) % 10 for one in hits.ids]
    (late,) = index.search(rows.vectors[2999:], 1, mode="ann")
    assert late.ids == ["p2999"]  # written since the index was built
    index.optimize()
    assert index.search(rows.vectors[2999:], 1, mode="ann")[0].ids == ["p2999"]
    assert len(index) == 2900
    assert read_column(index, "id") == rows.ids[100:]


@pytest.mark.slow
def test_a_scan_reads_one_version(location):
    if location.engine == "milvus":
        pytest.skip("Milvus may return rows that are written meanwhile, as documented")
    index = location.create(2)
    index.upsert(random_rows([f"p{i}" for i in range(4500)], 2, n=list(range(4500))))
    seen = index.scan(["id", "n"])
    first = next(seen)
    index.delete([f"p{i}" for i in range(4400, 4500)])
    index.upsert(random_rows(["p0", "new"], 2, n=[-1, -2]))
    rest = list(seen)
    ids = [*first["id"], *(one for batch in rest for one in batch["id"])]
    assert ids == [f"p{i}" for i in range(4500)]


def test_random_writes_agree_with_a_dict():
    rng = random.Random(5)
    index, model = MemoryIndex(3), {}
    for step in range(300):
        names = [f"p{n}" for n in rng.sample(range(80), rng.randint(1, 30))]
        if rng.random() < 0.5:
            index.upsert(Rows(names, torch.full((len(names), 3), float(step)), {"step": [step] * len(names)}))
            model |= dict.fromkeys(names, step)
        else:
            assert index.delete(names) == sum(model.pop(name, None) is not None for name in names)
        if rng.random() < 0.1:
            index.optimize()
    (found,) = index.scan(["id", "step"])
    assert found == {"id": list(model), "step": list(model.values())}
    rows = index.fetch(list(model))
    assert rows.vectors[:, 0].tolist() == list(model.values())


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_some_rows_are_ranked_like_a_copy_of_them(data):
    size = data.draw(st.integers(1, 120))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))), dtype=np.int64)
    if data.draw(st.booleans()):
        rows = np.arange(size)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    vectors = torch.randn(size, 16, generator=generator)
    vectors[size // 2 :] = vectors[: size - size // 2].clone()  # ties
    queries = torch.randn(data.draw(st.integers(1, 6)), 16, generator=generator)
    k = data.draw(st.integers(1, len(rows)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranking, "TILE", data.draw(st.tuples(st.integers(1, 4), st.integers(1, 7))))
        found = topk_of_rows(queries, vectors, rows, k)
        expected = ranking.exact_topk(queries, vectors[torch.from_numpy(rows)], k)
    assert found.positions.tolist() == expected.positions.tolist()
    assert torch.equal(found.scores, expected.scores)


def test_few_tiles_are_copied_at_a_time(monkeypatch):
    monkeypatch.setattr(ranking, "TILE", (4, 10))
    sizes, plain = [], ranking.exact_topk
    monkeypatch.setattr(ranking, "exact_topk", lambda q, g, k: (sizes.append(len(g)), plain(q, g, k))[1])
    topk_of_rows(torch.randn(2, 16), torch.randn(200, 16), np.arange(195), 4)
    assert max(sizes) < 50
    assert sum(sizes) == 195
