import pytest

from small_gallery import fill_gallery
from small_world import trainable


@pytest.fixture(scope="module")
def model():
    return trainable().eval()


@pytest.fixture(scope="module")
def gallery(model):
    """A gallery for tests that only search."""
    return fill_gallery(model)
