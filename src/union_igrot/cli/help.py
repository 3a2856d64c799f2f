"""What a command takes, read from the comments of the YAML files themselves.

Knows how those files are laid out. Does not compose or check anything.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from textwrap import wrap

from union_igrot.cli.config import conf_dir, options_of

SWEPT = ("train", "eval")
"""Commands that `-m` runs over comma-separated values."""
_WIDE = 88
_WHOLE = "# @package _global_\n"
"""Stands before the line for the help in a file that sets several groups."""


def help_text(name: str) -> str:
    """Say what a command takes: its groups with their options, and its settings.

    Read from the comments of the YAML files themselves; comments below the first line stand at the end.
    """
    lines = (conf_dir() / f"{name}.yaml").read_text().splitlines()
    groups = [m.groups() for line in lines if (m := re.match(r"\s+- (\w+): (\w+|\?{3})\s+# (.+)", line))]
    out = [
        *_laid("", lines[0].removeprefix("# "), 0),
        "",
        f"usage: union-{name} [GROUP=OPTION ...] [KEY=VALUE ...]{' [-m]' if name in SWEPT else ''}",
        "",
    ]
    out += ["groups:"] if groups else []
    for group, default, meaning in groups:
        options = [f"{option} (default)" if option == default else option for option in options_of(group)]
        out += _laid(f"  {group}", f"{meaning}: {', '.join(options)}", 13)
    out += ["", "settings:"]
    for section, body in _sections(lines):
        for key, value, meaning in body:
            out += _laid(f"  {section}{key}={value}", meaning, 34)
    for group, _, _ in groups:
        out += ["", f"{group}=..."]
        wide = max(15, 2 + max(map(len, options_of(group))))
        for option in options_of(group):
            text = (conf_dir() / group / f"{option}.yaml").read_text().removeprefix(_WHOLE).splitlines()
            out += _laid(f"  {option}", text[0].removeprefix("# "), 2 + wide)
            for line in text[1:]:
                setting = re.match(r"(\w+): (\S+)(?:\s+# (.+))?", line)
                # `name` and `kind` that repeat the option are no settings to a reader.
                if setting and not (setting[1] in {"name", "kind"} and setting[2] == option):
                    out += _laid(f"{'':<17}{group}.{setting[1]}={setting[2]}", setting[3] or "", 48)
    notes = [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines[1:])]
    out += ["", *(line for note in notes for line in _laid("-", note, 2))] if notes else []
    sweep = "-m sweeps over comma-separated values; " if name in SWEPT else ""
    out += ["", f"{sweep}--cfg job prints the composed configuration"]
    return "\n".join(out)


def _laid(left: str, right: str, at: int) -> list[str]:
    """Put a meaning beside a name, from a column on, in lines of at most `_WIDE` characters."""
    lines = wrap(right, _WIDE - at, break_long_words=False, break_on_hyphens=False) or [""]
    first = [left] if len(left) >= at > 0 else [f"{left:<{at}}{lines.pop(0)}".rstrip()]
    return first + [f"{'':<{at}}{line}".rstrip() for line in lines if line]


def _sections(lines: Sequence[str]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    sections: list[tuple[str, list[tuple[str, str, str]]]] = [("", [])]
    for line in lines:
        if re.match(r"hydra:", line):
            break
        if head := re.match(r"(\w+):\s*$", line):
            sections.append((f"{head.group(1)}.", []))
        elif setting := re.match(r"(\s*)(\w+): (\S+)\s+# (.+)", line):
            indent, key, value, meaning = setting.groups()
            sections[-1 if indent else 0][1].append((key, value, meaning))
    return [section for section in sections if section[0] != "defaults."]
