"""Columns from the EXIF data of a photo: when, with what and where it was taken (CIPA DC-008-2023)."""

import datetime as dt
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from PIL import ExifTags, Image

ExifColumns = Mapping[str, str | float]
EXIF_COLUMNS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("taken", "camera", "lens"), "str"),
    **dict.fromkeys(("latitude", "longitude"), "float"),
}
"""The columns and what they hold."""

_DATE: Final = re.compile(r"(\d{4})[:/-](\d\d)[:/-](\d\d)(?:[ T](\d\d):(\d\d)(?::(\d\d))?)?")
_MAX_TEXT: Final = 200


def read_exif(image: Image.Image) -> ExifColumns:
    """Read the EXIF data of an opened image; what is missing, corrupt or out of range is left out, without an error.

    Returns:
        Some of `taken`, the camera's local time such as `2024-05-01T18:30:00`, without a zone; `camera`, its model, or
        its maker if that is not named; `lens`; and both `latitude`, -90..90, and `longitude`, -180..180, in degrees. A
        position of exactly 0, 0 is left out: cameras without reception write it.
    """
    try:
        exif = image.getexif()
        main: Mapping[int, Any] = dict(exif)
    except Exception:  # corrupt data make Pillow raise nearly anything
        return {}
    detail, gps = _read_ifd(exif, ExifTags.IFD.Exif), _read_ifd(exif, ExifTags.IFD.GPSInfo)
    found = {
        "taken": _date(detail.get(ExifTags.Base.DateTimeOriginal))
        or _date(detail.get(ExifTags.Base.DateTimeDigitized)),
        "camera": _text(main.get(ExifTags.Base.Model)) or _text(main.get(ExifTags.Base.Make)),
        "lens": _text(detail.get(ExifTags.Base.LensModel)),
    }
    columns: dict[str, str | float] = {name: value for name, value in found.items() if value}
    latitude = _degrees(gps, ExifTags.GPS.GPSLatitude, {"N": 1, "S": -1}, 90)
    longitude = _degrees(gps, ExifTags.GPS.GPSLongitude, {"E": 1, "W": -1}, 180)
    if latitude is not None and longitude is not None and (latitude, longitude) != (0, 0):
        columns |= {"latitude": latitude, "longitude": longitude}
    return columns


def _read_ifd(exif: Image.Exif, tag: int) -> Mapping[int, Any]:
    try:
        return dict(exif.get_ifd(tag))
    except Exception:  # see read_exif
        return {}


def _text(value: object) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    printable = "".join(char if char.isprintable() else " " for char in value) if isinstance(value, str) else ""
    return " ".join(printable.split())[:_MAX_TEXT].rstrip()


def _date(value: object) -> str:
    if (found := _DATE.match(_text(value))) is None:
        return ""
    try:
        return dt.datetime(*(int(part or 0) for part in found.groups())).isoformat()  # type: ignore[arg-type]
    except ValueError:  # such as 0000:00:00, which cameras write before the clock is set
        return ""


def _degrees(gps: Mapping[int, Any], tag: int, signs: Mapping[str, int], largest: int) -> float | None:
    """Return an angle given in degrees, minutes and seconds; the tag before holds the letter of its sign."""
    try:
        sign = signs[_text(gps[tag - 1]).upper()]
        parts = [float(part) for part in gps[tag]][:3]
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    angle = sum((part / 60.0**power for power, part in enumerate(parts)), 0.0)
    if not parts or not all(math.isfinite(part) and part >= 0 for part in parts) or angle > largest:
        return None
    return round(sign * angle, 7) + 0.0
