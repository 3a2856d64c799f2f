"""Rows that lie scattered are ranked as if they lay in order, to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.evaluation import exact
from union_igrot.gallery.engines import scattered
from union_igrot.gallery.engines.scattered import scattered_topk


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scattered_rows_are_ranked_as_if_in_order(data):
    tile = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 7)))
    sizes = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=4).filter(any))
    everywhere = [(part << 32) + row for part, size in enumerate(sizes) for row in range(size)]
    shape = data.draw(st.sampled_from(["as they lie", "some left out", "some moved", "shuffled"]))
    if shape == "some left out":
        everywhere = [place for place in everywhere if data.draw(st.integers(0, 9))] or everywhere[:1]
    elif shape == "some moved":
        for _ in range(3):
            everywhere.append(everywhere.pop(data.draw(st.integers(0, len(everywhere) - 1))))
    elif shape == "shuffled":
        everywhere = data.draw(st.permutations(everywhere))
    places = np.array(everywhere, dtype=np.int64)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    parts = [torch.randn(size, 16, generator=draw) for size in sizes]
    queries = torch.randn(data.draw(st.integers(1, 6)), 16, generator=draw)
    k = data.draw(st.integers(1, len(places)))
    together = torch.stack([parts[place >> 32][place & 0xFFFFFFFF] for place in everywhere])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "TILE", tile)
        found = scattered_topk(queries, parts, places, k)
        expected = exact.exact_topk(queries, together, k)
    assert found.positions.tolist() == expected.positions.tolist()
    assert torch.equal(found.scores, expected.scores)


def test_rows_that_lie_together_are_not_copied(monkeypatch):
    monkeypatch.setattr(exact, "TILE", (4, 10))
    seen = []
    plain = exact.exact_topk
    monkeypatch.setattr(exact, "exact_topk", lambda q, g, k: (seen.append(g.data_ptr()), plain(q, g, k))[1])
    vectors = torch.randn(95, 16)
    scattered_topk(torch.randn(2, 16), [vectors], np.arange(95), 4)
    assert seen == [vectors.data_ptr()]
    seen.clear()
    places = np.delete(np.arange(95), 33)  # one row removed: only its tile has to be brought together
    scattered_topk(torch.randn(2, 16), [vectors], places, 4)
    views = [p for p in seen if 0 <= p - vectors.data_ptr() < vectors.nbytes]
    assert views == [vectors.data_ptr(), vectors[41].data_ptr()]
    assert len(seen) == 3


def test_few_tiles_are_brought_together_at_once(monkeypatch):
    monkeypatch.setattr(exact, "TILE", (4, 10))
    sizes = []
    plain = exact.exact_topk
    monkeypatch.setattr(exact, "exact_topk", lambda q, g, k: (sizes.append(len(g)), plain(q, g, k))[1])
    places = np.arange(195)[::-1].copy()
    scattered_topk(torch.randn(2, 16), [torch.randn(195, 16)], places, 4)
    assert max(sizes) <= scattered._GATHERED_TILES * 10 + 9
    assert sum(sizes) == 195


def test_numbers_that_are_not_aligned_are_copied(monkeypatch):
    seen = []
    plain = exact.exact_topk
    monkeypatch.setattr(exact, "exact_topk", lambda q, g, k: (seen.append(g.data_ptr()), plain(q, g, k))[1])
    vectors = torch.randn(20, 3)
    scattered_topk(torch.randn(1, 3), [vectors], np.arange(1, 20), 2)
    assert seen[0] % 64 == 0
    assert not 0 <= seen[0] - vectors.data_ptr() < vectors.nbytes
