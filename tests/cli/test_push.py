"""`union-push`: which folder and which card are sent; nothing leaves this machine here."""

import json
import shutil
from types import SimpleNamespace

import pytest

from small_runs import Run
from union_igrot.cli.push import main as push
from union_igrot.models import hub


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """What would have been sent, by repository."""
    place = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, **told):
            return SimpleNamespace(repo_id=repo_id, told=told)

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, place / repo_id)
            return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    return place


@pytest.mark.parametrize("inner", ["", "model"])
def test_a_run_is_pushed_with_its_card(small_run: Run, sent, inner, capsys):
    push([f"checkpoint={small_run.folder / inner}", "repo=someone/shapes"])
    said = capsys.readouterr().out
    assert "https://hub.example/someone/shapes" in said
    assert 'union_igrot.load("someone/shapes")' in said
    folder = sent / "someone" / "shapes"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "heads.safetensors",
        "model.json",
        "training_images.txt",
    }
    card = (folder / "README.md").read_text()
    assert "union-eval checkpoint=someone/shapes\n" in card
    assert str(small_run.folder) not in card
    assert card.count("| trained") == 2


def test_another_evaluations_figures_can_be_shown(small_run: Run, sent, tmp_path):
    rows = [row for row in small_run.rows if row["benchmark"] == "shapes_cir"]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    push([f"checkpoint={small_run.folder}", "repo=someone/a", f"results={tmp_path}", "license=mit"])
    card = (sent / "someone" / "a" / "README.md").read_text()
    assert card.count("| trained") == 1
    assert "license: mit" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere is not allowed; give an existing folder"),
        (["repo=shapes"], "shapes is no name on the hub; give owner/name"),
        (["checkpoint=empty"], "is not a saved model"),
        (["license=mit"], "give results=results.json along with it"),
        (["results=empty"], "results.json holds no metrics"),
        (["private=perhaps"], "private=perhaps is not allowed"),
    ],
)
def test_a_mistake_is_one_line(small_run: Run, sent, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    given = {argument.partition("=")[0] for argument in change}
    usual = [f"checkpoint={small_run.folder}", "repo=someone/x"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        push([*(argument for argument in usual if argument.partition("=")[0] not in given), *change])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("union-push: ")
    assert message in line
    assert not sent.exists()
