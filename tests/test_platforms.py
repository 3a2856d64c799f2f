"""What has to work on Windows and macOS, tried here without the modules that only POSIX has."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPTS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
WITHOUT = """
import importlib, os, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "grp", "posix_ipc", "pty", "pwd", "resource", "termios", "tty"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refused())
for name in ("fork", "register_at_fork"):
    delattr(os, name)
"""
HELP = """
import union_igrot
import union_igrot.storage.files, union_igrot.storage.cache, union_igrot.storage.locks
for target in sys.argv[1:]:
    module, _, function = target.partition(":")
    sys.argv[:] = [module]
    try:
        getattr(importlib.import_module(module), function)(["--help"])
    except SystemExit as ended:
        assert not ended.code, (target, ended.code)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_the_package_and_the_help_of_each_command_need_no_posix_module():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + HELP, *SCRIPTS.values()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for script in SCRIPTS:
        assert f"{script} " in done.stdout
