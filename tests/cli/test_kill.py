import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from union_igrot.cli.train import main as train
from union_igrot.models.model import IGROTModel

# The processes are forked from one that has imported everything: the tests do not pay for the imports again.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["union_igrot.experiment"])
EPOCHS = 6
SETTINGS = (
    "data.triplets=300",
    "data.pairs=60",
    "data.val_queries=8",
    "data.queries=16",
    "features.batch_size=32",
    "features.workers=0",  # another test covers decoding workers
    f"recipe.epochs={EPOCHS}",
    "recipe.batch_size=32",
    "strategy=cpu",
    "progress=false",
)
PATIENCE = 90.0


def start(settings: list[str]) -> BaseProcess:
    process = FORKS.Process(target=train, args=(settings,))
    process.start()
    return process


def kill_when(settings: list[str], reached: Callable[[], bool]) -> None:
    """Start the command and kill it, as `kill -9` does, the moment something is seen on disk."""
    process = start(settings)
    end = time.monotonic() + PATIENCE
    while not reached():
        assert process.is_alive(), f"ended with code {process.exitcode} before it could be killed"
        assert time.monotonic() < end, "too slow to be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9


def finish(settings: list[str]) -> None:
    process = start(settings)
    process.join(PATIENCE)
    assert process.exitcode == 0


def shards(cache: Path) -> dict[str, list[bytes]]:
    """The keys of each file of the store, as they stand on disk."""
    found = {}
    for path in sorted(cache.rglob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            rows = shard.get_tensor("digests")
        found[path.name] = [row.numpy().tobytes() for row in rows]
    return found


def steps(log: Path) -> list[int]:
    with log.open(newline="") as lines:
        return [int(row["step"]) for row in csv.DictReader(lines)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_training_with_the_shells_code(tmp_path, number, code):
    command = [*SETTINGS, f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    process = start(command)
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file():
        assert process.is_alive(), f"ended with code {process.exitcode} before it could be interrupted"
        assert time.monotonic() < end, "too slow to be interrupted"
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(PATIENCE if number == signal.SIGINT else 10)
    assert process.exitcode == code
    assert not (tmp_path / "run" / "model").exists()
    finish(command)
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.slow
def test_the_same_command_resumes_after_each_kill(tmp_path):
    """In a folder that is named by the date: the unfinished run is found again; the test above names its folder."""
    cache = tmp_path / "cache"
    runs = tmp_path / "outputs"
    place = f"hydra.run.dir={runs}/${{now:%Y-%m-%d}}/${{now:%H-%M-%S-%f}}"
    command = [*SETTINGS, place, f"cache_dir={cache}"]

    def run() -> Path:
        (only,) = runs.glob("*/*/run.json")
        return only.parent

    # In the middle of encoding: something is stored, much is missing.
    kill_when(command, lambda: any(cache.rglob("*.safetensors")))
    early = shards(cache)
    first = run()
    assert not (first / "checkpoints").exists()

    # In the middle of training, a checkpoint or more behind it.
    kill_when(command, (first / "checkpoints" / "last.ckpt").is_file)
    assert run() == first, "the unfinished run was not found again"
    reached = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)
    assert reached["global_step"] > 0
    assert reached["epoch"] < EPOCHS - 1, "the training was over when it was killed"
    assert not (first / "model").exists()

    # Between training and evaluation.
    kill_when(command, lambda: '"trained"' in (first / "run.json").read_text())
    assert not (first / "results.json").exists()
    logs = sorted(first.glob("logs/version_*/metrics.csv"))
    assert min(steps(logs[-1])) >= reached["global_step"], "the training began anew"
    heads = first / "model" / "heads.safetensors"
    trained = heads.stat().st_mtime_ns
    IGROTModel.load(first / "model")

    finish(command)
    assert run() == first
    assert heads.stat().st_mtime_ns == trained, "the model was trained again"
    rows = json.loads((first / "results.json").read_text())
    assert len(rows) == 12
    assert json.loads((first / "run.json").read_text())["stage"] == "done"
    for image in first.glob("*.png"):
        with Image.open(image) as opened:
            opened.load()
    left = [path for path in tmp_path.rglob("*") if path.suffix in {".tmp", ".partial", ".broken"}]
    assert left == []

    late = shards(cache)
    assert early.items() <= late.items(), "what was encoded before the kill was not kept"
    keys = [key for held in late.values() for key in held]
    assert len(keys) == len(set(keys)), "something was encoded twice"
