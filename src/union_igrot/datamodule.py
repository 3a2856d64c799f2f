"""The LightningDataModule: batches for training and validation, from features encoded once.

Knows triplets, benchmarks and the encoder. Does not know heads, losses or the optimiser.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import final

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from union_igrot.encode import Encoder
from union_igrot.errors import DataError
from union_igrot.types import Batch, Benchmark, EvalBatch, TrainingSet, Triplet

_SIDES = ("gallery", "queries")


@final
class TaskBatches(Sampler[list[int]]):
    """Batches of one task each, shuffled anew every epoch, the same cut on every process.

    Args:
        tasks: The task of each sample.
        batch_size: Samples a process takes at once.
        seed: Seed of the order.
        epoch: Says which epoch is running; asked when an epoch's first batch is taken, since
            Lightning makes the iterator before it knows where a resumed training stands.
        rank: This process.
        world: Number of processes; together they take `batch_size * world` samples a step.

    The rest of a task that does not fill a batch is left out of the epoch, unless the task
    has no full batch at all.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows: dict[str, list[int]] = {}
        for row, task in enumerate(tasks):
            self._rows.setdefault(task, []).append(row)
        self._size, self._seed, self._epoch, self._rank, self._world = batch_size, seed, epoch, rank, world
        for task, rows in self._rows.items():
            if len(rows) < world:
                raise DataError(f"{len(rows)} {task} samples cannot be shared by {world} processes; use fewer devices")

    def _cut(self, count: int) -> list[int]:
        together = self._size * self._world
        if count < together:
            return [count // self._world]
        return [self._size] * (count // together)

    def __len__(self) -> int:
        return sum(len(self._cut(len(rows))) for rows in self._rows.values())

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(f"batches {self._seed} {self._epoch()}")
        batches = []
        for rows in self._rows.values():
            shuffled = order.sample(rows, len(rows))
            begin = 0
            for size in self._cut(len(rows)):
                mine = begin + self._rank * size
                batches.append(shuffled[mine : mine + size])
                begin += size * self._world
        order.shuffle(batches)
        yield from batches


@final
class IGROTDataModule(lightning.LightningDataModule):
    """Training triplets and validation benchmarks through a frozen backbone.

    Args:
        training: The triplets.
        validation: Benchmarks looked at after each epoch.
        encoder: Encodes what the feature store lacks, before the first step.
        query_tokens: Whether the query head reads tokens.
        target_tokens: Whether the target head reads tokens.
        batch_size: Triplets a process takes at once.
        seed: Seed of the order.
    """

    def __init__(
        self,
        training: TrainingSet,
        validation: Sequence[Benchmark],
        encoder: Encoder,
        *,
        query_tokens: bool,
        target_tokens: bool,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._triplets: Sequence[Triplet] = training.triplets
        self._benchmarks, self._encoder = validation, encoder
        self._query_tokens, self._target_tokens = query_tokens, target_tokens
        self._batch_size, self._seed = batch_size, seed
        groups = sorted({triplet.group for triplet in self._triplets})
        number = {group: place for place, group in enumerate(groups)}
        self._groups = torch.tensor([number[triplet.group] for triplet in self._triplets])
        self._ready = False

    def prepare_data(self) -> None:
        """Encode what is not in the store; Lightning calls it in one process a machine, while the others wait."""
        self._encode()

    def setup(self, stage: str) -> None:
        """Look up every picture and text of training and validation; encode what is not in the store."""
        if stage == "fit" and not self._ready:
            self._encode()
            self._ready = True

    def _encode(self) -> None:
        if self.trainer is not None:  # Lightning moves the model only after this
            self._encoder.backbone.to(self.trainer.strategy.root_device)
        fill, read = self._encoder.fill_pictures, self._encoder.fill_texts
        self._images = fill([t.image for t in self._triplets], tokens=self._query_tokens, what="training queries")
        self._texts = read([t.text for t in self._triplets], what="training texts")
        self._targets = fill([t.target for t in self._triplets], tokens=self._target_tokens, what="training targets")
        self._sides: list[dict[str, list[str]]] = []
        for benchmark in self._benchmarks:
            name = f"{benchmark.name} {benchmark.split}"
            queries = fill([q.image for q in benchmark.queries], tokens=self._query_tokens, what=f"{name} queries")
            texts = read([q.text for q in benchmark.queries], what=f"{name} texts")
            gallery = fill([i.image for i in benchmark.gallery], tokens=self._target_tokens, what=f"{name} gallery")
            self._sides.append({"queries": queries, "texts": texts, "gallery": gallery})

    def train_dataloader(self) -> DataLoader[int]:
        """Give batches of one task each as `types.Batch`."""
        rank, world = self._place()
        tasks = [triplet.task for triplet in self._triplets]
        batches = TaskBatches(tasks, self._batch_size, self._seed, self._epoch, rank, world)
        rows: Sequence[int] = range(len(tasks))
        # A generator of its own: a loader draws one number, and that must not shift those of dropout.
        own = torch.Generator()
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._train_batch, generator=own)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[tuple[int, str, range]]:
        """Give this process's share of the validation queries and galleries as `types.EvalBatch`."""
        rank, world = self._place()
        mine = self._blocks(world)[rank::world]
        own = torch.Generator()
        return DataLoader(mine, batch_size=None, collate_fn=self._eval_batch, generator=own)  # type: ignore[arg-type]

    def transfer_batch_to_device(
        self, batch: Batch | EvalBatch, device: torch.device, dataloader_idx: int
    ) -> Batch | EvalBatch:
        """Leave a batch where the encoder put it: on the backbone's device."""
        del device, dataloader_idx
        return batch

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

    def _blocks(self, world: int) -> list[tuple[int, str, range]]:
        """Cut all sides into blocks, at least one a process: Lightning lets a process without any skip validation."""
        counts = [(number, side, len(keys[side])) for number, keys in enumerate(self._sides) for side in _SIDES]
        total = sum(count for _, _, count in counts)
        if total < world:
            raise DataError(
                f"{total} validation queries and pictures cannot be shared by {world} processes; use fewer devices"
            )
        step = min(self._encoder.batch_size, total // world)
        return [
            (number, side, range(at, min(at + step, count)))
            for number, side, count in counts
            for at in range(0, count, step)
        ]

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _train_batch(self, rows: list[int]) -> Batch:
        def keys(of: list[str]) -> list[str]:
            return [of[row] for row in rows]

        look = self._encoder.lookup
        return Batch(
            images=look(keys(self._images), tokens=self._query_tokens),
            texts=look(keys(self._texts), tokens=self._query_tokens),
            targets=look(keys(self._targets), tokens=self._target_tokens),
            groups=self._groups[rows].to(self._encoder.backbone.device),
        )

    def _eval_batch(self, block: tuple[int, str, range]) -> EvalBatch:
        number, side, span = block
        keys = self._sides[number]
        positions = torch.tensor(list(span))
        part = slice(span.start, span.stop)
        if side == "gallery":
            images = self._encoder.lookup(keys["gallery"][part], tokens=self._target_tokens)
            return EvalBatch(number, "gallery", positions, images)
        images = self._encoder.lookup(keys["queries"][part], tokens=self._query_tokens)
        texts = self._encoder.lookup(keys["texts"][part], tokens=self._query_tokens)
        return EvalBatch(number, "queries", positions, images, texts)
