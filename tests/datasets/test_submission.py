"""Submission files: what is written is right, what is wrong is named, and CIRCO's official metrics come out."""

import json

import official
import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.datasets.loading import load_benchmark
from union_igrot.datasets.submission import check_submission, read_predictions, write_circo, write_cirr
from union_igrot.errors import ConfigError, DataError, UnionError


@pytest.fixture(scope="module")
def cirr(tmp_path_factory):
    root = tmp_path_factory.mktemp("cirr")
    official.cirr(root, with_images=False, size=60)
    return load_benchmark("cirr", root, split="test1", check_images=False)


@pytest.fixture(scope="module")
def circo(tmp_path_factory):
    root = tmp_path_factory.mktemp("circo")
    official.circo(root, with_images=False, size=60)
    return load_benchmark("circo", root, split="test", check_images=False)


def rankings(benchmark):
    """Rank the gallery differently for each query, the reference included."""
    names = [item.id for item in benchmark.gallery]
    return [names[at:] + names[:at] for at in range(len(benchmark.queries))]


def subset_rankings(benchmark):
    return [query.subset[::-1] for query in benchmark.queries]


@pytest.fixture
def written(cirr, circo, tmp_path):
    recall, subset = write_cirr(tmp_path / "new", cirr, rankings(cirr), subset_rankings(cirr))
    return {
        "recall": (recall, cirr),
        "subset": (subset, cirr),
        "circo": (write_circo(tmp_path / "c.json", circo, rankings(circo)), circo),
    }


def test_written_files_are_valid(written, cirr):
    for path, benchmark in written.values():
        assert check_submission(path, benchmark) == []
    recall, subset, circo = (json.loads(path.read_text()) for path, _ in written.values())
    assert len(recall) == len(subset) == len(cirr.queries) + 2
    assert (recall["version"], recall["metric"]) == ("rc2", "recall")
    assert (subset["version"], subset["metric"]) == ("rc2", "recall_subset")
    for query in cirr.queries:
        assert len(recall[query.id]) == 50
        assert query.exclude[0] not in recall[query.id] + subset[query.id]
        assert subset[query.id] == list(query.subset[::-1][:3])
    assert list(circo) == ["0", "1", "2", "3", "4"]
    assert all(len(names) == 50 and all(type(name) is int for name in names) for names in circo.values())
    assert circo["0"][0] == 1000  # CIRCO keeps the reference


def test_invalid_rankings_are_not_written(cirr, circo, tmp_path):
    short = rankings(cirr)
    short[3] = short[3][:50]  # with the reference
    with pytest.raises(DataError, match=r"not written: key '103': has 49 entries"):
        write_cirr(tmp_path, cirr, short, subset_rankings(cirr))
    strange = subset_rankings(cirr)
    strange[2] = [item.id for item in cirr.gallery[-3:]]
    with pytest.raises(DataError, match=r"not written: key '102': contains .* not in the query's subset"):
        write_cirr(tmp_path, cirr, rankings(cirr), strange)
    with pytest.raises(DataError, match="53 rankings for 54 queries"):
        write_cirr(tmp_path, cirr, rankings(cirr)[1:], subset_rankings(cirr))
    with pytest.raises(DataError, match="not written: key '0': contains 'x', which is not an integer"):
        write_circo(tmp_path / "c.json", circo, [["x"] * 50] * 5)
    with pytest.raises(ConfigError, match="expected cirr"):
        write_cirr(tmp_path, circo, [], [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_circo(tmp_path / "file/c.json", circo, rankings(circo))


def set_to(key, change):
    def mutate(content):
        content[key] = change(content[key])

    return mutate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mutate", "problem"),
    [
        ("recall", set_to("103", lambda v: v[:49]), "key '103': has 49 entries; expected exactly 50"),
        ("recall", set_to("103", lambda v: [*v[:49], v[0]]), "key '103': contains 'test1-3-0-img0' twice"),
        (
            "recall",
            set_to("103", lambda v: ["test1-3-0-img0", *v[1:]]),
            "key '103': contains the reference 'test1-3-0-img0'",
        ),
        (
            "recall",
            set_to("103", lambda v: ["test1-3-0-img0.png", *v[1:]]),
            "key '103': contains 'test1-3-0-img0.png', which is not in the gallery (names have no folder",
        ),
        ("recall", set_to("103", lambda v: [7, *v[1:]]), "key '103': contains 7, which is not a text"),
        ("recall", lambda v: v.update({"103": "abc"}), "key '103': is 'abc'; expected a list of 50 ids"),
        ("recall", lambda v: v.pop("103"), "key '103': is missing"),
        ("recall", lambda v: v.update({"9": []}), "key '9': is not a query of cirr (test1)"),
        ("recall", lambda v: v.update(version="rc1"), "key 'version': is 'rc1'; expected 'rc2'"),
        ("recall", lambda v: v.pop("metric"), "key 'metric': is None; expected one of recall, recall_subset"),
        ("subset", set_to("103", lambda v: v[:2]), "key '103': has 2 entries; expected exactly 3"),
        (
            "subset",
            set_to("103", lambda v: [*v[:2], "test1-40-0-img0"]),
            "key '103': contains 'test1-40-0-img0', which is not in the query's subset",
        ),
        ("subset", set_to("103", lambda v: [*v[:2], "test1-3-0-img0"]), "key '103': contains the reference"),
        ("circo", set_to("2", lambda v: v[:49]), "key '2': has 49 entries"),
        ("circo", set_to("2", lambda v: [*v[:49], v[0]]), "key '2': contains '1014' twice"),
        ("circo", set_to("2", lambda v: [str(v[0]), *v[1:]]), "key '2': contains '1014', which is not an integer"),
        ("circo", set_to("2", lambda v: [True, *v[1:]]), "key '2': contains True, which is not an integer"),
        ("circo", set_to("2", lambda v: [3, *v[1:]]), "key '2': contains 3, which is not in the gallery"),
        ("circo", lambda v: v.pop("2"), "key '2': is missing; every query needs a list, without gaps"),
        ("circo", lambda v: v.update({"05": []}), "key '05': is not a query"),
    ],
)
def test_each_problem_is_named(written, kind, mutate, problem):
    path, benchmark = written[kind]
    content = json.loads(path.read_text())
    if problem.endswith("twice") and kind == "recall":
        problem = f"key '103': contains {content['103'][0]!r} twice"
    mutate(content)
    path.write_text(json.dumps(content))
    (found,) = check_submission(path, benchmark)
    assert found.startswith(problem)


def test_files_that_are_no_submission(written, tmp_path, cirr, circo):
    path, _ = written["circo"]
    text = path.read_text()
    for content, problem in (
        (text[:-5], "not JSON"),
        ("[]", "not a JSON object"),
        (text.replace('"1":', '"0":'), "duplicate key"),
    ):
        path.write_text(content)
        (found,) = check_submission(path, circo)
        assert problem in found
    assert "cannot be read" in check_submission(tmp_path / "none.json", cirr)[0]
    official.tuberlin(tmp_path, with_images=False)
    with pytest.raises(ConfigError, match="expected cirr or circo"):
        check_submission(path, load_benchmark("tuberlin", tmp_path, check_images=False))


def test_predictions_of_any_method(written, circo, cirr, tmp_path):
    path, _ = written["circo"]
    wanted = [names[:50] for names in rankings(circo)]
    assert read_predictions(path, circo) == wanted
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: [f"{name:012d}" for name in names] for key, names in content.items()}))
    assert read_predictions(path, circo) == wanted
    recall, _ = written["recall"]
    assert read_predictions(recall, cirr)[0] == [item.id for item in cirr.gallery[1:51]]
    for broken, match in (
        ({"0": [1000]}, "key '1': is missing"),
        (content | {"7": [1000]}, "key '7': is not a query of circo"),
        (content | {"3": []}, r"key '3': is \[\]; expected a list"),
        (content | {"3": [1000, "1000"]}, "key '3': contains '1000' twice"),
        (content | {"3": [1000, None]}, "key '3': contains None, which is not in the gallery"),
        (content | {"3": [{}]}, "key '3': contains {}, which is not in the gallery"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=match):
            read_predictions(path, circo)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_content_is_judged(circo, cirr, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    entry = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["1000", "1007", "", "\ud800"])
    value = entry | st.lists(entry, max_size=4) | st.dictionaries(st.text(max_size=2), entry, max_size=1)
    keys = st.sampled_from(["0", "1", "2", "3", "4", "version", "metric", "100"])
    path.write_text(json.dumps(data.draw(st.dictionaries(keys, value, max_size=8) | value)))
    for benchmark in (circo, cirr):
        assert all(isinstance(problem, str) for problem in check_submission(path, benchmark))
        try:
            read_predictions(path, benchmark)
        except UnionError as error:
            assert "\n" not in str(error)  # noqa: PT017
