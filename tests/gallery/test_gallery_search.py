"""Search in a gallery against a slow ranking; refinement, filters, errors."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from small_gallery import COUNT, agrees, embed_images, names, noise_image, slow_ranking
from small_world import DIM
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery import queries
from union_igrot.gallery.engines import VectorIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import ALPHA, BETA, GAMMA, refine_query
from union_igrot.images.transforms import image_batch


@pytest.mark.slow
def test_every_kind_of_query_is_ranked_by_the_model(model, gallery):
    assert len(gallery) == COUNT
    (image,) = embed_images(model, [40])
    assert agrees(gallery.search(noise_image(40), k=5), slow_ranking(model, image)[:5])
    (changed,) = embed_images(model, [40], ["the red square"])
    assert agrees(gallery.search(noise_image(40), "the red square", k=COUNT), slow_ranking(model, changed))
    with torch.inference_mode():
        (embedding,) = model.embed_queries(None, ["blue night"])
    assert agrees(gallery.search(text="blue night"), slow_ranking(model, embedding)[:10])
    both = normalize(normalize(embed_images(model, [40, 41, 42], ["small"] * 3), dim=-1).mean(0), dim=-1)
    assert agrees(
        gallery.search([noise_image(40), noise_image(41), noise_image(42)], "small"), slow_ranking(model, both)[:10]
    )


def test_a_filter_is_applied_before_the_ranking(model, gallery):
    (image,) = embed_images(model, [40])
    expected = [pair for pair in slow_ranking(model, image) if int(pair[0][1:]) % 3 == 1 and int(pair[0][1:]) > 2]
    assert agrees(gallery.search(noise_image(40), where="class = 'dog' and year > 2"), expected)
    assert len(gallery.search(noise_image(40), where="class = 'bird'")) == 0
    with pytest.raises(ConfigError, match="no column 'color'"):
        gallery.search(noise_image(40), where="color = 'red'")


def test_exclusions_do_not_reduce_the_number_of_hits(model, gallery):
    (image,) = embed_images(model, [3])
    whole = slow_ranking(model, image)
    expected = [pair for pair in whole if pair[0] not in {"p3", "p5"}][:4]
    first = gallery.search(noise_image(3), k=1)[0]
    assert agrees(gallery.search(noise_image(3), k=4, exclude=["p3", "p5", "not there"]), expected)
    assert agrees(gallery.search(noise_image(3), k=4, exclude=first), [p for p in whole if p[0] != first.id][:4])


def test_refinement_is_the_method_of_rocchio(model, gallery):
    (image,) = embed_images(model, [40])
    with torch.inference_mode():
        rows = model.embed_gallery(image_batch([noise_image(n) for n in range(COUNT)], model.preprocess))
    moved = ALPHA * image + BETA * (rows[1] + rows[2]) / 2 - GAMMA * (rows[3] + rows[4] + rows[5]) / 3
    expected = [p for p in slow_ranking(model, moved / moved.norm()) if p[0] not in {"p3", "p4", "p5"}]
    hits = gallery.search(noise_image(40), k=COUNT)
    by_id = {hit.id: hit for hit in hits}
    found = gallery.search(noise_image(40), liked=["p1", by_id["p2"]], disliked=(by_id["p3"], "p4", "p5"), k=COUNT)
    assert agrees(found, expected)
    alone = rows[1] / rows[1].norm()
    assert agrees(gallery.search(liked="p1", k=COUNT), slow_ranking(model, alone))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_a_refined_query_has_unit_length_and_moves_towards_liked_rows(liked, disliked, with_query, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(7, 32, generator=draw), dim=-1)
    if not (liked or with_query):
        return
    query = rows[6] if with_query else None
    moved = refine_query(query, list(rows[:liked]), list(rows[3 : 3 + disliked]))
    assert abs(float(moved.norm()) - 1) < 1e-5
    if with_query and liked and not disliked:
        centre = rows[:liked].mean(0)
        assert float(moved @ centre) >= float(rows[6] @ centre) - 1e-6


@pytest.mark.slow
def test_many_queries_equal_single_queries(model, gallery, monkeypatch):
    given = [
        {"image": noise_image(40)},
        {"text": "red"},
        {"image": [noise_image(41), noise_image(42)], "text": "large"},
        {"image": noise_image(43), "text": "remove", "exclude": ["p1"]},
        {"liked": ["p2"], "disliked": ["p1", "p3"]},
        {"image": noise_image(44), "liked": ["p2"]},
        {"text": "blue", "disliked": "p0"},
        {"image": [noise_image(45)] * 3},
    ]
    alone = [gallery.search(**one, k=6) for one in given]
    for batch in (256, 2):
        monkeypatch.setattr(queries, "BATCH", batch)
        together = gallery.search_many(given, 6)
        assert [found.ids for found in together] == [found.ids for found in alone]
        for one, other in zip(together, alone, strict=True):
            assert np.allclose(one.scores, other.scores, atol=1e-5)
    assert gallery.search_many([]) == []


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({}, ConfigError, "the query is empty"),
        ({"text": "  "}, ConfigError, "the query is empty"),
        ({"disliked": ["p1"]}, ConfigError, "the query is empty"),
        ({"image": "not there.png"}, ImageError, "missing"),
        ({"image": np.zeros((3, 8, 9))}, ImageError, "channels are first"),
        ({"text": "red", "liked": ["p99"]}, DataError, "p99"),
        ({"text": "red", "liked": [3]}, ConfigError, "invalid image of the gallery"),
        ({"text": "red", "liked": ["p1"], "disliked": ["p1"]}, ConfigError, "both liked and disliked"),
        ({"text": "red", "k": 0}, ConfigError, "k: 0"),
        ({"text": "red", "mode": "ann"}, ConfigError, "no approximate index"),
    ],
)
def test_invalid_searches_are_one_line_errors(gallery, arguments, error, part):
    with pytest.raises(error, match=part) as caught:
        gallery.search(**arguments)
    assert "\n" not in str(caught.value)


def test_wrong_types_are_refused_without_type_checks(gallery):
    with pytest.raises(ConfigError, match=r"k: 2\.0 .expected an integer"):
        inspect.unwrap(Gallery.search_many)(gallery, [{"text": "red"}], 2.0)
    with pytest.raises(ConfigError, match=r"mode: 'fast' .expected one of exact, ann"):
        inspect.unwrap(VectorIndex.search)(gallery.index, torch.ones(1, DIM), 3, mode="fast")


def test_an_error_among_many_queries_names_the_query(gallery):
    with pytest.raises(ConfigError, match=r"^query 2: the query is empty"):
        gallery.search_many([{"text": "red"}, {}])
    with pytest.raises(ConfigError, match=r"^query 1: unknown field of a query: 'txt' .expected image, text"):
        gallery.search_many([{"txt": "red"}, {"text": "red"}])
    with pytest.raises(ConfigError, match=r"^query 2: invalid value for text"):
        gallery.search_many([{"text": "red"}, {"text": 3}])
    with pytest.raises(ImageError, match=r"^query 2: .*missing"):
        gallery.search_many([{"text": "red"}, {"image": "not there.png"}])
    with pytest.raises(ImageError, match=r"^a\.csv:7: .*missing"):
        gallery.search_many([{"text": "red"}, {"image": "no.png"}], names=["a.csv:6", "a.csv:7"])
    with pytest.raises(DataError, match=r"^query 2: 'p99' is not in memory:"):
        gallery.search_many([{"text": "red", "liked": "p1"}, {"liked": "p99"}])


def test_exclusions_of_one_query_cost_the_others_nothing(gallery, monkeypatch):
    given = [
        {"text": "red"},
        {"text": "red", "exclude": names()[:9]},
        {"text": "blue"},
        {"text": "blue", "exclude": "p1"},
    ]
    alone = [gallery.search(**one, k=3) for one in given]
    read, plain = [], gallery.index.search

    def search(queries, k, **more):
        read.append((len(queries), k))
        return plain(queries, k, **more)

    monkeypatch.setattr(gallery.index, "search", search)
    together = gallery.search_many(given, 3)
    assert [found.ids for found in together] == [found.ids for found in alone]
    assert sorted(read) == [(1, 4), (1, 19), (2, 3)]


def test_pages_and_lowest_scores(gallery):
    whole = gallery.search(text="red", exclude="p3", k=COUNT)
    pages = [gallery.search(text="red", exclude="p3", k=4, offset=offset) for offset in (0, 4, 8, 12)]
    assert [page.ids for page in pages] == [whole.ids[:4], whole.ids[4:8], whole.ids[8:], []]
    found = gallery.search_many([{"text": "red"}, {"text": "red", "exclude": "p3"}], 3, offset=1)
    assert found[1].ids == whole.ids[1:4]
    lowest = whole.scores[5]
    assert gallery.search(text="red", exclude="p3", k=COUNT, min_score=lowest).ids == whole.ids[:6]
    assert gallery.search(text="red", exclude="p3", k=2, offset=5, min_score=lowest).ids == whole.ids[5:6]
    assert len(gallery.search(text="red", min_score=1.5)) == 0
    with pytest.raises(ConfigError, match=r"offset: -1 .expected an integer >= 0"):
        gallery.search(text="red", offset=-1)


def test_hits_have_columns_and_thumbnails(gallery):
    hit = next(hit for hit in gallery.search(noise_image(4), k=COUNT) if hit.id == "p4")
    assert (hit.columns["class"], hit.columns["year"]) == ("dog", 4)
    assert (hit.columns["width"], hit.columns["height"], hit.columns["source"]) == (8, 8, "added")
    assert "thumbnail" not in hit.columns
    assert hit.thumbnail.size == (8, 8)
    assert hit.path is None
    bare = gallery.search(noise_image(4), k=2, thumbnails=False)
    assert all(hit.thumbnail is None and "hash" in hit.columns for hit in bare)


def test_results_are_sequences_with_html_for_notebooks(gallery):
    found = gallery.search(noise_image(4), k=3)
    assert [hit.id for hit in found] == found.ids
    assert found[0].score == max(found.scores)
    assert found[1:].ids == found.ids[1:]
    assert found[-1] in found
    assert repr(found).startswith("SearchResult(3 hits, best ")
    assert [line.split()[-1] for line in str(found).splitlines()] == ["hits", *found.ids]
    assert found._repr_html_().count("<img") == 3
    assert "no hits" in gallery.search(noise_image(4), where="year > 99")._repr_html_()
    assert repr(gallery) == "Gallery('memory:', 12 images, model linear, exact)"
