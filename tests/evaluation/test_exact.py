"""Exact search against a full stable sort, for any chunk size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.errors import ConfigError, DataError
from union_igrot.evaluation import ranking
from union_igrot.evaluation.ranking import exact_topk, rank, rank_chunks


def slow_ranking(queries, gallery, exclude=None):
    """Candidates of each query by score in whole numbers, then by position, in plain Python."""
    rankings = []
    for row, query in enumerate(queries.tolist()):
        out = set(exclude[row]) if exclude else set()
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery.tolist()]
        rankings.append(sorted((-s, p) for p, s in enumerate(scores) if p not in out))
    return rankings


def whole(queries, gallery, **options):
    """Put the chunks of `rank_chunks` together."""
    return torch.cat([chunk.first(len(gallery)) for chunk in rank_chunks(queries, gallery, **options)])


@st.composite
def searches(draw):
    """Small whole numbers: many ties and duplicates, and exact products."""
    n, m = draw(st.integers(1, 7)), draw(st.integers(1, 26))
    numbers = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    queries = draw(st.lists(numbers, min_size=n, max_size=n))
    gallery = draw(st.lists(numbers, min_size=m, max_size=m))
    exclude = draw(
        st.none() | st.lists(st.lists(st.integers(0, m - 1), max_size=min(4, m - 1)), min_size=n, max_size=n)
    )
    tile = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    return torch.tensor(queries).float(), torch.tensor(gallery).float(), exclude, tile, draw(st.integers(1, 2000))


@settings(max_examples=40, deadline=None)
@given(searches(), st.integers(1, 26), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_chunked_equals_the_full_stable_sort(search, k, dtype):
    queries, gallery, exclude, tile, budget = search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE", tile)
        expected = slow_ranking(queries, gallery, exclude)
        k = min(k, *(len(row) for row in expected))
        found = exact_topk(queries.to(dtype), gallery.to(dtype), k, exclude, budget)
    assert found.positions.tolist() == [[p for _, p in row[:k]] for row in expected]
    assert found.scores.tolist() == [[-s for s, _ in row[:k]] for row in expected]
    assert found.scores.dtype == torch.float32


def unit(n, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


def test_neither_budget_nor_k_changes_a_bit():
    # More than one tile each way, none of them whole, with every third item a duplicate.
    queries, gallery = unit(150, 24, 0), unit(9000, 24, 1)
    gallery[2::3] = gallery[0::3]
    largest = exact_topk(queries, gallery, 300, chunk_bytes=2**30)
    positions = whole(queries, gallery, chunk_bytes=2**30)
    assert torch.equal(positions[:, :300], largest.positions)
    for budget in (1, 300_000, 3_000_000, 2**25):
        found = exact_topk(queries[:70], gallery, 20, chunk_bytes=budget)
        assert torch.equal(found.positions, largest.positions[:70, :20])
        assert torch.equal(found.scores, largest.scores[:70, :20])
    for budget in (100_000, 2**25):
        assert torch.equal(whole(queries, gallery, chunk_bytes=budget), positions)


def test_scores_are_those_of_a_product_in_double():
    queries, gallery = unit(5, 64, 2), unit(5000, 64, 3)
    found = exact_topk(queries, gallery, 50)
    expected = (queries.double() @ gallery.double().T).sort(dim=1, descending=True).values[:, :50]
    torch.testing.assert_close(found.scores.double(), expected, rtol=0, atol=1e-6)
    assert (found.scores.diff(dim=1) <= 0).all()


def test_half_precision_inputs_are_multiplied_in_float32():
    queries, gallery = unit(3, 64, 4).half(), unit(2000, 64, 5).half()
    found = exact_topk(queries, gallery, 2000)
    expected = queries.double() @ gallery.double().T
    torch.testing.assert_close(found.scores.double(), expected.gather(1, found.positions), rtol=0, atol=1e-6)
    assert found.scores.unique().numel() > 5000  # half precision would leave far fewer


def test_autocast_and_faster_matmuls_do_not_reach_the_scores():
    queries, gallery = unit(64, 256, 6), unit(512, 256, 7)
    expected = exact_topk(queries, gallery, 512)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = exact_topk(queries, gallery, 512)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.scores, expected.scores)


def test_scores_of_any_size_are_ordered_and_negative_zero_equals_zero():
    scores = torch.tensor([[3e38, 1.0, 1e-30, 0.0, -0.0, -1e-30, -0.5, -3e38]])
    found = exact_topk(torch.ones(1, 1), scores.T.contiguous(), 8)
    assert found.positions[0].tolist() == list(range(8))
    assert len(set(found.scores[0].tolist())) == 7
    assert found.scores[0, 3] == found.scores[0, 4]
    assert found.scores.tolist() == scores.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_a_tile_depends_on_the_position_alone(length, size, data):
    def tile_of(start, stop):
        parts = list(ranking._tiles(slice(start, stop), length, size))
        assert [p for part, _ in parts for p in range(part.start, part.stop)] == list(range(start, stop))
        for part, tile in parts:
            assert 0 <= tile.start <= part.start < part.stop <= tile.stop <= length
            assert tile.stop - tile.start == min(size, length)
        return {p: tile.start for part, tile in parts for p in range(part.start, part.stop)}

    everywhere = tile_of(0, length)
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    assert tile_of(start, stop).items() <= everywhere.items()


def test_embeddings_with_gradients_give_rankings_without():
    queries = unit(2, 8, 0).requires_grad_()
    found = exact_topk(queries, unit(9, 8, 1), 3)
    assert not found.scores.requires_grad
    assert exact_topk(queries[:0], unit(9, 8, 1), 3).positions.shape == (0, 3)


def test_no_score_matrix_above_the_budget(monkeypatch):
    sizes = []
    real = ranking._fill

    def watched(scores, *arguments):
        sizes.append(2 * scores.nbytes)
        return real(scores, *arguments)

    monkeypatch.setattr(ranking, "_fill", watched)
    queries, gallery = unit(200, 4, 0), unit(20_000, 4, 1)
    budget = 64 * 4096 * 8
    exact_topk(queries, gallery, 5, chunk_bytes=budget)
    assert max(sizes) <= budget
    assert np.sum(sizes) == 200 * 20_000 * 8


@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_beyond_the_candidates_is_an_error(k):
    queries, gallery = unit(2, 4, 0), unit(10, 4, 1)
    with pytest.raises(ConfigError, match=rf"k: {k} \(expected 1 to 8; the gallery has 10 items.*up to 2"):
        exact_topk(queries, gallery, k, exclude=[[1], [2, 3, 2]])


def first_only(queries, gallery, **options):
    return exact_topk(queries, gallery, 1, **options)


@pytest.mark.parametrize("search", [first_only, rank_chunks])
def test_wrong_arguments_are_errors_at_once(search):
    queries, gallery = unit(2, 4, 0), unit(10, 4, 1)
    with pytest.raises(DataError, match="1 lists of exclusions for 2 queries"):
        search(queries, gallery, exclude=[[]])
    for wrong in (-1, 10):
        with pytest.raises(DataError, match=f"query 1 excludes position {wrong}, but the gallery has 10"):
            search(queries, gallery, exclude=[[], [3, wrong]])
    with pytest.raises(DataError, match="the gallery is empty"):
        search(queries, gallery[:0])
    with pytest.raises(ConfigError, match="chunk_bytes: 0"):
        search(queries, gallery, chunk_bytes=0)


@pytest.mark.parametrize("search", [first_only, rank_chunks])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_embeddings_that_are_not_finite_are_errors_at_once(search, value):
    queries, gallery = unit(2, 4, 0), unit(10, 4, 1)
    gallery[7, 2] = value
    with pytest.raises(DataError, match=r"1 of the gallery \(first at position 7\) contain nan"):
        search(queries, gallery)
    with pytest.raises(DataError, match=r"1 of the queries \(first at position 0\)"):
        search(gallery[7:], unit(10, 4, 1))
    with pytest.raises(DataError, match="too large for float32"):
        search(torch.full((1, 2), 1e30), torch.full((1, 2), 1e30))


def test_rank_is_the_public_form():
    queries, gallery = unit(3, 8, 0), unit(20, 8, 1)
    found, expected = rank(queries, gallery, k=4), exact_topk(queries, gallery, 4)
    assert found.positions.equal(expected.positions)
    assert found.scores.equal(expected.scores)
    assert rank(queries[0], gallery, 4).positions.equal(exact_topk(queries[:1], gallery, 4).positions)


@pytest.mark.parametrize(
    ("queries", "gallery", "said"),
    [
        (torch.ones(2, 4), torch.ones(4), r"gallery.*\(4,\)"),
        (torch.ones(1, 2, 4), torch.ones(3, 4), r"queries.*\(1, 2, 4\)"),
        (torch.ones(2, 4), torch.ones(3, 5), "4 and 5"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4), "int64"),
    ],
)
def test_rank_checks_its_arguments(queries, gallery, said):
    with pytest.raises(DataError, match=said):
        rank(queries, gallery, 1)
