"""Names of files as people type them.

Knows the home folder and the folder one stands in. Does not look at any file.
"""

import os
from pathlib import Path


def from_home(path: str | Path) -> Path:
    """Put the home folder for a `~` in front; where there is no such user, the name stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for ~nobody


def absolute(path: str | Path) -> str:
    """Return a file's whole name, without `~` and `..`; links stay."""
    return os.path.abspath(from_home(path))  # noqa: PTH100 - Path.absolute keeps ".."
