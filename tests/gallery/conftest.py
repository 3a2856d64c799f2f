import pytest

from small_gallery import filled
from small_world import trainable


@pytest.fixture(scope="module")
def model():
    return trainable().eval()


@pytest.fixture(scope="module")
def gallery(model):
    """For tests that only ask."""
    return filled(model)
