"""`union-check` on official files without images, on complete small ones, and on nothing."""

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from official import WRITERS
from PIL import Image

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


def test_complete_files_exit_with_0(tmp_path, capsys, monkeypatch):
    WRITERS["tuberlin"](tmp_path)
    monkeypatch.setitem(registry._registered, "tuberlin", replace(TUBERLIN, counts={}))
    check(["data=tuberlin", f"data.root={tmp_path}"])
    assert "complete" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the official annotation files are not at ../shared/data")
def test_official_annotations_without_images(capsys):
    code, said = run(["data=fashioniq", f"data.root={ANNOTATIONS / 'fashioniq'}"], capsys)
    assert code == 1
    assert "2,017 of 2,017" in said
    assert "3,817 of 3,817" in said


def test_the_generated_world_has_no_files(capsys):
    check(["data=shapes"])
    assert "generated" in capsys.readouterr().out


def test_the_training_split_is_checked_too(tmp_path, capsys):
    code, printed = run(["data=cirr", f"data.root={tmp_path}"], capsys)
    assert code == 1
    assert "cap.rc2.train.json" in printed.replace(" ", "")
    assert "cap.rc2.val.json" in printed.replace(" ", "")


@pytest.mark.slow
def test_an_own_folder_shows_classes_counts_and_broken_files(tmp_path, capsys):
    for number, name in enumerate(("apple", "boat", "cat", "dog", "egg", "fan", "gear", "hat", "ink", "jar", "key")):
        for top in ("photos", "sketches"):
            (tmp_path / top / name).mkdir(parents=True)
            for copy in range(2):
                Image.new("RGB", (8, 8), (20 * number, 99 * copy, 0)).save(tmp_path / top / name / f"{copy}.png")
    check(["data=folder", f"data.root={tmp_path}"])
    printed = capsys.readouterr().out
    assert printed.count("complete") == 3
    counts = [line.split()[:4] for line in printed.splitlines() if line.strip().startswith(("train ", "val ", "test "))]
    assert sum(int(row[1]) for row in counts) == 11
    assert all(int(row[2]) == int(row[3]) == 2 * int(row[1]) for row in counts)
    names = [line for line in printed.splitlines() if line.startswith(("train:", "val:", "test:"))]
    assert len(names) == 3
    (tmp_path / "photos" / "apple" / "0.png").write_bytes(b"no image")
    code, printed = run(["data=folder", f"data.root={tmp_path}"], capsys)
    assert code == 1
    assert "1 images missing or broken" in printed
    assert "apple/0.png" in printed.replace(" ", "")


def test_own_triplets_are_counted(tmp_path, capsys):
    for name in "abcdef":
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    rows = [("a", "b", "train"), ("c", "d", "val"), ("e", "f", "test"), ("e", "lost", "test")]
    lines = [f'{{"reference": "{a}.png", "text": "x", "targets": ["{b}.png"], "split": "{c}"}}\n' for a, b, c in rows]
    (tmp_path / "triplets.jsonl").write_text("".join(lines))
    code, printed = run(["data=folder", f"data.root={tmp_path}"], capsys)
    assert code == 1
    assert "test 2 3" in printed
    assert "lost.png" in printed


def test_what_training_refuses_is_incomplete_and_other_spellings_of_names_are_not(tmp_path, capsys):
    rows = ["domain,path,class,split"]
    for number, split in enumerate(("train", "val", "test")):
        for domain in ("photo", "sketch"):
            name = f"{domain}{number} é.png"
            Image.new("RGB", (8, 8), "red").save(tmp_path / unicodedata.normalize("NFD", name))
            rows.append(f"{domain},{unicodedata.normalize('NFC', name)},shoe,{split}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    code, printed = run(["data=folder", f"data.root={tmp_path}"], capsys)
    assert code == 1
    assert "missing" not in printed
    assert "train: folder train: all triplets have one class" in printed
    assert printed.count("a single class, 'shoe'") == 2


def test_the_dataset_is_required(refused):
    assert "data" in refused(check)
