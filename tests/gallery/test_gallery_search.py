"""What a gallery finds, against a slow, literal ranking; refinement, filters, mistakes."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from small_gallery import COUNT, embedded, names, picture, ranked, same
from small_world import DIM
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery import queries
from union_igrot.gallery.engines import VectorIndex
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import ALPHA, BETA, GAMMA, refine_query
from union_igrot.images.transforms import image_batch


def test_every_way_of_asking_ranks_as_the_model_says(model, gallery):
    assert len(gallery) == COUNT
    (image,) = embedded(model, [40])
    assert same(gallery.search(picture(40), k=5), ranked(model, image)[:5])
    (changed,) = embedded(model, [40], ["the red square"])
    assert same(gallery.search(picture(40), "the red square", k=COUNT), ranked(model, changed))
    with torch.inference_mode():
        (spoken,) = model.embed_queries(None, ["blue night"])
    assert same(gallery.search(text="blue night"), ranked(model, spoken)[:10])
    both = normalize(normalize(embedded(model, [40, 41, 42], ["small"] * 3), dim=-1).mean(0), dim=-1)
    assert same(gallery.search([picture(40), picture(41), picture(42)], "small"), ranked(model, both)[:10])


def test_more_answers_than_pictures_are_all_pictures(gallery):
    assert sorted(gallery.search(picture(40), k=100).ids) == sorted(names())


def test_a_filter_is_applied_before_the_ranking(model, gallery):
    (image,) = embedded(model, [40])
    wanted = [pair for pair in ranked(model, image) if int(pair[0][1:]) % 3 == 1 and int(pair[0][1:]) > 2]
    assert same(gallery.search(picture(40), where="class = 'dog' and year > 2"), wanted)
    assert len(gallery.search(picture(40), where="class = 'bird'")) == 0
    with pytest.raises(ConfigError, match="no column 'color'"):
        gallery.search(picture(40), where="color = 'red'")


def test_what_is_excluded_does_not_shorten_the_list(model, gallery):
    (image,) = embedded(model, [3])
    whole = ranked(model, image)
    wanted = [pair for pair in whole if pair[0] not in {"p3", "p5"}][:4]
    first = gallery.search(picture(3), k=1)[0]
    assert same(gallery.search(picture(3), k=4, exclude=["p3", "p5", "not there"]), wanted)
    assert same(gallery.search(picture(3), k=4, exclude=first), [p for p in whole if p[0] != first.id][:4])


def test_refinement_is_rocchios(model, gallery):
    (image,) = embedded(model, [40])
    with torch.inference_mode():
        rows = model.embed_gallery(image_batch([picture(n) for n in range(COUNT)], model.preprocess))
    moved = ALPHA * image + BETA * (rows[1] + rows[2]) / 2 - GAMMA * (rows[3] + rows[4] + rows[5]) / 3
    wanted = [p for p in ranked(model, moved / moved.norm()) if p[0] not in {"p3", "p4", "p5"}]
    hits = gallery.search(picture(40), k=COUNT)
    by_id = {hit.id: hit for hit in hits}
    found = gallery.search(picture(40), liked=["p1", by_id["p2"]], disliked=(by_id["p3"], "p4", "p5"), k=COUNT)
    assert same(found, wanted)
    alone = rows[1] / rows[1].norm()
    assert same(gallery.search(liked="p1", k=COUNT), ranked(model, alone))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_a_refined_query_is_of_unit_length_and_nearer_to_what_was_liked(liked, disliked, asked, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(7, 32, generator=draw), dim=-1)
    if not (liked or asked):
        return
    query = rows[6] if asked else None
    moved = refine_query(query, list(rows[:liked]), list(rows[3 : 3 + disliked]))
    assert abs(float(moved.norm()) - 1) < 1e-5
    if asked and liked and not disliked:
        centre = rows[:liked].mean(0)
        assert float(moved @ centre) >= float(rows[6] @ centre) - 1e-6


def test_many_queries_are_answered_as_one_by_one(model, gallery, monkeypatch):
    asked = [
        {"image": picture(40)},
        {"text": "red"},
        {"image": [picture(41), picture(42)], "text": "large"},
        {"image": picture(43), "text": "remove", "exclude": ["p1"]},
        {"liked": ["p2"], "disliked": ["p1", "p3"]},
        {"image": picture(44), "liked": ["p2"]},
        {"text": "blue", "disliked": "p0"},
        {"image": [picture(45)] * 3},
    ]
    alone = [gallery.search(**one, k=6) for one in asked]
    for batch in (256, 2):
        monkeypatch.setattr(queries, "BATCH", batch)
        together = gallery.search_many(asked, 6)
        assert [found.ids for found in together] == [found.ids for found in alone]
        for one, other in zip(together, alone, strict=True):
            assert np.allclose(one.scores, other.scores, atol=1e-5)
    assert gallery.search_many([]) == []


@pytest.mark.parametrize(
    ("asked", "error", "part"),
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
def test_a_mistake_in_a_search_is_one_line(gallery, asked, error, part):
    with pytest.raises(error, match=part) as caught:
        gallery.search(**asked)
    assert "\n" not in str(caught.value)


def test_values_of_a_wrong_type_are_refused_without_type_checks(gallery):
    with pytest.raises(ConfigError, match=r"k: 2\.0 .expected an integer"):
        inspect.unwrap(Gallery.search_many)(gallery, [{"text": "red"}], 2.0)
    with pytest.raises(ConfigError, match=r"mode: 'fast' .expected one of exact, ann"):
        inspect.unwrap(VectorIndex.search)(gallery.index, torch.ones(1, DIM), 3, mode="fast")


def test_a_mistake_among_many_queries_says_which(gallery):
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


def test_one_query_that_leaves_out_much_costs_the_others_nothing(gallery, monkeypatch):
    asked = [
        {"text": "red"},
        {"text": "red", "exclude": names()[:9]},
        {"text": "blue"},
        {"text": "blue", "exclude": "p1"},
    ]
    alone = [gallery.search(**one, k=3) for one in asked]
    read, plain = [], gallery.index.search

    def search(queries, k, **more):
        read.append((len(queries), k))
        return plain(queries, k, **more)

    monkeypatch.setattr(gallery.index, "search", search)
    together = gallery.search_many(asked, 3)
    assert [found.ids for found in together] == [found.ids for found in alone]
    assert sorted(read) == [(1, 4), (1, 19), (2, 3)]


def test_hits_carry_what_is_kept_beside_the_embedding(gallery):
    hit = next(hit for hit in gallery.search(picture(4), k=COUNT) if hit.id == "p4")
    assert (hit.columns["class"], hit.columns["year"]) == ("dog", 4)
    assert (hit.columns["width"], hit.columns["height"], hit.columns["source"]) == (8, 8, "added")
    assert "thumbnail" not in hit.columns
    assert hit.thumbnail.size == (8, 8)
    assert hit.path is None
    bare = gallery.search(picture(4), k=2, thumbnails=False)
    assert all(hit.thumbnail is None and "hash" in hit.columns for hit in bare)


def test_answers_are_a_sequence_that_a_notebook_shows(gallery):
    found = gallery.search(picture(4), k=3)
    assert [hit.id for hit in found] == found.ids
    assert found[0].score == max(found.scores)
    assert found[1:].ids == found.ids[1:]
    assert found[-1] in found
    assert repr(found).startswith("SearchResult(3 hits, best ")
    assert [line.split()[-1] for line in str(found).splitlines()] == ["hits", *found.ids]
    assert found._repr_html_().count("<img") == 3
    assert "no hits" in gallery.search(picture(4), where="year > 99")._repr_html_()
    assert repr(gallery) == "Gallery('memory:', 12 images, model linear, exact)"
