"""What is imported when it is first used: public names of packages (PEP 562), and entry points of other packages."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def lazy_exports(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of a package whose imports are heavy.

    Use it as `__getattr__, __dir__ = lazy_exports(__name__, {"Gallery": "gallery"})`, beside a `TYPE_CHECKING` block
    that imports the same names for editors and mypy.

    Args:
        package: Full name of the package, its `__name__`.
        names: For each public name the module that holds it, relative to the package; `module:name` if it has another
            name there.
    """

    def get(name: str) -> Any:
        if name in names:
            module, _, inner = names[name].partition(":")
            return getattr(import_module(f"{package}.{module}"), inner or name)
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from difflib import get_close_matches  # noqa: PLC0415 - only needed for the error

        close = get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(sorted(names))}"
        raise AttributeError(f"module {package!r} has no attribute {name!r}; {hint}", name=name)

    def list_names() -> list[str]:
        return sorted(names)

    return get, list_names


def entry_points_of(group: str) -> "dict[str, EntryPoint]":
    """Return the entry points of a group by name."""
    return {point.name: point for point in _all_entry_points() if point.group == group}


@cache
def _all_entry_points() -> "tuple[EntryPoint, ...]":
    """Return all entry points; reading those of one group takes as long."""
    from importlib.metadata import distributions  # noqa: PLC0415 - slow to import

    return tuple(point for one in distributions() for point in one.entry_points)
