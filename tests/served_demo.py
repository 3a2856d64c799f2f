"""`union-demo` as a process, for the tests in a browser."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def served(place: Path, *settings: str) -> Iterator[str]:
    """Run `union-demo` on a free port; yield its address; stop it with Ctrl-C and check that it exits 0."""
    code = "import sys; from union_igrot.cli.demo import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "port=0", "progress=false", f"cache_dir={place / 'cache'}", *settings]
    log = place / "log.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, cwd=place, env=environment)
    try:
        address = None
        while address is None:
            try:
                server.wait(0.2)
                pytest.fail(f"union-demo ended at once:\n{log.read_text()}")
            except subprocess.TimeoutExpired:
                address = re.search(r"open (http://127\.0\.0\.1:\d+) ", log.read_text())
        yield address[1]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.kill()
        server.wait()
