"""Backbones, heads and projectors built by name, their options checked."""

from collections.abc import Mapping
from dataclasses import make_dataclass, replace
from functools import cache
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from union_igrot.errors import ConfigError, check_choice
from union_igrot.models.backbones.base import Backbone, PreprocessChoice
from union_igrot.models.heads.query import QueryHead, VisionProjector
from union_igrot.models.heads.target import TargetHead
from union_igrot.models.registry import BACKBONES, QUERY_HEADS, TARGET_HEADS, Registry
from union_igrot.settings import Setting, declared
from union_igrot.storage.files import expand_user


def build_backbone(
    name: str, weights: str | Path | None = None, preprocess: PreprocessChoice | None = None
) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: `tiny` (bundled), `base` (OpenAI's CLIP ViT-B/32), `large` (ViT-L/14), `openclip_h`, `blip`, `siglip2`,
            `tinyclip`, `open_clip:<architecture>/<tag>`, `hf-hub:<repository>` (OpenCLIP), `hf:<repository>`
            (transformers), `st:<repository>` (sentence-transformers), or a registered name.
        weights: A file or folder to load instead of the default weights, which are bundled (`tiny`) or downloaded on
            first use.
        preprocess: `model` preprocesses images as the authors of the weights do; `pad` pads an image longer than 1.25
            to 1 to that ratio, then resizes and crops. None for `pad` with OpenAI's weights of OpenCLIP and with
            `blip`, as in the reference, and for `model` with all others.

    Raises:
        ConfigError: If the name is unknown, or `preprocess` is neither.
        CheckpointError: If the weights cannot be loaded.
    """
    if preprocess is not None:
        check_choice("preprocess", preprocess, get_args(PreprocessChoice))
    path = None if weights is None else expand_user(weights)
    backbone: Backbone = BACKBONES.get(name)(name, path)
    if preprocess == "pad":
        backbone.preprocess = replace(backbone.preprocess, fit="pad")
    elif preprocess == "model" and backbone.preprocess.fit == "pad":
        if backbone.model_preprocess is None:
            raise ConfigError(f"backbone {name!r} has no preprocessing that does not pad; leave out preprocess=model")
        backbone.preprocess = backbone.model_preprocess
    if path is None:
        backbone.is_described_by_name = True
    return backbone


def build_query_head(kind: str, width: int, sizes: Mapping[str, Any] | None = None, **options: Any) -> QueryHead:
    """Build a query head.

    Args:
        kind: `image`, `text`, `sum`, `transagg` or a registered name.
        width: Width of the joint space.
        sizes: Sizes that suit the backbone, from which the head takes those it declares in `model_sizes`.
        options: The head's own options.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is invalid.
    """
    head: QueryHead = _build(QUERY_HEADS, QueryHead, kind, width, sizes, options)
    return head


def build_target_head(kind: str, width: int, sizes: Mapping[str, Any] | None = None, **options: Any) -> TargetHead:
    """Build a target head, one of `registry.TARGET_HEADS`; see `build_query_head`."""
    head: TargetHead = _build(TARGET_HEADS, TargetHead, kind, width, sizes, options)
    return head


def build_projector(kind: str, width: int, **options: Any) -> VisionProjector | None:
    """Build a vision projector: `mlp`, or `none`, for which None is returned.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is invalid.
    """
    if kind not in ("none", "mlp"):
        raise ConfigError(f"unknown projector {kind!r}; choose none or mlp")
    if kind == "mlp":
        return _construct("projector 'mlp'", VisionProjector, width, options)
    if options:
        raise ConfigError(f"projector 'none' takes no option (got {', '.join(sorted(options))})")
    return None


def _build(
    registry: Registry, base: Any, kind: str, width: int, sizes: Mapping[str, Any] | None, options: dict[str, Any]
) -> Any:
    head: Any = registry.get(kind)
    if base not in getattr(head, "__mro__", ()):
        raise ConfigError(f"{registry.what} {kind!r} is {head!r} (expected a subclass of {base.__name__})")
    taken = {name: sizes[key] for name, key in head.model_sizes.items() if sizes is not None and key in sizes}
    return _construct(f"{registry.what} {kind!r}", head, width, taken | options)


C = TypeVar("C")


def _construct(what: str, made: type[C], width: int, options: dict[str, Any]) -> C:
    takes = [name for name, one in signature(made).parameters.items() if one.kind is not one.VAR_KEYWORD]
    if unknown := sorted(set(options) - set(takes)):
        allowed = ", ".join(name for name in takes if name != "width") or "none"
        raise ConfigError(f"{what} has no option {', '.join(unknown)} (options: {allowed})")
    given = {"width": width, **options} if "width" in takes else options
    for option in _plain_options(made):  # type: ignore[arg-type]  # a class is hashable
        if option.key in given and not option.allows(value := given[option.key]):
            raise ConfigError(f"invalid value for {option.key} of {what}: {value!r} (expected {option.expected})")
    try:
        return made(**given)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot build {what} at width {width}: {error}") from None


@cache
def _plain_options(made: type) -> tuple[Setting, ...]:
    """Return the arguments of a class that are checked: of plain types, or one of some values."""
    arguments = [(one.name, one.annotation) for one in signature(made).parameters.values()]
    return declared(make_dataclass("Options", [(name, kind) for name, kind in arguments if _is_plain(kind)]))


def _is_plain(annotation: Any) -> bool:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(get_origin(one) is Literal or one in (bool, int, float, str, NoneType, None) for one in members)
