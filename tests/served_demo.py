"""`union-demo` as a process of its own, for the tests in a browser.

Knows how it is started and ended. Does not know what its page shows.
"""

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
    """Run `union-demo` on a port of its own; give its address; end it with Ctrl-C and see that it ends well."""
    code = "import sys; from union_igrot.cli.demo import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "port=0", "progress=false", f"cache_dir={place / 'cache'}", *settings]
    told = place / "told.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with told.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, cwd=place, env=environment)
    try:
        address = None
        while address is None:
            try:
                server.wait(0.2)
                pytest.fail(f"union-demo ended at once:\n{told.read_text()}")
            except subprocess.TimeoutExpired:
                address = re.search(r"open (http://127\.0\.0\.1:\d+) ", told.read_text())
        yield address[1]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, told.read_text()
        assert "Traceback" not in told.read_text(), told.read_text()
    finally:
        server.kill()
        server.wait()
