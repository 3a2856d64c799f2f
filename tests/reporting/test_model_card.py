"""The card of a model says what it is, how it was trained, its metrics with protocol, and how it is loaded."""

import json
import re

import pytest
import yaml

from small_runs import Run
from union_igrot.errors import CheckpointError, DataError
from union_igrot.reporting.model_card import NOBODY, model_card, read_rows, rename_card, write_card
from union_igrot.reporting.tables import percent

NOTES = {
    "backbone": "base",
    "backbone_fingerprint": "b" * 16,
    "heads": "c" * 16,
    "fusion": {"kind": "transagg", "layers": 2},
    "target": {"kind": "union", "heads": 8},
    "projector": None,
}


def row(method, figure, **more):
    protocol = {
        **{"name": "official", "metrics": ["R@1", "mAP"], "primary": "mAP", "exclude_reference": True},
        **{"ap_norm": "all", "ap_rule": "step", "average": "micro", "ties": "gallery order", "note": "a note"},
        **{"recall": "any", "precision_cut": "k", "means": [], "prompt": ""},
    }
    return {
        **{
            "benchmark": "birds",
            "split": "val",
            "method": method,
            "n_queries": 1200,
            "n_gallery": 4000,
            "n_skipped": 3,
        },
        "protocol": protocol,
        "metrics": {"R@1": figure / 2, "mAP": figure},
        "ci95": {"R@1": [figure / 2 - 1, figure / 2 + 1], "mAP": [figure - 2, figure + 2]},
        **{"by_tag": {}, "seen_classes": [], "seen_images": None, "versions": {"torch": "9.9"}, "seed": 5},
        **more,
    }


ROWS = [row("chance", 4.0), row("trained", 40.0, gain95={"chance": {"R@1": [1, 1, 1], "mAP": [36.0, 33.0, 39.0]}})]


def test_a_training_leaves_a_card_with_every_figure(small_run: Run):
    text = (small_run.folder / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "union-igrot"
    saved = json.loads((small_run.folder / "model" / "model.json").read_text())
    for said in (saved["heads"], saved["backbone_fingerprint"], "`tiny`", "`shapes`", "14 (", "frozen", "128"):
        assert said in body, said
    for one in small_run.rows:
        assert f"### {one['benchmark']}, {one['split']}: {one['n_queries']:,} queries" in body
        assert (
            all(f"[{percent(low)}, {percent(high)}]" in body for low, high in one["ci95"].values())
            or one["method"] != "trained"
        )
    assert body.count("| trained |") == 2
    assert body.count("In brackets 95 % bootstrap intervals over queries") == 2
    assert "of the classes were trained on: for them this is not zero-shot" in body
    assert f'union_igrot.load("{small_run.folder.as_posix()}/model")' in body
    assert "no one else has rights" in body
    assert body.count("\n## ") == 6


def test_figures_stand_with_counts_protocol_intervals_differences_and_versions():
    text = model_card(NOTES, rows=ROWS)
    assert "### birds, val: 1,200 queries, 4,000 images" in text
    assert "| method | R@1 | **mAP** |\n| --- | ---: | ---: |" in text
    assert "| chance | 2.0 | 4.0 [2.0, 6.0] |\n| trained | 20.0 | 40.0 [38.0, 42.0] |" in text
    assert "protocol official; AP divided by R, step rule; micro average; reference left out" in text
    assert "of the last line: R@1 [19.0, 21.0], mAP [38.0, 42.0]." in text
    assert "- trained - chance: +36.0 [+33.0, +39.0] mAP, better" in text
    assert "- 3 items left out" in text
    assert "Versions: torch 9.9. Seed of chance and bootstrap: 5." in text
    assert "hold for birds under the protocol" in text


def test_of_parts_the_figures_are_shown_and_the_protocol_once():
    whole = [row("chance", 4.0, benchmark="animals", parts=["birds"]), row("trained", 40.0, benchmark="animals")]
    text = model_card(NOTES, rows=[*ROWS, *(one | {"parts": ["birds"]} for one in whole)])
    birds, animals = text.split("### birds")[1].split("### animals")
    assert "protocol official" not in birds
    assert "mean of the parts' means" in animals


def test_without_training_or_figures_the_card_says_so():
    text = model_card({**NOTES, "tuned": True, "card": {}})
    assert f'union_igrot.load("{NOBODY}")' in text
    assert "not recorded" in text
    assert "None were measured" in text
    assert "Nothing was measured." in text
    assert "`backbone.safetensors`" in text


@pytest.mark.parametrize(
    ("card", "asked", "rights"),
    [
        ({"data": "shapes", "config": {"data": {"name": "shapes"}}}, "", "no one else has rights"),
        (
            {"data": "folder", "config": {"data": {"name": "folder", "root": "my/own"}}},
            " data=folder data.root=DIR",
            "own",
        ),
        (
            {"data": "circo", "config": {"data": {"name": "circo"}}},
            " data=circo data.root=DIR",
            "of `circo` have terms",
        ),
        ({"source": "authors.pth", "reference_target": "union"}, "", "the training data have terms of their own"),
    ],
)
def test_rights_and_the_command_follow_the_data(card, asked, rights):
    text = model_card({**NOTES, "card": card}, name="someone/x", license="mit")
    assert f"union-eval checkpoint=someone/x{asked}\n```" in text
    assert rights in text
    assert "my/own" not in text
    assert "The weights of `base` have a license of their own." in text
    assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == "mit"
    assert ("- **converted from**: `authors.pth`" in text) == ("source" in card)


def test_a_new_name_is_put_where_the_model_is_loaded_and_nowhere_else():
    text = model_card(NOTES, name="model")
    renamed = rename_card(text, "someone/x")
    assert 'union_igrot.load("someone/x")' in renamed
    assert "union-eval checkpoint=someone/x\n" in renamed
    assert len(re.findall("someone/x", renamed)) == 2
    assert rename_card(renamed, "model") == text
    assert rename_card(text, None) == text
    assert rename_card("a card of someone else", "someone/x") == "a card of someone else"


def test_a_card_is_written_beside_a_model_with_or_without_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read"):
        write_card(folder, tmp_path / "results.json")
    (folder / "model.json").write_text(json.dumps(NOTES))
    assert write_card(folder, tmp_path / "results.json") == folder / "README.md"
    assert 'union_igrot.load("run/model")' in (folder / "README.md").read_text()
    (tmp_path / "results.json").write_text(json.dumps(ROWS))
    write_card(folder, tmp_path / "results.json", name="someone/x")
    assert "| trained |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("content", ["", "{", "3", '[{"method": "x"}]', '["x"]'])
def test_results_that_are_none_are_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json cannot be read .*give a results\.json of union-train") as told:
        read_rows(tmp_path / "results.json")
    assert "\n" not in str(told.value)
