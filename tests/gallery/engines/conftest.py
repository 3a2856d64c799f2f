"""Fixtures of indexes."""

import pytest

from index_locations import ENGINES, new_location


@pytest.fixture(params=ENGINES)
def location(request, tmp_path):
    found = new_location(request.param, tmp_path)
    yield found
    found.remove()


@pytest.fixture
def uri(tmp_path):
    """Location of a new Lance table."""
    return str(tmp_path / "photos.lance")
