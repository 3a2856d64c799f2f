"""The processes of a run: counted, found, started, and of one mind on the folder and the result."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from small_runs import SMALL_DATA
from union_igrot.errors import ConfigError
from union_igrot.training.processes import Processes, count_processes, detect_processes

SMALL = [
    *SMALL_DATA,
    "data.triplets=64",
    "data.pairs=64",
    "recipe.epochs=2",
    "fusion.dropout=0",
    "target=frozen",
    "progress=false",
]
TWO = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]


def test_a_process_that_nobody_started_with_others_is_alone(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    alone = detect_processes()
    assert (alone, alone.is_main) == (Processes(), True)
    assert alone.broadcast("run", "here") == "here"


def test_devices_are_processes():
    assert count_processes("cpu", "auto", 1) == 1
    assert count_processes("cpu", 3, 1) == 3
    with pytest.raises(ConfigError, match="torchrun --nnodes=2"):
        count_processes("gpu", 8, 2)


def run(*arguments, module=True):
    command = [sys.executable, "-m", "union_igrot.cli.train"] if module else list(arguments[:1])
    here = {name: x for name, x in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
    return subprocess.run(
        [*command, *arguments[0 if module else 1 :]],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**here, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_train_what_one_trains_on_the_joined_batch(tmp_path):
    cache = f"cache_dir={tmp_path / 'cache'}"
    place = tmp_path / "two of them"
    said = run(*SMALL, *TWO, "recipe.batch_size=16", cache, f"output_dir={place}")
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("written to") == 1
    assert said.stderr.count("run folder") == 1
    assert "Warning" not in said.stderr
    alone = run(*SMALL, "recipe.batch_size=32", cache, f"output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    both = [json.loads((folder / "results.json").read_text()) for folder in (place, tmp_path / "one")]
    rows = [{(row["benchmark"], row["method"]): row["metrics"] for row in rows} for rows in both]
    assert rows[0].keys() == rows[1].keys()
    for key, metrics in rows[0].items():
        # A tie may fall the other way by a last bit: one of 50 queries.
        assert metrics == pytest.approx(rows[1][key], abs=2.1)
    states = [json.loads((folder / "model" / "model.json").read_text()) for folder in (place, tmp_path / "one")]
    assert states[0]["card"]["best"]["epoch"] == states[1]["card"]["best"]["epoch"]


@pytest.mark.slow
def test_torchrun_starts_it_too_and_no_folder_is_left_behind(tmp_path):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    launch = [torchrun, "--standalone", "--nproc-per-node=2", "-m", "union_igrot.cli.train"]
    runs = f"hydra.run.dir='{tmp_path}/runs/${{now:%Y}}/${{now:%H-%M-%S-%f}}'"
    said = run(*launch, *SMALL, *TWO, "recipe.epochs=1", f"cache_dir={tmp_path / 'cache'}", runs, module=False)
    assert said.returncode == 0, said.stderr
    folders = [path for path in (tmp_path / "runs").glob("*/*") if path.is_dir()]
    assert len(folders) == 1
    assert (folders[0] / "results.json").is_file()
    assert json.loads((folders[0] / "run.json").read_text())["stage"] == "done"


@pytest.mark.slow
def test_a_mistake_met_by_all_processes_is_one_line(tmp_path):
    (tmp_path / "pictures").mkdir()
    said = run(*TWO, "data=folder", f"data.root={tmp_path / 'pictures'}", f"output_dir={tmp_path / 'out'}")
    assert said.returncode == 2
    assert said.stderr.count("no known layout") == 1
    assert "Traceback" not in said.stderr


def children_of(parent):
    """Return the processes that are descendants of one and not yet ended."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, above = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(above)
    found, size = {parent}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, above in parents.items() if above in found}
    return found - {parent}


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (signal.SIGKILL, TWO),
        (signal.SIGKILL, ["model.finetune=image", "features.workers=2", "strategy=cpu"]),
        (signal.SIGTERM, TWO),
    ],
)
def test_nothing_outlives_a_killed_run(tmp_path, number, settings):
    """All processes end within seconds, and SIGTERM is reported in one line."""
    command = [sys.executable, "-m", "union_igrot.cli.train", *SMALL, *settings, "recipe.epochs=500"]
    command += [f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        end = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file():
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        started = children_of(run.pid)
        assert len(started) >= 2
        run.send_signal(number)
        begin = time.monotonic()
        code = run.wait(60)
        while any(map(alive, started)) and time.monotonic() - begin < 60:
            time.sleep(0.1)
        # A process that is told to end may take 3 s for it, 4 s in all on a quiet machine.
        assert time.monotonic() - begin < (5 if number == signal.SIGKILL else 20)
        said = run.stderr.read().splitlines()[1:]
    if number == signal.SIGTERM:
        assert (code, said) == (143, ["union-train: terminated; run the same command again to resume"])
    else:
        assert code == -9
    torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
