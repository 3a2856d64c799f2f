"""Configurations: where `conf/` is, composing and checking them.

The only room beside `cli` that knows Hydra and OmegaConf. Does not import anything heavy,
so that a mistake is reported before a model is thought of.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from union_igrot.errors import ConfigError

_BACKBONES = ("tiny", "base", "large", "openclip_h", "blip", "siglip2")
Check = Callable[[Any], str | None]
"""Gives what is allowed where a value is not, else None."""


def conf_dir() -> Path:
    """Find the folder of configurations: in the installed package, or beside `src`.

    Raises:
        ConfigError: Where neither exists.
    """
    package = Path(__file__).resolve().parent
    places = [package / "conf", package.parents[1] / "conf"]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise ConfigError(f"no configurations at {places[0]} or {places[1]}; install the package again")


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


def _one_of(*options: Any) -> Check:
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


def _folder(value: Any) -> str | None:
    if isinstance(value, str) and Path(value).expanduser().is_dir():
        return None
    return "an existing folder"


def _folder_or_null(value: Any) -> str | None:
    return None if value is None or _folder(value) is None else "an existing folder, or null"


def _file_or_null(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and Path(value).expanduser().exists()):
        return None
    return "an existing file, or null"


def _figure(value: Any) -> str | None:
    if isinstance(value, str) and re.fullmatch(r"val/score|val/\w+/(R@\d+|Rs@\d+|P@\d+|mAP|mAP@\d+)", value):
        return None
    return "val/score, or val/<benchmark>/<figure> such as val/shapes_cir/mAP@10"


def _backbone(value: Any) -> str | None:
    if value in _BACKBONES or (isinstance(value, str) and re.match(r"(open_clip|hf):\S+$", value)):
        return None
    return f"one of {', '.join(_BACKBONES)}, open_clip:<architecture>/<tag> or hf:<repository>"


def _devices(value: Any) -> str | None:
    return None if value == "auto" or _whole(1)(value) is None else "auto or a whole number of at least 1"


_PROBABILITY = _number(0.0, 0.999)
_COMMON: dict[str, Check] = {
    "seed": _whole(0, 2**32 - 1),
    "output_dir": _text_or_null,
    "cache_dir": _text_or_null,
    "progress": _flag,
    "features.batch_size": _whole(1),
    "features.workers": _whole(0, null=True),
    "features.dtype": _one_of("float32", "float16"),
}


def _public(*splits: str, preset: bool = True, **more: Check) -> dict[str, Check]:
    """Give the rules of a public benchmark's settings."""
    rules: dict[str, Check] = {
        "root": _folder_or_null,
        "split": _one_of(*splits),
        "prompt": _text_or_null,
        "check_images": _flag,
        **({"preset": _one_of("official", "union_reference")} if preset else {}),
        **more,
    }
    return {f"data.{name}": check for name, check in rules.items()}


_RULES: dict[str, dict[str, Check]] = {
    "train": {
        **_COMMON,
        "model.name": _backbone,
        "model.projector": _one_of("none", "mlp"),
        "model.weights": _file_or_null,
        "model.feedforward": _whole(1),
        "model.union_heads": _whole(1),
        "loss.scale": _number(0.0, above=True),
        "loss.symmetric": _flag,
        "loss.skip_duplicates": _flag,
        "recipe.epochs": _whole(1),
        "recipe.batch_size": _whole(2),
        "recipe.rate": _number(0.0, above=True),
        "recipe.weight_decay": _number(0.0),
        "recipe.eps": _number(0.0, above=True),
        "recipe.warmup": _number(0.0, 1.0),
        "recipe.floor": _number(0.0, 1.0),
        "recipe.clip": _number(0.0, above=True),
        "recipe.monitor": _figure,
        "precision.trainer": _one_of("32-true", "bf16-mixed", "16-mixed"),
        "strategy.accelerator": _text,
        "strategy.devices": _devices,
        "strategy.nodes": _whole(1),
        "strategy.name": _text,
        "logger.name": _one_of("csv", "none"),
    },
    "eval": {**_COMMON, "checkpoint": _text, "weights": _file_or_null, "predictions": _file_or_null},
    "check": {},
    "compare": {
        "first": _folder,
        "second": _folder,
        "method": _one_of("trained", "image", "text", "sum", "chance"),
        "rounds": _whole(1),
        "seed": _whole(0, 2**32 - 1),
    },
}
_VARIANTS: dict[str, dict[str, dict[str, Check]]] = {
    "data.name": {
        "shapes": {
            "data.split": _one_of("val", "test"),
            "data.seed": _whole(0),
            "data.triplets": _whole(0),
            "data.pairs": _whole(0),
            "data.val_queries": _whole(1),
            "data.queries": _whole(1),
        },
        "folder": {
            "data.root": _folder,
            "data.split": _one_of("val", "test"),
            "data.seed": _whole(0),
            "data.pairs": _whole(1),
            "data.text": _text_or_null,
            "data.on_missing": _one_of("error", "skip"),
        },
        "fashioniq": _public(
            "val",
            "test",
            category=_one_of("dress", "shirt", "toptee", "all"),
            gallery=_one_of("original", "val"),
        ),
        "cirr": _public("val", "test1"),
        "circo": _public("val", "test"),
        "genecis": _public(
            "val",
            preset=False,
            task=_one_of("focus_attribute", "change_attribute", "focus_object", "change_object", "all"),
        ),
        "lasco": _public("val"),
        "llavasco": _public("val", stride=_whole(1, null=True), limit=_whole(1, null=True)),
        "dtin": _public(
            "val",
            domain=_one_of("cartoon", "origami", "toy", "sculpture", "all"),
            recall_mode=_one_of("fraction", "any", None),
            only_with_gt=_flag,
        ),
        "sketchy": _public("zeroshot1", "zeroshot0"),
        "tuberlin": _public("test"),
        "quickdraw": _public("test"),
        "training_sketchy": _public(
            "train",
            lists=_one_of("zeroshot1", "zeroshot0"),
            build=_whole(1, null=True),
            seed=_whole(0),
        ),
    },
    "fusion.kind": {
        "image": {},
        "text": {},
        "sum": {},
        "transagg": {
            "fusion.layers": _whole(1),
            "fusion.heads": _whole(1),
            "fusion.dropout": _PROBABILITY,
            "fusion.mask": _one_of("exclude", "legacy"),
            "fusion.start": _one_of("balanced", "reference"),
        },
    },
    "target.kind": {
        "frozen": {},
        "shared": {},
        "sum": {"target.form": _one_of("normalised", "training", "inference")},
        "union": {
            "target.layers": _whole(1),
            "target.dropout": _PROBABILITY,
            "target.encoder_dropout": _PROBABILITY,
            "target.start": _one_of("image", "reference"),
        },
    },
}

_FIXED = {"image", "text", "sum", "frozen", "shared"}
"""Heads without weights of their own."""


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_config(name: str, config: DictConfig) -> None:
    """Check every value of a composed configuration.

    Args:
        name: `train` or `eval`.
        config: What `compose` gave.

    Raises:
        ConfigError: Naming every problem: unknown keys, missing keys, values not allowed.
    """
    values = _leaves(OmegaConf.to_container(config))  # type: ignore[arg-type]
    rules = dict(_RULES[name])
    for key, variants in _VARIANTS.items():
        if name == "train" or (name in ("eval", "check") and key == "data.name"):
            rules[key] = _one_of(*variants)
            rules |= variants.get(str(values.get(key)), {})
    problems = []
    for key, value in values.items():
        if key not in rules:
            near = difflib.get_close_matches(key, rules, 1)
            problems.append(f"{key} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
        elif isinstance(value, str) and value == "???":
            problems.append(f"{key} is not given; add {key}=VALUE")
        elif allowed := rules[key](value):
            problems.append(f"{key}={value} is not allowed; give {allowed}")
    problems += [f"{key} is missing" for key in rules if key not in values]
    heads = {values.get("fusion.kind"), values.get("target.kind")}
    if name == "train" and heads <= _FIXED and values.get("model.projector", "none") == "none":
        problems.append("nothing is left to train; choose fusion=transagg or target=union")
    if problems:
        raise ConfigError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))


def compose(name: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """Compose and check a configuration, as the commands do.

    Args:
        name: `train` or `eval`.
        overrides: As on the command line, such as `["data=folder", "data.root=pictures"]`.

    Returns:
        The composed configuration.

    Raises:
        ConfigError: For an unknown name, group, option, key or value; all values that are
            not allowed are named together.
    """
    known = sorted(path.stem for path in conf_dir().glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"configuration {name!r} does not exist; choose one of {', '.join(known)}")
    # A program that runs under Hydra itself gets its own state back.
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=name):
            config = hydra_compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error)) from None
    finally:
        GlobalHydra.instance().hydra = outer
    check_config(name, config)
    return config


def check_sweep(name: str, overrides: Sequence[str]) -> None:
    """Compose and check what a sweep (`-m`) will run: every value that is swept over, once.

    Args:
        name: `train` or `eval`.
        overrides: As on the command line; one may name several values, `seed=0,1` or `seed=range(3)`.

    Raises:
        ConfigError: As `compose`, or where several runs would share one folder.
    """
    for override in overrides:
        if "glob(" in override:
            raise ConfigError(f"{override} is not given value by value; list the values, or give a range")
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        choices = [_swept(override) for override in parsed]
    except HydraException as error:
        raise ConfigError(_explain(error)) from None
    first = [values[0] for values in choices]
    several = any(len(values) > 1 for values in choices)
    if several and any(override.startswith("output_dir=") for override in first):
        raise ConfigError("output_dir is the folder of one run; leave it out, or give hydra.sweep.dir=FOLDER for all")
    compose(name, first)
    for place, values in enumerate(choices):
        for value in values[1:]:
            compose(name, [*first[:place], value, *first[place + 1 :]])


def _swept(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def options_of(group: str) -> list[str]:
    """Name what a configuration group offers."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    missing = isinstance(error, MissingConfigException) and re.search(r"'(\w+)/([^']+)'", text)
    if missing:
        group, option = missing.groups()
        return f"{group}={option} does not exist; choose one of {', '.join(options_of(group))}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return f"{unknown.group(1)} is not a setting; --help lists the settings"
    return text
