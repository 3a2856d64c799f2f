"""Errors that a user can cause, and the helpers that word them; each message is one clear line."""

from collections.abc import Collection


class UnionError(Exception):
    """A mistake that the user can fix.

    The message says what is wrong, what is expected and what to do next. Commands print it alone, without a
    traceback, and exit with code 2.
    """


class ConfigError(UnionError):
    """A setting or argument is invalid; the message lists every problem found."""


class DataError(UnionError):
    """An annotation file, a list or a folder does not follow its format."""


class ImageError(UnionError):
    """An image is missing, unreadable or truncated; the message names the file."""


class CheckpointError(UnionError):
    """A saved model cannot be read or does not fit its backbone."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def check_choice(name: str, value: object, allowed: Collection[str]) -> str:
    """Return a value if it is one of the allowed ones.

    Raises:
        ConfigError: If it is not; lists the allowed values and suggests a close one.
    """
    if isinstance(value, str) and value in allowed:
        return value
    from difflib import get_close_matches  # noqa: PLC0415 - only needed for the error

    close = get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"invalid value for {name}: {value!r} (expected one of {', '.join(allowed)}){hint}")
