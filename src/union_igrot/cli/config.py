"""From a command line to checked settings: grammar, composition of `conf/`, validation with all mistakes at once.

Every command composes here, once. `union-train` and `union-eval` compose their groups and experiments with Hydra.
Nothing heavy is imported before the settings are known to be valid.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from union_igrot.cli.groups import GROUPS, UNTRAINED_HEADS
from union_igrot.cli.settings import COMMANDS
from union_igrot.errors import ConfigError, did_you_mean
from union_igrot.models.registry import BACKBONE_FORMS, BACKBONE_PREFIXES
from union_igrot.settings import REQUIRED, Setting, declared, show

if TYPE_CHECKING:
    from omegaconf import DictConfig

_ONE_MODEL = (
    "model=... evaluates a backbone without trained heads, checkpoint=... a trained model with its own backbone; "
    "give one of the two"
)


@cache
def conf_dir() -> Path:
    """Return the folder of the YAML files: in the installed package, or next to `src`.

    Raises:
        ConfigError: If neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [package / "conf", package.parents[1] / "conf"]
    for folder in folders:
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no configuration files in {folders[0]} or {folders[1]}; reinstall the package")


def options_of(group: str) -> list[str]:
    """Return the options of a group: its files in `conf/`, and registered names."""
    names = GROUPS[group].names() if group in GROUPS else ()
    return sorted({path.stem for path in (conf_dir() / group).glob("*.yaml")} | set(names))


def has_file(group: str, option: str) -> bool:
    """Return whether an option has a file in `conf/`, with its values that differ from the declared defaults."""
    return (conf_dir() / group / f"{option}.yaml").is_file()


def read_option(group: str, option: str) -> dict[str, Any]:
    """Return the values of an option of a group."""
    if has_file(group, option):
        return _with_defaults(group, _read_yaml(conf_dir() / group / f"{option}.yaml"))
    return _with_defaults(group, {GROUPS[group].key: option})


def _with_defaults(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a group, and the declared defaults of the settings that they leave out."""
    return {one.key: one.default for one in GROUPS[group].settings(values.get(GROUPS[group].key))} | dict(values)


@cache
def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `did you mean ...?` for an unknown word; empty if no known one is similar."""
    known = list(known)
    ending = [one for one in known if one.endswith(f".{word}")]
    return f"did you mean {' or '.join(ending[:3])}?" if ending else did_you_mean(word, known)


def _unknown(what: str, word: str, known: Iterable[str], otherwise: str) -> str:
    return f"unknown {what} {word} ({suggestion(word.rpartition('=')[2], known) or otherwise})"


class InvalidArgumentsError(ConfigError):
    """Several arguments are invalid.

    Attributes:
        problems: A line for each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = problems
        super().__init__("\n  ".join([f"{len(problems)} invalid arguments:", *problems]))


@dataclass
class Arguments:
    """A parsed command line.

    `settings` are keys and texts in their order, `hydra` settings of Hydra itself, `problems` what cannot be parsed.
    `help` is the topic of `--help`, empty for the short help; `sweep` means `-m`, `show` means `--cfg job`.
    """

    settings: list[tuple[str, str]] = field(default_factory=list)
    hydra: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    help: str | None = None
    version: bool = False
    sweep: bool = False
    show: bool = False

    def plain(self) -> list[str]:
        """Return all settings as KEY=VALUE."""
        return [*(f"{key}={text}" for key, text in self.settings), *self.hydra]


def parse_arguments(name: str, words: Sequence[str]) -> Arguments:
    """Parse `KEY=VALUE`, `--KEY VALUE`, `--KEY=VALUE` and positional values; values are taken as typed."""
    found, rest, positional = Arguments(), list(words), list(COMMANDS[name].positional)
    known = cache(lambda: _known(name))  # slow, and rarely needed
    while rest:
        word = rest.pop(0)
        key, equals, text = word.partition("=")
        if _is_flag(found, word, rest):
            continue
        if word.startswith("--") and len(key) > 2:
            key = key[2:] if key[2:] in known() else key[2:].replace("-", "_")
            if not equals and key in known():
                following = _value_of(known()[key], rest)
                text = following or ""
                if following is None:
                    found.problems.append(f"--{key} needs a value (expected {known()[key].expected})")
                    continue
            found.settings.append((key, text))
        elif positional and word[:1] != "-" and (not equals or (key not in known() and Path(word).exists())):
            found.settings.append((positional.pop(0), word))
        elif equals and not word.startswith("-"):
            key = key.lstrip("+")
            hydra = COMMANDS[name].hydra and re.match(r"hydra[./]", key)
            found.hydra.append(parseable(key, text)) if hydra else found.settings.append((key, text))
        else:
            near = suggestion(word.lstrip("-"), [*known(), "help", "version", "multirun"])
            found.problems.append(
                f"unexpected argument {word!r} (expected KEY=VALUE or --KEY VALUE{'; ' * bool(near)}{near})"
            )
    return found


def _is_flag(found: Arguments, word: str, rest: list[str]) -> bool:
    """Return whether a word is an option of every command, and record it."""
    if word in ("-h", "--help"):
        found.help = rest.pop(0) if rest and re.fullmatch(r"\w[\w.]*", rest[0]) else ""
    elif word == "--version":
        found.version = True
    elif word in ("-m", "--multirun"):
        found.sweep = True
    elif word in ("-c", "--cfg") and rest:
        found.show = rest.pop(0) == "job"
        found.problems += [] if found.show else ["invalid value for --cfg (expected job)"]
    else:
        return False
    return True


def parseable(key: str, text: str) -> str:
    """Return a setting in Hydra's grammar; a text that does not follow it, such as a path with brackets, is quoted."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    for override in (f"{key}={text}", f"{key}='{quoted}'"):
        with suppress(HydraException):
            OverridesParser.create().parse_override(override)
            return override
    raise ConfigError(f"invalid argument {key}={text} (expected KEY=VALUE)")


def _value_of(setting: Setting, rest: list[str]) -> str | None:
    """Take the value that follows `--KEY`; a boolean alone is true."""
    if bool in setting.types and (not rest or rest[0].lower() not in ("true", "false")):
        return "true"
    return None if not rest or re.match(r"--\w|-[hmc]$", rest[0]) else rest.pop(0)


def _known(name: str) -> dict[str, Setting]:
    """Return all settings and groups that a command may have, whichever options are chosen."""
    known = {one.key: one for one in declared(COMMANDS[name].settings)}
    for group, (default, meaning) in COMMANDS[name].groups.items():
        known[group] = Setting(group, (str,), default, {"help": meaning, "expected": "an option"})
        for option in options_of(group) if group in GROUPS else ():
            with suppress(ConfigError):  # a package that cannot be imported; an error if it is chosen
                known |= {one.key: one for one in _group_settings(group, option)}
    return known


def _group_settings(group: str, name: object) -> list[Setting]:
    return [replace(one, key=f"{group}.{one.key}") for one in GROUPS[group].settings(name)]


def schema_of(name: str, values: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings of a command with the options of its groups that its composed values choose."""
    schema = {one.key: one for one in declared(COMMANDS[name].settings)}
    for group in COMMANDS[name].groups:
        if group in GROUPS and isinstance(values.get(group), dict):
            schema |= {one.key: one for one in _group_settings(group, values[group].get(GROUPS[group].key))}
    return schema


def resolve(name: str, arguments: Arguments) -> "tuple[dict[str, Any], DictConfig | None]":
    """Compose and validate the settings of a command.

    Returns:
        The nested values, and the configuration with Hydra's own if Hydra composes the command.

    Raises:
        ConfigError: With all mistakes: unknown settings, options and values, and missing ones.
    """
    command, problems = COMMANDS[name], list(arguments.problems)
    chosen: dict[str, str] = {}
    given: list[tuple[str, str]] = []
    for key, text in arguments.settings:
        if key not in command.groups:
            given.append((key, text))
        elif text in options_of(key) or (text == "null" and command.groups[key][0] is None):
            chosen[key] = text
            _ = key in GROUPS and GROUPS[key].settings(text)  # an error if its package cannot be imported
        elif key == "model" and command.hydra and text.startswith(BACKBONE_PREFIXES):
            chosen[key] = "base"  # whose sizes of heads suit most
            given.append(("model.name", text))
        else:
            problems.append(_wrong_option(name, key, text))
    values, hydra = _composed(name, chosen, arguments.hydra)
    tried = {key for key, _ in arguments.settings}
    problems += [
        f"{group} is required: {command.groups[group][1]} (expected {', '.join(options_of(group))})"
        for group, (default, _) in command.groups.items()
        if default == REQUIRED and group not in tried
    ]
    # What decides the variant of a group comes first: the other settings depend on it.
    decisive = {f"{group}.{GROUPS[group].key}" for group in command.groups if group in GROUPS}
    given.sort(key=lambda one: one[0] not in decisive)
    problems += _apply(name, values, given)
    problems += problems_of(name, values)
    if name == "eval" and "model" in values and any(key == "checkpoint" for key, _ in given):
        problems.append(_ONE_MODEL)
    if distinct := list(dict.fromkeys(problems)):
        raise ConfigError(distinct[0]) if len(distinct) == 1 else InvalidArgumentsError(distinct)
    return values, hydra


def _wrong_option(name: str, group: str, option: str) -> str:
    trained = "; for trained heads use checkpoint=FOLDER" if (name, group) == ("eval", "model") else ""
    near = suggestion(option, options_of(group))
    forms = f", {BACKBONE_FORMS}" if group == "model" and COMMANDS[name].hydra else ""
    expected = f"{', '.join(options_of(group))}{forms}"
    return f"unknown option {group}={option} ({f'{near} ' * bool(near)}expected {expected}{trained})"


def _composed(name: str, chosen: Mapping[str, str], hydra: Sequence[str]) -> "tuple[dict[str, Any], DictConfig | None]":
    """Return the values of the chosen options and the defaults of the command, and Hydra's configuration."""
    own: dict[str, Any] = {}
    for one in declared(COMMANDS[name].settings):
        _put(own, one.key, list(one.default) if isinstance(one.default, tuple) else one.default)
    if COMMANDS[name].hydra:
        # Without the defaults: an experiment chooses options too.
        words = [*(f"{group}={option}" for group, option in chosen.items()), *hydra]
        composed, config = _compose_with_hydra(name, words)
        return {group: _with_defaults(group, values) for group, values in composed.items()} | own, config
    options = {**{group: default for group, (default, _) in COMMANDS[name].groups.items()}, **chosen}
    known = {group: option for group, option in options.items() if option and option != REQUIRED}
    return {group: read_option(group, option) for group, option in known.items()} | own, None


def _compose_with_hydra(name: str, overrides: list[str]) -> "tuple[dict[str, Any], DictConfig]":
    from hydra import compose as hydra_compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _store_registered()
    # A program that runs under Hydra itself gets its own state back.
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=name):
            config = hydra_compose(name, overrides=overrides, return_hydra_config=True)
            str(config.hydra.run.dir)  # an invalid one is an error here
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    finally:
        GlobalHydra.instance().hydra = outer
    values: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    del values["hydra"]
    return values, config


def _store_registered() -> None:
    """Make registered names options for Hydra, sweeps included."""
    from hydra.core.config_store import ConfigStore

    for group in GROUPS:
        for option in options_of(group):
            if not has_file(group, option):
                with suppress(ConfigError):  # a package that cannot be imported; an error if it is chosen
                    ConfigStore.instance().store(option, read_option(group, option), group=group)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _apply(name: str, values: dict[str, Any], given: Sequence[tuple[str, str]]) -> list[str]:
    """Set what was given; return a line for each setting that does not exist or is given in two ways."""
    problems: list[str] = []
    lists: dict[str, list[str]] = {}
    seen: set[str] = set()
    for key, text in given:
        schema = schema_of(name, values)
        setting = schema.get(key)
        group = key.partition(".")[0]
        if setting is None and _is_open(values, group):
            _put(values, key, Setting(key, (bool, int, float, str, type(None)), None, {}).parse(text))
        elif setting is None:
            problems.append(_unknown_setting(name, key, schema))
        elif tuple in setting.types:
            lists.setdefault(key, []).append(text)
        elif key in seen and str in setting.types and not COMMANDS[name].hydra:
            problems.append(f"{key} is given twice; quote it if a shell expanded it ({{a,b}})")
        else:
            _put(values, key, setting.parse(text))
        seen.add(key)
    for key, texts in lists.items():
        bracketed = [text for text in texts if text.startswith("[") and text.endswith("]")]
        if bracketed and len(texts) > 1:
            problems.append(f"{key} is given both as a list and repeated; use {key}=[A,B], or {key}=A {key}=B")
        else:
            _put(values, key, _read_list(bracketed[0]) if bracketed else texts)
    return problems


def _read_list(text: str) -> list[str] | str:
    import yaml

    try:
        found = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        return text
    return found if isinstance(found, list) else text


def _is_open(values: Mapping[str, Any], group: str) -> bool:
    """Return whether a group holds a registered name, whose further settings are checked when it is built."""
    section = values.get(group)
    return group in GROUPS and isinstance(section, dict) and GROUPS[group].is_open(section.get(GROUPS[group].key))


def _unknown_setting(name: str, key: str, schema: Mapping[str, Setting]) -> str:
    inner = [one for one in schema if one.startswith(f"{key}.")]
    if inner:
        return f"{key} is a section; set {', '.join(inner)}"
    return _unknown("setting", key, [*schema, *COMMANDS[name].groups], f"union-{name} --help all lists all")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def problems_of(name: str, values: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that is missing, unknown or not allowed, and for each contradiction."""
    schema, leaves, problems = schema_of(name, values), dict(_leaves(values)), []
    for key, value in leaves.items():
        setting = schema.get(key)
        if setting is None:
            if not _is_open(values, key.partition(".")[0]):
                problems.append(_unknown_setting(name, key, schema))
        elif value == REQUIRED:
            problems.append(f"{key} is required: {setting.help}; add {key}=VALUE")
        elif not setting.allows(value):
            near = suggestion(str(value), map(str, setting.choices))
            problems.append(
                f"invalid value for {key}: {show(value)} (expected {setting.expected}{'; ' * bool(near)}{near})"
            )
    return problems + _contradictions(name, leaves)


def _contradictions(name: str, values: Mapping[str, Any]) -> list[str]:
    """Return a line for each combination that is not allowed."""
    alone = name == "eval" and "model.name" in values
    target, fusion, tuned = values.get("target.kind"), values.get("fusion.kind"), values.get("model.finetune") != "none"
    untrained = {fusion, target} <= UNTRAINED_HEADS and values.get("model.projector") == "none" and not tuned
    rules = {
        _ONE_MODEL: alone and values.get("checkpoint") not in (None, "tiny"),
        "weights= are those of a checkpoint's backbone; with model=... use model.weights=": alone
        and values.get("weights") is not None,
        "predictions are scored without a model; leave out model=...": alone and values.get("predictions") is not None,
        f"the published code has no target={target} (expected target=frozen, sum or union)": name == "convert"
        and target in ("shared", "residual"),
        "model.weights must be null: the checkpoint contains its weights": name == "convert"
        and values.get("model.weights") is not None,
        "model.preprocess must be null: the reference pads": name == "convert"
        and values.get("model.preprocess") is not None,
        "nothing to train; choose fusion=transagg or target=residual": name == "train" and untrained,
        "recipe.checkpointing=true requires fine-tuning; set model.finetune=both, or leave it false": not tuned
        and values.get("recipe.checkpointing") is True,
    }
    for key in ("model.projector", "model.finetune"):
        rules[f"{key} must be none: union-{name} trains nothing"] = (
            name != "train" and values.get(key, "none") != "none"
        )
    return [problem for problem, applies in rules.items() if applies]


def as_config(values: Mapping[str, Any]) -> "DictConfig":
    """Return nested values with access by attribute; text that looks like an interpolation stays text."""
    from omegaconf import OmegaConf

    def escaped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: escaped(one) for key, one in value.items()}
        if isinstance(value, list):
            return [escaped(one) for one in value]
        # One backslash more than twice those before it makes ${...} plain text.
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value) if isinstance(value, str) else value

    config: DictConfig = OmegaConf.create(escaped(values))
    return config


def plain(config: "DictConfig") -> dict[str, Any]:
    """Return a configuration as plain nested values."""
    from omegaconf import OmegaConf

    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment] # str keys
    return values


def compose(name: str = "train", overrides: Sequence[str] = ()) -> "DictConfig":
    """Compose and validate the settings of a command.

    Args:
        name: The command, such as `train`, `eval` or `search`.
        overrides: As on the command line, such as `["data=folder", "data.root=images"]`, one or several.

    Returns:
        The settings.

    Raises:
        ConfigError: With all unknown settings, options and values, one per line.
    """
    if name not in COMMANDS:
        raise ConfigError(_unknown("command", name, COMMANDS, f"expected {', '.join(COMMANDS)}"))
    words = [overrides] if isinstance(overrides, str) else overrides
    return as_config(resolve(name, parse_arguments(name, words))[0])
