"""The card of a model says what it is, how it was trained, its metrics with protocol, and how it is loaded."""

import json
import re

import pytest
import yaml

from small_results import method, result
from small_runs import Run
from union_igrot.errors import CheckpointError
from union_igrot.evaluation.tables import format_percent
from union_igrot.metrics.statistics import Difference
from union_igrot.models.hub import rename_model_card
from union_igrot.reporting.model_card import PLACEHOLDER, render_model_card, write_model_card
from union_igrot.types import Protocol

NOTES = {
    "backbone": "base",
    "backbone_fingerprint": "b" * 16,
    "heads": "c" * 16,
    "fusion": {"kind": "transagg", "layers": 2},
    "target": {"kind": "union", "heads": 8},
    "projector": None,
}


PROTOCOL = Protocol(metrics=("R@1", "mAP"), primary="mAP", exclude_reference=True, ap_norm="all", note="a note")


def one(name, value, benchmark="birds", **more):
    sizes = {"n_queries": 1200, "n_gallery": 4000, "n_skipped": 3, "versions": {"torch": "9.9"}, "seed": 5}
    return method(name, value, benchmark, {"R@1": value / 2}, PROTOCOL, **(sizes | more))


GAIN = {"chance": {"R@1": Difference(1.0, 1.0, 1.0), "mAP": Difference(36.0, 33.0, 39.0)}}
METHODS = [one("chance", 4.0), one("trained", 40.0, differences=GAIN)]


@pytest.mark.slow
def test_a_training_leaves_a_card_with_every_metric(small_run: Run):
    text = (small_run.folder / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "union-igrot"
    saved = json.loads((small_run.folder / "model" / "model.json").read_text())
    for said in (saved["heads"], saved["backbone_fingerprint"], "`tiny`", "shapes", "14 (", "frozen", "128"):
        assert said in body, said
    for one in small_run.rows:
        assert f"### {one['benchmark']}, {one['split']}: {one['n_queries']:,} queries" in body
        assert (
            all(f"[{format_percent(low)}, {format_percent(high)}]" in body for low, high in one["ci95"].values())
            or one["method"] != "trained"
        )
    assert body.count("| trained") == 2
    assert body.count("[low, high]: 95 % bootstrap interval of ") == 2
    assert "of the classes: these are not zero-shot" in body
    assert f'union_igrot.load("{small_run.folder.as_posix()}/model")' in body
    assert "no one else has rights" in body
    assert body.count("\n## ") == 6


def test_metrics_come_with_counts_protocol_intervals_and_differences():
    text = render_model_card(NOTES, result=result(*METHODS))
    assert "### birds, val: 1,200 queries, 4,000 images" in text
    assert "| method | R@1 | **mAP** |\n| --- | ---: | ---: |" in text
    assert "| chance | 2.0 | 4.0 [3.0, 5.0] |\n| trained | 20.0 | 40.0 [39.0, 41.0] |" in text
    assert "protocol official; AP divided by R, step rule; micro average; reference left out" in text
    assert "- intervals of trained: R@1 [19.0, 21.0], mAP [39.0, 41.0]\n" in text
    assert "- trained - chance: +36.0 [+33.0, +39.0] mAP, better" in text
    assert "; 3 items left out\n" in text
    assert "Versions: torch 9.9. Seed of chance and bootstrap: 5." in text
    assert "hold for birds under the protocol" in text


def test_of_parts_the_metrics_are_shown_and_the_protocol_once():
    whole = [one(name, 4.0, "animals", parts=("birds",)) for name in ("chance", "trained")]
    text = render_model_card(NOTES, result=result(*METHODS, *whole))
    birds, animals = text.split("### birds")[1].split("### animals")
    assert "protocol official" not in birds
    assert "mean of the parts' means" in animals


def test_a_card_without_training_or_metrics():
    text = render_model_card({**NOTES, "tuned": True, "card": {}})
    assert f'union_igrot.load("{PLACEHOLDER}")' in text
    assert "not recorded" in text
    assert "Not evaluated" in text
    assert "was not evaluated" in text
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
    text = render_model_card({**NOTES, "card": card}, name="someone/x", license="mit")
    assert f"union-eval checkpoint=someone/x{asked}\n```" in text
    assert rights in text
    assert "my/own" not in text
    assert "The weights of `base` have a license of their own." in text
    assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == "mit"
    assert ("- **converted from**: authors.pth" in text) == ("source" in card)


def test_renaming_changes_only_the_loading_lines():
    text = render_model_card(NOTES, name="model")
    renamed = rename_model_card(text, "someone/x")
    assert 'union_igrot.load("someone/x")' in renamed
    assert "union-eval checkpoint=someone/x\n" in renamed
    assert len(re.findall("someone/x", renamed)) == 2
    assert rename_model_card(renamed, "model") == text
    assert rename_model_card(text, None) == text
    assert rename_model_card("a card of someone else", "someone/x") == "a card of someone else"


def test_a_card_is_written_beside_a_model_with_or_without_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.json"):
        write_model_card(folder, tmp_path / "results.json")
    (folder / "model.json").write_text(json.dumps(NOTES))
    assert write_model_card(folder, tmp_path / "results.json") == folder / "README.md"
    assert 'union_igrot.load("run/model")' in (folder / "README.md").read_text()
    (tmp_path / "results.json").write_text(result(*METHODS).to_json())
    write_model_card(folder, tmp_path / "results.json", name="someone/x")
    assert "| trained |" in (folder / "README.md").read_text()
