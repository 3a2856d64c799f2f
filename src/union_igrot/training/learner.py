"""The LightningModule around the model, and the run of a training.

Knows loss, optimizer, schedule, validation and checkpoints of what is trained. Does not know
where triplets come from, configurations or reports.
"""

import functools
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from union_igrot.errors import ConfigError
from union_igrot.evaluation.evaluate import means
from union_igrot.evaluation.scoring import score
from union_igrot.models.devices import TrainerConfig
from union_igrot.models.model import IGROTModel
from union_igrot.training.losses import InfoNCE
from union_igrot.training.trainer import make_trainer, manners
from union_igrot.types import Batch, Benchmark, EvalBatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How the heads are trained.

    Attributes:
        epochs: Passes over the triplets.
        rate: Highest learning rate of the heads.
        backbone_rate: Highest learning rate of an encoder that is tuned.
        weight_decay: AdamW's weight decay.
        decay: What is decayed: `matrices`, or `all` weights as the reference does.
        eps: AdamW's epsilon.
        schedule: `cosine` rises and then falls along half a cosine; `restarts` is the
            reference's: no rise, and the fall starts anew every `cycle` epochs.
        cycle: Epochs of one fall under `restarts`; all epochs where None.
        warmup: Share of all steps in which the rate rises to its highest, under `cosine`.
        floor: Share of the highest rate at which a fall ends. Under `restarts` every rate
            falls to this share of the heads' rate, as in the reference.
        clip: Largest norm of the gradient.
        accumulate: Batches whose gradients are added up before a step. Negatives come from
            one batch alone.
        monitor: Validation metric by which the best epoch is chosen, such as `val/score`
            (the mean of the benchmarks' primary metrics) or `val/shapes_cir/mAP@10`.
    """

    epochs: int = 4
    rate: float = 1e-3
    backbone_rate: float = 1e-6
    weight_decay: float = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    eps: float = 1e-8
    schedule: Literal["cosine", "restarts"] = "cosine"
    cycle: int | None = None
    warmup: float = 0.05
    floor: float = 0.01
    clip: float = 5.0
    accumulate: int = 1
    monitor: str = "val/score"


@final
class Learner(lightning.LightningModule):
    """Trains a model's heads; its checkpoints hold nothing of a frozen backbone.

    Args:
        model: The model.
        loss: The contrastive loss.
        recipe: Optimizer, schedule and the metric to choose by.
        validation: The benchmarks that the data module's validation batches belong to.

    Raises:
        ConfigError: Where the model has nothing to train, or the monitor is not measured.
    """

    def __init__(self, model: IGROTModel, loss: InfoNCE, recipe: Recipe, validation: Sequence[Benchmark]) -> None:
        super().__init__()
        self.model, self.loss, self.recipe, self.benchmarks = model, loss, recipe, validation
        self.strict_loading = False  # checkpoints lack the backbone on purpose
        self._embedded: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
        self._seed: int | None = None
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                "this model has nothing to train; choose fusion=transagg or target=union, or model.finetune=both"
            )
        known = self.figures()
        if recipe.monitor not in known:
            raise ConfigError(f"monitor {recipe.monitor!r} is not measured here; choose one of {', '.join(known)}")

    def figures(self) -> list[str]:
        """Name the validation metrics that are logged."""
        single = [f"val/{b.name}/{metric}" for b in self.benchmarks for metric in b.protocol.metrics]
        return ["val/score", *single]

    def on_fit_start(self) -> None:
        """Keep the seed that torch was given; a resumed training has its first run's already."""
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_epoch_start(self) -> None:
        """Start each epoch's dropout from its own seed, so that a resumed epoch is like an uninterrupted one."""
        place = f"dropout {self._seed} {self.current_epoch} {self.global_rank}"
        torch.manual_seed(random.Random(place).getrandbits(63))

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Return the loss of one batch."""
        del batch_idx
        queries = self.model.embed_queries(batch.images, batch.texts)
        targets = self.model.embed_gallery(batch.targets)
        loss: Tensor = self.loss(queries, targets, batch.groups)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(queries))
        return loss

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
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
            queries = self._whole(number, "queries", len(benchmark.queries))
            gallery = self._whole(number, "gallery", len(benchmark.gallery))
            mine = torch.arange(self.trainer.global_rank, len(queries), self.trainer.world_size)
            figures = means(benchmark, score(benchmark, queries[mine.to(queries.device)], gallery, mine))
            primary.append(figures[benchmark.protocol.primary])
            self.log_dict({f"val/{benchmark.name}/{name}": figure for name, figure in figures.items()})
        self.log("val/score", sum(primary) / len(primary), prog_bar=True)
        self._embedded.clear()

    def _whole(self, number: int, side: str, count: int) -> Tensor:
        """Return one side's embeddings of all processes, each item once, in order."""
        parts = self._embedded.get((number, side), [])
        held = [(positions.cpu(), rows.float().cpu()) for positions, rows in parts]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, held)
            held = [part for share in shares for part in share]
        order = torch.cat([positions for positions, _ in held])
        rows = torch.cat([embedded for _, embedded in held])
        whole = rows.new_full((count, rows.shape[1]), float("nan"))  # a row that nobody embedded is an error in `score`
        whole[order] = rows
        return whole.to(self.model.device)

    def configure_optimizers(self) -> Any:
        """AdamW over the heads and what is tuned of the backbone, each at its own rate."""
        recipe = self.recipe
        groups: list[dict[str, Any]] = []
        for rate, part in (
            (recipe.rate, self.model.head_parameters()),
            (recipe.backbone_rate, self.model.backbone.parameters()),
        ):
            trained = [weight for weight in part if weight.requires_grad]
            plain = [weight for weight in trained if weight.ndim <= 1 and recipe.decay == "matrices"]
            decayed = [weight for weight in trained if weight.ndim > 1 or recipe.decay == "all"]
            for weights, decay in ((decayed, recipe.weight_decay), (plain, 0.0)):
                if weights:
                    groups.append({"params": weights, "weight_decay": decay, "lr": rate})
        optimizer = torch.optim.AdamW(groups, lr=recipe.rate, eps=recipe.eps)
        steps = int(self.trainer.estimated_stepping_batches)
        shares: list[Callable[[int], float]] = [
            functools.partial(rate_share, recipe, group["lr"], steps=steps) for group in groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Bound the gradient's norm; where FSDP cut the weights into pieces, it alone knows the whole norm."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[operator, union-attr]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen of the backbone, and keep the seed."""
        frozen = {f"model.backbone.{n}" for n in self.model.backbone.state_dict()}
        frozen -= {f"model.backbone.{n}" for n, x in self.model.backbone.named_parameters() if x.requires_grad}
        checkpoint["state_dict"] = {n: x for n, x in checkpoint["state_dict"].items() if n not in frozen}
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed of the first run."""
        self._seed = checkpoint["seed"]


def rate_share(recipe: Recipe, rate: float, step: int, *, steps: int) -> float:
    """Return the share of a group's highest rate that a step takes.

    Args:
        recipe: The schedule.
        rate: The group's highest rate.
        step: Which step, from 0.
        steps: All steps of the training.
    """
    if recipe.schedule == "cosine":
        return warmup_cosine(step, steps, recipe.warmup, recipe.floor)
    # The published loop moves its schedule after each step by the step's number, so the second takes the first's rate.
    per_epoch = steps / recipe.epochs
    cycle = recipe.cycle or recipe.epochs
    done = (max(0, step - 1) / per_epoch) % cycle / cycle
    lowest = recipe.floor * recipe.rate
    return (lowest + (rate - lowest) * 0.5 * (1 + math.cos(math.pi * done))) / rate


def warmup_cosine(step: int, steps: int, warmup: float, floor: float) -> float:
    """Return the share of the highest rate at a step: a rise, then half a cosine down to `floor`."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(
    learner: Learner,
    datamodule: lightning.LightningDataModule,
    folder: Path,
    *,
    machine: TrainerConfig | None = None,
    logger: Logger | Sequence[Logger] | bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Train the heads and leave the best epoch's in the model, on the device it was trained on.

    Under FSDP the model lies in pieces; build another and give it to `load_best`.

    Goes on from `folder/last.ckpt` where an earlier run of the same training was
    interrupted, and then ends with the same weights as an uninterrupted run: batches and
    dropout follow from the seed that torch had at the first start, and the epoch.

    Args:
        learner: What is trained.
        datamodule: Its batches.
        folder: Where checkpoints are kept.
        machine: Devices and precision; the Trainer's choice where None.
        logger: Where losses and metrics are written.
        callbacks: Further callbacks.
        progress: Whether a progress bar is shown.

    Returns:
        The best epoch's number, from 0, and its monitored metric in percent.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    machine = machine or TrainerConfig()
    keep = ModelCheckpoint(
        folder, filename="best", monitor=learner.recipe.monitor, mode="max", enable_version_counter=False
    )
    # Of its own: `save_last` writes only where the best is written too. It comes second, so that it knows the best.
    resume = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    bars: list[Callback] = [RichProgressBar()] if progress else []
    last = folder / "last.ckpt"
    if last.is_file():
        _log.warning("going on from %s", last)
    with manners():
        trainer = make_trainer(
            machine,
            folder,
            [keep, resume, *bars, *callbacks],
            max_epochs=learner.recipe.epochs,
            gradient_clip_val=learner.recipe.clip,
            accumulate_grad_batches=learner.recipe.accumulate,
            logger=logger,
            log_every_n_steps=5,
            num_sanity_val_steps=0,
            enable_progress_bar=progress,
        )
        trainer.fit(learner, datamodule, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    if not isinstance(trainer.strategy, FSDPStrategy):
        learner.model.to(trainer.strategy.root_device)  # Lightning puts it on the CPU at its end
        load_best(learner.model, folder)
    best = torch.load(keep.best_model_path, map_location="cpu", weights_only=True)
    assert keep.best_model_score is not None
    return {"epoch": float(best["epoch"]), learner.recipe.monitor: float(keep.best_model_score)}


def load_best(model: IGROTModel, folder: Path) -> None:
    """Put the best epoch's weights into a model, and end its training.

    Args:
        model: As it was built for the training.
        folder: Where `fit` kept its checkpoints.
    """
    best = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): x for name, x in best.items()}, strict=False)
    model.finish_training()
