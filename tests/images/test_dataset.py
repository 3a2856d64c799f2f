"""Images read in batches: any transform, errors as values, order, random numbers, dead and slow workers."""

import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from union_igrot.errors import ImageError, UnionError
from union_igrot.images import dataset as images
from union_igrot.images.dataset import ImageDataset, WorkerDiedError, image_loader, load_pixels, read_batches
from union_igrot.types import Preprocess

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def soon_noticed(monkeypatch):
    """Look for dead workers often; torch does every five seconds."""
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__", (0.2,))


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (EOFError(), True),  # what torch raises if a worker dies while it hands over shared memory
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError("Caught EOFError in DataLoader worker process 0."), False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
    ],
)
def test_a_connection_that_ends_is_a_death_and_an_error_of_a_worker_is_not(error, died):
    class Broken(DataLoader):
        def __iter__(self):
            yield [0]
            raise error

    read = []
    with pytest.raises(WorkerDiedError if died else type(error)):
        read.extend(read_batches(Broken([0])))
    assert read == [[0]]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match="nothing"):
        list(load_pixels([Path(tmp_path / "nothing.png")], [[0]], PREPROCESS, 0))


def compute(interruptible):
    """Compute for a minute: in Python, where a signal is handled, or in one call of C."""
    if interruptible:
        end = time.process_time() + 60
        while time.process_time() < end:
            pass
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)


@pytest.mark.slow
@pytest.mark.parametrize("interruptible", [True, False])
def test_a_slow_image_is_an_error_that_names_it(tmp_path, monkeypatch, interruptible):
    sources = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(sources):
        Image.new("RGB", (8 + number, 9)).save(path)
    monkeypatch.setattr(images, "TIME_LIMIT", 0.2)
    real = ImageFile.ImageFile.load

    def slow(image):
        if image.size == (10, 9):
            compute(interruptible)
        return real(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow)
    loaded = load_pixels(sources, [[0], [1, 2]], PREPROCESS, workers=1)
    assert next(loaded).shape == (1, 3, 8, 8)
    with pytest.raises(ImageError, match=r"cannot decode image .*2\.png \(decoding.* took more than 0 s\)"):
        list(loaded)


def make_random(seed):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as if shared memory were full
    return torch.from_numpy(np.random.default_rng(seed).random((100, 100)))


def test_without_room_for_locks_one_line_says_what_to_do(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing, "Lock", full)
    image_loader(ImageDataset([], len), [], list, workers=0)
    with pytest.raises(UnionError, match=r"/dev/shm.*workers=0"):
        image_loader(ImageDataset([], len), [], list, workers=1)


def test_without_shared_memory_batches_pass_through_pipes():
    loader = image_loader(ImageDataset(None, make_random), [[1, 2], [3]], torch.stack, workers=1)
    batches = list(read_batches(loader))
    expected = [np.random.default_rng(seed).random((100, 100)) for seed in (1, 2, 3)]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), expected)


LEFT = """
import sys
from multiprocessing import active_children
from union_igrot.images.dataset import ImageDataset, image_loader, read_batches
if __name__ == "__main__":
    loader = image_loader(ImageDataset(None, abs), ([n] for n in range(10**9)), list, workers=2,
                          start_method=sys.argv[1])
    batches = read_batches(loader)
    print(next(batches), next(batches), *(worker.pid for worker in active_children()), flush=True)
    sys.stdin.read()
"""


def is_running(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_workers_of_any_start_method_end_after_their_killed_main_process(tmp_path, start_method):
    script = tmp_path / "main.py"
    script.write_text(LEFT)
    with subprocess.Popen(
        [sys.executable, str(script), start_method], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        first, second, *workers = process.stdout.readline().split()
        assert (first, second, len(workers)) == ("[0]", "[1]", 2)
        process.kill()
    end = time.monotonic() + 30  # they look for it every second; without that they would stay for good
    while alive := [pid for pid in workers if is_running(pid)]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.1)
