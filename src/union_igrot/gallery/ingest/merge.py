"""From chunks in the work folder to rows of an index, in an order that loses nothing.

While images are read, only rows are written that replace no other content: an image that was
moved or renamed finds the vector of its bytes as long as the row that holds it is there. Changed
images wait in files of their own until all are read; then they are written, and then the rows of
images that are gone are removed. Killed anywhere, the next run takes up the files it finds.
Knows chunks and an index. Does not decode or embed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from union_igrot.gallery.engines.base import Rows, VectorIndex
from union_igrot.gallery.engines.filters import match_any
from union_igrot.gallery.ingest.chunks import SUFFIX, Chunk, Fact, read_chunk, write_chunk
from union_igrot.gallery.ingest.entries import ADDED, OWN, UNREACHED, Entry, Value
from union_igrot.gallery.ingest.plan import Row, columns_of
from union_igrot.gallery.ingest.skipped import Skip, SkippedFile

_LATE: Final = "late-"
_AT_ONCE: Final = 8
"""Chunks in one write to the index, where several wait."""
_LOOKED_UP: Final = 1000
"""Hashes in one question to the index."""
_REMOVED: Final = 10_000
"""Rows removed at once."""


class Content(NamedTuple):
    """What equal bytes share."""

    vector: Tensor
    width: int
    height: int
    thumbnail: bytes


@final
class Merger:
    """Writes chunks to an index.

    Args:
        index: The index.
        source: Whose rows they are.
        entries: The images, by id.
        rows: What the index held at the start, by id.
        skipped: The list of what cannot be read.
        folder: The work folder.
        merged: Told the name of each chunk that was taken, and its number of images.

    Attributes:
        added: Rows written that were not there.
        updated: Rows written that were there.
        embedded: Rows written with a vector of their own, of this run's.
        broken: Images that cannot be read.
        left: Ids of images whose equal is not in the index, against expectation.
        done: Size and time of change, by id, of images found in the chunks of an interrupted run.
        digests: Hashes found there.
    """

    def __init__(
        self,
        index: VectorIndex,
        source: str,
        entries: Mapping[str, Entry],
        rows: Mapping[str, Row],
        skipped: SkippedFile,
        folder: Path,
        merged: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        self._index, self._source, self._entries, self._rows = index, source, entries, rows
        self._skipped, self._folder, self._merged = skipped, folder, merged
        self._named = columns_of(entries.values())
        self._late: dict[str, tuple[Path, int]] = {}
        """Where the content of a changed image waits, by hash."""
        self._taking_up = False
        self.added = self.updated = self.embedded = 0
        self.left: list[str] = []
        self.broken: list[Skip] = []
        self.done: dict[str, tuple[int, int]] = {}
        self.digests: set[str] = set()

    def take_up(self) -> None:
        """Take what an interrupted run left."""
        self._taking_up = True
        for path in sorted(self._folder.glob(f"{_LATE}*{SUFFIX}")):
            chunk = read_chunk(path)
            if chunk is not None:
                self._note(path, chunk)
                wanted = [fact for fact in chunk.facts if self._wanted(fact)]
                self._remember(wanted)
                self._count(fact.id for fact in wanted)
        self.merge()
        self._taking_up = False
        self.left.clear()  # they are simply read again
        self.embedded = 0

    def merge(self) -> None:
        """Write the chunks that lie in the folder."""
        paths = sorted(path for path in self._folder.glob(f"*{SUFFIX}") if not path.name.startswith(_LATE))
        for at in range(0, len(paths), _AT_ONCE):
            read = ((path, read_chunk(path)) for path in paths[at : at + _AT_ONCE])
            self._merge({path: chunk for path, chunk in read if chunk is not None})

    def finish(self, gone: Sequence[str]) -> int:
        """Write changed images, then remove rows.

        Args:
            gone: Ids of rows to remove.

        Returns:
            How many were removed.
        """
        for path in sorted(self._folder.glob(f"{_LATE}*{SUFFIX}")):
            chunk = read_chunk(path)
            if chunk is not None:
                self._upsert({fact.id: (fact, _content(chunk, fact)) for fact in chunk.facts if self._wanted(fact)})
                path.unlink()
        chunks = (gone[at : at + _REMOVED] for at in range(0, len(gone), _REMOVED))
        return sum(self._index.delete(chunk) for chunk in chunks)

    def _merge(self, chunks: Mapping[Path, Chunk]) -> None:
        """Write some chunks to the index at once; what has to wait goes to files of its own."""
        facts = [fact for chunk in chunks.values() for fact in chunk.facts if self._wanted(fact)]
        broken = [_skip(fact, fact.reason) for fact in facts if fact.reason is not None]
        self._skipped.add(broken)
        self.broken += broken
        contents = {
            fact.digest: _content(chunk, fact)
            for chunk in chunks.values()
            for fact in chunk.facts
            if fact.at is not None
        }
        self.embedded += sum(fact.at is not None for fact in facts)
        contents |= self._contents({fact.digest for fact in facts if fact.reason is None} - contents.keys())
        now: dict[str, tuple[Fact, Content]] = {}
        for path, chunk in chunks.items():
            later: dict[str, tuple[Fact, Content]] = {}
            for fact in chunk.facts:
                if not self._wanted(fact) or fact.reason is not None:
                    continue
                if fact.digest not in contents:
                    self.left.append(fact.id)
                    continue
                row = self._rows.get(fact.id)
                group = now if row is None or row.digest in ("", fact.digest) else later
                group[fact.id] = fact, contents[fact.digest]
            self._postpone(path, later)
            self._count(later)
        self._upsert(now)
        self._count(now)
        self._remember(fact for fact in facts if fact.reason is not None or fact.digest in contents)
        for path, chunk in chunks.items():
            path.unlink()
            self._merged(path.name, len(chunk.facts))

    def _wanted(self, fact: Fact) -> bool:
        """Whether a fact is of an image that is there, as it is now; of bytes in memory this cannot be known later."""
        entry = self._entries.get(fact.id)
        if entry is None or (self._taking_up and entry.data is not None):
            return False
        return (entry.size, entry.mtime) == (fact.size, fact.mtime)

    def _count(self, written: Iterable[str]) -> None:
        for name in written:
            if name in self._rows:
                self.updated += 1
            else:
                self.added += 1

    def _remember(self, facts: Iterable[Fact]) -> None:
        for fact in facts if self._taking_up else ():
            self.done[fact.id] = fact.size, fact.mtime
            if fact.digest:
                self.digests.add(fact.digest)

    def _postpone(self, path: Path, rows: Mapping[str, tuple[Fact, Content]]) -> None:
        if not rows:
            return
        facts = [
            Fact(fact.id, fact.size, fact.mtime, fact.digest, content.width, content.height, at)
            for at, (fact, content) in enumerate(rows.values())
        ]
        vectors = torch.stack([content.vector for _, content in rows.values()])
        chunk = Chunk(facts, vectors, [content.thumbnail for _, content in rows.values()])
        late = path.with_name(f"{_LATE}{path.name}")
        write_chunk(late, chunk)
        self._note(late, chunk)

    def _note(self, path: Path, chunk: Chunk) -> None:
        self._late |= {fact.digest: (path, at) for at, fact in enumerate(chunk.facts)}

    def _contents(self, digests: set[str]) -> dict[str, Content]:
        """Find contents by hash: in the index, else among the changed images that wait."""
        found: dict[str, Content] = {}
        asked = sorted(digests) if "hash" in self._index.columns else []
        for at in range(0, len(asked), _LOOKED_UP):
            found |= dict(self._in_index(asked[at : at + _LOOKED_UP]))
        waiting: dict[Path, list[tuple[str, int]]] = {}
        for digest in digests - found.keys():
            if digest in self._late:
                path, at = self._late[digest]
                waiting.setdefault(path, []).append((digest, at))
        for path, places in waiting.items():
            chunk = read_chunk(path)
            if chunk is not None:
                found |= {digest: _content(chunk, chunk.facts[at]) for digest, at in places}
        return found

    def _in_index(self, digests: Sequence[str]) -> Iterator[tuple[str, Content]]:
        ids: dict[str, str] = {}
        for batch in self._index.scan(["id", "hash"], where=match_any("hash", digests)):
            ids |= {str(digest): str(name) for digest, name in zip(batch["hash"], batch["id"], strict=True)}
        if not ids:
            return
        rows = self._index.fetch(list(ids.values()))
        for at, digest in enumerate(ids):
            width, height, thumbnail = (rows.columns[name][at] for name in ("width", "height", "thumbnail"))
            yield digest, Content(rows.vectors[at], int(width or 0), int(height or 0), bytes(thumbnail or b""))  # type: ignore[arg-type]

    def _upsert(self, written: Mapping[str, tuple[Fact, Content]]) -> None:
        if not written:
            return
        columns: dict[str, list[Value | bytes]] = {name: [] for name in OWN}
        own, sources = zip(*(self._said(name) for name in written), strict=True)
        columns |= {user: [given.get(user) for given in own] for user in dict.fromkeys(user for g in own for user in g)}
        for (fact, content), source in zip(written.values(), sources, strict=True):
            values: dict[str, Value | bytes] = {
                "hash": fact.digest,
                "size": fact.size,
                "mtime": fact.mtime,
                "width": content.width,
                "height": content.height,
                "thumbnail": content.thumbnail,
                "source": source,
            }
            for name, value in values.items():
                columns[name].append(value)
        self._index.upsert(
            Rows(list(written), torch.stack([content.vector for _, content in written.values()]), columns)
        )

    def _said(self, name: str) -> tuple[Mapping[str, Value], str]:
        """Return the user's columns of a row that is written, and its source."""
        row, given = self._rows.get(name), self._entries[name].columns
        if row is None:
            return given, self._source
        columns, source = row.with_columns(given, self._named)
        if self._source == ADDED:  # a row that another source follows is followed further
            return columns, row.source or ADDED
        return columns, source or self._source


def _skip(fact: Fact, reason: str) -> Skip:
    """Note what is broken; what could not be reached will be tried again."""
    return Skip(fact.id, reason, 0, 0) if reason.startswith(UNREACHED) else Skip(fact.id, reason, fact.size, fact.mtime)


def _content(chunk: Chunk, fact: Fact) -> Content:
    assert fact.at is not None
    return Content(chunk.vectors[fact.at], fact.width, fact.height, chunk.thumbnails[fact.at])
