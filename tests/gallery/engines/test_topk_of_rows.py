"""Exact search over some rows of a matrix equals the ranking of a copy of them, to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.evaluation import exact
from union_igrot.gallery.engines.base import topk_of_rows


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_ranked_as_their_copy(data):
    size = data.draw(st.integers(1, 120))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))), dtype=np.int64)
    if data.draw(st.booleans()):
        rows = np.arange(size)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    vectors = torch.randn(size, 16, generator=draw)
    vectors[size // 2 :] = vectors[: size - size // 2].clone()  # ties
    queries = torch.randn(data.draw(st.integers(1, 6)), 16, generator=draw)
    k = data.draw(st.integers(1, len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "TILE", data.draw(st.tuples(st.integers(1, 4), st.integers(1, 7))))
        found = topk_of_rows(queries, vectors, rows, k)
        expected = exact.exact_topk(queries, vectors[torch.from_numpy(rows)], k)
    assert found.positions.tolist() == expected.positions.tolist()
    assert torch.equal(found.scores, expected.scores)


def test_few_tiles_are_copied_at_once(monkeypatch):
    monkeypatch.setattr(exact, "TILE", (4, 10))
    sizes, plain = [], exact.exact_topk
    monkeypatch.setattr(exact, "exact_topk", lambda q, g, k: (sizes.append(len(g)), plain(q, g, k))[1])
    topk_of_rows(torch.randn(2, 16), torch.randn(200, 16), np.arange(195), 4)
    assert max(sizes) < 50
    assert sum(sizes) == 195
