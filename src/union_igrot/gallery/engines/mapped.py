"""A Lance table's vectors as files that can be mapped: exact search reads them where they lie.

Lance decodes a column anew at each reading, which takes far longer than to score it, and keeps
the rows of one write in no order. So the vectors of each of its data files, which never change,
are written once more, as they are in memory and in the order in which rows were first written,
to the cache folder; every process then maps them. A file gets its name when it is whole and on
disk, any process may write it, and it is dropped once the table no longer uses what it was made
of. Who has files mapped shares a lock beside their folder, so that nobody takes it away to make room.

Knows Lance's fragments and data files. Does not know queries, nor how rows are ranked.
"""

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

import lance
import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from union_igrot.errors import ConfigError, DataError
from union_igrot.gallery.engines.scattered import OFFSET
from union_igrot.storage.locks import acquire_shared, lock_path
from union_igrot.storage.paths import absolute_path

ADVICE: Final = "set UNION_CACHE to a folder on another disk"

_NONE: Final = np.empty(0, dtype=np.int64)
_TRIES: Final = 3
_MANIFEST: Final = "manifest.json"
_STALE_SECONDS: Final = 3600.0
_SCHEME: Final = re.compile(r"[a-z0-9]+://")
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@final
class Layout:
    """Where the rows of one version of a table lie, in the order in which they were first written.

    Args:
        table: The version.
        dim: Width of the embeddings.
        folder: Where the mapped files are.

    Attributes:
        offsets: For each row its number among the table's rows, as Lance's `take` counts.
        places: For each row where its vector is; see `scattered_topk`.
    """

    def __init__(self, table: Any, dim: int, folder: Path) -> None:
        self._table, self._dim, self._folder = table, dim, folder
        found = table.scanner(columns=["row"], with_row_address=True, scan_in_order=True).to_table()
        rows = found["row"].to_numpy()
        self._addresses = found["_rowaddr"].to_numpy().astype(np.int64)
        self.offsets: Int64[np.ndarray, " rows"] = np.argsort(rows, kind="stable")
        if (np.diff(rows[self.offsets]) == 0).any():  # two writers began at one version
            ids = table.scanner(columns=["id"], scan_in_order=True).to_table()["id"].to_pylist()
            self.offsets = np.array(sorted(range(len(rows)), key=lambda i: (rows[i], ids[i])), dtype=np.int64)
        self._fragments = {fragment.fragment_id: fragment for fragment in table.get_fragments()}
        number = np.zeros(max(self._fragments, default=0) + 1, dtype=np.int64)
        number[list(self._fragments)] = range(len(self._fragments))
        places = np.empty(len(rows), dtype=np.int64)
        self._ranks: dict[int, Int64[np.ndarray, " all"]] = {}
        for part in _runs(self._addresses >> 32):
            key, inside = int(self._addresses[part.start]) >> 32, self._addresses[part] & OFFSET
            self._ranks[key] = _ranks(table, self._fragments[key], inside, rows[part])
            places[part] = (number[key] << 32) + self._ranks[key][inside]
        self.places: Int64[np.ndarray, " rows"] = places[self.offsets]
        self._by_address: Int64[np.ndarray, " rows"] | None = None
        self._parts: list[Float32[Tensor, "... dim"]] | None = None

    def parts(self) -> Sequence[Float32[Tensor, "... dim"]]:
        """Map the vectors of each fragment, written to files first where they are not.

        Raises:
            DataError: Where a file cannot be written.
        """
        if self._parts is None:
            field = next(field.id() for field in self._table.lance_schema.fields() if field.name() == "vector")
            files, parts = set(), list[Float32[Tensor, "... dim"]]()
            for key, fragment in self._fragments.items():
                (source,) = (file.path for file in fragment.data_files() if field in file.fields)
                path = self._folder / f"{Path(source).stem}.rows"
                ranks = self._ranks.get(key, _NONE)  # a fragment all of whose rows were removed is not read
                parts.append(_mapped(path, self._table, fragment, ranks, self._dim))
                files.add(path.name)
            if files:
                _note_use(self._folder, str(self._table.uri))
                _drop_others(self._folder, files)
            self._parts = parts
        return self._parts

    def chosen(self, filter_text: str) -> Bool[np.ndarray, " rows"]:
        """Say for each row whether it passes a filter, given in Lance's SQL."""
        found = self._table.scanner(columns=[], filter=filter_text, with_row_address=True).to_table()
        passed = np.zeros(len(self._addresses), dtype=bool)
        passed[self._offset_of(found["_rowaddr"].to_numpy().astype(np.int64))] = True
        return np.asarray(passed[self.offsets])

    def _offset_of(self, addresses: Int64[np.ndarray, " found"]) -> Int64[np.ndarray, " found"]:
        if self._by_address is None:
            self._by_address = np.argsort(self._addresses, kind="stable")
        return self._by_address[np.searchsorted(self._addresses, addresses, sorter=self._by_address)]


def folder_of(uri: str) -> Path:
    """Return the folder of a table's mapped files: under `$UNION_CACHE`, else `~/.cache/union-igrot`.

    Raises:
        ConfigError: Where it lies under a home folder that cannot be found.
    """
    chosen = Path(os.environ.get("UNION_CACHE") or "~/.cache/union-igrot")
    try:
        root = chosen.expanduser()
    except RuntimeError:
        raise ConfigError(f"the cache folder {chosen} needs a home folder, and there is none; {ADVICE}") from None
    where = uri if _SCHEME.match(uri) else str(Path(uri).resolve())
    return root / "vectors" / hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()[:24]


class InUse:
    """A share of the lock of a folder of mapped files, so that nobody prunes it; given back when collected."""

    def __init__(self, folder: Path) -> None:
        with suppress(OSError):  # whoever writes the files says why
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._held = acquire_shared(lock_path(folder))


def _runs(values: Int64[np.ndarray, " rows"]) -> list[slice]:
    """Cut where a value follows that differs."""
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)] if len(values) else []
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _ranks(
    table: Any, fragment: Any, inside: Int64[np.ndarray, " rows"], rows: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " all"]:
    """Return for each row of a fragment, removed ones included, its number when they stand as first written."""
    if len(rows) == fragment.physical_rows:
        values = np.empty_like(rows)
        values[inside] = rows
    else:
        values = _all_rows(table, fragment, ["row"]).to_table()["row"].to_numpy()
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def _all_rows(table: Any, fragment: Any, columns: list[str]) -> Any:
    """Read a fragment with its removed rows, which an older version may still have."""
    return table.scanner(
        columns=columns, fragments=[fragment], with_row_id=True, include_deleted_rows=True, scan_in_order=True
    )


def _mapped(
    path: Path, table: Any, fragment: Any, ranks: Int64[np.ndarray, " all"], dim: int
) -> Float32[Tensor, "... dim"]:
    rows = len(ranks)
    if not rows:
        return torch.empty(0, dim)
    try:
        for left in reversed(range(_TRIES)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.stat().st_size != 4 * rows * dim:
                _write(path, _all_rows(table, fragment, ["vector"]), ranks, dim)
            try:
                # Not shared: mapped for reading alone, and no write here could reach the file.
                mapped = torch.from_file(str(path), shared=False, size=rows * dim, dtype=torch.float32)
                break
            except RuntimeError as error:
                if path.exists() or not left:  # else dropped by another process or a prune just now
                    raise OSError(str(error)) from error
        return mapped.view(rows, dim)
    except OSError as error:
        what = "has no room" if error.errno in _NO_ROOM else f"cannot be used ({error.strerror or error})"
        size = 4 * rows * dim
        raise DataError(
            f"exact search keeps {size:,} bytes of vectors in {path.parent}, which {what}; {ADVICE}"
        ) from error


def _write(path: Path, scanner: Any, ranks: Int64[np.ndarray, " all"], dim: int) -> None:
    """Write a fragment's vectors, each at its rank."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            at = 0
            for batch in scanner.to_batches():
                vectors = batch.column("vector")
                if vectors.null_count:
                    raise DataError(
                        f"this version of Lance (pylance {lance.__version__}) hides removed rows; take another"
                    )
                places = ranks[at : at + len(vectors)]
                order = np.argsort(places)
                places, rows = places[order], vectors.flatten().to_numpy().reshape(-1, dim)[order]
                for run in _runs(places - np.arange(len(places))):  # of places that follow one another
                    file.seek(4 * dim * int(places[run.start]))
                    file.write(rows[run])
                at += len(vectors)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _note_use(folder: Path, uri: str) -> None:
    """Note when the files were last used, and what of, for whoever makes room in the cache folder."""
    with suppress(OSError):
        os.utime(folder)
        if not (folder / _MANIFEST).exists():
            temporary = folder / f"{_MANIFEST}.{uuid.uuid4().hex}.tmp"
            where = uri if _SCHEME.match(uri) else absolute_path(uri)
            temporary.write_text(json.dumps({"index": where, "dtype": "float32"}), encoding="utf-8")
            temporary.rename(folder / _MANIFEST)


def _drop_others(folder: Path, used: set[str]) -> None:
    """Drop files that this version does not use, and what killed writers left.

    A process that has one mapped keeps it, and one that needs it again writes it again.
    """
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stale = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if stale if path.suffix == ".tmp" else path.name not in {*used, _MANIFEST}:
                path.unlink()
