"""What is imported when it is first used: public names of packages (PEP 562), and entry points of other packages."""

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from union_igrot.errors import did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of a package whose imports are heavy.

    Use it as `__getattr__, __dir__ = lazy_exports(__name__, __file__)` in an `__init__.py` whose `if TYPE_CHECKING:`
    block imports the public names, for editors and mypy; they are read from there.
    """
    block = next(node for node in ast.parse(Path(file).read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(modules[name]), name)
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        near = did_you_mean(name, modules) or f"it has {', '.join(sorted(modules))}"
        raise AttributeError(f"module {package!r} has no attribute {name!r}; {near}", name=name)

    return get, lambda: sorted(modules)


def entry_points_of(group: str) -> "dict[str, EntryPoint]":
    """Return the entry points of a group by name."""
    return {point.name: point for point in _all_entry_points() if point.group == group}


@cache
def _all_entry_points() -> "tuple[EntryPoint, ...]":
    """Return all entry points; reading those of one group takes as long."""
    from importlib.metadata import distributions  # noqa: PLC0415 - slow to import

    return tuple(point for one in distributions() for point in one.entry_points)
