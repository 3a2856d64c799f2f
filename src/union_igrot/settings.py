"""How settings are declared, once: fields of dataclasses with help and allowed values in their metadata.

Commands parse, validate and describe settings by these declarations; nothing heavy is imported for that.

The metadata may hold `help`; `choices`; the bounds `low`, `high` and `above` (excluded); `path` (`file` or `folder`,
which must exist); or `accepts`, a test of the value, with `expected`, its description or a function that returns it.
`verbatim` text is never null; `rare` settings are left out of the short help.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from union_igrot.errors import UnionError
from union_igrot.storage.files import expand_user

T = TypeVar("T")
REQUIRED = "???"
"""Default of a setting without a default, as in Hydra's files."""


@dataclass(frozen=True)
class Setting:
    """A declared setting with its full name, such as `recipe.epochs`."""

    key: str
    types: tuple[Any, ...]
    default: Any
    options: Mapping[str, Any]

    @property
    def help(self) -> str:
        """Meaning of the setting."""
        return str(self.options.get("help", ""))

    @property
    def choices(self) -> tuple[Any, ...]:
        """Allowed values, if they are a fixed list."""
        return tuple(self.options.get("choices", ()))

    @property
    def expected(self) -> str:
        """Allowed values in words."""
        if "expected" in self.options:
            expected = self.options["expected"]
            words = [expected() if callable(expected) else expected]
        elif self.choices:
            words = [show(choice) for choice in self.choices]
        elif bool in self.types:
            words = ["true", "false"]
        elif tuple in self.types:
            words = ["text; repeat the setting for several values", "[A,B]"]
        elif "path" in self.options:
            words = [f"an existing {self.options['path']}"]
        else:
            kind = "a number" if float in self.types else "an integer" if int in self.types else "text"
            bounds = {"low": ">=", "above": ">", "high": "<="}
            limits = [f"{sign} {self.options[name]}" for name, sign in bounds.items() if name in self.options]
            words = [f"{kind} {' and '.join(limits)}".strip()]
        if NoneType in self.types and "null" not in words and not self.options.get("verbatim"):
            words.append("null")
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

    def parse(self, text: str) -> Any:
        """Return the value of a text; the text itself if it fits none of the types."""
        if text == "null" and NoneType in self.types and not self.options.get("verbatim"):
            return None
        if bool in self.types and text.lower() in ("true", "false"):
            return text.lower() == "true"
        number = float in self.types
        for kind in (int, float) if number else (int,) if int in self.types else ():
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    def allows(self, value: Any) -> bool:
        """Return whether a value has one of the types and is allowed."""
        if value is None or isinstance(value, bool):
            return type(value) in self.types
        if "accepts" in self.options:
            return bool(self.options["accepts"](value))
        if isinstance(value, list | tuple):
            return tuple in self.types and all(isinstance(one, str) and one not in ("", REQUIRED) for one in value)
        if isinstance(value, int | float):
            return self._in_range(value) if not self.choices else value in self.choices
        if self.choices or str not in self.types:
            return value in self.choices
        return self._exists(value) and (NoneType in self.types or bool(value.strip()))

    def _in_range(self, value: int | float) -> bool:
        low, high, above = (self.options.get(name) for name in ("low", "high", "above"))
        typed = float in self.types or (int in self.types and isinstance(value, int))
        fits = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        return typed and math.isfinite(value) and fits

    def _exists(self, value: str) -> bool:
        kind = self.options.get("path")
        return kind is None or (expand_user(value).is_dir() if kind == "folder" else expand_user(value).exists())


def show(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting(default: Any, help: str, **options: Any) -> Any:  # noqa: A002 - the name that argparse uses
    """Declare a field; for the options see the module."""
    return field(default=default, metadata={"help": help, **options})


def documented(group: type[T]) -> type[T]:
    """Add the help of the fields to the docstring of a dataclass."""
    lines = [f"    {one.key}: {one.help[:1].upper()}{one.help[1:]}." for one in _declared(group, "")]
    group.__doc__ = "\n".join([f"{group.__doc__}\n", "Attributes:", *lines])
    return group


@cache
def declared(group: type, prefix: str = "") -> tuple[Setting, ...]:
    """Return the settings of a dataclass, those of nested dataclasses with their full names."""
    return tuple(_declared(group, prefix))


def _declared(group: type, prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(group)
    for one in fields(group):
        hint = hints[one.name]
        if is_dataclass(hint):
            yield from _declared(hint, f"{prefix}{one.name}.")  # type: ignore[arg-type] # a class, since it is a hint
            continue
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        literals = tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))
        options = {**({"choices": literals} if literals else {}), **one.metadata}
        types = (*map(type, literals), *(get_origin(one) or one for one in members if get_origin(one) is not Literal))
        default = REQUIRED if one.default is MISSING or one.default == REQUIRED else one.default
        yield Setting(f"{prefix}{one.name}", types, default, options)


def readable(parse: Callable[[Any], Any], *words: str) -> Callable[[Any], bool]:
    """Return a test that accepts what a function can parse, and some words."""

    def accepts(value: Any) -> bool:
        try:
            return value in words or parse(value) is not None
        except UnionError:
            return False

    return accepts
