"""The settings of groups such as `model` and `data`; `conf/GROUP/OPTION.yaml` holds the values of each option."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from union_igrot.cli.fields import REQUIRED, readable, setting
from union_igrot.metrics.names import parse_metric

BACKBONES = ("tiny", "base", "large", "openclip_h", "blip", "siglip2")


@dataclass
class Model:
    """Backbone, and the sizes of heads that fit it."""

    name: str = setting(
        REQUIRED,
        "name of the backbone, or open_clip:ARCHITECTURE/TAG, or hf:REPOSITORY",
        accepts=lambda value: value in BACKBONES or bool(re.match(r"(open_clip|hf):\S+$", str(value))),
        expected=f"{', '.join(BACKBONES)}, open_clip:ARCHITECTURE/TAG or hf:REPOSITORY",
    )
    weights: str | None = setting(None, "file or folder to load instead of the usual weights", path="file")
    feedforward: int = setting(2048, "inner width of the heads' feedforward layers", low=1)
    union_heads: int = setting(8, "attention heads of the UNION target head, 64 wide each", low=1)
    projector: Literal["none", "mlp"] = setting("none", "none, or mlp: a small residual network on image embeddings")
    finetune: Literal["none", "text", "image", "both"] = setting(
        "none", "none, or text, image, both: encoders to fine-tune at recipe.backbone_rate"
    )


@dataclass
class Shapes:
    """The generated world."""

    name: str = "shapes"
    split: Literal["val", "test"] = setting("test", "split to evaluate: val or test")
    seed: int = setting(0, "seed of the generated scenes and images", low=0)
    triplets: int = setting(5000, "training triplets of composed retrieval", low=0)
    pairs: int = setting(2500, "training pairs of a sketch and an image", low=0)
    val_queries: int = setting(400, "validation queries per task; validation selects the best epoch", low=1)
    queries: int = setting(2000, "test queries per task", low=1)


@dataclass
class Folder:
    """Your own images."""

    name: str = "folder"
    root: str = setting(REQUIRED, "your folder", path="folder")
    split: Literal["val", "test"] = setting("test", "split to evaluate: val or test")
    seed: int = setting(0, "seed of the drawn training pairs", low=0)
    pairs: int = setting(2500, "training pairs of a sketch and a photo, if there are no triplets", low=1)
    text: str | None = setting(None, "modification text of every sketch; none if null")
    on_missing: Literal["error", "skip"] = setting("error", "missing and broken images: error, or skip (and count)")


@dataclass
class Public:
    """A public benchmark."""

    name: str = REQUIRED
    root: str | None = setting(None, "dataset folder; its folder in $UNION_DATA if null", path="folder")
    split: str = setting("val", choices=("val",), help="split to evaluate: val, the only one")
    prompt: str | None = setting(None, "prompt of the queries, a name or a template; the benchmark's own if null")
    check_images: bool = setting(True, "check first that all images exist")


@dataclass
class Preset(Public):
    """A public benchmark with two protocols."""

    preset: Literal["official", "union_reference"] = setting(
        "official", "protocol: official, or union_reference (conventions of the published code)"
    )


@dataclass
class FashionIQ(Preset):  # noqa: D101 - the YAML files describe the benchmarks
    split: str = setting(
        "val",
        choices=("val", "test"),
        help="split to evaluate: val; the targets of test are not published",
    )
    category: Literal["dress", "shirt", "toptee", "all"] = setting(
        "all", "dress, shirt, toptee, or all with their mean"
    )
    gallery: Literal["original", "val"] = setting("original", "original, or val (the smaller galleries of VAL)")


@dataclass
class Cirr(Preset):  # noqa: D101
    split: str = setting(
        "val",
        choices=("val", "test1"),
        help="val, or test1 (hidden targets: writes a submission file)",
    )


@dataclass
class Circo(Preset):  # noqa: D101
    split: str = setting(
        "val",
        choices=("val", "test"),
        help="val, or test (hidden targets: writes a submission file)",
    )


@dataclass
class GeneCIS(Public):  # noqa: D101
    task: Literal["focus_attribute", "change_attribute", "focus_object", "change_object", "all"] = setting(
        "all", "focus_attribute, change_attribute, focus_object, change_object, or all with their mean"
    )


@dataclass
class LlavaSCo(Preset):  # noqa: D101
    stride: int | None = setting(None, "read every n-th row; all if null (published code: 70)", low=1)
    limit: int | None = setting(
        None, "read this many rows at most, before the stride; all if null (published code: 350000)", low=1
    )


@dataclass
class Dtin(Preset):  # noqa: D101
    domain: Literal["cartoon", "origami", "toy", "sculpture", "all"] = setting(
        "all", "cartoon, origami, toy, sculpture, or all with their mean"
    )
    recall_mode: Literal["fraction", "any"] | None = setting(
        None, "recall: fraction of the targets found, or any; the preset's if null"
    )
    only_with_gt: bool = setting(False, "leave out queries without targets")


@dataclass
class Sketchy(Preset):  # noqa: D101
    split: str = setting(
        "zeroshot1",
        choices=("zeroshot1", "zeroshot0"),
        help="zeroshot1 (25 classes) or zeroshot0 (21 classes)",
    )


@dataclass
class OnlyTest(Preset):  # noqa: D101
    split: str = setting("test", choices=("test",), help="split to evaluate: test, the only one")


@dataclass
class TrainingSketchy(Preset):  # noqa: D101
    split: str = setting("train", choices=("train",), help="split: train, the only one")
    lists: Literal["zeroshot1", "zeroshot0"] = setting("zeroshot1", "training classes of: zeroshot1 or zeroshot0")
    build: int | None = setting(None, "number of pairs to draw; the authors' file if null", low=1)
    seed: int = setting(0, "seed of the drawn pairs", low=0)


@dataclass
class Head:
    """A head without settings."""

    kind: str = REQUIRED


@dataclass
class TransAgg(Head):
    """Token fusion with three learned weights."""

    layers: int = setting(2, "transformer layers", low=1)
    heads: int = setting(8, "attention heads", low=1)
    dropout: float = setting(0.1, "dropout", low=0, high=0.999)
    mask: Literal["exclude", "legacy"] = setting(
        "exclude", "padding: exclude, or legacy (+1 on padding, as the reference trains)"
    )
    start: Literal["balanced", "reference"] = setting(
        "balanced", "initial weights: balanced (1, 1, 1), or reference (random)"
    )


@dataclass
class SumTarget(Head):
    """Image plus null text."""

    form: Literal["normalised", "training", "inference"] = setting(
        "normalised", "normalised, or the reference's: training or inference"
    )


@dataclass
class UnionTarget(Head):
    """A learned mixture of the image and the null text."""

    layers: int = setting(4, "transformer layers", low=1)
    dropout: float = setting(0.1, "dropout of the head", low=0, high=0.999)
    encoder_dropout: float = setting(0.1, "dropout of its encoder", low=0, high=0.999)
    start: Literal["image", "reference"] = setting("image", "start: image (the plain embedding), or reference (random)")


@dataclass
class Loss:
    """Contrastive loss."""

    scale: float = setting(30.0, "factor of the cosine similarities (1 / temperature)", above=0)
    symmetric: bool = setting(False, "also retrieve queries from targets")
    skip_duplicates: bool = setting(True, "do not count equal targets in a batch as negatives")


@dataclass
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
    warmup: float = setting(0.05, "share of the steps with rising learning rate", low=0, high=1)
    floor: float = setting(0.01, "share of the learning rate at the end of a cycle", low=0, high=1)
    clip: float = setting(5.0, "largest norm of the gradient", above=0)
    checkpointing: bool = setting(False, "recompute layers of a fine-tuned encoder to save memory")
    monitor: str = setting(
        "val/score",
        "metric that selects the best epoch; val/score is the mean of the primary metrics",
        accepts=lambda value: value == "val/score" or _is_monitored(str(value)),
        expected="val/score or val/BENCHMARK/METRIC, such as val/shapes_cir/mAP@10",
    )


def _is_monitored(value: str) -> bool:
    found = re.fullmatch(r"val/\w+/(\S+)", value)
    return found is not None and readable(parse_metric)(found[1])


@dataclass
class Precision:
    """Numeric precision."""

    trainer: Literal["32-true", "bf16-mixed", "16-mixed"] = setting(
        "32-true", "precision as Lightning names it: 32-true, bf16-mixed or 16-mixed"
    )


@dataclass
class Strategy:
    """Devices."""

    accelerator: str = setting("auto", "accelerator as Lightning names it: auto, cpu, gpu, ...")
    devices: int | str = setting(
        "auto",
        "number of devices, or auto",
        accepts=lambda value: value == "auto" or (isinstance(value, int) and value >= 1),
        expected="auto or an integer >= 1",
    )
    nodes: int = setting(1, "number of machines", low=1)
    name: str = setting("auto", "strategy as Lightning names it: auto, ddp, fsdp, ...")


@dataclass
class Logger:
    """A logger without settings."""

    name: str = REQUIRED


@dataclass
class Wandb(Logger):
    """Weights & Biases."""

    mode: Literal["offline", "online"] = setting("offline", "offline (in the run folder, no account) or online")
    project: str = setting("union-igrot", "project name")


@dataclass(frozen=True)
class Group:
    """A group of settings whose values come from a chosen option.

    Attributes:
        settings: The dataclass; or one per value of `key`.
        key: Setting that decides which.
    """

    settings: type | Mapping[str, type]
    key: str = "name"

    def variant(self, value: Any) -> type | None:
        """Return the dataclass for a value of `key`; None if the value is not known."""
        return self.settings if isinstance(self.settings, type) else self.settings.get(str(value))


GROUPS: Mapping[str, Group] = {
    "model": Group(Model),
    "data": Group(
        {
            **{"shapes": Shapes, "folder": Folder, "fashioniq": FashionIQ, "cirr": Cirr, "circo": Circo},
            **{"genecis": GeneCIS, "lasco": Preset, "llavasco": LlavaSCo, "dtin": Dtin, "sketchy": Sketchy},
            **{"tuberlin": OnlyTest, "quickdraw": OnlyTest, "training_sketchy": TrainingSketchy},
        }
    ),
    "fusion": Group({"image": Head, "text": Head, "sum": Head, "transagg": TransAgg}, "kind"),
    "target": Group({"frozen": Head, "shared": Head, "sum": SumTarget, "union": UnionTarget}, "kind"),
    "loss": Group(Loss),
    "recipe": Group(Recipe),
    "precision": Group(Precision),
    "strategy": Group(Strategy),
    "logger": Group({"csv": Logger, "none": Logger, "tensorboard": Logger, "wandb": Wandb}),
}
UNTRAINED_HEADS = {"image", "text", "sum", "frozen", "shared"}
"""Kinds of heads without weights."""
