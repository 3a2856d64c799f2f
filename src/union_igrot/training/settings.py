"""The settings of a training, declared without torch: recipe, loss, the generated world, an own folder."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from union_igrot.metrics.names import parse_metric
from union_igrot.settings import REQUIRED, documented, readable, setting


def _is_monitored(value: object) -> bool:
    found = re.fullmatch(r"val/\w+/(\S+)", str(value))
    return value == "val/score" or (found is not None and readable(parse_metric)(found[1]))


@documented
@dataclass(frozen=True, repr=False)
class Recipe:
    """Optimizer, schedule and length of training."""

    epochs: int = setting(4, "epochs", low=1)
    batch_size: int = setting(128, "samples per step and device, of one task", low=2)
    accumulate: int = setting(1, "batches per optimizer step; negatives come from one batch", low=1)
    rate: float = setting(1e-3, "highest learning rate of the heads", above=0)
    backbone_rate: float = setting(1e-6, "highest learning rate of a fine-tuned encoder", above=0)
    weight_decay: float = setting(0.05, "weight decay of AdamW", low=0)
    decay: Literal["matrices", "all"] = setting("matrices", "weights that decay: matrices or all")
    eps: float = setting(1e-8, "epsilon of AdamW", above=0)
    schedule: Literal["cosine", "restarts"] = setting(
        "cosine", "cosine with warm-up, or restarts (cosine in cycles, no warm-up)"
    )
    cycle: int | None = setting(None, "epochs per cycle of restarts; all epochs if null", low=1)
    warmup: float = setting(0.05, "fraction of the steps with rising learning rate", low=0, high=1)
    floor: float = setting(0.01, "fraction of the learning rate at the end of a cycle", low=0, high=1)
    clip: float = setting(5.0, "largest norm of the gradient", above=0)
    checkpointing: bool = setting(False, "recompute layers of a fine-tuned encoder to save memory")
    monitor: str = setting(
        "val/score",
        "metric that selects the best epoch; val/score is the mean of the primary metrics",
        accepts=_is_monitored,
        expected="val/score or val/BENCHMARK/METRIC, such as val/shapes_cir/mAP@10",
    )

    def __repr__(self) -> str:
        values = [(one.name, getattr(self, one.name), one.default) for one in fields(self)]
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value, default in values if value != default)})"


@documented
@dataclass(frozen=True)
class LossSettings:
    """Settings of the contrastive loss."""

    scale: float = setting(100.0, "factor of the cosine similarities (1 / temperature)", above=0)
    symmetric: bool = setting(False, "also retrieve queries from targets")
    skip_duplicates: bool = setting(True, "do not count equal targets in a batch as negatives")


@dataclass(frozen=True)
class BankSettings:
    """Settings of the loss with a bank of negatives."""

    kind: Literal["bank"] = setting("bank", "")
    scale: float = setting(30.0, "factor of the cosine similarities (1 / temperature)", above=0)
    auxiliary: float = setting(
        1.0, "weight of a second term for sketches: the target image fused with the null text", low=0
    )
    bank_size: int = setting(
        10_000,
        "most training images that a composed query is compared with per step; a sample if there are more",
        low=2,
    )
    distillation: float = setting(
        0.25, "weight of the query head's embedding of an image, which a residual target learns after training", low=0
    )


@dataclass(frozen=True)
class ShapesSettings:
    """Settings of the generated world."""

    name: str = "shapes"
    split: Literal["val", "test"] = setting("test", "split to evaluate: val or test")
    seed: int = setting(0, "seed of the generated scenes and images", low=0)
    triplets: int = setting(5000, "training triplets of composed retrieval", low=0)
    pairs: int = setting(2500, "training pairs of a sketch and an image", low=0)
    val_queries: int = setting(400, "validation queries per task; validation selects the best epoch", low=1)
    queries: int = setting(2000, "test queries per task", low=1)


@dataclass(frozen=True)
class FolderSettings:
    """Settings of a folder of one's own images."""

    name: str = "folder"
    root: str = setting(REQUIRED, "your folder", path="folder")
    split: Literal["val", "test"] = setting("test", "split to evaluate: val or test")
    seed: int = setting(0, "seed of the drawn training pairs", low=0)
    pairs: int = setting(2500, "training pairs of a sketch and a photo, if there are no triplets", low=1)
    text: str | None = setting(None, "modification text of every sketch; none if null")
    on_missing: Literal["error", "skip"] = setting("error", "missing and broken images: error, or skip (and count)")
