"""Many users at once, for a few seconds; see `benchmarks/demo_load.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

LOAD = Path(__file__).parents[2] / "benchmarks" / "demo_load.py"


def test_twenty_users_keep_their_histories(address):
    command = [sys.executable, str(LOAD), address, "--users", "20", "--seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 histories mixed up" in done.stdout
    assert int(done.stdout.split(" steps")[0].split()[-1].replace(",", "")) > 20
