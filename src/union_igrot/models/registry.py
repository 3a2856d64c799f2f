"""Names of backbones and heads: built-in, registered, or from the entry points of other packages.

Imports nothing heavy, so that a configuration is checked without torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, final

from union_igrot._lazy import entry_points_of
from union_igrot.errors import ConfigError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])
BACKBONE_FORMS = (
    "open_clip:<architecture>/<tag>, hf-hub:<repository> (OpenCLIP), hf:<repository> (transformers) or st:<repository> "
    "(sentence-transformers)"
)

USUAL_NAMES = {
    **dict.fromkeys(("clip", "vit-b-32", "clip-vit-b-32", "openai-clip-vit-base-patch32"), "base"),
    **dict.fromkeys(("vit-l-14", "clip-vit-l-14", "openai-clip-vit-large-patch14"), "large"),
    **dict.fromkeys(("siglip", "google-siglip2-base-patch16-224"), "siglip2"),
}
"""Names that backbones have elsewhere, with `-` for `/`."""


@final
class Registry:
    """Classes or functions by name, each imported when it is used.

    Args:
        what: What the names stand for, for errors.
        group: Group of entry points by which other packages add theirs.
        builtin: Built-in names, each with `module:attribute` below `union_igrot.models`.
        prefixes: The same of what further names begin with, by which the builder itself knows them.
        forms: These further names, for errors.
    """

    def __init__(
        self, what: str, group: str, builtin: Mapping[str, str], prefixes: Mapping[str, str] = {}, forms: str = ""
    ) -> None:
        self.what, self.group, self.builtin = what, group, tuple(builtin)
        self._builtin, self._prefixes, self._forms = builtin, prefixes, forms
        self._registered: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Return all names: built-in, registered and from entry points."""
        return list(dict.fromkeys([*self.builtin, *self._registered, *entry_points_of(self.group)]))

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self._registered or name in entry_points_of(self.group)

    def register(self, name: str, value: Any) -> None:
        """Add a name; a name registered before is replaced.

        Raises:
            ConfigError: If the name is a built-in one.
        """
        if name in self.builtin:
            raise ConfigError(f"{self.what} {name!r} is built in; register it under another name")
        self._registered[name] = value

    def get(self, name: str) -> Any:
        """Return what a name stands for.

        Raises:
            ConfigError: If the name is unknown, or its package cannot be imported.
        """
        further = (place for prefix, place in self._prefixes.items() if name.startswith(prefix))
        if (place := self._builtin.get(name) or next(further, None)) is not None:
            module, _, attribute = place.partition(":")
            return getattr(import_module(f"union_igrot.models.{module}"), attribute)
        if name in self._registered:
            return self._registered[name]
        if (found := entry_points_of(self.group).get(name)) is None:
            raise ConfigError(self.unknown(name, self._forms))
        try:
            return found.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"cannot import {self.what} {name!r} ({error}); reinstall {found.value}") from None

    def unknown(self, name: str, more: str = "") -> str:
        """Return the error line for an unknown name; `more` names further forms that are allowed."""
        choices = ", ".join(self.names()) + (f", {more}" if more else "")
        return f"unknown {self.what} {name!r}{near_name(name, self.names())}; choose one of {choices}"


def near_name(name: str, known: list[str]) -> str:
    """Return ` (did you mean X?)` for the nearest of some names, or an empty text if none is near."""
    usual = USUAL_NAMES.get(name.lower().replace("/", "-"))
    near = f"did you mean {usual}?" if usual in known else did_you_mean(name, known)
    return f" ({near})" if near else ""


_FURTHER = {
    "open_clip:": "backbones.open_clip:load_open_clip",
    "hf-hub:": "backbones.open_clip:load_open_clip",
    "hf:": "backbones.hf:load_hf",
    "st:": "backbones.sentence:load_sentence",
}
BACKBONE_PREFIXES = tuple(_FURTHER)
"""What the names of further backbones begin with."""
BACKBONES = Registry(
    "backbone",
    "union_igrot.backbones",
    {
        "tiny": "backbones.tiny:load_tiny",
        "photos": "backbones.photos:load_photos",
        "base": "backbones.open_clip:load_open_clip",
        "large": "backbones.open_clip:load_open_clip",
        "openclip_h": "backbones.open_clip:load_open_clip",
        "blip": "backbones.hf:load_hf",
        "siglip2": "backbones.hf:load_hf",
        "tinyclip": "backbones.hf:load_hf",
    },
    _FURTHER,
    BACKBONE_FORMS,
)
QUERY_HEADS = Registry(
    "query head",
    "union_igrot.query_heads",
    {
        "image": "heads.query:ImageFusion",
        "text": "heads.query:TextFusion",
        "sum": "heads.query:SumFusion",
        "transagg": "heads.query:TransAggFusion",
    },
)
TARGET_HEADS = Registry(
    "target head",
    "union_igrot.target_heads",
    {
        "frozen": "heads.target:FrozenTarget",
        "residual": "heads.target:ResidualTarget",
        "sum": "heads.target:SumTarget",
        "union": "heads.target:UnionTarget",
        "shared": "heads.target:SharedTarget",
    },
)


def is_backbone(name: str) -> bool:
    """Return whether a name has the form of a backbone's; `tiny` is the bundled model, heads included."""
    return name != "tiny" and (name in BACKBONES or name.startswith(BACKBONE_PREFIXES))


def names_backbone(name: str) -> bool:
    """Return whether a name refers to a backbone; a folder of that name counts only if it holds a saved model."""
    return is_backbone(name) and not any(Path(name, inner, "model.json").is_file() for inner in ("", "model"))


def register_query_head(head: T) -> T:
    """Register a `QueryHead` class under its `kind`; also usable as a class decorator."""
    QUERY_HEADS.register(head.kind, head)  # type: ignore[attr-defined]
    return head


def register_target_head(head: T) -> T:
    """Register a `TargetHead` class under its `kind`; also usable as a class decorator."""
    TARGET_HEADS.register(head.kind, head)  # type: ignore[attr-defined]
    return head


def register_backbone(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a function `(name, weights) -> Backbone`.

    Args:
        name: Name of the backbone in configurations and saved models.
    """

    def register(build: T) -> T:
        BACKBONES.register(name, build)
        return build

    return register
