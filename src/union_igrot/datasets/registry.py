"""Declarations of benchmarks, built in or registered: what each is called, which options it takes, how it is read.

Imports neither torch nor an image library, so that help and validation stay fast; `loading` imports the readers.
A package adds benchmarks by `register_benchmark`, or by an entry point of the group `union_igrot.benchmarks` that has
the benchmark's name and refers to its `BenchmarkDeclaration`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint
from pkgutil import resolve_name
from string import Formatter
from typing import Any, Final, NamedTuple, final

from union_igrot._lazy import entry_points_of
from union_igrot.errors import ConfigError, UnionError, check_choice

ENTRY_POINTS: Final = "union_igrot.benchmarks"
_PRESET_HELP: Final = "protocol: official, or union_reference (conventions of the published code)"
Text = str | tuple[str, ...]
"""The text of a query, or several alternative texts."""
Template = Callable[[Mapping[str, str]], Text]
"""Makes the text of a query from the fields of its annotation."""
Counts = Mapping[tuple[str, str], tuple[int | None, int | None]]
"""Queries and gallery images by split and part; None if no public count is known."""


class Prompt(NamedTuple):
    """A prompt by name, or a template as it was given, and the function that applies it."""

    name: str
    text: Template


@final
@dataclass(frozen=True, slots=True)
class BenchmarkOption:
    """A keyword argument of a benchmark's reader; the setting `data.<name>` of the commands.

    Attributes:
        name: Its name.
        type: `str`, `int` or `bool`.
        default: Its value if none is given. If None, None is allowed.
        choices: Allowed texts; any text if empty.
        minimum: Smallest allowed integer.
        is_part: Whether each choice selects a part of the benchmark, whose published result is the mean over the
            parts. It has no default; the commands take `all` too.
        for_training: Whether the commands pass it on when they read training triplets.
        is_setting: Whether the commands have it as a setting.
        help: One line on what it does.
    """

    name: str
    type: type[str] | type[int] | type[bool]
    default: str | int | bool | None = None
    choices: tuple[str, ...] = ()
    minimum: int = 0
    is_part: bool = False
    for_training: bool = True
    is_setting: bool = True
    help: str = ""

    def expected(self, value: object) -> str | None:
        """Describe the allowed values if a value is not allowed, else return None."""
        if value is None and self.default is None and not self.is_part:
            return None
        if self.choices:
            allowed, expected = value in self.choices, f"one of {', '.join(self.choices)}"
        elif self.type is int:  # a bool is not an int here
            allowed, expected = type(value) is int and value >= self.minimum, f"an integer >= {self.minimum}"
        else:
            allowed, expected = type(value) is self.type, "a text" if self.type is str else "true or false"
        none = ", or null" if self.default is None and not self.is_part else ""
        return None if allowed else expected + none


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkDeclaration:
    """Everything that the package has to know about a benchmark.

    Attributes:
        name: The name for `load_benchmark` and `data=NAME`.
        reader: A function `(folder, split, **options)` that returns a `Benchmark`, or `module:function`, imported on
            first use. It receives a `DatasetFolder`, the split, and a value for each of `all_options`.
        splits: Names of its splits, the default first.
        options: Options of its reader beside `prompt` and `preset`.
        prompts: Its prompts by name, the default first; without any, the reader has no argument `prompt`.
        prompt_fields: Fields that a written-out template may use.
        presets: Names of its protocols, the default first; without any, the reader has no argument `preset`.
        trainable: Whether its split `train` can be trained on.
        validation_split: Split on which training validates; without it, a tenth of the triplets is held out.
        folder: Its folder in `$UNION_DATA`, if that is not its name.
        counts: Numbers of queries and gallery images in the official files, by split and part.
        summary: One line on what it is, for the help of the commands.
        source: Where its files can be downloaded.
    """

    name: str
    reader: str | Callable[..., Any]
    splits: tuple[str, ...]
    options: tuple[BenchmarkOption, ...] = ()
    prompts: Mapping[str, Template] = field(default_factory=dict)
    prompt_fields: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    trainable: bool = False
    validation_split: str | None = None
    folder: str | None = None
    counts: Counts = field(default_factory=dict)
    summary: str = "A registered benchmark."
    source: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(f"invalid name of a benchmark: {self.name!r} (expected letters, digits and underscores)")
        if not self.splits or (self.trainable and "train" not in self.splits):
            needed = "'train' among them" if self.trainable else "at least one"
            raise ConfigError(f"invalid splits of benchmark {self.name!r}: {self.splits} (expected {needed})")

    @property
    def all_options(self) -> tuple[BenchmarkOption, ...]:
        """All options of the reader, with `prompt` and `preset`."""
        prompt = BenchmarkOption("prompt", str, help="prompt of the queries, a name or a template; the default if null")
        preset = BenchmarkOption("preset", str, (*self.presets, "")[0], self.presets, help=_PRESET_HELP)
        return (*self.options, *[prompt] * bool(self.prompts), *[preset] * bool(self.presets))

    @property
    def settings(self) -> tuple[BenchmarkOption, ...]:
        """The options that are settings `data.<name>` of the commands; a single preset is none."""
        options = (option for option in self.all_options if option.name != "preset" or len(self.presets) > 1)
        return tuple(option for option in options if option.is_setting)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits to evaluate on, all but `train`, unless that is the only one."""
        return tuple(split for split in self.splits if split != "train") or self.splits

    @property
    def parts(self) -> list[dict[str, str]]:
        """The options that select each part; a single empty dictionary if the benchmark is not divided."""
        return [{one.name: part} for one in self.options if one.is_part for part in one.choices] or [{}]

    @property
    def expected_counts(self) -> Counts:
        """`counts`; without any, unknown ones for each split and part."""
        parts = [next(iter(part.values()), "") for part in self.parts]
        return self.counts or {(split, part): (None, None) for split in self.splits for part in parts}

    def find_prompt(self, prompt: str | None = None) -> Prompt:
        """Return a prompt.

        Args:
            prompt: Name of a prompt; or a template with fields in braces, such as `find {caption}`. A text without
                blanks and braces counts as a name. None for the default.

        Raises:
            ConfigError: If there is no such prompt or the template uses an unknown field.
        """
        if prompt is None:
            prompt = next(iter(self.prompts))
        if prompt in self.prompts:
            return Prompt(prompt, self.prompts[prompt])
        fields = ", ".join(f"{{{name}}}" for name in self.prompt_fields)
        expected = f"(expected one of {', '.join(self.prompts)}, or a template with {fields})"
        if not re.search(r"[\s{]", prompt):
            raise ConfigError(f"invalid value for prompt of {self.name}: {prompt!r} {expected}")
        try:
            parts = list(Formatter().parse(prompt))
        except ValueError as error:
            raise ConfigError(f"invalid prompt template: {prompt!r}, {error} {expected}") from None
        for _, name, spec, conversion in parts:
            if name is not None and (name not in self.prompt_fields or spec or conversion):
                raise ConfigError(f"invalid prompt template: {prompt!r} uses an unknown field {{{name}}} {expected}")
        return Prompt(prompt, prompt.format_map)

    def check_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a value for each option.

        Raises:
            ConfigError: If an option is unknown or missing, or its value is not allowed.
        """
        options = {option.name: option for option in self.all_options}
        for name in given:
            check_choice(f"option of {self.name}", name, options)
        for option in self.options:
            if option.is_part and given.get(option.name) is None:
                raise ConfigError(
                    f"missing option of {self.name}: {option.name} (expected one of {', '.join(option.choices)}; the "
                    "published result is the mean over them)"
                )
        values = {name: given.get(name, option.default) for name, option in options.items()}
        for name, value in values.items():
            if expected := options[name].expected(value):
                raise ConfigError(f"invalid value for {name} of {self.name}: {value!r} (expected {expected})")
        return values

    def import_reader(self) -> Callable[..., Any]:
        """Return the reader, imported if it is declared by name."""
        return self.reader if callable(self.reader) else resolve_name(self.reader)


_RESERVED: Final = ("shapes", "folder")  # the generated world and folders of one's own images
_registered: dict[str, BenchmarkDeclaration] = {}


def register_benchmark(declaration: BenchmarkDeclaration) -> None:
    """Add a benchmark, so that `load_benchmark`, `load_training` and the commands know it by its name.

    Registering an equal declaration again does nothing.

    Raises:
        ConfigError: If another benchmark has its name.
    """
    name = declaration.name
    other = _all_declarations().get(name)
    if name in _RESERVED or (isinstance(other, BenchmarkDeclaration) and other != declaration):
        raise ConfigError(f"cannot register benchmark {name!r}: the name is taken; choose another")
    _registered[name] = declaration


def find_benchmark(name: str) -> BenchmarkDeclaration:
    """Return the declaration of a benchmark.

    Raises:
        ConfigError: If there is no such benchmark, or the package that offers it cannot be imported.
    """
    known = _all_declarations()
    found = known[check_choice("benchmark", name, known)]
    return _load(found) if isinstance(found, EntryPoint) else found


def benchmark_names(*, trainable: bool = False) -> tuple[str, ...]:
    """Return the names of all benchmarks, or of those that can be trained on."""
    names = tuple(_all_declarations())
    return tuple(name for name in names if _is_trainable(name)) if trainable else names


def _is_trainable(name: str) -> bool:
    try:
        return find_benchmark(name).trainable
    except UnionError:  # a broken package must not hide the other names
        return False


def _all_declarations() -> dict[str, BenchmarkDeclaration | EntryPoint]:
    """Return all benchmarks; those of entry points are not imported yet."""
    from union_igrot.datasets.builtin import BUILTIN  # noqa: PLC0415 - it imports the classes above

    builtin = {one.name: one for one in BUILTIN}
    foreign = {name: found for name, found in entry_points_of(ENTRY_POINTS).items() if name not in builtin}
    return builtin | foreign | _registered


@cache
def _load(entry_point: EntryPoint) -> BenchmarkDeclaration:
    origin = f"{entry_point.value} (entry point {entry_point.name} of {ENTRY_POINTS})"
    try:
        declaration = entry_point.load()
    except Exception as error:  # whatever a foreign module raises
        raise ConfigError(f"cannot import {origin}: {type(error).__name__}: {error}; update its package") from error
    if not isinstance(declaration, BenchmarkDeclaration) or declaration.name != entry_point.name:
        raise ConfigError(f"{origin} is not a BenchmarkDeclaration named {entry_point.name}; update its package")
    return declaration
