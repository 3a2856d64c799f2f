"""Commands and Python of the documentation: every command is composed, every block of Python runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from union_igrot.cli.config import compose
from union_igrot.cli.settings import COMMANDS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAMES = {f"union-{name}" for name in COMMANDS}
NEEDS_SERVER = {"scale.md", "service.md"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in parts if words]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_is_known_and_composed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "finetuned.pt").touch()
    (tmp_path / "key.txt").touch()
    for folder in ("my_images", "my_photos", "DIR"):
        (tmp_path / folder).mkdir()
    for name, *arguments in commands(page):
        assert name in {"pip", "curl", "docker", *NAMES}, name
        if name in NAMES and "-m" not in arguments:
            compose(name.removeprefix("union-"), arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


RUN = "import sys; [exec(compile(block, sys.argv[1], 'exec'), globals()) for block in sys.stdin.read().split(chr(0))]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.name not in NEEDS_SERVER],
    ids=lambda page: page.stem,
)
def test_python_runs(page, tmp_path):
    if any(".lance" in block for block in blocks(page, "python")):
        pytest.importorskip("lance", reason='the extra "gallery" is not installed')
    if any("pandas" in block for block in blocks(page, "python")) and not importlib.util.find_spec("pandas"):
        pytest.skip("pandas is not installed")
    for folder in ("photos", "mine/photos"):
        (tmp_path / folder).mkdir(parents=True)
        for number, color in enumerate(("red", "green", "blue", "yellow", "white", "gray")):
            Image.new("RGB", (64 + number, 48), color).save(tmp_path / folder / f"{number}.jpg")
    rows = [f"{number}.jpg,in blue,{(number + 1) % 6}.jpg" for number in range(6)]
    (tmp_path / "mine" / "queries.csv").write_text("\n".join(["reference,text,target", *rows]) + "\n")
    Image.new("L", (50, 50), 200).save(tmp_path / "sketch.png")
    done = subprocess.run(
        [sys.executable, "-c", RUN, page.name],
        input="\0".join(blocks(page, "python")),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_page_of_the_api_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("write_api", DOCS / "write_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.api_page(), "run python docs/write_api.py"
