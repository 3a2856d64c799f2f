"""Whole rankings against a full stable sort: first results and ranks, for any ties, chunks and threads."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.evaluation import ranking as module
from union_igrot.evaluation.ranking import exact_topk, rank_chunks


def slow_order(queries, gallery, exclude):
    """Positions of each row by score in whole numbers, then by position; excluded ones behind; in plain Python."""
    orders = []
    for row, query in enumerate(queries.tolist()):
        out = set(exclude[row]) if exclude else set()
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery.tolist()]
        orders.append(sorted(range(len(scores)), key=lambda p: (p in out, 0 if p in out else -scores[p], p)))
    return orders


@st.composite
def searches(draw):
    """Small whole numbers: many ties and duplicates, and exact products."""
    n, m = draw(st.integers(1, 7)), draw(st.integers(1, 26))
    numbers = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    queries = draw(st.lists(numbers, min_size=n, max_size=n))
    gallery = draw(st.lists(numbers, min_size=m, max_size=m))
    exclude = draw(st.none() | st.lists(st.lists(st.integers(0, m - 1), max_size=4), min_size=n, max_size=n))
    return torch.tensor(queries).float(), torch.tensor(gallery).float(), exclude


@settings(max_examples=40, deadline=None)
@given(
    searches(),
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    st.integers(1, 2000),
    st.sampled_from([0, 2, 64]),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.data(),
)
def test_ranks_and_first_results_are_those_of_a_full_stable_sort(search, tile, budget, ties, few, before, data):
    queries, gallery, exclude = search
    orders = slow_order(queries, gallery, exclude)
    k = data.draw(st.integers(1, len(gallery)))
    covered = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", tile)
        patch.setattr(module, "_FEW_TIES", ties)
        patch.setattr(module, "_FEW_ITEMS", few)
        for chunk in rank_chunks(queries, gallery, exclude, budget):
            mine = orders[chunk.queries]
            covered += mine
            places = torch.stack([torch.tensor(order)[::2].sort().values for order in mine])
            if before:
                assert chunk.first(k).tolist() == [order[:k] for order in mine]
            found = chunk.ranks(places).tolist()
            expected = [[order.index(p) + 1 for p in row] for order, row in zip(mine, places.tolist(), strict=True)]
            assert found == expected
            assert chunk.first(k).tolist() == [order[:k] for order in mine]
            out = [len(set(one)) for one in exclude[chunk.queries]] if exclude else [0] * len(mine)
            assert (chunk.scores > -torch.inf).sum(1).tolist() == [len(gallery) - count for count in out]
            assert chunk.scores.isinf().sum(1).tolist() == out
    assert covered == orders


def unit(n, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


def test_the_first_results_are_those_of_the_search_to_the_last_bit():
    # More than one tile each way, and every third item a duplicate.
    queries, gallery = unit(70, 24, 0), unit(5000, 24, 1)
    gallery[2::3] = gallery[0::3][: len(gallery[2::3])]
    found = exact_topk(queries, gallery, 300)
    for chunk in rank_chunks(queries, gallery, chunk_bytes=10 * 8 * 5000):
        first = chunk.first(300)
        assert first.equal(found.positions[chunk.queries])
        assert chunk.scores.gather(1, first).equal(found.scores[chunk.queries])
        assert chunk.ranks(first).equal(torch.arange(1, 301).expand(len(first), -1))


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.0, 1e30, 3e38])
def test_scores_of_any_size_are_ranked(scale):
    scores = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * scale
    scores[1], scores[2, 5:9] = 0.25 * scale, -torch.inf
    scores[3, 0], scores[3, 1] = scale, -scale
    chunk = module.RankedChunk(slice(0, 4), scores)
    everything = torch.arange(200).expand(4, -1)
    assert chunk.ranks(everything).equal(module._order(scores).argsort(dim=1) + 1)


def test_threads_change_nothing():
    queries, gallery = unit(9, 8, 0), unit(300, 8, 1)
    places = torch.arange(0, 300, 7).expand(9, -1)

    def ranks():
        (chunk,) = rank_chunks(queries, gallery)
        return chunk.ranks(places)

    alone, before = ranks(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert ranks().equal(alone)
    finally:
        torch.set_num_threads(before)


def test_what_an_accelerator_computes_is_the_same():
    """Its way, a stable sort with positions, on this device."""
    scores = torch.randint(-3, 4, (5, 40), generator=torch.Generator().manual_seed(0)).float()
    places = torch.arange(0, 40, 3).expand(5, -1)
    chunk = module.RankedChunk(slice(0, 5), scores)
    assert (module._order(scores).argsort(dim=1).gather(1, places) + 1).equal(chunk.ranks(places))


def test_a_chunk_is_invalid_after_the_next():
    chunks = rank_chunks(unit(4, 4, 0), unit(10, 4, 1), chunk_bytes=2 * 8 * 10)
    first = next(chunks)
    memory = first.scores.data_ptr()
    assert next(chunks).scores.data_ptr() == memory
    with pytest.raises(RuntimeError, match="reused by the next"):
        first.ranks(torch.zeros(2, 1, dtype=torch.int64))


def test_no_score_matrix_above_the_budget():
    queries, gallery = unit(200, 4, 0), unit(20_000, 4, 1)
    budget = 64 * 4096 * 8
    sizes = [2 * chunk.scores.nbytes for chunk in rank_chunks(queries, gallery, chunk_bytes=budget)]
    assert max(sizes) <= budget
    assert sum(sizes) == 200 * 20_000 * 8


def test_no_query_no_chunk():
    assert list(rank_chunks(unit(2, 8, 0)[:0], unit(9, 8, 1))) == []
