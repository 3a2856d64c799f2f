"""What every setting may hold: the rules by which a configuration is checked.

One table a command, and variants by the name of a dataset, a head. Does not know how
a configuration is composed, and imports nothing heavy.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from union_igrot.datasets.registry import BenchmarkDeclaration, BenchmarkOption, benchmark_names, find_benchmark
from union_igrot.errors import UnionError
from union_igrot.storage.paths import expand_user
from union_igrot.storage.sizes import DURATION_FORMAT, SIZE_FORMAT, parse_duration, parse_size

_BACKBONES = ("tiny", "base", "large", "openclip_h", "blip", "siglip2")
Check = Callable[[Any], str | None]
"""Gives what is allowed where a value is not, else None."""


def _whole(low: int, high: int | None = None, *, null: bool = False) -> Check:
    def check(value: Any) -> str | None:
        if null and value is None:
            return None
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value
        right = right and (high is None or value <= high)
        top = "" if high is None else f" and at most {high}"
        return None if right else f"a whole number of at least {low}{top}" + (", or null" if null else "")

    return check


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if right and math.isfinite(value) and not (above and value == low):
            return None
        floor = f"above {low:g}" if above else f"of at least {low:g}"
        return f"a number {floor}" + ("" if high == math.inf else f" and at most {high:g}")

    return check


def one_of(*options: Any) -> Check:
    """Allow some values and no other."""
    return lambda value: (
        None
        if value in options
        else "one of " + ", ".join("null" if option is None else str(option) for option in options)
    )


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "a text"


def _text_or_null(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "a text or null"


def _texts(value: Any) -> str | None:
    right = isinstance(value, list) and all(isinstance(one, str) and one not in ("", "???") for one in value)
    return None if right else "a text, several times for several, or [A,B]"


def _folder(value: Any) -> str | None:
    if isinstance(value, str) and expand_user(value).is_dir():
        return None
    return "an existing folder"


def _folder_or_null(value: Any) -> str | None:
    return None if value is None or _folder(value) is None else "an existing folder, or null"


def _file_or_null(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and expand_user(value).exists()):
        return None
    return "an existing file, or null"


def _reads(parse: Callable[[Any], Any], allowed: str, *words: Any) -> Check:
    """Allow what a function can read, and some words."""

    def check(value: Any) -> str | None:
        if value in words:
            return None
        try:
            parse(value)
        except UnionError:
            return ", ".join(str("null" if word is None else word) for word in words) + f" or {allowed}"
        return None

    return check


_size_or_null = _reads(parse_size, SIZE_FORMAT, None)


def _file(value: Any) -> str | None:
    return "an existing file" if value is None or _file_or_null(value) else None


def _null(value: Any) -> str | None:
    return None if value is None else "null, since the file brings its weights"


def _figure(value: Any) -> str | None:
    if isinstance(value, str) and re.fullmatch(r"val/score|val/\w+/(R@\d+|Rs@\d+|P@\d+|mAP|mAP@\d+)", value):
        return None
    return "val/score, or val/<benchmark>/<figure> such as val/shapes_cir/mAP@10"


def _backbone(value: Any) -> str | None:
    if value in _BACKBONES or (isinstance(value, str) and re.match(r"(open_clip|hf):\S+$", value)):
        return None
    return f"one of {', '.join(_BACKBONES)}, open_clip:<architecture>/<tag> or hf:<repository>"


def _untrained(value: Any) -> str | None:
    return None if value == "none" else "none, since nothing is trained here"


def _device(value: Any) -> str | None:
    right = isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value)
    return None if right else "auto, cpu, cuda, cuda:NUMBER or mps"


def _devices(value: Any) -> str | None:
    return None if value == "auto" or _whole(1)(value) is None else "auto or a whole number of at least 1"


_PROBABILITY = _number(0.0, 0.999)
_COMMON: dict[str, Check] = {
    "seed": _whole(0, 2**32 - 1),
    "output_dir": _text_or_null,
    "cache_dir": _text_or_null,
    "cache_limit": _size_or_null,
    "progress": _flag,
    "features.batch_size": _whole(1),
    "features.workers": _whole(0, null=True),
    "features.dtype": one_of("float32", "float16"),
    "features.precision": one_of("float32", "bfloat16", "float16"),
}


def _option(option: BenchmarkOption) -> Check:
    everything = (*option.choices, "all")
    return one_of(*everything) if option.is_part else option.expected


def benchmark_rules(declaration: BenchmarkDeclaration) -> dict[str, Check]:
    """Return the rules for the settings of a benchmark."""
    rules: dict[str, Check] = {
        "root": _folder_or_null,
        "split": one_of(*declaration.evaluation_splits),
        "check_images": _flag,
        **{option.name: _option(option) for option in declaration.settings},
    }
    return {f"data.{name}": check for name, check in rules.items()}


def rules_by_data(name: str) -> dict[str, dict[str, Check]]:
    """Return the rules for the settings of each data option; of the benchmarks only those of `name`."""
    known = {one: benchmark_rules(find_benchmark(one)) if one == name else {} for one in benchmark_names()}
    return {**VARIANTS["data.name"], **known}


_MACHINE: dict[str, Check] = {
    "precision.trainer": one_of("32-true", "bf16-mixed", "16-mixed"),
    "strategy.accelerator": _text,
    "strategy.devices": _devices,
    "strategy.nodes": _whole(1),
    "strategy.name": _text,
}
RULES: dict[str, dict[str, Check]] = {
    "train": {
        **_COMMON,
        "model.name": _backbone,
        "model.projector": one_of("none", "mlp"),
        "model.weights": _file_or_null,
        "model.finetune": one_of("none", "text", "image", "both"),
        "model.feedforward": _whole(1),
        "model.union_heads": _whole(1),
        "loss.scale": _number(0.0, above=True),
        "loss.symmetric": _flag,
        "loss.skip_duplicates": _flag,
        "recipe.epochs": _whole(1),
        "recipe.batch_size": _whole(2),
        "recipe.accumulate": _whole(1),
        "recipe.rate": _number(0.0, above=True),
        "recipe.backbone_rate": _number(0.0, above=True),
        "recipe.decay": one_of("matrices", "all"),
        "recipe.schedule": one_of("cosine", "restarts"),
        "recipe.cycle": _whole(1, null=True),
        "recipe.checkpointing": _flag,
        "recipe.weight_decay": _number(0.0),
        "recipe.eps": _number(0.0, above=True),
        "recipe.warmup": _number(0.0, 1.0),
        "recipe.floor": _number(0.0, 1.0),
        "recipe.clip": _number(0.0, above=True),
        "recipe.monitor": _figure,
        **_MACHINE,
    },
    "eval": {
        **_COMMON,
        "checkpoint": _text_or_null,
        "weights": _file_or_null,
        "device": _device,
        "predictions": _file_or_null,
    },
    "check": {},
    "cache": {
        "cache_dir": _text_or_null,
        "prune": _reads(parse_size, SIZE_FORMAT, None, "all"),
        "older_than": _reads(parse_duration, DURATION_FORMAT, None),
    },
    "index": {
        **_MACHINE,
        **dict.fromkeys(("index", "checkpoint"), _text),
        **dict.fromkeys(("images", "remove"), _text_or_null),
        "weights": _file_or_null,
        "decoder": one_of("pillow", "torchcodec"),
        "on_broken": one_of("skip", "fail"),
        "executor": one_of("local", "ray"),
        "ray.address": _text_or_null,
        "ray.actors": _whole(1, null=True),
        "prune": _flag,
        "batch_size": _whole(1),
        "workers": _whole(0, null=True),
        "cache_dir": _text_or_null,
        "progress": _flag,
    },
    "search": {
        "index": _text,
        **dict.fromkeys(("image", "liked", "disliked", "exclude"), _texts),
        **dict.fromkeys(("text", "where", "queries", "contact", "checkpoint"), _text_or_null),
        "k": _whole(1),
        "device": _device,
        "search": one_of("auto", "exact", "ann"),
        "weights": _file_or_null,
        "format": one_of("auto", "table", "jsonl"),
        "thumbnails": one_of("auto", "on", "off"),
        "progress": _flag,
    },
    "demo": {
        **{name: check for name, check in _COMMON.items() if name not in {"seed", "output_dir"}},
        **dict.fromkeys(("index", "checkpoint", "second_index", "second_checkpoint", "user", "name"), _text_or_null),
        "device": _device,
        "host": _text,
        "port": _whole(0, 65_535),
        "page": _whole(2, 200),
        "megabytes": _number(0.0, 1000.0, above=True),
        "megapixels": _number(0.0, 1000.0, above=True),
        "waiting": _whole(1, 10_000),
    },
    "convert": {
        "checkpoint": _file,
        "output_dir": _text,
        "model.name": _backbone,
        "model.weights": _null,
        "model.feedforward": _whole(1),
        "model.union_heads": _whole(1),
        "model.projector": _untrained,
        "model.finetune": _untrained,
        "mask": one_of("exclude", "legacy"),
        "tokenizer": _file_or_null,
        "text_heads": _whole(1, null=True),
        "half": _flag,
    },
    "push": {
        "checkpoint": _folder,
        "repo": _text,
        "private": one_of(True, False, None),
        "branch": _text_or_null,
        "results": _file_or_null,
        "license": _text_or_null,
    },
    "compare": {
        "first": _folder,
        "second": _folder,
        "method": one_of("trained", "image", "text", "sum", "chance"),
        "rounds": _whole(1),
        "seed": _whole(0, 2**32 - 1),
    },
}
BACKBONE: dict[str, Check] = {
    "model.name": _backbone,
    "model.weights": _file_or_null,
    "model.feedforward": _whole(1),
    "model.union_heads": _whole(1),
    "model.projector": _untrained,
    "model.finetune": _untrained,
}
"""Settings of a backbone that is evaluated without trained heads."""
VARIANTS: dict[str, dict[str, dict[str, Check]]] = {
    "data.name": {
        "shapes": {
            "data.split": one_of("val", "test"),
            "data.seed": _whole(0),
            "data.triplets": _whole(0),
            "data.pairs": _whole(0),
            "data.val_queries": _whole(1),
            "data.queries": _whole(1),
        },
        "folder": {
            "data.root": _folder,
            "data.split": one_of("val", "test"),
            "data.seed": _whole(0),
            "data.pairs": _whole(1),
            "data.text": _text_or_null,
            "data.on_missing": one_of("error", "skip"),
        },
    },
    "fusion.kind": {
        "image": {},
        "text": {},
        "sum": {},
        "transagg": {
            "fusion.layers": _whole(1),
            "fusion.heads": _whole(1),
            "fusion.dropout": _PROBABILITY,
            "fusion.mask": one_of("exclude", "legacy"),
            "fusion.start": one_of("balanced", "reference"),
        },
    },
    "target.kind": {
        "frozen": {},
        "shared": {},
        "sum": {"target.form": one_of("normalised", "training", "inference")},
        "union": {
            "target.layers": _whole(1),
            "target.dropout": _PROBABILITY,
            "target.encoder_dropout": _PROBABILITY,
            "target.start": one_of("image", "reference"),
        },
    },
    "logger.name": {
        "csv": {},
        "none": {},
        "tensorboard": {},
        "wandb": {"logger.mode": one_of("offline", "online"), "logger.project": _text},
    },
}

FIXED = {"image", "text", "sum", "frozen", "shared"}
"""Heads without weights of their own."""
