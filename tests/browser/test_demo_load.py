"""The page under many users at once; a minute of it is `benchmarks/demo_load.py` by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

LOAD = Path(__file__).parents[2] / "benchmarks" / "demo_load.py"


def test_twenty_users_at_once_lose_no_step_and_mix_up_no_history(address):
    command = [sys.executable, str(LOAD), address, "--users", "20", "--seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 histories mixed up" in done.stdout
    assert int(done.stdout.split(" steps")[0].split()[-1].replace(",", "")) > 20
