"""The text of `--help`, from the declared settings and the options in `conf/`."""

from collections.abc import Iterable
from textwrap import wrap
from typing import Any

from union_igrot.cli.config import conf_dir, has_file, options_of, read_option, suggestion
from union_igrot.cli.groups import GROUPS
from union_igrot.cli.settings import COMMANDS
from union_igrot.datasets.registry import find_benchmark
from union_igrot.errors import ConfigError
from union_igrot.settings import Setting, declared, show

_WIDTH = 80
_COLUMN = 25
_INDENTED: Any = {"initial_indent": "  ", "subsequent_indent": "    "}


def help_text(name: str, topic: str = "") -> str:
    """Return the help of a command; the topic is empty for the short help, a group or section, or `all`.

    Raises:
        ConfigError: If there is no such topic.
    """
    command = COMMANDS[name]
    keys = [one.key for one in declared(command.settings) if "." in one.key]
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    topics = [*command.groups, *sections, "all"]
    if topic and topic not in topics:
        near = suggestion(topic, topics)
        raise ConfigError(f"unknown help topic {topic} ({f'{near} ' * bool(near)}expected {', '.join(topics)})")
    if topic not in ("", "all"):
        return "\n".join(_topic(name, topic))
    lines = _short(name, sections)
    if topic:
        lines += ["", *_settings(one for one in declared(command.settings) if one.options.get("rare"))]
    for one in (*command.groups, *sections) if topic else ():
        lines += ["", *_topic(name, one)]
    return "\n".join(lines)


def _short(name: str, sections: list[str]) -> list[str]:
    command = COMMANDS[name]
    groups = " [GROUP=OPTION ...]" if command.groups else ""
    lines = [
        *wrap(command.summary, _WIDTH),
        "",
        f"usage: union-{name}{groups} [KEY=VALUE ...]{' [-m]' * command.hydra}",
    ]
    lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    if command.groups:
        lines += ["", "groups (--help GROUP shows the settings of each option):"]
    for group, (default, meaning) in command.groups.items():
        options = [f"{one} (default)" if one == default else one for one in options_of(group)]
        listed = ", ".join(options) if len(options) <= 16 else f"{', '.join(options[:2])}, ... ({len(options)} options)"
        lines += _entry(f"  {group}", f"{meaning}: {listed}", 14)
    own = vars(command.settings).get("__annotations__", {})
    settings = sorted(declared(command.settings), key=lambda one: ("." in one.key, one.key not in own))
    lines += ["", "settings:"] if settings else []
    own_settings = [one for one in settings if "." not in one.key]
    lines += _settings(one for one in own_settings if not one.options.get("rare"))
    more = [one.key for one in own_settings if one.options.get("rare")] + [f"{section}.*" for section in sections]
    lines += wrap(f"further ones, see --help all: {', '.join(more)}", _WIDTH, **_INDENTED) if more else []
    lines += [
        "",
        "options:",
        *_entry("  -h, --help [TOPIC]", "this help, or that of a group or section, or all", _COLUMN),
    ]
    lines += _entry("  --version", "print the version", _COLUMN)
    lines += _entry("  --cfg job", "print the composed settings and exit", _COLUMN)
    if command.hydra:
        lines += _entry("  -m, --multirun", "run once for each combination of comma-separated values", _COLUMN)
    lines += ["", "KEY=VALUE, --KEY VALUE and --KEY=VALUE are the same; values are taken as typed."]
    for note in command.notes:
        lines += wrap(f"{note[0].upper()}{note[1:]}.", _WIDTH)
    return lines


def _topic(name: str, topic: str) -> list[str]:
    """Return the settings of a section, or of each option of a group."""
    if topic not in COMMANDS[name].groups:
        inner = [one for one in declared(COMMANDS[name].settings) if one.key.startswith(f"{topic}.")]
        return [f"{topic}.*", *_settings(inner)]
    default, meaning = COMMANDS[name].groups[topic]
    lines, described = wrap(f"{topic}=OPTION  {meaning}; default {show(default)}", _WIDTH), set()
    for option in options_of(topic):
        lines += _entry(f"  {option}", summary_of(topic, option), 20)
    for option in options_of(topic) if topic in GROUPS else ():
        values = read_option(topic, option)
        schema = {one.key: one for one in GROUPS[topic].settings(values.get(GROUPS[topic].key))}
        shown = tuple((key, show(value)) for key, value in values.items() if key not in ("name", "kind"))
        if not shown or shown in described:
            continue
        described.add(shown)
        lines += ["", f"with {topic}={option}:"]
        for key, value in shown:
            lines += _entry(f"  {topic}.{key}={value}", schema[key].help, _COLUMN + 4)
    return lines


def summary_of(group: str, option: str) -> str:
    """Return one line on an option: the first comment of its file, or what a benchmark declares."""
    if not has_file(group, option):
        return find_benchmark(option).summary if group == "data" else "A registered name."
    text = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8")
    return text.removeprefix("# @package _global_\n").partition("\n")[0].removeprefix("# ")


def _settings(settings: Iterable[Setting]) -> list[str]:
    return [line for one in settings for line in _entry(f"  {one.key}={show(one.default)}", one.help, _COLUMN)]


def _entry(left: str, right: str, at: int) -> list[str]:
    """Return a name and its meaning in two columns."""
    lines = wrap(right, _WIDTH - at, break_long_words=False, break_on_hyphens=False) or [""]
    first = [left] if len(left) >= at - 1 else [f"{left:<{at}}{lines.pop(0)}".rstrip()]
    return [*first, *(f"{'':<{at}}{line}" for line in lines if line)]
