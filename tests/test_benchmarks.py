"""`benchmarks/gpu.sh` at tiny sizes on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"


def test_the_time_limits_of_all_parts_add_up_to_eight_minutes():
    steps, *others = (int(limit) for limit in re.findall(r"^ *part \S+ (\d+) ", SCRIPT.read_text(), re.MULTILINE))
    assert 2 * steps + sum(others) <= 480


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    pytest.importorskip("lance", reason='the extra "gallery" is not installed')
    settings = {"TINY": "1", "DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, tmp_path], env=os.environ | settings, capture_output=True, text=True, check=True)
    table = (tmp_path / "gpu.md").read_text()
    assert table in done.stdout
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE))
    assert rows.pop("fsdp") == "skipped: FSDP needs a GPU"
    assert not [result for result in rows.values() if "failed" in result or "limit" in result]
    steps = ("training step, cached", "gallery batch", "indexing, pillow", "indexing, one Ray actor", "evaluation, 60")
    for step in steps:
        assert any(step in name for name in rows), step
