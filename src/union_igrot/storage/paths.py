"""Paths as people type them."""

import os
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """Replace a leading `~` with the home folder; a `~name` without such a user stays unchanged."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for ~nobody


def absolute_path(path: str | Path) -> str:
    """Return the absolute path without `~` and `..`; symbolic links are not resolved."""
    return os.path.abspath(expand_user(path))  # noqa: PTH100 - Path.absolute keeps ".."
