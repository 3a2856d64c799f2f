"""Paths as people type them and as lists spell them, and files that appear complete or not at all."""

import logging
import os
import re
import time
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from union_igrot.errors import DataError


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


Content = str | bytes | Sequence[bytes | memoryview] | Callable[[Path], object]
"""Text (UTF-8), bytes, pieces of bytes in order, or a function that writes to the path it is given."""

log: Final = logging.getLogger("union_igrot.storage")

_ABANDONED_SECONDS: Final = 3600.0
_TEMPORARY: Final = f"*.{'[0-9a-f]' * 32}.tmp"


def write_atomic(path: Path, content: Content) -> None:
    """Write a file under a temporary name beside it, flush it to the disk and rename it.

    Raises:
        OSError: If it cannot be written. Nothing is left behind and an existing file is unchanged.
    """
    temporary = path.with_name(f"{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        if callable(content):
            content(temporary)
            temporary.chmod(0o644)  # safetensors creates files for the owner alone
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            with temporary.open("xb") as file:
                pieces = [content.encode()] if isinstance(content, str) else content
                for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # what remains is removed by `remove_temporary`
            temporary.unlink()
        raise


def remove_temporary(folder: Path, *, all_of_them: bool) -> None:
    """Remove the temporary files of killed writers, which have names as `write_atomic` makes them.

    Args:
        folder: The folder.
        all_of_them: If no other process writes here; else only files that are older than an hour.
    """
    for path in folder.glob(_TEMPORARY):
        with suppress(FileNotFoundError):  # renamed by its writer in the meantime
            if all_of_them or time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def move_aside(path: Path, reason: Exception) -> None:
    """Rename a damaged file to `*.broken`, so that it is not read again, and log it."""
    aside = path.with_name(path.name + ".broken")
    try:
        with suppress(FileNotFoundError):  # another process was faster
            path.replace(aside)
    except OSError as error:
        raise DataError(f"{path} is damaged ({reason}) and cannot be renamed ({error.strerror}); delete it") from error
    log.error("%s is damaged (%s): renamed to %s; its content will be computed again", path, reason, aside.name)


def _sync_folder(folder: Path) -> None:
    """Flush a new name to the disk, so that it survives a power cut; Windows cannot open folders."""
    if os.name == "posix":
        held = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(held)
        finally:
            os.close(held)
