"""Weighted terms: their forms, and searches against a sum that is computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from small_gallery import COUNT, agrees, embed_images, fill_gallery, noise_image, slow_ranking
from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import Term, describe_term, parse_term, read_queries


@torch.inference_mode()
def text_embedding(model, text):
    return model.embed_queries(None, [text])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "images", "text", "weight"),
    [
        ("golden retriever", (), "golden retriever", 1),
        ("2:golden retriever", (), "golden retriever", 2),
        ("0.5:a dog", (), "a dog", 0.5),
        (".5: a dog ", (), "a dog", 0.5),
        ("+3:a dog", (), "a dog", 3),
        ("-fruit", (), "fruit", -1),
        ("- fruit", (), "fruit", -1),
        ("-2:fruit", (), "fruit", -2),
        ("text:-5 degrees", (), "-5 degrees", 1),
        ("-text:-5 degrees", (), "-5 degrees", -1),
        ("text:a dog:2", (), "a dog:2", 1),
        ("John 3:16", (), "John 3:16", 1),
        ("text:16:9 screen", (), "16:9 screen", 1),
        ("2:text:16:9 screen", (), "16:9 screen", 2),
        ("text:pool.jpg", (), "pool.jpg", 1),
        ("ratio 16:9", (), "ratio 16:9", 1),
        ("dog + cat", (), "dog + cat", 1),
        ("and/or", (), "and/or", 1),
        ("./pool", ("./pool",), None, 1),
        ("/photos/pool", ("/photos/pool",), None, 1),
        ("~/pool", ("~/pool",), None, 1),
        ("C:\\photos\\pool", ("C:\\photos\\pool",), None, 1),
        ("pool.JPG", ("pool.JPG",), None, 1),
        ("my pool.webp", ("my pool.webp",), None, 1),
        ("-2:pool.jpg", ("pool.jpg",), None, -2),
        ("image:pool", ("pool",), None, 1),
        ("-image:pool", ("pool",), None, -1),
        ("pool.jpg#10%,20%,50%,50%", ("pool.jpg#10%,20%,50%,50%",), None, 1),
        ("2:pool.jpg + in red", ("pool.jpg",), "in red", 2),
        ("image:pool + at night + warm", ("pool",), "at night + warm", 1),
        ("-pool.jpg#1,2,3,4 + in red", ("pool.jpg#1,2,3,4",), "in red", -1),
        (("fruit", -1), (), "fruit", -1),
        (["fruit", 2.5], (), "fruit", 2.5),
        (("-fruit", 2), (), "-fruit", 2),
        (("2:fruit", 2), (), "2:fruit", 2),
        (("./pool.jpg", np.float32(2)), ("./pool.jpg",), None, 2),
        ((Path("pool"), "in red"), (Path("pool"),), "in red", 1),
        ((("pool", "in red"), -1), ("pool",), "in red", -1),
        ([["pool", "in red"], -1], ("pool",), "in red", -1),
        (Path("pool"), (Path("pool"),), None, 1),
        ({"image": "pool", "text": "in red", "weight": 3}, ("pool",), "in red", 3),
        ({"text": "2:fruit"}, (), "2:fruit", 1),
    ],
)
def test_forms_of_a_term(given, images, text, weight):
    assert parse_term(given) == Term(images, text, float(weight))
    assert parse_term(parse_term(given)) == parse_term(given)


def test_a_file_whose_name_looks_like_a_pair_is_one_image(tmp_path):
    name = str(tmp_path / "a.jpg + b.jpg")
    assert parse_term(name) == Term((str(tmp_path / "a.jpg"),), "b.jpg")
    Path(name).write_bytes(b"")
    assert parse_term(name) == Term((name,))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("", "is empty"),
        ("2:", "is empty"),
        ("-", "is empty"),
        (" text: ", "is empty"),
        (("", 1), "is empty"),
        ({"weight": 2}, "is empty"),
        ({"txt": "a"}, "unknown field of a term: 'txt'"),
        (("a", "b", "c"), "3 values"),
        (("a", float("nan")), "invalid weight of a term: nan"),
        ("nan:dog", "invalid weight of a term: nan"),
        ("-INF:dog", "invalid weight of a term: -inf"),
        ("9999999:dog", "expected a number up to 1,000,000"),
        ("a dog:2", "comes first: 2:a dog; for this text write text:a dog:2"),
        ("a.jpg:-0.5", "comes first: -0.5:a.jpg"),
        (("a", 1e9), "expected a number up to 1,000,000"),
        ({"text": "a", "weight": True}, "invalid weight of a term: True"),
        ({"text": "a", "weight": "2"}, "invalid weight of a term: '2'"),
        ({"text": 3}, "invalid term"),
        (3, "invalid term: 3"),
        ((1, 2), "invalid term"),
    ],
)
def test_an_invalid_term_is_a_one_line_error(given, part):
    with pytest.raises(ConfigError) as caught:
        parse_term(given)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


WORDS = st.text("abcdefgh +:-.#/%0123456789", min_size=1).filter(str.strip)


@given(WORDS, st.floats(-1000, 1000))
def test_an_escaped_text_is_taken_as_it_is(text, weight):
    assert parse_term(f"{weight:f}:text:{text}") == Term((), text.strip(), float(f"{weight:f}"))


def expected_terms(model):
    """Return the query of `given_terms`, summed by hand."""
    image, other = embed_images(model, [40, 41], [None, "large"])
    total = 2 * text_embedding(model, "red") + image - 0.5 * text_embedding(model, "night") + 3 * other
    return total / total.norm()


def given_terms(image=None):
    first = image or noise_image(40)
    return ["2:red", (first, 1), ("night", -0.5), ((noise_image(41), "large"), 3)]


def test_terms_are_a_weighted_sum_of_unit_embeddings(model, gallery):
    query = expected_terms(model)
    assert agrees(gallery.search(terms=given_terms(), k=COUNT), slow_ranking(model, query))
    (own,) = embed_images(model, [42], ["small"])
    for first in ({"image": noise_image(42), "text": "small"}, {"terms": [(noise_image(42), "small")]}):
        terms = [*first.get("terms", ()), ("night", -0.5)]
        total = own - 0.5 * text_embedding(model, "night")
        found = gallery.search(**{**first, "terms": terms}, k=COUNT)
        assert agrees(found, slow_ranking(model, total / total.norm()))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.25, 1, 7])
def test_a_single_positive_term_is_the_plain_query(gallery, weight):
    for term, plain in (
        (("red", weight), {"text": "red"}),
        ((noise_image(40), weight), {"image": noise_image(40)}),
        (((noise_image(40), "red"), weight), {"image": noise_image(40), "text": "red"}),
    ):
        assert gallery.search(terms=[term]).scores == gallery.search(**plain).scores


def test_scaling_all_weights_and_a_weight_of_0_change_nothing(gallery):
    some = gallery.search(terms=[("red", 1), ("blue", -0.5)], k=COUNT)
    for same in ([("red", 4), ("blue", -2)], [("red", 1), ("night", 0), ("blue", -0.5)]):
        again = gallery.search(terms=same, k=COUNT)
        assert again.ids == some.ids
        assert np.allclose(again.scores, some.scores, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["memory", "lance"])
def test_everything_else_works_beside_terms(model, engine, tmp_path):
    if engine == "lance":
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
        with Gallery.open(tmp_path / "x.lance", model) as gallery:
            columns = {"year": list(range(COUNT))}
            gallery.add([noise_image(number) for number in range(COUNT)], [f"p{n}" for n in range(COUNT)], columns)
            check_other_settings(model, gallery)
    else:
        check_other_settings(model, fill_gallery(model))


def check_other_settings(model, gallery):
    whole = slow_ranking(model, expected_terms(model))
    kept = [pair for pair in whole if pair[0] not in ("p3", "p4") and int(pair[0][1:]) > 1]
    found = gallery.search(terms=given_terms(), where="year > 1", exclude=["p3", "p4"], k=4, offset=2)
    assert agrees(found, kept[2:6])
    assert len(gallery.search(terms=given_terms(), min_score=whole[2][1] - 1e-5, k=COUNT)) == 3
    rows = dict(zip(gallery.ids(), gallery.index.fetch(gallery.ids()).vectors, strict=True))
    moved = expected_terms(model) + 0.75 * rows["p1"] - 0.15 * rows["p2"]
    expected = [pair for pair in slow_ranking(model, moved / moved.norm()) if pair[0] != "p2"]
    assert agrees(gallery.search(terms=given_terms(), liked="p1", disliked="p2", k=COUNT), expected)
    several = [{"text": "red"}, {"terms": given_terms()}, {"terms": ["blue", "-red"], "image": noise_image(40)}]
    together = gallery.search_many(several, 3)
    assert [one.ids for one in together] == [gallery.search(**one, k=3).ids for one in several]


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ({"terms": ["-red", ("blue", -2)]}, "only negative terms; add one positive term"),
        ({"terms": ["-red"], "liked": "p1"}, "only negative terms; add one positive term"),
        ({"terms": [("red", 0)]}, "no term of positive weight"),
        ({"terms": ["red", "-red"]}, "cancel each other out"),
        ({"terms": []}, "the query is empty"),
        ({"terms": ["red", 3]}, "invalid term: 3"),
    ],
)
def test_invalid_terms_name_their_query(gallery, query, part):
    with pytest.raises(ConfigError, match=part):
        gallery.search(**query)
    with pytest.raises(ConfigError, match=f"^query 2: .*{part}"):
        gallery.search_many([{"text": "red"}, query])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"queries": [{"text": "red"}], "names": ["a", "b"]}, "got 2 names for 1 queries"),
        ({"queries": [{"text": "red"}], "min_score": float("nan")}, "invalid value for min_score: nan"),
    ],
)
def test_arguments_of_many_queries_are_validated(gallery, arguments, part):
    with pytest.raises(ConfigError, match=part):
        gallery.search_many(**arguments)


def test_a_text_of_which_the_model_knows_nothing_is_refused(model, gallery, monkeypatch):
    unknown = model.encode_queries(texts="red") * 0
    monkeypatch.setattr(model, "embed_queries", lambda *_: unknown)
    with pytest.raises(ConfigError, match=r"knows no word of 'xyzzy'; use other words"):
        gallery.search(text="xyzzy")


def test_a_file_of_queries_has_terms(model, gallery, tmp_path):
    noise_image(40).save(tmp_path / "a.png")
    terms = ["2:red", ["./a.png", 1], {"text": "night", "weight": -0.5}, [["a.png", "large"], 3]]
    (tmp_path / "q.jsonl").write_text(json.dumps({"terms": terms}) + "\n")
    (line,) = read_queries(tmp_path / "q.jsonl")
    image, other = embed_images(model, [40, 40], [None, "large"])
    total = 2 * text_embedding(model, "red") + image - 0.5 * text_embedding(model, "night") + 3 * other
    (found,) = gallery.search_many([line.query], COUNT)
    assert agrees(found, slow_ranking(model, total / total.norm()))
    for wrong, part in (
        ([3], "invalid term: 3"),
        (["-red"], "only negative terms"),
        ([{"image": ["a.png"]}], "invalid image of a term"),
        (["b.png"], "b.png: the image is missing"),
    ):
        (tmp_path / "q.jsonl").write_text(json.dumps({"terms": wrong}) + "\n")
        with pytest.raises(DataError if "missing" not in part else Exception, match=f"q.jsonl, line 1: .*{part}"):
            read_queries(tmp_path / "q.jsonl")


def test_titles_of_terms():
    terms = ["2:a dog", "./pool.jpg", "-fruit", "0.5:a.jpg + in red"]
    shown = ["2 * 'a dog'", "./pool.jpg", "-1 * 'fruit'", "0.5 * a.jpg + 'in red'"]
    assert [describe_term(parse_term(term)) for term in terms] == shown
