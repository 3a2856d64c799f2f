"""Images read in batches: any transform, errors as values, order, random numbers, dead workers."""

import os
import signal
from pathlib import Path

import pytest
import torch

from union_igrot.errors import ImageError
from union_igrot.images.dataset import ImageDataset, WorkerDiedError, image_loader, load_pixels, read_batches
from union_igrot.types import Preprocess


def describe(source):
    if source == 3:
        raise ImageError("3 is broken")
    return {"square": torch.tensor(source**2), "jpeg": b"x" * source}


def die_at_two(source):
    if source == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return source


def as_list(items):
    return items


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("held", [True, False])
def test_a_transform_may_return_anything_and_its_errors_are_values(workers, held):
    state = torch.get_rng_state()
    dataset = ImageDataset([0, 1, 2, 3, 4] if held else None, describe)
    batches = list(read_batches(image_loader(dataset, [[4, 0], [3, 1]], as_list, workers=workers)))
    assert [batches[0][0]["jpeg"], int(batches[0][0]["square"])] == [b"xxxx", 16]
    assert isinstance(batches[1][0], ImageError)
    assert int(batches[1][1]["square"]) == 1
    assert torch.get_rng_state().equal(state)


def test_a_killed_worker_is_reported_after_the_batches_before_it():
    loader = image_loader(ImageDataset(None, die_at_two), [[0], [1], [2], [3]], as_list, workers=1, prefetch=1)
    before = signal.getsignal(signal.SIGCHLD)
    read = []
    with pytest.raises(WorkerDiedError, match="fewer workers"):
        read.extend(read_batches(loader))
    assert read[:2] == [[0], [1]]
    assert signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL or before == signal.SIG_DFL


def test_a_missing_file_is_named(tmp_path):

    preprocess = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ImageError, match="nothing"):
        list(load_pixels([Path(tmp_path / "nothing.png")], [[0]], preprocess, 0))
