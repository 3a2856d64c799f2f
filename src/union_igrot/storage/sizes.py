"""Sizes and spans of time as people write them: `50GB`, `30d`.

Imports nothing heavy. Does not know what is measured.
"""

import re
from datetime import timedelta
from typing import Final

from union_igrot.errors import ConfigError

SIZES: Final = "a number of bytes such as 50GB (also KB, MB, TB, and KiB, MiB, GiB, TiB)"
SPANS: Final = "a span of time such as 30d (also s, m, h, w)"

_BYTES: Final = {"": 1, "b": 1} | {
    f"{letter}{middle}b": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kmgt", 1)
}
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_size(text: object) -> int:
    """Read a size.

    Returns:
        Bytes; `1GB` is 10^9 and `1GiB` 2^30 of them.

    Raises:
        ConfigError: Where it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if found is None or found[2] not in _BYTES:
        raise ConfigError(f"{text!r} is not a size; give {SIZES}")
    return int(float(found[1]) * _BYTES[found[2]]) if "." in found[1] else int(found[1]) * _BYTES[found[2]]


def parse_span(text: object) -> float:
    """Read a span of time, in seconds.

    Raises:
        ConfigError: Where it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", str(text).strip().lower())
    if found is None:
        raise ConfigError(f"{text!r} is not a span of time; give {SPANS}")
    return float(found[1]) * _SECONDS[found[2]]


def show_size(count: int) -> str:
    """Write a number of bytes in the unit that fits it: `73.4 GB`."""
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{count:,} B" if unit == "B" else f"{size:.1f} {unit}"


def show_span(seconds: float | int) -> str:
    """Write a span of time in one unit: `3 days`."""
    span = timedelta(seconds=max(0.0, seconds))
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        count = int(span.total_seconds() // size)
        if count:
            return f"{count:,} {unit}{'s' if count > 1 else ''}"
    return "moments"
