"""`union-check` on official files without images, on complete small ones, and on nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
from official import WRITERS

from union_igrot.cli.check import main as check
from union_igrot.datasets import registry
from union_igrot.datasets.builtin import BUILTIN, TUBERLIN

ANNOTATIONS = Path(__file__).parents[3] / "shared" / "data" / "annotations"


def run(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        check(arguments)
    return stop.value.code, " ".join(capsys.readouterr().out.split())


def test_every_benchmark_is_known_with_its_own_splits_and_parts():
    for declaration in BUILTIN:
        assert declaration.source
        values = {value for part in declaration.parts for value in part.values()}
        assert {split for split, _ in declaration.counts} <= set(declaration.splits)
        assert {part for _, part in declaration.counts} == (values or {""})


def test_other_counts_than_the_official_ones_are_incomplete(tmp_path, capsys):
    WRITERS["tuberlin"](tmp_path)
    code, said = run(["data=tuberlin", f"data.root={tmp_path}"], capsys)
    assert code == 1
    assert "of 2,400" in said
    assert "ZSE-SBIR" in said


def test_complete_files_end_well(tmp_path, capsys, monkeypatch):
    WRITERS["tuberlin"](tmp_path)
    monkeypatch.setitem(registry._registered, "tuberlin", replace(TUBERLIN, counts={}))
    check(["data=tuberlin", f"data.root={tmp_path}"])
    assert "complete" in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path, capsys):
    code, said = run(["data=cirr", f"data.root={tmp_path}"], capsys)
    assert code == 1
    assert "cap.rc2.val.json" in said.replace(" ", "")


@pytest.mark.slow
@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the official annotation files are not at ../shared/data")
def test_official_annotations_without_pictures(capsys):
    code, said = run(["data=fashioniq", f"data.root={ANNOTATIONS / 'fashioniq'}"], capsys)
    assert code == 1
    assert "2,017 of 2,017" in said
    assert "3,817 of 3,817" in said


def test_the_generated_world_needs_no_check(capsys):
    code, _ = run(["data=shapes"], capsys)
    assert code == 2


def test_no_benchmark_named_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        check([])
    assert stop.value.code == 2
    assert "data" in capsys.readouterr().err
