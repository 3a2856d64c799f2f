"""Every tutorial runs from its first cell to its last, and no output is kept in the repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the tutorials need the group docs: pip install --group docs")
pytest.importorskip("nbclient", reason="the tutorials need the group docs: pip install --group docs")
PLACE = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
TUTORIALS = sorted(PLACE.glob("*.ipynb"))


def test_there_are_tutorials():
    assert len(TUTORIALS) >= 4


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_kept_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.cells[0].cell_type == "markdown"
    assert book.cells[0].source.startswith("# ")
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path):
    """In a process of its own: a kernel is talked to over loopback, which is closed to the tests."""
    copied = Path(shutil.copy(path, tmp_path))
    run = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", "--timeout=300", str(copied)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [output for cell in nbformat.read(copied, as_version=4).cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 2
    assert not any(output.output_type == "error" for output in outputs)
