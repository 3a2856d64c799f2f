"""Files of queries: lines with an image, a text or both, as JSON lines or CSV.

Paths in a file are relative to the file. Does not open images; knows no model and no index.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.gallery.queries import several, wanted_of
from union_igrot.images.decode import check_image
from union_igrot.storage.paths import expand_user

_JSON: Final = ("id", "image", "text", "liked", "disliked", "exclude")
_CSV: Final = ("id", "image", "text")


@dataclass(frozen=True)
class Line:
    """One query of a file.

    Attributes:
        name: Its `id`, else its number in the file, from 1.
        asked: Its parts, as `Gallery.search_many` takes them; images are paths.
        place: File and line; empty where it is from none.
    """

    name: str | int
    asked: dict[str, Any]
    place: str = ""


def read_queries(path: Path) -> list[Line]:
    """Read a file of queries.

    Args:
        path: `.jsonl`: objects with `image` (a path or a list of them), `text`, `id`, `liked`, `disliked`, `exclude`
            (lists of ids), all optional but that something has to be asked. `.csv`: a header of `image`, `text`,
            `id`, in any order.

    Raises:
        DataError: Where the file is missing or a line is wrong; names file and line.
        ImageError: Where an image is missing; names file and line.
    """
    kinds = {".jsonl": _json_lines, ".csv": _csv_lines}
    if path.suffix.lower() not in kinds:
        raise DataError(f"queries={path}: give a .jsonl or .csv file")
    found: list[Line] = []
    taken: dict[str | int, int] = {}
    try:
        for number, given in kinds[path.suffix.lower()](path):
            line = _line(path, number, len(found) + 1, given)
            if line.name in taken:
                raise DataError(f"{path}:{number}: the id {line.name!r} stands in line {taken[line.name]} too")
            taken[line.name] = number
            found.append(line)
    except FileNotFoundError:
        raise DataError(f"queries={path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"queries={path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise DataError(f"queries={path} is not UTF-8; save it as such") from None
    if not found:
        raise DataError(f"queries={path} holds no query; add lines with image, text or both")
    return found


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                given = json.loads(text)
            except (ValueError, RecursionError) as error:
                said = getattr(error, "msg", error)  # without the place in the line, which looks like one in the file
                raise DataError(f"{path}:{number}: is not JSON ({said})") from None
            if not isinstance(given, dict):
                raise DataError(f'{path}:{number}: is not an object; write {{"image": "a.jpg", "text": "in red"}}')
            _check_names(path, number, list(given), _JSON)
            yield number, {name: value for name, value in given.items() if value is not None}


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        header: list[str] = []
        try:
            for row in rows:
                if not header:
                    header = [cell.strip() for cell in row]
                    _check_names(path, rows.line_num, header, _CSV)
                elif row:
                    if len(row) != len(header):
                        raise DataError(f"{path}:{rows.line_num}: has {len(row)} cells, the header {len(header)}")
                    yield rows.line_num, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: {error}") from None


def _check_names(path: Path, number: int, names: list[str], allowed: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in allowed]:
        raise DataError(f"{path}:{number}: {unknown[0]!r} is not known; there are {', '.join(allowed)}")
    if len(set(names)) != len(names):
        raise DataError(f"{path}:{number}: a name stands twice in the header")


def _line(path: Path, number: int, place: int, given: dict[str, Any]) -> Line:
    where = f"{path}:{number}"
    name = given.pop("id", place)
    if not isinstance(name, str | int):
        raise DataError(f"{where}: id is {name!r}; give a text or a number")
    for part in ("image", "liked", "disliked", "exclude"):
        values = given.get(part)
        if values is not None and not all(isinstance(one, str) for one in several(values)):
            raise DataError(f"{where}: {part} is {values!r}; give a text, or a list of texts")
    if "image" in given:
        given["image"] = [path.parent / expand_user(image) for image in several(given["image"])]
    try:
        wanted_of(given)
        for image in given.get("image", ()):
            check_image(image)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from None
    return Line(name, given, where)
