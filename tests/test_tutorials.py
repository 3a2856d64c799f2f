"""Tutorials are kept without outputs; `nox -s docs` runs them from their first cell to their last."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the tutorials need the group docs: pip install --group docs")
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
