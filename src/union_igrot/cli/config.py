"""Configurations: where `conf/` is, composing and checking them.

The only room beside `cli` that knows Hydra and OmegaConf. Does not import anything heavy,
so that a mistake is reported before a model is thought of.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from union_igrot.cli.rules import BACKBONE, FIXED, RULES, VARIANTS, one_of, rules_by_data
from union_igrot.datasets.registry import benchmark_names, find_benchmark
from union_igrot.errors import ConfigError

_ONE_MODEL = (
    "model=... evaluates a backbone without trained heads and checkpoint=... trained ones, which bring their backbone "
    "along; give one of the two"
)


def conf_dir() -> Path:
    """Find the folder of configurations: in the installed package, or beside `src`.

    Raises:
        ConfigError: Where neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "conf", package.parents[1] / "conf"]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise ConfigError(f"no configurations at {places[0]} or {places[1]}; install the package again")


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
    rules = dict(RULES[name])
    for key, variants in (VARIANTS | {"data.name": rules_by_data(str(values.get("data.name")))}).items():
        read = {"eval": "data.name", "check": "data.name", "convert": "target.kind"}.get(name)
        if name == "train" or key == read:
            rules[key] = one_of(*variants)
            rules |= variants.get(str(values.get(key)), {})
    if name == "eval" and "model.name" in values:
        rules |= BACKBONE
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
    problems += _contradictions(name, values)
    if problems:
        raise ConfigError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))


def _contradictions(name: str, values: Mapping[str, Any]) -> list[str]:
    """Name settings that are each allowed, but not together."""
    if name == "eval" and "model.name" in values:
        problems = [_ONE_MODEL] if values.get("checkpoint") not in (None, "tiny") else []
        if values.get("weights") is not None:
            problems.append("weights belong to a checkpoint's backbone; beside model=... give model.weights")
        if values.get("predictions") is not None:
            problems.append("predictions are scored without a model; leave model=... out")
        return problems
    problems = []
    if name == "convert" and values.get("target.kind") == "shared":
        problems.append("target=shared is not the published code's; choose target=frozen, sum or union")
    heads = {values.get("fusion.kind"), values.get("target.kind")}
    tuned = values.get("model.finetune", "none") != "none"
    if name == "train" and heads <= FIXED and values.get("model.projector", "none") == "none" and not tuned:
        problems.append("nothing is left to train; choose fusion=transagg or target=union")
    if values.get("recipe.checkpointing") is True and not tuned:
        problems.append("recipe.checkpointing=true is for tuned encoders; give model.finetune=both, or leave it false")
    return problems


def compose(name: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """Compose and check a configuration, as the commands do.

    Args:
        name: `train` or `eval`.
        overrides: As on the command line, such as `["data=folder", "data.root=images"]`.

    Returns:
        The composed configuration.

    Raises:
        ConfigError: For an unknown name, group, option, key or value; all values that are
            not allowed are named together.
    """
    known = sorted(path.stem for path in conf_dir().glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"configuration {name!r} does not exist; choose one of {', '.join(known)}")
    offer_registered(overrides)
    # A program that runs under Hydra itself gets its own state back.
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=name):
            config = hydra_compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, name)) from None
    except TypeError:  # Hydra looks for names in a list of options, whatever the list holds
        given = " ".join(override for override in overrides if "=[" in override)
        raise ConfigError(f"{given} is not allowed; a group takes one name, such as model=tiny") from None
    finally:
        GlobalHydra.instance().hydra = outer
    check_config(name, config)
    if name == "eval" and "model" in config and any(override.startswith("checkpoint=") for override in overrides):
        raise ConfigError(_ONE_MODEL)
    return config


def offer_registered(overrides: Sequence[str]) -> None:
    """Let Hydra know the registered benchmarks that are chosen; the built-in ones have files in `conf/data`."""
    for override in overrides:
        group, _, names = override.lstrip("+").partition("=")
        for name in set(names.split(",")) & set(benchmark_names()) if group == "data" else ():
            if not (conf_dir() / "data" / f"{name}.yaml").exists():
                declaration = find_benchmark(name)
                options = {one.name: "all" if one.is_part else one.default for one in declaration.settings}
                node = {"name": name, "root": None, "split": declaration.evaluation_splits[0], "check_images": True}
                ConfigStore.instance().store(group="data", name=name, node=node | options)


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
        raise ConfigError(_explain(error, name)) from None
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
    registered = benchmark_names() if group == "data" else ()
    return sorted({path.stem for path in (conf_dir() / group).glob("*.yaml")} | set(registered))


def _explain(error: Exception, name: str) -> str:
    text = " ".join(str(error).split())
    missing = isinstance(error, MissingConfigException) and re.search(r"'(\w+)/([^']+)'", text)
    if missing:
        group, option = missing.groups()
        trained = "; for trained heads give checkpoint=FOLDER" if (name, group) == ("eval", "model") else ""
        return f"{group}={option} does not exist; choose one of {', '.join(options_of(group))}{trained}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return f"{unknown.group(1)} is not a setting; --help lists the settings"
    return text
