"""Images into the rows of an index: what is new is embedded, what moved is found again, what is gone is removed.

Knows the order of the steps. Does not know how an image is decoded, a vector computed or a row written.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, final

import numpy as np
import torch
from rich.progress import Progress

from union_igrot.errors import DataError
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.ingest.batches import Waits
from union_igrot.gallery.ingest.chunks import SUFFIX, Chunk, write_chunk
from union_igrot.gallery.ingest.codec import require_codec
from union_igrot.gallery.ingest.entries import Entry, Listing
from union_igrot.gallery.ingest.keep import ROWS
from union_igrot.gallery.ingest.merge import Merger
from union_igrot.gallery.ingest.place import Place, work_place
from union_igrot.gallery.ingest.plan import Plan, digests_of, gone, make_plan, read_rows, spoilt
from union_igrot.gallery.ingest.share import KNOWN, Words, lead_round, refused
from union_igrot.gallery.ingest.skipped import SkippedFile
from union_igrot.gallery.ingest.work import Report, Work
from union_igrot.models.model import IGROTModel
from union_igrot.progress import progress_bar
from union_igrot.training.processes import Processes

__all__ = ["EXAMPLES", "Report", "Work", "ingest_images"]
EXAMPLES: Final = 5
"""Broken images that a report names."""
_ROUNDS: Final = 5


def ingest_images(
    index: VectorIndex,
    model: IGROTModel,
    listing: Listing,
    work: Work | None = None,
    processes: Processes | None = None,
    *,
    fingerprint: str | None = None,
) -> Report:
    """Bring an index up to date with images.

    Images whose size and time of change are those of their row are not opened. Others are read; one whose bytes
    are in the index already, under whatever name, takes the vector that is there. What is finished is in the index
    within seconds, and readers see it while the work goes on. Interrupted anywhere, the same call goes on.

    Args:
        index: The index; made with this model.
        model: The model.
        listing: The images; `data.sources.list_images` gives those of a folder, a list, tar shards.
        work: SearchMode the work is done.
        processes: The processes that share it; this is the first, the others call `share.follow`.
        fingerprint: The model's, where it is known; hashing all weights takes seconds.

    Returns:
        What became of the images.

    Raises:
        UnionError: Where another process is putting images into the index.
        ConfigError: Where the decoder asked for is not installed.
        ImageError: For an image that cannot be read, where none is to be left out.
        DataError: Where columns cannot be kept, all images are gone, or a disk is full.
    """
    work, words = work or Work(), Words(processes or Processes())
    start = time.perf_counter()
    try:
        if work.decoder == "torchcodec":
            require_codec()
        place = work_place(index.uri, fingerprint or model.fingerprint(), listing.source, work.cache)
        with progress_bar(shown=work.progress) as bar, place as at:
            report = _Run(index, model, listing, work, words, at, bar).run()
    except BaseException:
        words.say(None)
        raise
    words.say("done")
    return replace(report, seconds=time.perf_counter() - start)


@final
class _Run:
    """The steps, and what they share."""

    def __init__(
        self,
        index: VectorIndex,
        model: IGROTModel,
        listing: Listing,
        work: Work,
        words: Words,
        place: Place,
        bar: Progress,
    ) -> None:
        self._index, self._model, self._listing, self._work = index, model, listing, work
        self._words, self._place, self._bar = words, place, bar
        self._task = bar.add_task("reading the index", total=None)
        self._merged = 0
        self._opened = 0

    def run(self) -> Report:
        """Do it; give the report without its time."""
        listing, work = self._listing, self._work
        entries = {entry.id: entry for entry in listing.entries}
        skipped = SkippedFile(self._place.skipped, listing.source)
        there = read_rows(self._index, listing, prune=work.prune)
        doomed = gone(listing, there.rows) if work.prune else []
        merger = Merger(
            self._index, listing.source, entries, there.rows, skipped, self._place.folder, self._note_merged
        )
        merger.take_up()
        plan = make_plan(listing, there.rows, merger.done, skipped.own)
        if plan.skips and work.on_broken == "fail":
            raise refused(plan.skips[0].path, plan.skips[0].reason)
        skipped.add(plan.skips)
        known = np.unique(np.concatenate([there.digests, digests_of(merger.digests)]))
        np.save(self._place.folder / KNOWN, known)
        self._write_known(plan)
        merger.merge()
        waits = self._embed(plan.todo, merger, entries)
        self._bar.update(self._task, description="finishing")
        skips = [*plan.skips, *merger.broken]
        worn = spoilt(skips, there.rows) if work.prune else []
        removed = merger.finish(list(dict.fromkeys([*doomed, *worn])))
        if merger.added + merger.updated + removed:
            self._index.optimize()
        broken = {skip.path for skip in skips}
        unseen = tuple(f"{folder}/" for folder in listing.unseen)
        skipped.settle({path for path in skipped.own if path in broken or self._stays(path, unseen, entries)})
        return Report(
            added=merger.added,
            updated=merger.updated,
            unchanged=plan.unchanged,
            removed=removed,
            skipped=len(broken),
            embedded=merger.embedded,
            opened=self._opened,
            working=waits.working,
            model_waited=waits.model,
            decoding_waited=waits.decoding,
            writing_waited=waits.writing,
            skipped_file=self._place.skipped if broken else None,
            reasons=tuple({skip.path: skip.reason for skip in skips}.items())[:EXAMPLES],
        )

    def _stays(self, path: str, unseen: tuple[str, ...], entries: dict[str, Entry]) -> bool:
        """Whether an image that was skipped before stays listed though it was not looked at now."""
        return path not in entries and (not self._work.prune or path.startswith(unseen))

    def _embed(self, todo: Sequence[Entry], merger: Merger, entries: dict[str, Entry]) -> Waits:
        """Read and embed images; those whose equal was removed meanwhile are embedded after all."""
        waits = Waits()
        for number in range(_ROUNDS):
            if not todo:
                return waits
            self._bar.reset(self._task, total=len(todo), description="embedding images")
            before = self._merged
            waits += lead_round(
                self._model,
                todo,
                self._work,
                self._words,
                self._place.folder,
                merger.merge,
                self._note_seen,
                force=number > 0,
            )
            self._opened += len(todo)
            if self._merged - before < len(todo):  # an earlier run's may come late
                raise DataError(f"results of {len(todo) - self._merged + before:,} images were lost; run it again")
            todo, merger.left = [entries[name] for name in merger.left], []
        raise DataError(f"rows of {self._index.uri} vanish while images are put in; end what removes them, run again")

    def _write_known(self, plan: Plan) -> None:
        none = torch.empty(0, self._index.dim)
        for number, at in enumerate(range(0, len(plan.known), ROWS)):
            chunk = Chunk(plan.known[at : at + ROWS], none, [])
            write_chunk(self._place.folder / f"known-00000-{number:08d}{SUFFIX}", chunk)

    def _note_merged(self, name: str, count: int) -> None:
        self._merged += count
        if name.split("-")[1] != "00000":
            self._bar.advance(self._task, count)

    def _note_seen(self, count: int) -> None:
        self._bar.advance(self._task, count)
