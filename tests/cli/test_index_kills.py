"""No kill of `union-index` loses or doubles a row, and none of its workers outlives it."""

import time
from pathlib import Path

import pytest

pytest.importorskip("lance", reason='the extra "gallery" is not installed')
from index_kills import Trial, kill_many

KILLS = 10


@pytest.mark.slow
def test_no_kill_of_the_command_loses_or_doubles_a_row(tmp_path):
    seen, starts = kill_many(tmp_path, KILLS, images=150)
    assert seen["before the first write"] + seen["after writes"] == KILLS <= starts


@pytest.mark.slow
def test_no_decoding_worker_outlives_a_killed_command(tmp_path):
    trial = Trial(tmp_path, seed=0, workers=2)
    trial.folder.add(500)
    process = trial.start()
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := [int(pid) for pid in tasks.read_text().split()]) < 2:
        assert process.is_alive()
    process.kill()
    process.join()
    end = time.monotonic() + 5
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.1)
