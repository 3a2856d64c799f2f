"""Errors that a user can cause, and the helpers that word them; each message is one clear line."""

import importlib.util
import re
from collections.abc import Callable, Collection, Iterable
from functools import wraps
from operator import index
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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
    """Return the first line of another library's error message, which may hold bytes of a damaged file."""
    lines = str(error).strip().splitlines()
    return escape_controls(lines[0].rstrip(". ")) if lines else type(error).__name__


def check_choice(name: str, value: object, allowed: Collection[str]) -> str:
    """Return a value if it is one of the allowed ones.

    Raises:
        ConfigError: If it is not; lists the allowed values and suggests a close one.
    """
    if isinstance(value, str) and value in allowed:
        return value
    near = did_you_mean(str(value), allowed)
    raise ConfigError(
        f"invalid value for {name}: {value!r} (expected one of {', '.join(allowed)}){'; ' * bool(near)}{near}"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean ...?` for an unknown word, in any case; empty if no known one is similar."""
    from difflib import get_close_matches  # noqa: PLC0415 - only needed for errors

    plain = {one.lower().replace("_", "-"): one for one in known}
    near = get_close_matches(word.lower().replace("_", "-"), plain, 1)
    return f"did you mean {plain[near[0]]}?" if near else ""


def names_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Make an unknown keyword argument of a function a ConfigError that suggests a known one, or lists all."""
    from inspect import signature  # noqa: PLC0415 - slow to import

    known = [name for name in signature(function).parameters if name not in ("self", "cls")]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [name for name in kwargs if name not in known]:
            advice = did_you_mean(unknown[0], known) or f"expected {', '.join(known)}"
            raise ConfigError(f"unknown argument of {function.__name__}: {unknown[0]} ({advice})")
        return function(*args, **kwargs)

    return call


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return a value as an integer if it is one, of Python or NumPy, that is not below `least`; else a ConfigError."""
    try:
        if not isinstance(value, bool) and (number := index(value)) >= least:  # type: ignore[arg-type]  # else TypeError
            return number
    except TypeError:
        pass
    raise ConfigError(f"invalid value for {name}: {value!r} (expected an integer >= {least})")


def require_packages(what: str, extra: str, *names: str) -> None:
    """Raise a ConfigError if a package of an extra is not installed; `what` needs it."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f'{what} needs {", ".join(missing)}; pip install "union-igrot[{extra}]"')


def wrong_type(name: str, value: object, expected: str) -> ConfigError:
    """Return the error for an argument of a wrong type."""
    return ConfigError(f"invalid type for {name}: {type(value).__name__} (expected {expected})")


def escape_controls(text: str) -> str:
    """Escape control, bidirectional and unpaired surrogate characters, which a terminal interprets; not line ends."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, length: int = 500) -> str:
    """Return a message in one line without control characters, the middle left out if it is longer than `length`."""
    line = escape_controls(" ".join(text.split()))
    return line if len(line) <= length else f"{line[: length // 2]} ... {line[5 - length + length // 2 :]}"
