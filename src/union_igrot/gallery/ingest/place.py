"""Where indexing keeps its work, one process at a time: a folder in the cache, a lock, the list of what was skipped.

Knows names of indexes and the cache. Does not know what is in the files.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from union_igrot.errors import DataError, UnionError
from union_igrot.storage.atomic import remove_temporary
from union_igrot.storage.cache import ADVICE, check_manifest, default_root
from union_igrot.storage.locks import acquire_exclusive
from union_igrot.storage.paths import absolute_path


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where a run works.

    Attributes:
        folder: Work files of this index, model and source; gone when the work is done.
        skipped: The list of images that could not be read; None for an index in memory.
    """

    folder: Path
    skipped: Path | None


@contextmanager
def work_place(uri: str, fingerprint: str, source: str, cache: Path | None) -> Iterator[Place]:
    """Open the work folder of an index, and keep others from working on the same index meanwhile.

    Args:
        uri: The index.
        fingerprint: The model's.
        source: What brings the images.
        cache: The cache folder; its default where None.

    Raises:
        UnionError: Where another process is at work on the index.
        DataError: Where the cache folder cannot be written.
    """
    if uri == "memory:":
        with tempfile.TemporaryDirectory(prefix="union-igrot-") as passing:
            yield Place(Path(passing), None)
        return
    house = (cache or default_root()) / "indexing"
    local = _local(uri)
    name = _hash(uri if local is None else str(local))
    folder = house / f"{name}-{_hash(fingerprint, source)}"
    lock = house / f"{name}.lock"
    try:
        house.mkdir(parents=True, exist_ok=True)
        held = acquire_exclusive(lock)
    except OSError as error:
        raise DataError(f"cannot write to {house} ({error.strerror}); {ADVICE}") from error
    if held is None:
        raise UnionError(f"another process is putting images into {uri}; wait for its end ({lock} is its lock)")
    with held:
        try:
            folder.mkdir(exist_ok=True)
            remove_temporary(folder, all_of_them=False)
        except OSError as error:
            raise DataError(f"cannot work in {folder} ({error.strerror}); {ADVICE}") from error
        check_manifest(folder / "manifest.json", {"index": uri, "model": fingerprint, "source": source})
        beside = house / f"{name}.skipped.jsonl" if local is None else local.with_name(f"{local.name}.skipped.jsonl")
        yield Place(folder, beside)
        shutil.rmtree(folder, ignore_errors=True)  # what stays is taken up, and does no harm


def _local(uri: str) -> Path | None:
    """Return the path of an index on this machine's disk."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)
    return Path(absolute_path(uri)) if scheme is None else None


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
