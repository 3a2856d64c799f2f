import pytest

from indexing_world import World


@pytest.fixture(params=["memory", "lance"])
def world(request, tmp_path):
    made = World(tmp_path, request.param)
    yield made
    made.index.close()


@pytest.fixture
def lance_world(tmp_path):
    made = World(tmp_path, "lance")
    yield made
    made.index.close()
