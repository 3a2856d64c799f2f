"""Pictures through the model: decoded ahead in worker processes, embedded under Lightning's Trainer.

Each content goes through the model once. Knows a model, a Trainer and batches of pictures. Does not
know an index, nor what is done with the vectors.
"""

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, final

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from union_igrot.data.entries import Entry
from union_igrot.data.transforms import model_input
from union_igrot.indexing.decode import Decoded, Decoder, Seen, Wanted
from union_igrot.model import IGROTModel
from union_igrot.processes import Machine
from union_igrot.trainer import make_trainer, manners

_AHEAD: Final = 2
"""Batches that each worker decodes ahead."""
_CONTEXT: Final = "fork" if sys.platform == "linux" else None
"""How workers start: at once where that is safe, as they touch neither the index nor the model."""
Take = Callable[[Sequence[Seen], Float[Tensor, "embedded dim"]], None]
"""Takes a batch: what was seen, and the vectors of those that hold a thumbnail, in order."""


@final
@dataclass(slots=True)
class Waits:
    """Who waited for whom, in seconds.

    Attributes:
        model: The model for decoded pictures.
        decoding: Decoding for the model, mean of the workers.
        writing: The model for rows to be written.
        working: From the first batch asked for to the last one embedded.
    """

    model: float = 0.0
    decoding: float = 0.0
    writing: float = 0.0
    working: float = 0.0

    def __add__(self, other: "Waits") -> "Waits":
        return Waits(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@final
class Batches:
    """The pictures in batches, decoded ahead; of equal ones only the first is left to be embedded.

    Args:
        decoder: Decodes a batch.
        entries: The pictures.
        batch_size: Pictures a batch.
        workers: Processes that decode; 0 decodes in this one.
        force: Whether pictures are decoded even if equal ones are in the index.
        pinned: Whether a GPU will fetch the pictures.
    """

    def __init__(
        self,
        decoder: Decoder,
        entries: Sequence[Entry],
        *,
        batch_size: int,
        workers: int,
        force: bool = False,
        pinned: bool = False,
    ) -> None:
        self._decoder, self._entries, self._size = decoder, entries, batch_size
        self._workers = min(workers, math.ceil(len(entries) / batch_size))
        self._force, self._pinned = force, pinned
        self._met: set[str] = set()
        self.waits = Waits()

    def __iter__(self) -> Iterator[Decoded]:
        start = time.perf_counter()
        at, batches = 0, math.ceil(len(self._entries) / self._size)
        while at < batches:
            try:
                for decoded in self._timed(self._loader(range(at, batches), self._workers)):
                    at += 1
                    yield self._first_ones(decoded)
            except RuntimeError as error:
                if not _is_crash(error) or self._workers == 0:
                    raise
                # The batch that is missing or one that was decoded ahead: each is tried, picture by picture.
                yield self._first_ones(self._one_by_one(at))
                at += 1
        self.waits.working += time.perf_counter() - start

    def _loader(self, batches: range, workers: int, ahead: int = _AHEAD) -> DataLoader[Decoded]:
        wanted = (self._wanted(range(at * self._size, (at + 1) * self._size)) for at in batches)
        return self._load(wanted, workers, ahead)

    def _load(self, wanted: Any, workers: int, ahead: int) -> DataLoader[Decoded]:
        return DataLoader(
            self._decoder,
            batch_sampler=wanted,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            multiprocessing_context=_CONTEXT if workers else None,
            collate_fn=_as_it_is,  # type: ignore[arg-type] # what `__getitems__` gave
            pin_memory=self._pinned,
            # Of its own: random numbers of whoever calls must not shift.
            generator=torch.Generator(),
        )

    def _wanted(self, numbers: range) -> list[Wanted]:
        entries = ((number, self._entries[number]) for number in numbers if number < len(self._entries))
        return [Wanted(number, one.path, one.size, one.offset, one.data, self._force) for number, one in entries]

    def _timed(self, loader: DataLoader[Decoded]) -> Iterator[Decoded]:
        """Give the batches, and count who waited."""
        start = time.perf_counter()
        with _quiet_fork():
            batches = iter(loader)
        with _deaths_in_turn():
            while (decoded := next(batches, None)) is not None:
                self.waits.model += time.perf_counter() - start
                self.waits.decoding += decoded.waited / max(1, self._workers)
                yield decoded
                start = time.perf_counter()

    def _one_by_one(self, batch: int) -> Decoded:
        """Decode a batch in a process that may die; a picture that kills it is broken."""
        wanted = self._wanted(range(batch * self._size, (batch + 1) * self._size))
        found: list[Decoded] = []
        while len(found) < len(wanted):
            rest = wanted[len(found) :]
            try:
                with _quiet_fork():
                    each = iter(self._load([[one] for one in rest], 1, 1))
                with _deaths_in_turn():
                    found += each
            except RuntimeError as error:
                if not _is_crash(error):
                    raise
                # `+=` has kept what came before, and with one batch ahead the next is the one that was at work.
                reason = "decoding it ended the process; it may be too large for the memory, or made to do harm"
                dead = Seen(wanted[len(found)].number, reason=reason)
                found.append(Decoded(self._decoder.no_pictures(), [dead], 0.0))
        return Decoded(torch.cat([one.pictures for one in found]), [seen for one in found for seen in one.seen], 0.0)

    def _first_ones(self, decoded: Decoded) -> Decoded:
        """Leave out pictures whose content was met before in this run."""
        seen, rows, row = [], [], 0
        for one in decoded.seen:
            if one.thumbnail is None:
                seen.append(one)
            elif one.digest in self._met:
                seen.append(Seen(one.number, one.digest))
                row += 1
            else:
                self._met.add(one.digest)
                seen.append(one)
                rows.append(row)
                row += 1
        pictures = decoded.pictures if len(rows) == row else decoded.pictures[rows]
        return replace(decoded, pictures=pictures, seen=seen)


@final
class _Embedder(lightning.LightningModule):
    """The model as Lightning wants it."""

    def __init__(self, model: IGROTModel) -> None:
        super().__init__()
        self.model = model

    def transfer_batch_to_device(self, batch: Decoded, device: torch.device, dataloader_idx: int) -> Decoded:
        """Move the pictures alone."""
        del dataloader_idx
        return replace(batch, pictures=batch.pictures.to(device, non_blocking=True))

    def on_predict_start(self) -> None:
        """Encode the empty text, outside the half precision that the pictures may be encoded in."""
        self.model.null_text()

    def predict_step(self, batch: Decoded) -> Tensor:
        """Embed a batch, which may hold none that has to be."""
        if not len(batch.pictures):
            return torch.empty(0, self.model.backbone.dim)
        features = self.model.backbone.encode_image(model_input(batch.pictures, self.model.preprocess))
        # The heads are small, and what they give is kept in 32 bits: they work so too.
        with torch.autocast(batch.pictures.device.type, enabled=False):
            tokens = None if features.tokens is None else features.tokens.float()
            return self.model.embed_gallery(replace(features, pooled=features.pooled.float(), tokens=tokens))


@final
class _Hand(lightning.Callback):
    """Hands on a batch when the next one is on its way, so that the device need not wait for what is done with it."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._held: tuple[Sequence[Seen], Tensor] | None = None

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Decoded,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        del trainer, pl_module, batch_idx, dataloader_idx
        held, self._held = self._held, (batch.seen, outputs)
        self._give(held)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        del trainer, pl_module
        held, self._held = self._held, None
        self._give(held)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        del trainer, pl_module, exception
        held, self._held = self._held, None
        with suppress(Exception):  # the first error is the one to tell
            self._give(held)

    def _give(self, held: tuple[Sequence[Seen], Tensor] | None) -> None:
        if held is not None:
            self._take(held[0], held[1].to("cpu"))


def embed(model: IGROTModel, batches: Batches, take: Take, machine: Machine, folder: Path) -> None:
    """Embed pictures and hand on the vectors.

    Args:
        model: The model; it stays on its device and in evaluation mode.
        batches: The pictures.
        take: What takes each batch.
        machine: Devices and precision.
        folder: Where Lightning may write.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    device = model.device
    try:
        with manners():
            options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = make_trainer(machine, folder, [_Hand(take)], **options)
            trainer.predict(_Embedder(model), batches, return_predictions=False)
    finally:
        model.to(device).eval()


def machine_of(device: torch.device, precision: Any = "32-true") -> Machine:
    """Say where a model already lies."""
    if device.type == "cpu":
        return Machine("cpu", 1, precision=precision)
    return Machine(device.type, [device.index or 0] if device.type == "cuda" else 1, precision=precision)


def _as_it_is(decoded: Decoded) -> Decoded:
    return decoded


def _is_crash(error: RuntimeError) -> bool:
    return "DataLoader worker" in str(error)


@contextmanager
def _deaths_in_turn() -> Iterator[None]:
    """Hear of a dead worker where its batch is asked for, not by a signal in the midst of anything else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Let workers be forked beside an open index: they never touch it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        yield
