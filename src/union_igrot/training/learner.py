"""The LightningModule that trains the heads, and `fit`, which runs a training and resumes an interrupted one."""

import functools
import io
import logging
import math
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from union_igrot.errors import ConfigError, DataError, UnionError, first_line
from union_igrot.evaluation.evaluate import means
from union_igrot.evaluation.scoring import score
from union_igrot.models.model import IGROTModel
from union_igrot.storage.files import move_aside, write_atomic
from union_igrot.training.datamodule import TrainingBatch, ValidationBatch
from union_igrot.training.losses import BankLoss, CachedBank, FeatureQueue, gather, info_nce
from union_igrot.training.settings import Recipe
from union_igrot.types import Benchmark, Features

_log = logging.getLogger(__name__)
_LOG_EVERY = 5

_EXPECTED_WARNINGS = (
    # A frozen backbone in evaluation mode.
    "Found .* module.* in eval mode",
    # Features come from the store; images have workers of their own.
    ".*does not have many workers",
    # Small data.
    "The number of training batches",
    # Metrics are the same on every process already.
    ".*sync_dist=True",
    # Lightning calls a deprecated function of torch.
    ".*isinstance\\(treespec, LeafSpec\\)",
    # The folder of an interrupted training is resumed.
    "Checkpoint directory .* exists and is not empty",
)


@final
@dataclass(frozen=True)
class TrainerConfig:
    """Devices, strategy and precision of a Lightning Trainer.

    Attributes:
        accelerator: `auto`, `cpu`, `gpu`, ...
        devices: Number of devices, the devices themselves, or `auto`.
        nodes: Number of machines.
        strategy: `auto`, `ddp`, ...
        precision: `32-true`, `bf16-mixed`, `16-mixed`.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    nodes: int = 1
    strategy: str = "auto"
    precision: Any = "32-true"


@final
class Learner(lightning.LightningModule):
    """Trains a model's heads; its checkpoints hold nothing of a frozen backbone.

    Args:
        model: The model.
        loss: The contrastive loss of query embeddings, target embeddings and groups; a `BankLoss` also gets the bank
            of the data module, or a queue of past batches if images are encoded in each step.
        recipe: Optimizer, schedule and the metric that selects the best epoch.
        validation: The benchmarks that the data module's validation batches belong to.

    Raises:
        ConfigError: If the model has nothing to train, or there is no such metric as `recipe.monitor`.
    """

    def __init__(self, model: IGROTModel, loss: nn.Module, recipe: Recipe, validation: Sequence[Benchmark]) -> None:
        super().__init__()
        self.model, self.loss, self.recipe, self.benchmarks = model, loss, recipe, validation
        self.strict_loading = False  # checkpoints lack the backbone on purpose
        self._embedded: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
        self._seed: int | None = None
        self._queue = FeatureQueue(loss.bank_size) if isinstance(loss, BankLoss) else None
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                "this model has nothing to train; choose fusion=transagg or target=residual, or model.finetune=both"
            )
        known = self.metric_names()
        if recipe.monitor not in known:
            raise ConfigError(f"invalid value for monitor: {recipe.monitor!r} (expected one of {', '.join(known)})")

    def metric_names(self) -> list[str]:
        """Return the names of the validation metrics that are logged."""
        single = [f"val/{b.name}/{metric}" for b in self.benchmarks for metric in b.protocol.metrics]
        return ["val/score", *single]

    def on_fit_start(self) -> None:
        """Store torch's seed; a resumed training keeps that of its first run."""
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        """Log the loss at least once per epoch."""
        steps = int(self.trainer.num_training_batches) // self.recipe.accumulate
        self.trainer.log_every_n_steps = max(1, min(_LOG_EVERY, steps))  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """Seed each epoch's dropout, so that a resumed epoch equals an uninterrupted one."""
        seed = f"dropout {self._seed} {self.current_epoch} {self.global_rank}"
        torch.manual_seed(random.Random(seed).getrandbits(63))
        if self._queue is not None:
            self._queue.clear()

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Return the loss of one batch."""
        if isinstance(self.loss, BankLoss):
            loss = self._bank_loss(self.loss, batch, batch_idx)
        else:
            queries = self.model.embed_queries(batch.images, batch.texts)
            loss = self.loss(queries, self.model.embed_gallery(batch.targets), batch.groups)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.groups))
        if batch.task:
            self.log(f"train/loss_{batch.task}", loss, batch_size=len(batch.groups))
        return loss

    def _bank_loss(self, loss: BankLoss, batch: TrainingBatch, batch_idx: int) -> Float[Tensor, ""]:
        images = self._encoded(batch.images)
        queries = self.model.embed_queries(images, batch.texts)
        if batch.rows is not None:
            bank: CachedBank = self.trainer.datamodule.bank  # type: ignore[attr-defined]
            seed = f"bank {self._seed} {self.current_epoch} {batch_idx}"
            chosen = bank.select(batch.rows, gather(batch.rows)[0], seed, queries.device)
            candidates = self.model.embed_gallery(chosen.images)
            return info_nce(queries, candidates, chosen.positives, batch.groups, chosen.groups, loss.scale)
        targets = self._encoded(batch.targets)
        if batch.reference_groups is not None:
            return self._queue_loss(loss, queries, batch, targets, images)
        fused = self.model.embed_queries(targets) if loss.auxiliary else None
        result: Tensor = loss(queries, self.model.embed_gallery(targets), batch.groups, fused)
        return result

    def _encoded(self, images: Tensor | Features) -> Features:
        return images if isinstance(images, Features) else self.model.backbone.encode_image(images)

    def _queue_loss(
        self, loss: BankLoss, queries: Tensor, batch: TrainingBatch, targets: Features, references: Features
    ) -> Float[Tensor, ""]:
        """Return the loss against the images of this batch, of all processes, and of past batches."""
        assert self._queue is not None
        assert batch.reference_groups is not None
        own = [one if self.model.target.needs_tokens else Features(one.pooled) for one in (targets, references)]
        embedded = [gather(self.model.embed_gallery(one))[0] for one in own]
        groups = [gather(one)[0] for one in (batch.groups, batch.reference_groups)]
        start = gather(batch.groups)[1]
        positives = torch.arange(start, start + len(queries), device=queries.device)
        past = self._queue.read()
        if past is not None:
            embedded, groups = [*embedded, self.model.embed_gallery(past[0])], [*groups, past[1]]
        with torch.no_grad():
            for images, shown in zip(own, groups, strict=False):
                self._queue.add(images.map(lambda x: gather(x)[0]), shown)
        return info_nce(queries, torch.cat(embedded), positives, batch.groups, torch.cat(groups), loss.scale)

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> None:
        """Embed some queries or gallery images."""
        del batch_idx
        if batch.side == "gallery":
            embedded = self.model.embed_gallery(batch.images)
        else:
            embedded = self.model.embed_queries(batch.images, batch.texts)
        self._embedded.setdefault((batch.benchmark, batch.side), []).append((batch.positions, embedded))

    def on_validation_epoch_end(self) -> None:
        """Score each benchmark under its protocol and log the metrics in percent."""
        primary = []
        for number, benchmark in enumerate(self.benchmarks):
            queries = self._gathered(number, "queries", len(benchmark.queries))
            gallery = self._gathered(number, "gallery", len(benchmark.gallery))
            own = torch.arange(self.trainer.global_rank, len(queries), self.trainer.world_size)
            values = means(benchmark, score(benchmark, queries[own.to(queries.device)], gallery, own))
            primary.append(values[benchmark.protocol.primary])
            self.log_dict({f"val/{benchmark.name}/{name}": value for name, value in values.items()})
        self.log("val/score", sum(primary) / len(primary), prog_bar=True)
        self._embedded.clear()

    def _gathered(self, number: int, side: str, count: int) -> Tensor:
        """Return one side's embeddings of all processes, each item once, in order."""
        blocks = [(at.cpu(), rows.float().cpu()) for at, rows in self._embedded.get((number, side), [])]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, blocks)
            blocks = [block for share in shares for block in share]
        rows = torch.cat([rows for _, rows in blocks])
        ordered = rows.new_full((count, rows.shape[1]), float("nan"))  # `score` refuses a row without embedding
        ordered[torch.cat([at for at, _ in blocks])] = rows
        return ordered.to(self.model.device)

    def configure_optimizers(self) -> Any:
        """Return AdamW over the heads and the tuned encoders, each at its own rate."""
        recipe = self.recipe
        groups: list[dict[str, Any]] = []
        for rate, parameters in (
            (recipe.rate, self.model.head_parameters()),
            (recipe.backbone_rate, self.model.backbone.parameters()),
        ):
            trained = [weight for weight in parameters if weight.requires_grad]
            undecayed = [weight for weight in trained if weight.ndim <= 1 and recipe.decay == "matrices"]
            decayed = [weight for weight in trained if weight.ndim > 1 or recipe.decay == "all"]
            for weights, decay in ((decayed, recipe.weight_decay), (undecayed, 0.0)):
                if weights:
                    groups.append({"params": weights, "weight_decay": decay, "lr": rate})
        # One kernel for all weights; not with a gradient scaler, which clips after unscaling.
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=recipe.rate, eps=recipe.eps, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        shares: list[Callable[[int], float]] = [
            functools.partial(rate_share, recipe, group["lr"], steps=steps) for group in groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient's norm; under FSDP, which shards the weights, by its own method."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[operator, union-attr]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights of the backbone, and store the seed."""
        frozen = {f"model.backbone.{n}" for n in self.model.backbone.state_dict()}
        frozen -= {f"model.backbone.{n}" for n, x in self.model.backbone.named_parameters() if x.requires_grad}
        checkpoint["state_dict"] = {n: x for n, x in checkpoint["state_dict"].items() if n not in frozen}
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the seed of the first run."""
        self._seed = checkpoint["seed"]


def rate_share(recipe: Recipe, rate: float, step: int, *, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest rate of its group.

    Args:
        recipe: The schedule.
        rate: The group's highest rate.
        step: Number of the step, from 0.
        steps: Number of steps of the training.
    """
    if recipe.schedule == "cosine":
        return warmup_cosine(step, steps, recipe.warmup, recipe.floor)
    # The published loop steps its schedule after each step by that step's number, so the first two rates are equal.
    per_epoch = steps / recipe.epochs
    cycle = recipe.cycle or recipe.epochs
    done = (max(0, step - 1) / per_epoch) % cycle / cycle
    lowest = recipe.floor * recipe.rate
    return (lowest + (rate - lowest) * 0.5 * (1 + math.cos(math.pi * done))) / rate


def warmup_cosine(step: int, steps: int, warmup: float, floor: float) -> float:
    """Return the learning rate at a step as a share of the highest: a linear rise, then half a cosine to `floor`."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@final
class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside their final name, synced and renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UnionError: If it cannot be written, for instance to a full disk.
        """
        del storage_options
        content, path = io.BytesIO(), Path(path)
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, [content.getbuffer()])
        except OSError as error:
            raise UnionError(
                f"cannot write checkpoint {path} ({error.strerror}); free some space, then run the same again to resume"
            ) from None


@final
class FSDPWithoutConversion(FSDPPrecision):
    """FSDP's precision without a conversion of batches: ours are immutable, and FSDP casts by itself."""

    def convert_input(self, data: Any) -> Any:
        """Return the batch unchanged."""
        return data


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Make and use a Trainer inside: without its expected warnings, and Ctrl-C raises KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: After Ctrl-C, for which Lightning would exit the process.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        for number, handler in signals.items():  # Lightning leaves Ctrl-C ignored
            signal.signal(number, handler)
        raise KeyboardInterrupt from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fit(
    learner: Learner,
    datamodule: lightning.LightningDataModule,
    folder: Path,
    *,
    trainer: TrainerConfig | None = None,
    logger: Logger | Sequence[Logger] | bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Train the heads; the model ends with the weights of the best epoch, on the device it was trained on.

    Under FSDP the model ends in shards; build another one and pass it to `load_best`.

    Resumes from `folder/last.ckpt` (or, if that is damaged, `best.ckpt`) if an earlier run of the same training was
    interrupted, and then ends with the same weights as an uninterrupted run: batches and dropout follow from the seed
    that torch had at the first start, and the epoch.

    Args:
        learner: The model with its loss and recipe.
        datamodule: Its batches.
        folder: Folder of the checkpoints.
        trainer: Devices and precision; the Trainer's defaults if None.
        logger: Loggers of losses and metrics.
        callbacks: Further callbacks.
        progress: Whether to show a progress bar.

    Returns:
        The best epoch's number, from 0, and its monitored metric in percent.

    Raises:
        UnionError: If a checkpoint cannot be written.
        KeyboardInterrupt: After Ctrl-C.
    """
    best = ModelCheckpoint(
        folder, filename="best", monitor=learner.recipe.monitor, mode="max", enable_version_counter=False
    )
    # A callback of its own: `save_last` writes only together with the best. It comes second and includes its state.
    resume = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    bars: list[Callback] = [RichProgressBar()] if progress else []
    start = _readable_checkpoint(learner, folder)
    if start is not None:
        _log.warning("resuming from %s", start)
    config = trainer or TrainerConfig()
    fsdp = config.strategy.startswith("fsdp")
    with quiet_trainer():
        running = lightning.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=config.strategy,
            precision=None if fsdp else config.precision,
            plugins=[AtomicCheckpoints(), *([FSDPWithoutConversion(config.precision)] if fsdp else [])],
            callbacks=[best, resume, *bars, *callbacks],
            use_distributed_sampler=False,  # the data module divides batches among processes
            enable_model_summary=False,
            default_root_dir=folder,
            max_epochs=learner.recipe.epochs,
            gradient_clip_val=learner.recipe.clip,
            accumulate_grad_batches=learner.recipe.accumulate,
            logger=logger,
            log_every_n_steps=_LOG_EVERY,
            num_sanity_val_steps=0,
            enable_progress_bar=progress,
        )
        running.fit(learner, datamodule, ckpt_path=start and str(start), weights_only=True)
    if not isinstance(running.strategy, FSDPStrategy):
        learner.model.to(running.strategy.root_device)  # Lightning moves it to the CPU at its end
        load_best(learner.model, folder)
    saved = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    assert best.best_model_score is not None
    return {"epoch": float(saved["epoch"]), learner.recipe.monitor: float(best.best_model_score)}


def _readable_checkpoint(learner: Learner, folder: Path) -> Path | None:
    """Return the checkpoint to resume from; one that is damaged or of another model is renamed and reported."""
    shapes = {name: x.shape for name, x in learner.state_dict().items()}
    for path in (folder / "last.ckpt", folder / "best.ckpt"):
        if not path.is_file():
            continue
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            held = {name: x.shape for name, x in saved["state_dict"].items()}
            if held.items() <= shapes.items() and held and {"loops", "epoch", "global_step", "seed"} <= saved.keys():
                return path
            problem = DataError("not a checkpoint of this training")
        except Exception as error:
            problem = DataError(first_line(error))
        move_aside(path, problem)
    return None


def load_best(model: IGROTModel, folder: Path) -> None:
    """Load the weights of the best epoch into a model, and end its training.

    Args:
        model: The model, as built for the training.
        folder: Folder of the checkpoints of `fit`.
    """
    best = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): x for name, x in best.items()}, strict=False)
    model.finish_training()
