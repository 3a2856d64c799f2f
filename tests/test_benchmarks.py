"""`benchmarks/gpu.sh` at tiny sizes on the CPU."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_time_limits_of_all_parts_add_up_to_eight_minutes():
    script = (FOLDER / "gpu.sh").read_text()
    steps, *others = (int(limit) for limit in re.findall(r"^ *part \S+ (\d+) ", script, re.MULTILINE))
    assert 2 * steps + sum(others) <= 480


@pytest.mark.slow
def test_every_part_runs(tmp_path, monkeypatch, capsys):
    """The script names the commands; they run in this process, which has imported what they need."""
    for module in ("lance", "ray"):
        pytest.importorskip(module)
    settings = {"TINY": "1", "DEVICE": "cpu", "PYTHON": "true"}
    script = [FOLDER / "gpu.sh", tmp_path]
    listed = subprocess.run(script, env=os.environ | settings, capture_output=True, text=True, check=True).stdout
    monkeypatch.syspath_prepend(FOLDER)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    parts = dict(re.findall(r"^(\S+): true (.+)$", listed, re.MULTILINE))
    assert parts.keys() == {"steps-1", "steps-2", "index", "evaluation"}
    for part, command in parts.items():
        (tmp_path / f"{part}.log").write_text(run(*shlex.split(command)))
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", run("gpu_table.py", str(tmp_path)), re.MULTILINE))
    assert rows.pop("fsdp") == "skipped: FSDP needs a GPU"
    assert not [result for result in rows.values() if "failed" in result or "limit" in result]
    steps = ("training step, cached", "gallery batch", "reading and embedding", "one Ray actor", "evaluation, 60")
    for step in steps:
        assert any(step in name for name in rows), step
