"""Settings that are taken as they were typed: texts, filters and file names need no quotes of Hydra's.

`text=it's red, not blue` would be a mistake in Hydra's language of overrides, and `${...}` would be
looked up. Such values are quoted before Hydra sees them. Knows that language. Does not know any command.
"""

import re
from collections.abc import Collection, Sequence
from typing import Final

from hydra.core.override_parser.types import Quote, QuotedString

from union_igrot.errors import ConfigError

_WORDS: Final = frozenset({"text", "where", "remove"})


def as_typed(arguments: Sequence[str], literal: Collection[str] = (), several: Collection[str] = ()) -> list[str]:
    """Quote the values of some settings, so that Hydra reads them as they were typed.

    Args:
        arguments: As on the command line.
        literal: Settings of one text each.
        several: Settings of a list of texts. One may be given several times, each time with one text as typed, or
            once as `[...]` in Hydra's own language.

    Returns:
        The arguments; those of `several` stand where the first of them stood.

    Raises:
        ConfigError: Where both forms of a list are mixed.
    """
    quoted: list[str] = []
    lists: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in {*literal, *several}:
            quoted.append(argument)
        elif key in literal:
            # What is left out is `null`, but a word or a filter may be that word.
            quoted.append(argument if value == "null" and key not in _WORDS else f"{key}={_quoted(value)}")
        else:
            lists.setdefault(key, []).append(value)
            places.setdefault(key, len(quoted))
            if len(lists[key]) == 1:
                quoted.append("")
    for key, values in lists.items():
        quoted[places[key]] = f"{key}={_list(key, values)}"
    return quoted


def _list(key: str, values: Sequence[str]) -> str:
    own = [value for value in values if value.startswith("[") and value.endswith("]")]
    if not own:
        return "[" + ",".join(_quoted(value) for value in values) + "]"
    if len(values) > 1:
        raise ConfigError(f"{key} is given several times and as a list; give {key}=[A,B], or {key}=A {key}=B")
    return own[0]


def _quoted(text: str) -> str:
    # OmegaConf would look up ${...}: one backslash more than twice those before it makes it plain text.
    plain = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return QuotedString(plain, Quote.single).with_quotes()
