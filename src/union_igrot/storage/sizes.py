"""Sizes and durations as people write them: `50GB`, `30d`."""

import re
from typing import Final

from union_igrot.errors import ConfigError

SIZE_FORMAT: Final = "a number of bytes such as 50GB (also KB, MB, TB, and KiB, MiB, GiB, TiB)"
DURATION_FORMAT: Final = "a duration such as 30d (also s, m, h, w)"

_BYTES: Final = {"": 1, "b": 1} | {
    f"{letter}{middle}b": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kmgt", 1)
}
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_size(text: object) -> int:
    """Parse a size in bytes; `1GB` is 10^9 and `1GiB` is 2^30 bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if found is None or found[2] not in _BYTES:
        raise ConfigError(f"invalid size: {text!r} (expected {SIZE_FORMAT})")
    return int(float(found[1]) * _BYTES[found[2]]) if "." in found[1] else int(found[1]) * _BYTES[found[2]]


def parse_duration(text: object) -> float:
    """Parse a duration in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", str(text).strip().lower())
    if found is None:
        raise ConfigError(f"invalid duration: {text!r} (expected {DURATION_FORMAT})")
    return float(found[1]) * _SECONDS[found[2]]


def format_size(count: int) -> str:
    """Format a number of bytes in the unit that fits: `73.4 GB`."""
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{count:,} B" if unit == "B" else f"{size:.1f} {unit}"


def format_duration(seconds: float | int) -> str:
    """Format a duration in one unit: `3 days`."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        if count >= 1:
            return f"{count:,} {unit}{'s' if count > 1 else ''}"
    return "moments"
