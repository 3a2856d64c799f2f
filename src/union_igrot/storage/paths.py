"""Paths as people type them and as lists spell them."""

import os
import re
import unicodedata
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """Return the path that a person means: `~` is the home folder, and letters are composed as in an existing name.

    A `~name` without such a user stays unchanged.
    """
    text = os.path.expanduser(path)  # noqa: PTH111 - Path's raises for ~nobody
    return Path(text if text.isascii() or os.path.lexists(text) else _find_unicode(text) or text)


def absolute_path(path: str | Path) -> str:
    """Return the absolute path without `~` and `..`; symbolic links are not resolved."""
    return os.path.abspath(expand_user(path))  # noqa: PTH100 - Path.absolute keeps ".."


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; unlike that of `pathlib`, it raises for no name, however long."""
    return os.path.isdir(path)  # noqa: PTH112


def is_web_address(text: str) -> bool:
    """Return whether a text is an address such as `https://host/a.jpg`, which is no path; also as part of a path."""
    return re.search(r"(?:^|[/\\])(?:https?|ftp):/", text, re.IGNORECASE) is not None


def find_path(path: str) -> str:
    r"""Return the spelling of a path under which it exists.

    Lists written on Windows separate folders by backslashes, and macOS writes letters with accents decomposed (NFD)
    that others write composed (NFC).
    """
    for spelling in (path, path.replace("\\", "/")):
        if os.path.lexists(spelling):
            return spelling
        if not spelling.isascii() and (found := _find_unicode(spelling)) is not None:
            return found
    return path


def _find_unicode(path: str) -> str | None:
    """Find a path whose names have their letters composed or decomposed in another way."""
    found = ""
    for at, name in enumerate(path.split("/")):
        options = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        prefix = f"{found}/" if at else ""
        match = next((prefix + one for one in options if os.path.lexists(prefix + one or "/")), None)
        if match is None:
            return None
        found = match
    return found
