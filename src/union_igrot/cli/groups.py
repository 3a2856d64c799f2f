"""The settings of groups; `conf/GROUP/OPTION.yaml` holds the values of an option.

Recipe, loss and data are declared where they are used; names of backbones, heads and benchmarks come from registries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

from union_igrot.datasets.registry import BenchmarkDeclaration, benchmark_names, find_benchmark
from union_igrot.models.registry import BACKBONE_FORMS, BACKBONE_PREFIXES, BACKBONES, QUERY_HEADS, TARGET_HEADS
from union_igrot.settings import REQUIRED, Setting, declared, setting
from union_igrot.training.settings import BankSettings, FolderSettings, LossSettings, Recipe, ShapesSettings


def preprocess_setting() -> Any:
    """Declare a setting `preprocess`, see `build_backbone`."""
    return setting(None, "model: as the weights' authors; pad: long images padded; null: usual", rare=True)


@dataclass
class ModelSettings:
    """Backbone, and the sizes of heads that fit it."""

    name: str = setting(
        REQUIRED,
        "name of the backbone, or open_clip:ARCHITECTURE/TAG, or hf:REPOSITORY",
        accepts=lambda value: value in BACKBONES or (str(value).startswith(BACKBONE_PREFIXES) and " " not in value),
        expected=lambda: f"{', '.join(BACKBONES.names())}, {BACKBONE_FORMS}",
    )
    weights: str | None = setting(None, "file or folder to load instead of the usual weights", path="file")
    preprocess: Literal["model", "pad"] | None = preprocess_setting()
    feedforward: int = setting(2048, "inner width of the heads' feedforward layers", low=1)
    union_heads: int = setting(8, "attention heads of the UNION target head, 64 wide each", low=1)
    projector: Literal["none", "mlp"] = setting("none", "none, or mlp: a small residual network on image embeddings")
    finetune: Literal["none", "text", "image", "both"] = setting(
        "none", "none, or text, image, both: encoders to fine-tune at recipe.backbone_rate"
    )


@dataclass
class QuerySettings:
    """A query head without further settings."""

    kind: str = setting(
        REQUIRED, "", accepts=QUERY_HEADS.__contains__, expected=lambda: f"one of {', '.join(QUERY_HEADS.names())}"
    )


@dataclass
class TransAggSettings(QuerySettings):
    """Token fusion with three learned weights."""

    layers: int = setting(2, "transformer layers", low=1)
    heads: int = setting(8, "attention heads", low=1)
    dropout: float = setting(0.1, "dropout", low=0, high=0.999)
    mask: Literal["exclude", "legacy"] = setting(
        "exclude", "padding: exclude, or legacy (+1 on padding, as in the reference training)"
    )
    start: Literal["balanced", "reference"] = setting(
        "balanced", "initial weights: balanced (1, 1, 1), or reference (random)"
    )


@dataclass
class TargetSettings:
    """A target head without further settings."""

    kind: str = setting(
        REQUIRED, "", accepts=TARGET_HEADS.__contains__, expected=lambda: f"one of {', '.join(TARGET_HEADS.names())}"
    )


@dataclass
class ResidualSettings(TargetSettings):
    """The image embedding plus a small network of it."""

    hidden: int | None = setting(None, "inner width; twice the embedding's if null", low=1)


@dataclass
class SumSettings(TargetSettings):
    """Image plus null text."""

    form: Literal["normalised", "training", "inference"] = setting(
        "normalised", "normalised, or the reference's: training or inference"
    )


@dataclass
class UnionSettings(TargetSettings):
    """A learned mixture of the image and the null text."""

    layers: int = setting(4, "transformer layers", low=1)
    dropout: float = setting(0.1, "dropout of the head", low=0, high=0.999)
    encoder_dropout: float = setting(0.1, "dropout of its encoder", low=0, high=0.999)
    start: Literal["image", "reference"] = setting("image", "start: image (the plain embedding), or reference (random)")


@dataclass
class PrecisionSettings:
    """Numeric precision."""

    trainer: Literal["32-true", "bf16-mixed", "16-mixed", "onnx", "int8"] = setting(
        "32-true", "precision: 32-true, bf16-mixed or 16-mixed, as in Lightning; of union-index also onnx or int8"
    )


@dataclass
class StrategySettings:
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
class LoggerSettings:
    """A logger without further settings."""

    name: str = setting(REQUIRED, "", choices=("csv", "none", "tensorboard", "wandb"))


@dataclass
class WandbSettings(LoggerSettings):
    """Weights & Biases."""

    mode: Literal["offline", "online"] = setting("offline", "offline (in the run folder, no account) or online")
    project: str = setting("union-igrot", "project name")


@dataclass
class DataSettings:
    """A dataset whose name is not known."""

    name: str = setting(
        REQUIRED,
        "",
        accepts=lambda value: value in ("shapes", "folder", *benchmark_names()),
        expected=lambda: f"one of shapes, folder, {', '.join(benchmark_names())}",
    )


@dataclass(frozen=True)
class Group:
    """A group of settings whose values come from a chosen option.

    `key` is the setting that holds the option's name; `special` are dataclasses of single options, `names` options
    without a file in `conf/`, and `builtin` names whose settings are declared here, None if all are.
    """

    default: type
    special: Mapping[str, type] = field(default_factory=dict)
    key: str = "name"
    names: Callable[[], Sequence[str]] = tuple
    builtin: Sequence[str] | None = None

    def settings(self, name: object) -> list[Setting]:
        """Return the settings with a name, without their group."""
        if self.default is DataSettings and name in benchmark_names():
            return _benchmark_settings(find_benchmark(str(name)))
        return list(declared(self.special.get(str(name), self.default)))

    def is_open(self, name: object) -> bool:
        """Return whether the settings with a name are not declared here but checked when they are used."""
        return self.builtin is not None and name not in self.builtin


def _benchmark_settings(benchmark: BenchmarkDeclaration) -> list[Setting]:
    splits = benchmark.evaluation_splits
    root = {"path": "folder", "help": "dataset folder; its folder in $UNION_DATA if null"}
    split = {"choices": splits, "help": f"split to evaluate: {' or '.join(splits)}"}
    found = [
        Setting("name", (str,), benchmark.name, {}),
        Setting("root", (str, NoneType), None, root),
        Setting("split", (str,), splits[0], split),
        Setting("check_images", (bool,), True, {"help": "check first that all images exist"}),
    ]
    for one in benchmark.settings:
        choices = (*one.choices, *(["all"] * one.is_part))
        limits = {"choices": choices} if choices else {"low": one.minimum} if one.type is int else {}
        optional = (NoneType,) if one.default is None and not one.is_part else ()
        parts = f"{one.help}: {', '.join(one.choices)}, or all with their mean"
        help_line = parts if one.is_part else one.help
        default = "all" if one.is_part else one.default
        found.append(Setting(one.name, (one.type, *optional), default, {**limits, "help": help_line}))
    return found


GROUPS: Mapping[str, Group] = {
    "model": Group(ModelSettings, names=BACKBONES.names),
    "data": Group(DataSettings, {"shapes": ShapesSettings, "folder": FolderSettings}, names=benchmark_names),
    "fusion": Group(QuerySettings, {"transagg": TransAggSettings}, "kind", QUERY_HEADS.names, QUERY_HEADS.builtin),
    "target": Group(
        TargetSettings,
        {"residual": ResidualSettings, "sum": SumSettings, "union": UnionSettings},
        "kind",
        TARGET_HEADS.names,
        TARGET_HEADS.builtin,
    ),
    "loss": Group(LossSettings, {"bank": BankSettings}, "kind"),
    "recipe": Group(Recipe),
    "precision": Group(PrecisionSettings),
    "strategy": Group(StrategySettings),
    "logger": Group(LoggerSettings, {"wandb": WandbSettings}),
}
UNTRAINED_HEADS = {"image", "text", "sum", "frozen", "shared"}
"""Kinds of heads without weights."""
