"""What each kind of command writes as its page, on small files in official layouts."""

import html
import json
import shlex

import pytest
from official import WRITERS

from union_igrot.cli.eval import main as evaluate
from union_igrot.datasets.loading import load_benchmark
from union_igrot.reporting.page import MAX_BYTES


def page_of(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) <= MAX_BYTES
    return text


def command_in(text):
    return html.unescape(text.partition('<pre class="command"><code>')[2].partition("</code>")[0])


@pytest.mark.slow
def test_a_hidden_split_is_shown_without_a_verdict(tmp_path, capsys):
    WRITERS["circo"](tmp_path / "data", size=60)
    settings = ["data=circo", f"data.root={tmp_path / 'data'}", "data.split=test", "progress=false"]
    evaluate([*settings, f"output_dir={tmp_path / 'out'}"])
    text = page_of(tmp_path / "out")
    assert "The targets of this split are not published" in text
    assert "<img" in text
    assert "✓ right" not in text
    assert "✗ wrong" not in text
    assert f"written to {tmp_path / 'out'}; open {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out


@pytest.mark.slow
def test_rankings_of_another_method_are_shown_even_without_images(tmp_path):
    WRITERS["circo"](tmp_path / "data", size=60)
    for image in (tmp_path / "data").rglob("*.jpg"):
        image.unlink()
    benchmark = load_benchmark("circo", tmp_path / "data", check_images=False)
    names = [int(item.id) for item in benchmark.gallery]
    answers = {query.id: names[5:55] for query in benchmark.queries}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    settings = ["data=circo", f"data.root={tmp_path / 'data'}", "progress=false"]
    evaluate([*settings, f"predictions={tmp_path / 'answers.json'}", f"output_dir={tmp_path / 'out'}"])
    text = page_of(tmp_path / "out")
    assert "the image cannot be opened" in text
    assert "<img" not in text
    assert "answers.json" in text
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["protocol"]["primary"] == "mAP@10"  # as CIRCO's server reports its aspects
    assert set(row["by_tag"]["addition"]) == {"n_queries", "mAP@10"}


@pytest.mark.slow
def test_the_command_names_where_public_data_were_found(tmp_path, monkeypatch):
    home = tmp_path / "it's data"
    WRITERS["tuberlin"](home / "tuberlin")
    monkeypatch.setenv("UNION_DATA", str(home))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    evaluate(["data=tuberlin", "output_dir=out dir", "progress=false", "seed=3"])
    text = page_of(tmp_path / "out dir")
    assert "started in <code>~</code>" in text  # the page is sent to others, without one's name
    words = shlex.split(command_in(text))
    assert words == [
        f"UNION_DATA={home}",
        "union-eval",
        "data=tuberlin",
        "output_dir=out dir",
        "progress=false",
        "seed=3",
    ]
