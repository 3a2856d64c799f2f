"""What the README promises: every command is known, composed and run."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from small_runs import SMALL, SMALL_DATA
from union_igrot.cli.config import compose
from union_igrot.cli.eval import main as evaluate
from union_igrot.cli.settings import COMMANDS
from union_igrot.cli.train import main as train
from union_igrot.service import http as serving

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LINES_OF_BASH = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
STEPS = [step.strip() for line in LINES_OF_BASH for step in line.split("&&")]
COMMAND_NAMES = {f"union-{name}" for name in COMMANDS}
UNION_STEPS = [step for step in dict.fromkeys(STEPS) if step.startswith("union-")]


def test_the_readme_shows_the_two_commands_and_nothing_unknown():
    assert "pip install . && union-train" in LINES_OF_BASH
    assert "pip install nox && nox -s tests" in LINES_OF_BASH
    assert {step.split()[0] for step in STEPS} <= {"pip", "nox", *COMMAND_NAMES}
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for step in STEPS:
        if step.startswith("nox"):
            assert set(step.split()[2:]) <= sessions


@pytest.mark.parametrize("step", UNION_STEPS)
def test_every_command_of_the_readme_is_composed(step, tmp_path, monkeypatch, capsys):
    command, *arguments = shlex.split(step)
    monkeypatch.chdir(tmp_path)
    if "--help" in arguments:
        {"union-train": train, "union-eval": evaluate}[command](arguments)
        assert "usage" in capsys.readouterr().out
        return
    for argument in arguments:
        if argument.startswith("data.root="):
            Path(argument.removeprefix("data.root=")).mkdir()
    name = command.removeprefix("union-")
    compose(name, arguments)


def my_photos(place: Path) -> None:
    """What the README's commands speak of: class folders, a sketch and a photo."""
    for kind, count in (("photos", 6), ("sketches", 4)):
        for label in ("cat", "dog", "shoe", "tree"):
            folder = place / "my_photos" / kind / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(len(label) + 10 * number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((120, 96)).save(folder / f"{number}.jpg")
    Image.new("RGB", (200, 200), "white").save(place / "my_sketch.png")
    Image.new("RGB", (200, 200), "red").save(place / "my_photo.jpg")


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    """Word for word; trainings and evaluations of the generated world with small numbers."""
    pytest.importorskip("lance", reason='the extra "gallery" is not installed')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "serve", lambda *given: given[-1]("http://127.0.0.1:7860"))
    monkeypatch.setattr(serving, "listen", lambda *_: None)
    my_photos(tmp_path)
    ran = []
    for step in STEPS:
        command, *arguments = shlex.split(step)
        if command not in COMMAND_NAMES or "--help" in arguments:
            continue
        small = SMALL if command == "union-train" else SMALL_DATA if command == "union-eval" else ()
        if "data=folder" in arguments:
            small = ("recipe.epochs=1", "strategy=cpu", "progress=false")
        given = {argument.partition("=")[0] for argument in arguments}
        more = [setting for setting in small if setting.partition("=")[0] not in given]
        import_module(f"union_igrot.cli.{command.removeprefix('union-')}").main([*arguments, *more])
        ran.append(command)
    assert {"union-train", "union-eval", "union-index", "union-search", "union-demo"} <= set(ran)
    said = capsys.readouterr()
    assert "photos.lance: 40 rows; 40 added" in said.out
    assert "open http://127.0.0.1:7860 in a browser" in said.err
    assert (tmp_path / "outputs" / "small" / "report.html").is_file()


@pytest.mark.slow
def test_the_notebook_lines_of_the_readme_run(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.count("'a") >= 5 or said.count('"a') >= 5, said
