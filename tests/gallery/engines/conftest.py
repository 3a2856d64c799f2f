"""One fixture for tests that every engine has to pass."""

import pytest

from engine_places import ENGINES, clear, place_of


@pytest.fixture(params=ENGINES)
def place(request, tmp_path):
    found = place_of(request.param, tmp_path)
    yield found
    clear(found)


@pytest.fixture
def uri(tmp_path):
    """Where a Lance table may be made."""
    return str(tmp_path / "photos.lance")
