"""The Python interface: each documented call, and the public names with their types."""

import ast
from pathlib import Path

import pytest
import torch

import union_igrot as ui
from union_igrot.errors import ConfigError, UnionError


@pytest.fixture(scope="module")
def model():
    return ui.load("tiny")


def test_names_for_editors_are_those_imported_lazily():
    tree = ast.parse(Path(ui.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {
        alias.asname: node.module.removeprefix("union_igrot.")
        for node in imports
        for alias in node.names
        if alias.asname == alias.name
    }
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy_exports")
    assert ast.literal_eval(call.args[1]) == typed


def test_an_unknown_name_suggests_close_ones():
    with pytest.raises(AttributeError, match="load_benchmark"):
        ui.load_benchmarks  # noqa: B018


def test_evaluate_takes_a_name_a_benchmark_or_several(model, tmp_path):
    options = {"cache_dir": tmp_path, "progress": False, "workers": 0}
    named = ui.evaluate(model, "shapes", queries=20, **options)
    benchmarks = [ui.shapes_cir("test", 20, 0, distractors=40), ui.shapes_sbir("test", 20, 0, gallery=20)]
    several = ui.evaluate(model, benchmarks, **options)
    single = ui.evaluate(model, benchmarks[1], **options)
    metrics = [(one.benchmark, one.method, one.metrics) for one in named.methods]
    assert metrics == [(one.benchmark, one.method, one.metrics) for one in several.methods]
    assert metrics[len(metrics) // 2 :] == [(one.benchmark, one.method, one.metrics) for one in single.methods]
    assert "shapes_sbir" in str(single)
    assert len(repr(single)) < 300


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [(("circle",), {}, "circle"), (("shapes",), {"querys": 3}, "querys"), (("circo",), {"root": "nowhere"}, "nowhere")],
)
def test_a_wrong_benchmark_or_option_is_named(model, tmp_path, arguments, options, named):
    with pytest.raises(UnionError, match=named):
        ui.evaluate(model, *arguments, cache_dir=tmp_path, **options)


def test_a_benchmark_that_is_read_takes_no_root(model, tmp_path):
    with pytest.raises(ConfigError, match="root"):
        ui.evaluate(model, ui.shapes_cir("test", 4, 0), "data", cache_dir=tmp_path)


def test_rank_takes_embeddings_and_refuses_other_shapes():
    vectors = torch.nn.functional.normalize(torch.randn(5, 4), dim=-1)
    assert ui.rank(vectors, vectors, k=1).positions.tolist() == [[0], [1], [2], [3], [4]]
    for wrong in (vectors[None], vectors[:, :3], vectors.int()):
        with pytest.raises(UnionError):
            ui.rank(wrong, vectors)


def test_the_old_name_of_image_batch_warns(model):
    image = torch.zeros(3, 20, 20)
    with pytest.warns(DeprecationWarning, match="image_batch"):
        old = ui.picture_batch([image], model.preprocess)
    assert old.equal(ui.image_batch([image], model.preprocess))
