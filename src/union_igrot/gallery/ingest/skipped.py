"""The list of images that could not be read, and why: JSON lines beside the index.

Knows the file alone. Does not know what is done about them.
"""

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from union_igrot.errors import DataError
from union_igrot.storage.cache import write_cached

_log: Final = logging.getLogger("union_igrot.indexing")


class Skip(NamedTuple):
    """An image that could not be read.

    Attributes:
        path: The id its row would have.
        reason: Why.
        size: Bytes; 0 where that is not known.
        mtime: Time of change in ns; 0 where that is not known.
    """

    path: str
    reason: str
    size: int
    mtime: int


@final
class SkippedFile:
    """The list, of which one source's lines are this run's.

    Args:
        path: The file; None keeps no file.
        source: Whose lines are read and changed; those of others stay.

    Raises:
        DataError: Where the file cannot be read.
    """

    def __init__(self, path: Path | None, source: str) -> None:
        self.path, self._source = path, source
        self.own: dict[str, Skip] = {}
        """By path."""
        self._others: dict[tuple[str, str], dict[str, Any]] = {}
        self._whole = True
        try:
            lines = [] if path is None or not path.exists() else path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); check the disk and the permissions") from error
        for line in lines:
            self._take(line)

    def add(self, skips: Iterable[Skip]) -> None:
        """Note images, at once on disk."""
        new = [skip for skip in skips if self.own.get(skip.path) != skip]
        self.own |= {skip.path: skip for skip in new}
        if self.path is None or not new:
            return
        if not self._whole:
            self._write()
            return
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(self._line(skip) for skip in new))
        except OSError as error:
            raise DataError(f"cannot write {self.path} ({error.strerror}); make room there") from error

    def settle(self, paths: Collection[str]) -> None:
        """Keep the lines of these alone, each once; no list is left where nothing was skipped."""
        self.own = {path: skip for path, skip in self.own.items() if path in paths}
        if self.path is None:
            return
        if self.own or self._others:
            self._write()
        elif self.path.exists():
            self.path.unlink()

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            skip = Skip(*(values[name] for name in Skip._fields))
            if values["source"] == self._source:
                self.own[skip.path] = skip
            else:
                self._others[values["source"], skip.path] = values
        except (ValueError, KeyError, TypeError):
            _log.warning("%s: a line that cannot be read is left out", self.path)
            self._whole = False
        self._whole &= line.endswith(b"\n")

    def _line(self, skip: Skip) -> bytes:
        return _json({**skip._asdict(), "source": self._source})

    def _write(self) -> None:
        assert self.path is not None
        others = [_json(values) for values in self._others.values()]
        write_cached(self.path, [*others, *(self._line(skip) for skip in self.own.values())])
        self._whole = True


def _json(values: Mapping[str, Any]) -> bytes:
    # A byte of a name that is no text becomes a JSON escape.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
