"""The LightningDataModule: batches for training and validation.

Images and texts of a frozen encoder are encoded once, into the feature store; for an encoder that is tuned, batches
hold the images and texts themselves.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, final

import lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.images.dataset import ImageDataset, first_error, image_loader
from union_igrot.images.transforms import model_input, open_pixels
from union_igrot.models.backbones.base import Modality
from union_igrot.training.losses import UNKNOWN, CachedBank, reference_groups
from union_igrot.types import Benchmark, Features, ImageSource, Preprocess, Query, TrainingSet, Triplet


@dataclass(frozen=True)
class TrainingBatch:
    """Training samples of one task, as images and texts or as their features.

    Attributes:
        images: Reference images, preprocessed or already encoded.
        texts: Modification texts; an entry may be None.
        targets: Target images, preprocessed or already encoded.
        groups: Identity of each target's content; equal groups are not negatives.
        task: The task of the batch, if the training has several.
        reference_groups: Group of each reference, for composed queries that are compared with a bank; else None.
        rows: Positions of the targets in the bank, if it is read from the feature store.
    """

    images: Float[Tensor, "batch 3 height width"] | Features
    texts: Sequence[str | None] | Features
    targets: Float[Tensor, "batch 3 height width"] | Features
    groups: Int[Tensor, " batch"]
    task: str = ""
    reference_groups: Int[Tensor, " batch"] | None = None
    rows: Int[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class ValidationBatch:
    """Some queries or gallery images of a benchmark.

    Attributes:
        benchmark: Number of the benchmark.
        side: `queries` or `gallery`.
        positions: Their positions on that side.
        images: Images, preprocessed or already encoded.
        texts: The queries' texts; None for a gallery.
    """

    benchmark: int
    side: Literal["queries", "gallery"]
    positions: Int[Tensor, " batch"]
    images: Float[Tensor, "batch 3 height width"] | Features
    texts: Sequence[str | None] | Features | None = None


@final
class TaskSampler(Sampler[list[int]]):
    """Batches of one task each, shuffled again every epoch, the same on every process.

    The rest of a task that does not fill a batch is left out of the epoch, unless the task has no full batch at all.

    Args:
        tasks: The task of each sample.
        batch_size: Samples per step of a process.
        seed: Seed of the order.
        epoch: Returns the running epoch. Called at an epoch's first batch: Lightning makes the iterator before it
            knows the epoch at which a training resumes.
        rank: This process.
        world: Number of processes; together they take `batch_size * world` samples a step.

    Raises:
        DataError: If a task has fewer samples than there are processes.
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
                raise DataError(f"{len(rows)} {task} samples cannot be divided among {world} processes; use fewer")

    def _sizes(self, count: int) -> list[int]:
        step = self._size * self._world
        return [self._size] * (count // step) or [count // self._world]

    def __len__(self) -> int:
        return sum(len(self._sizes(len(rows))) for rows in self._rows.values())

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(f"batches {self._seed} {self._epoch()}")
        batches = []
        for rows in self._rows.values():
            shuffled = order.sample(rows, len(rows))
            begin = 0
            for size in self._sizes(len(rows)):
                own = begin + self._rank * size
                batches.append(shuffled[own : own + size])
                begin += size * self._world
        order.shuffle(batches)
        yield from batches


@dataclass(frozen=True)
class _Inputs:
    """Keys of the features of a side; no keys of images, and the texts themselves, if their encoder is tuned."""

    images: Sequence[str]
    texts: Sequence[str]
    tokens: bool


class _Block(NamedTuple):
    """Consecutive items of one side of a validation benchmark."""

    benchmark: int
    side: Literal["queries", "gallery"]
    span: range


_Decoded = tuple[list[Any], list[Tensor]]
"""Rows of the training set, or blocks, and the pixels of their images."""


def _open_images(
    preprocess: Preprocess, triplets: Sequence[Triplet], benchmarks: Sequence[Benchmark], item: Any
) -> tuple[Any, list[Tensor]]:
    """Open the images of a row of the training set, or of a block and a position, in a decoding process."""
    if isinstance(item, int):
        sources = [triplets[item].image, triplets[item].target]
    else:
        item, position = item
        sources = [getattr(benchmarks[item.benchmark], item.side)[position].image]
    return item, [open_pixels(source, preprocess) for source in sources]


def _stack_images(items: list[tuple[Any, list[Tensor]] | ImageError]) -> _Decoded | ImageError:
    if (error := first_error(items)) is not None:
        return error
    opened = [item for item in items if not isinstance(item, ImageError)]
    columns = zip(*(images for _, images in opened), strict=True)
    return [item for item, _ in opened], [torch.stack(column) for column in columns]


def _single_wording(query: Query) -> str | None:
    if len(query.wordings) > 1:
        raise ConfigError(
            f"query {query.id!r} has {len(query.wordings)} wordings, which only an evaluation averages; choose another "
            "prompt for validation"
        )
    return query.wordings[0]


@final
class IGROTDataModule(lightning.LightningDataModule):
    """Training triplets and validation benchmarks for a backbone.

    Args:
        training: The triplets.
        validation: Benchmarks that are scored after each epoch.
        extractor: Encodes what the feature store lacks, before the first step.
        query_tokens: Whether the query head reads tokens.
        target_tokens: Whether the target head reads tokens.
        batch_size: Triplets per step of a process.
        seed: Seed of the order.
        tuned: The encoders that are tuned, whose inputs are encoded in each step by the model itself.
        bank_size: Most images of a bank for composed queries (`BankLoss`); None makes none.
        fused_targets: Whether the targets of sketches come with tokens, for the query head.

    Attributes:
        bank: The bank after `setup`; None without one, or if images are encoded in each step.
    """

    def __init__(
        self,
        training: TrainingSet,
        validation: Sequence[Benchmark],
        extractor: FeatureExtractor,
        *,
        query_tokens: bool,
        target_tokens: bool,
        batch_size: int = 128,
        seed: int = 0,
        tuned: Collection[Modality] = (),
        bank_size: int | None = None,
        fused_targets: bool = False,
    ) -> None:
        super().__init__()
        self._triplets, self._benchmarks, self._extractor = training.triplets, validation, extractor
        self._tokens = {"queries": query_tokens, "gallery": target_tokens}
        self._batch_size, self._seed, self._tuned = batch_size, seed, frozenset(tuned)
        numbers = {group: number for number, group in enumerate(sorted({one.group for one in self._triplets}))}
        self._groups = torch.tensor([numbers[one.group] for one in self._triplets])
        self._several_tasks = len({one.task for one in self._triplets}) > 1
        self._bank_size, self._fused_targets = bank_size, fused_targets
        self._composed = [row for row, one in enumerate(self._triplets) if one.task == "cir"]
        self.bank: CachedBank | None = None

    def setup(self, stage: str) -> None:
        """Look up every image and text of training and validation; encode what is not in the store."""
        if stage == "fit":
            self.prepare_data()

    def prepare_data(self) -> None:
        """Encode what is not in the store; Lightning calls it in one process per machine, while the others wait."""
        if self.trainer is not None:  # Lightning moves the model only after this
            self._extractor.backbone.to(self.trainer.strategy.root_device)
        triplets = self._triplets
        texts = [triplet.text for triplet in triplets]
        self._queries = self._inputs("queries", [triplet.image for triplet in triplets], "training queries", texts)
        if self._fused_targets and "image" not in self._tuned:
            # First, as features without tokens would be stored beside those with them.
            shown = [triplet.target for triplet in triplets if triplet.task == "sbir"]
            self._extractor.extract_images(shown, tokens=True, label="targets of sketches")
        self._targets = self._inputs("gallery", [triplet.target for triplet in triplets], "training targets")
        if self._bank_size is not None and self._composed:
            self._make_bank(self._bank_size)
        self._sides: list[dict[str, _Inputs]] = []
        for one in self._benchmarks:
            name, texts = f"{one.name} {one.split}", [_single_wording(query) for query in one.queries]
            queries = self._inputs("queries", [query.image for query in one.queries], f"{name} queries", texts)
            gallery = self._inputs("gallery", [item.image for item in one.gallery], f"{name} gallery")
            self._sides.append({"queries": queries, "gallery": gallery})

    def _inputs(
        self, side: str, images: Sequence[ImageSource], what: str, texts: Sequence[str | None] | None = None
    ) -> _Inputs:
        """Encode images and texts of frozen encoders and return their keys."""
        tokens, keys, text_keys = self._tokens[side], [], [text or "" for text in texts or ()]
        if "image" not in self._tuned:
            keys = self._extractor.extract_images(images, tokens=tokens, label=what)
        if texts is not None and "text" not in self._tuned:
            text_keys = self._extractor.extract_texts(texts, label=f"texts of {what}")
        return _Inputs(keys, text_keys, tokens)

    def _make_bank(self, size: int) -> None:
        composed = torch.tensor(self._composed)
        own = self._groups[composed]
        shown = reference_groups([self._triplets[row] for row in self._composed], own)
        self._reference_groups = torch.full_like(self._groups, UNKNOWN).index_copy(0, composed, shown)
        if "image" in self._tuned:
            return
        tokens, targets = self._targets.tokens, [self._targets.images[row] for row in self._composed]
        shown_in = [self._triplets[row].image for row in self._composed]
        references = self._extractor.extract_images(shown_in, tokens=tokens, label="training references")
        lookup = partial(self._extractor.lookup, tokens=tokens)
        self.bank = CachedBank(targets, references, own, shown, lookup, size)
        self._rows = torch.full_like(self._groups, UNKNOWN).index_copy(0, composed, self.bank.targets)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of `TrainingBatch`es of one task each; `transfer_batch_to_device` completes them."""
        rank, world = self._process()
        tasks = [triplet.task for triplet in self._triplets]
        batches = TaskSampler(tasks, self._batch_size, self._seed, self._epoch, rank, world)
        if "image" in self._tuned:
            return self._image_loader(batches)
        rows: Any = range(len(tasks))
        # A generator of its own: a loader draws one number, and that must not shift those of dropout.
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._training_batch, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation batches: this process's share of the queries and galleries."""
        rank, world = self._process()
        own = self._blocks(world)[rank::world]
        if "image" in self._tuned:
            return self._image_loader([[(block, position) for position in block.span] for block in own])
        blocks: Any = own
        collate: Any = self._validation_batch
        return DataLoader(blocks, batch_size=None, collate_fn=collate, generator=torch.Generator())

    def _image_loader(self, batches: Iterable[Sequence[Any]]) -> DataLoader[Any]:
        preprocess, workers = self._extractor.backbone.preprocess, self._extractor.workers
        dataset = ImageDataset(None, partial(_open_images, preprocess, self._triplets, self._benchmarks))
        return image_loader(dataset, batches, _stack_images, workers=workers, persistent=True)

    def transfer_batch_to_device(
        self,
        batch: TrainingBatch | ValidationBatch | _Decoded | ImageError,
        device: torch.device,
        dataloader_idx: int,
    ) -> TrainingBatch | ValidationBatch:
        """Join decoded images with features of the store, which are on the backbone's device already."""
        del dataloader_idx
        if isinstance(batch, ImageError):
            raise batch
        if not isinstance(batch, tuple):
            return batch
        items, columns = batch
        preprocess = self._extractor.backbone.preprocess
        images = [model_input(pixels.to(device, non_blocking=True), preprocess) for pixels in columns]
        if isinstance(items[0], _Block):
            return self._validation_batch(items[0], *images)
        return self._training_batch(items, *images)

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _blocks(self, world: int) -> list[_Block]:
        """Divide all sides into blocks, at least one per process: Lightning lets a process without any skip it."""
        sides: list[tuple[int, Literal["queries", "gallery"], int]] = []
        for number, one in enumerate(self._benchmarks):
            sides += [(number, "gallery", len(one.gallery)), (number, "queries", len(one.queries))]
        total = sum(count for _, _, count in sides)
        if total < world:
            raise DataError(f"{total} validation queries and images cannot be divided among {world} processes")
        step = min(self._extractor.batch_size, total // world)
        return [
            _Block(number, side, range(at, min(at + step, count)))
            for number, side, count in sides
            for at in range(0, count, step)
        ]

    def _training_batch(
        self, rows: list[int], images: Tensor | None = None, targets: Tensor | None = None
    ) -> TrainingBatch:
        device, task = self._extractor.backbone.device, self._triplets[rows[0]].task
        with_bank = self._bank_size is not None and task == "cir"
        tokens = self._fused_targets and task == "sbir"
        return TrainingBatch(
            images=self._images(self._queries, rows) if images is None else images,
            texts=self._texts(self._queries, rows),
            targets=self._images(self._targets, rows, tokens=tokens) if targets is None else targets,
            groups=self._groups[rows].to(device),
            task=task if self._several_tasks else "",
            reference_groups=self._reference_groups[rows].to(device) if with_bank else None,
            rows=self._rows[rows].to(device) if with_bank and self.bank is not None else None,
        )

    def _validation_batch(self, block: _Block, images: Tensor | None = None) -> ValidationBatch:
        inputs, positions = self._sides[block.benchmark][block.side], torch.tensor(list(block.span))
        embedded = self._images(inputs, block.span) if images is None else images
        texts = None if block.side == "gallery" else self._texts(inputs, block.span)
        return ValidationBatch(block.benchmark, block.side, positions, embedded, texts)

    def _images(self, inputs: _Inputs, rows: Iterable[int], *, tokens: bool = False) -> Features:
        return self._extractor.lookup([inputs.images[row] for row in rows], tokens=inputs.tokens or tokens)

    def _texts(self, inputs: _Inputs, rows: Iterable[int]) -> Features | list[str]:
        texts = [inputs.texts[row] for row in rows]
        return texts if "text" in self._tuned else self._extractor.lookup(texts, tokens=inputs.tokens)
