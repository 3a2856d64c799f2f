"""A round of reading and embedding, alone or shared with other processes.

The first process deals the images and waits for the others; what they did comes back as chunks in the
work folder, which all processes must see. Knows processes, rounds and the folder. Does not know an index.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.errors import ConfigError, ImageError, UnionError
from union_igrot.gallery.ingest.batches import Batches, Waits
from union_igrot.gallery.ingest.codec import BatchDecoder
from union_igrot.gallery.ingest.decode import Decoder, Seen
from union_igrot.gallery.ingest.embed import embed, machine_of
from union_igrot.gallery.ingest.entries import Entry
from union_igrot.gallery.ingest.keep import Keeper
from union_igrot.gallery.ingest.plan import shares
from union_igrot.gallery.ingest.work import Work
from union_igrot.models.devices import default_workers
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import write_cached
from union_igrot.training.processes import Processes

KNOWN: Final = "known.npy"
"""File of the hashes of what is in the index, for `Decoder`."""
_LOOK: Final = 0.2
"""Seconds between two looks for what other processes have written."""
_TRIES: Final = 24
"""How often another process waits ten minutes for the first one's next word; listing may take long."""
_SILENCE: Final = 1800.0
"""Seconds without a batch after which another process is held to be dead."""
_FIELDS: Final = ("id", "path", "size", "mtime", "offset")


@final
class Words:
    """What the first process says to the others: a round, that all is done, or that it failed."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self._number = processes, 0

    def say(self, word: Any) -> None:
        """Say the next word."""
        self.processes.share(f"indexing-{self._number}", json.dumps(word))
        self._number += 1

    def hear(self) -> Any:
        """Wait for the next word.

        Raises:
            UnionError: Where none comes for hours.
        """
        for left in reversed(range(_TRIES)):
            try:
                word = self.processes.share(f"indexing-{self._number}")
                break
            except UnionError:
                if not left:
                    raise
        self._number += 1
        return json.loads(word)


def lead_round(
    model: IGROTModel,
    entries: Sequence[Entry],
    work: Work,
    words: Words,
    folder: Path,
    merge: Callable[[], None],
    seen: Callable[[int], None],
    *,
    force: bool = False,
) -> Waits:
    """Have images read and embedded; when it returns, all chunks are merged.

    Args:
        model: The model.
        entries: The images.
        work: SearchMode the work is done.
        words: To the other processes.
        folder: The work folder.
        merge: Merges the chunks that lie in the folder.
        seen: Told of images that this process has read.
        force: Whether images are decoded even if equal ones are in the index.

    Returns:
        Who waited for whom, in this process.

    Raises:
        UnionError: Where another process failed, or was not heard of for half an hour.
    """
    token, world = f"{time.time_ns():x}", words.processes.world
    dealt = shares(entries, world)
    for rank, share in enumerate(dealt[1:], 1):
        lines = [json.dumps([getattr(entry, name) for name in _FIELDS]) for entry in share]
        write_cached(_file(folder, token, rank, "share"), ["\n".join(lines).encode()])
    words.say([token, str(folder), force])
    here = words.processes.here

    def merge_all() -> None:
        for rank in range(1, world):
            _look_for_failure(words.processes, rank)
        merge()

    waits = _work_through(model, dealt[0], work, folder, f"{token}-{0:05d}", merge_all, seen, force=force, here=here)
    for rank in range(1, world):
        _await(words.processes, folder, token, rank, merge)
    merge()
    return waits


def _await(processes: Processes, folder: Path, token: str, rank: int, merge: Callable[[], None]) -> None:
    """Merge what another process writes until it is done with its share."""
    share, last = _file(folder, token, rank, "share"), 0
    heard = time.monotonic()
    while not _file(folder, token, rank, "done").exists():
        _look_for_failure(processes, rank)
        # Compared with itself alone: the clocks of two machines differ.
        if (touched := share.stat().st_mtime_ns) != last:
            last, heard = touched, time.monotonic()
        elif time.monotonic() - heard > _SILENCE:
            raise UnionError(
                f"process {rank} was not heard of for {_SILENCE / 60:.0f} minutes; look at its output, and run it "
                "again: what is done is kept"
            )
        time.sleep(_LOOK)
        merge()


def _look_for_failure(processes: Processes, rank: int) -> None:
    if (why := processes.complaint_of(rank)) is not None:
        raise UnionError(f"process {rank} failed: {why}")


def follow(model: IGROTModel, work: Work, processes: Processes) -> None:
    """Embed what the first process deals to this one, until it has no more.

    Args:
        model: The same model.
        work: The same way of working.
        processes: This process among those of the run.

    Raises:
        SystemExit: Where the first process failed; it has said why itself.
        ConfigError: Where this process does not see the first one's cache folder.
    """
    words = Words(processes)
    try:
        while (word := words.hear()) != "done":
            if word is None:
                raise SystemExit(2)
            _follow_round(model, word, work, processes)
    except Exception as error:
        processes.complain(str(error) if isinstance(error, UnionError) else f"{type(error).__name__}: {error}")
        raise


def _follow_round(model: IGROTModel, word: Any, work: Work, processes: Processes) -> None:
    """Embed one share."""
    token, folder, force = word[0], Path(word[1]), word[2]
    share = _file(folder, token, processes.rank, "share")
    if not share.exists():
        raise ConfigError(f"process {processes.rank} does not see {folder}; give a cache_dir that all machines see")
    lines = share.read_text().splitlines()
    entries = [Entry(**dict(zip(_FIELDS, json.loads(line), strict=True))) for line in lines]
    stem, here = f"{token}-{processes.rank:05d}", processes.here

    def heard(_: int) -> None:
        with suppress(OSError):  # a write will say what is wrong
            os.utime(share)

    _work_through(model, entries, work, folder, stem, None, heard, force=force, here=here)
    write_cached(_file(folder, token, processes.rank, "done"), [b""])


def _file(folder: Path, token: str, rank: int, what: str) -> Path:
    return folder / f"{token}-{rank:05d}.{what}"


def _work_through(
    model: IGROTModel,
    entries: Sequence[Entry],
    work: Work,
    folder: Path,
    stem: str,
    merge: Callable[[], None] | None,
    seen: Callable[[int], None],
    *,
    force: bool,
    here: int,
) -> Waits:
    """Read and embed images; what was embedded is kept, also where it ends by an error."""
    machine = work.machine or machine_of(model.device)
    codec = work.decoder == "torchcodec"
    device = torch.device("cuda" if machine.on_gpu else "cpu")
    workers = max(1, default_workers(device, here)) if work.workers is None else work.workers
    known = folder / KNOWN

    def unpack() -> BatchDecoder:
        # Asked when the Trainer has given this process its device.
        return BatchDecoder(model.preprocess, model.device if device.type == "cpu" else _current_gpu())

    decoder = Decoder(model.preprocess, known if known.exists() else None, hands_over=codec)
    batches = Batches(
        decoder,
        entries,
        batch_size=work.batch_size,
        workers=workers,
        force=force,
        pinned=machine.on_gpu,
        unpack=unpack if codec else None,
    )
    keeper = Keeper(entries, folder, stem, merge)

    def take(found: Sequence[Seen], vectors: Float[Tensor, "embedded dim"]) -> None:
        keeper.take(found, vectors)
        seen(len(found))
        broken = next((one for one in found if one.reason is not None), None)
        if broken is not None and work.on_broken == "fail":
            raise refused(entries[broken.number].id, str(broken.reason))

    start = time.perf_counter()
    try:
        if entries:
            embed(model, batches, take, machine, folder)
    finally:
        batches.waits.working = time.perf_counter() - start
        decoder.close()
        keeper.close()
    batches.waits.writing = keeper.waited
    return batches.waits


def _current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def refused(name: str, reason: str) -> ImageError:
    """Return the error for an image that cannot be read where none is left out."""
    return ImageError(f"{name}: {reason}; replace it, take it away, or leave such out with on_broken=skip")
