"""The LightningDataModule: batches for training and validation.

What a frozen encoder says is encoded once; for an encoder that is being tuned, batches
hold images and texts themselves. Knows triplets, benchmarks and the extractor. Does not
know heads, losses or the optimizer.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.images.dataset import ImageDataset, OpenAsPixels, first_error, image_loader
from union_igrot.images.transforms import model_input
from union_igrot.models.backbones.base import Modality
from union_igrot.types import (
    Batch,
    Benchmark,
    EvalBatch,
    Features,
    ImageSource,
    Preprocess,
    Query,
    TrainingSet,
    Triplet,
)

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


class _Block(NamedTuple):
    """Some items of one side of a validation benchmark."""

    benchmark: int
    side: str
    span: range


class _Decoded(NamedTuple):
    """A batch from a decoding process: the samples' numbers, or a block, and the pixels of each of their images."""

    of: Any
    images: list[Tensor]


class _OpenSample:
    """Opens the images of one sample: reference and target in training, one image in validation."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._open = OpenAsPixels(preprocess)

    def __call__(self, sample: "_Sample") -> tuple[Any, list[Tensor]]:
        return sample[0], [self._open(source) for source in sample[1]]


_Sample = tuple[Any, Sequence[ImageSource]]


def _stack_samples(samples: list[tuple[Any, list[Tensor]] | ImageError]) -> _Decoded | ImageError:
    opened = [sample for sample in samples if not isinstance(sample, ImageError)]
    if len(opened) < len(samples):
        return first_error(samples) or ImageError("")
    return _Decoded([of for of, _ in opened], [torch.stack(side) for side in zip(*(i for _, i in opened), strict=True)])


def _only_wording(query: Query) -> str | None:
    if len(query.wordings) > 1:
        raise ConfigError(
            f"query {query.id!r} has {len(query.wordings)} wordings, whose embeddings only an evaluation averages; "
            "choose another prompt to validate with"
        )
    return query.wordings[0]


@final
class IGROTDataModule(lightning.LightningDataModule):
    """Training triplets and validation benchmarks for a backbone.

    Args:
        training: The triplets.
        validation: Benchmarks looked at after each epoch.
        extractor: Encodes what the feature store lacks, before the first step.
        query_tokens: Whether the query head reads tokens.
        target_tokens: Whether the target head reads tokens.
        batch_size: Triplets a process takes at once.
        seed: Seed of the order.
        live: The sides that are encoded in each step, by the model itself, since their encoder is tuned.
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
        live: Collection[Modality] = (),
    ) -> None:
        super().__init__()
        self._live = frozenset(live)
        self._triplets: Sequence[Triplet] = training.triplets
        self._benchmarks, self._extractor = validation, extractor
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
        """Look up every image and text of training and validation; encode what is not in the store."""
        if stage == "fit" and not self._ready:
            self._encode()
            self._ready = True

    def _encode(self) -> None:
        if self.trainer is not None:  # Lightning moves the model only after this
            self._extractor.backbone.to(self.trainer.strategy.root_device)
        self._images = self._pictures([t.image for t in self._triplets], "training queries", tokens=self._query_tokens)
        self._texts = self._sentences([t.text for t in self._triplets], "training texts")
        self._targets = self._pictures(
            [t.target for t in self._triplets], "training targets", tokens=self._target_tokens
        )
        self._sides: list[dict[str, list[str]]] = []
        for benchmark in self._benchmarks:
            name = f"{benchmark.name} {benchmark.split}"
            asked, items = [q.image for q in benchmark.queries], [i.image for i in benchmark.gallery]
            queries = self._pictures(asked, f"{name} queries", tokens=self._query_tokens)
            texts = self._sentences([_only_wording(q) for q in benchmark.queries], f"{name} texts")
            gallery = self._pictures(items, f"{name} gallery", tokens=self._target_tokens)
            self._sides.append({"queries": queries, "texts": texts, "gallery": gallery})

    def _pictures(self, sources: Sequence[ImageSource], what: str, *, tokens: bool) -> list[str]:
        """Encode images and give their keys; none are needed where each step encodes them."""
        return [] if "image" in self._live else self._extractor.extract_images(sources, tokens=tokens, label=what)

    def _sentences(self, texts: Sequence[str | None], what: str) -> list[str]:
        """Encode texts and give their keys; where each step encodes them, the texts themselves."""
        return (
            [text or "" for text in texts] if "text" in self._live else self._extractor.extract_texts(texts, label=what)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of one task each as `types.Batch`, whole once they passed `transfer_batch_to_device`."""
        rank, world = self._place()
        tasks = [triplet.task for triplet in self._triplets]
        batches = TaskBatches(tasks, self._batch_size, self._seed, self._epoch, rank, world)
        # A generator of its own: a loader draws one number, and that must not shift those of dropout.
        own = torch.Generator()
        if "image" in self._live:
            samples = [(row, (t.image, t.target)) for row, t in enumerate(self._triplets)]
            return self._image_loader(samples, batches)
        rows: Sequence[int] = range(len(tasks))
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._train_batch, generator=own)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this process's share of the validation queries and galleries as `types.EvalBatch`, as above."""
        rank, world = self._place()
        mine = self._blocks(world)[rank::world]
        own = torch.Generator()
        if "image" in self._live:
            images = [
                (_Block(number, side, range(at, at + 1)), (one.image,))
                for number, benchmark in enumerate(self._benchmarks)
                for side in _SIDES
                for at, one in enumerate(getattr(benchmark, side))
            ]
            first: dict[tuple[int, str], int] = {}
            for at, (block, _) in enumerate(images):
                first.setdefault((block.benchmark, block.side), at)
            spans = [[first[block.benchmark, block.side] + at for at in block.span] for block in mine]
            return self._image_loader(images, spans)
        return DataLoader(mine, batch_size=None, collate_fn=self._eval_batch, generator=own)  # type: ignore[arg-type]

    def _image_loader(self, samples: Sequence[_Sample], batches: Iterable[list[int]]) -> DataLoader[Any]:
        dataset = ImageDataset(samples, _OpenSample(self._extractor.backbone.preprocess))
        return image_loader(dataset, batches, _stack_samples, workers=self._extractor.workers, persistent=True)

    def transfer_batch_to_device(
        self, batch: Batch | EvalBatch | _Decoded | ImageError, device: torch.device, dataloader_idx: int
    ) -> Batch | EvalBatch:
        """Join what was decoded with what is in the store; features stay on the backbone's device."""
        del dataloader_idx
        if isinstance(batch, ImageError):
            raise batch
        if not isinstance(batch, _Decoded):
            return batch
        wanted = self._extractor.backbone.preprocess
        images = [model_input(side.to(device, non_blocking=True), wanted) for side in batch.images]
        if isinstance(batch.of[0], _Block):
            first, last = batch.of[0], batch.of[-1]
            return self._eval_batch(first._replace(span=range(first.span.start, last.span.stop)), images[0])
        return self._train_batch(batch.of, *images)

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

    def _blocks(self, world: int) -> list[_Block]:
        """Cut all sides into blocks, at least one a process: Lightning lets a process without any skip validation."""
        counts = [(number, side, len(getattr(b, side))) for number, b in enumerate(self._benchmarks) for side in _SIDES]
        total = sum(count for _, _, count in counts)
        if total < world:
            raise DataError(
                f"{total} validation queries and images cannot be shared by {world} processes; use fewer devices"
            )
        step = min(self._extractor.batch_size, total // world)
        return [
            _Block(number, side, range(at, min(at + step, count)))
            for number, side, count in counts
            for at in range(0, count, step)
        ]

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _train_batch(self, rows: list[int], images: Tensor | None = None, targets: Tensor | None = None) -> Batch:
        return Batch(
            images=self._look(self._images, rows, tokens=self._query_tokens) if images is None else images,
            texts=self._spoken(self._texts, rows),
            targets=self._look(self._targets, rows, tokens=self._target_tokens) if targets is None else targets,
            groups=self._groups[rows].to(self._extractor.backbone.device),
        )

    def _eval_batch(self, block: _Block, pictures: Tensor | None = None) -> EvalBatch:
        keys, positions = self._sides[block.benchmark], torch.tensor(list(block.span))
        if block.side == "gallery":
            images = (
                self._look(keys["gallery"], block.span, tokens=self._target_tokens) if pictures is None else pictures
            )
            return EvalBatch(block.benchmark, "gallery", positions, images)
        images = self._look(keys["queries"], block.span, tokens=self._query_tokens) if pictures is None else pictures
        return EvalBatch(block.benchmark, "queries", positions, images, self._spoken(keys["texts"], block.span))

    def _look(self, keys: Sequence[str], rows: Iterable[int], *, tokens: bool) -> Features:
        return self._extractor.lookup([keys[row] for row in rows], tokens=tokens)

    def _spoken(self, texts: Sequence[str], rows: Iterable[int]) -> Features | list[str]:
        if "text" in self._live:
            return [texts[row] for row in rows]
        return self._look(texts, rows, tokens=self._query_tokens)
