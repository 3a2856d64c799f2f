"""Heads by name, for configurations and saved models.

Knows the names and what each head takes. Does not know a configuration's layout.
"""

from inspect import signature
from typing import Any, Literal, TypeVar, get_args, get_origin

from union_igrot.errors import ConfigError
from union_igrot.models.heads.query import ImageFusion, QueryHead, SumFusion, TextFusion, TransAggFusion
from union_igrot.models.heads.target import FrozenTarget, SharedTarget, SumTarget, TargetHead, UnionTarget

Head = TypeVar("Head", QueryHead, TargetHead)
QUERY_HEADS: dict[str, type[QueryHead]] = {h.kind: h for h in (ImageFusion, TextFusion, SumFusion, TransAggFusion)}
TARGET_HEADS: dict[str, type[TargetHead]] = {h.kind: h for h in (FrozenTarget, SumTarget, UnionTarget, SharedTarget)}


def build_query_head(kind: str, width: int, **options: Any) -> QueryHead:
    """Build a query head.

    Args:
        kind: `image`, `text`, `sum` or `transagg`.
        width: Width of the joint space.
        options: What the head takes beside its width.

    Raises:
        ConfigError: Where the name or an option is not known, or the head refuses a value.
    """
    return _build("fusion", QUERY_HEADS, kind, width, options)


def build_target_head(kind: str, width: int, **options: Any) -> TargetHead:
    """Build a target head.

    Args:
        kind: `frozen`, `sum`, `union` or `shared`.
        width: Width of the joint space.
        options: What the head takes beside its width.

    Raises:
        ConfigError: Where the name or an option is not known, or the head refuses a value.
    """
    return _build("target", TARGET_HEADS, kind, width, options)


def _build(what: str, known: dict[str, type[Head]], kind: str, width: int, options: dict[str, Any]) -> Head:
    if kind not in known:
        raise ConfigError(f"{what} {kind!r} does not exist; choose one of {', '.join(known)}")
    parameters = signature(known[kind]).parameters
    takes = [name for name in parameters if name != "options"]
    unknown = sorted(set(options) - set(takes))
    if unknown:
        allowed = ", ".join(name for name in takes if name != "width") or "no option"
        raise ConfigError(f"{what} {kind!r} does not take {', '.join(unknown)}; it takes {allowed}")
    given = {"width": width, **options} if "width" in takes else options
    for name, value in given.items():
        if wanted := _unlike(parameters[name].annotation, value):
            raise ConfigError(f"{what} {kind!r}: {name} is {value!r}; give {wanted}")
    try:
        return known[kind](**given)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"{what} {kind!r} at width {width} cannot be built: {error}") from None


def _unlike(annotation: Any, value: object) -> str | None:
    """Say what a value should have been; None where it is. Heads take names, counts and rates."""
    if get_origin(annotation) is Literal:
        return None if value in get_args(annotation) else f"one of {', '.join(get_args(annotation))}"
    if annotation is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if fits else "a whole number of at least 1"
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    return None if fits else "a rate of at least 0 and below 1"
