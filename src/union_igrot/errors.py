"""The errors a user can cause, each one clear line.

Knows the shape of a helpful message. Does not know which room raises it.
"""


class UnionError(Exception):
    """A mistake that the user can mend.

    The message says what was given, what is allowed and what to do next. Command
    lines print it alone, without a traceback, and end with exit code 2.
    """


class ConfigError(UnionError):
    """The configuration is wrong; the message lists every problem found."""


class DataError(UnionError):
    """An annotation file, a list or a folder is not what its format says."""


class ImageError(UnionError):
    """An image is missing, unreadable or truncated; the message names the file."""


class CheckpointError(UnionError):
    """A saved model cannot be read, or does not belong to the given backbone."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library said."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
