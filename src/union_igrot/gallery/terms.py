"""Terms of a query: images, texts, and images with a text, which are added or subtracted with a weight."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Final

from union_igrot.errors import ConfigError
from union_igrot.gallery.calibration import QueryTask
from union_igrot.images.formats import IMAGE_SUFFIXES
from union_igrot.storage.paths import expand_user, find_path, is_web_address

TERM_FORMAT: Final = "a text, an image, (image, text), or one of them with a weight, as in ('fruit', -1)"
_LARGEST: Final = 1_000_000  # weight, whatever its sign
_WEIGHT: Final = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+|nan|inf|infinity)):(.*)", re.DOTALL | re.IGNORECASE)
_WEIGHT_BEHIND: Final = re.compile(r"(?!-?(?:text|image):)(.*[^\W\d_]):\s*([+-]?\d+\.?\d*)", re.DOTALL)
_REGION: Final = re.compile(r"#[\d.,%\s]+$")
_PATH: Final = re.compile(r"\.{0,2}[/\\]|~[/\\]|[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class Term:
    """A part of a query."""

    images: tuple[Any, ...] = ()  # photos or sketches, in any form that `open_region` accepts
    text: str | None = None  # the modification text of the images, or a text alone; None for none
    weight: float = 1.0  # of its unit embedding in the query
    vector: Any = None  # the embedding itself, [dim] of unit length, instead of images and a text

    @property
    def task(self) -> QueryTask:
        """Its task, which decides how its scores are calibrated."""
        return None if not self.images else "cir" if self.text else "sbir"


def parse_term(given: object, *, images: bool = True) -> Term:
    """Validate one term.

    Args:
        given: A text as on the command line, `[WEIGHT:|-][text:|image:]CONTENT`; an image; a pair of content and
            weight, or of image and text, or `((image, text), weight)`; or a mapping with some of `image`, `text` and
            `weight`. The content of the first two forms of text is an image if it begins with `image:`, ends with the
            suffix of an image (and a region), or begins like a path (`./`, `../`, `/`, `~/`, `C:/`), whether the file
            exists or not; `IMAGE + TEXT` is an image with a text; `text:` makes anything a text.
        images: Whether a text can name an image; not if it is from somebody else, who must not open files.

    Raises:
        ConfigError: If it is none of these, empty, or its weight is not a number of at most a million.
    """
    if isinstance(given, Term):
        return given
    image, text, weight = _read_parts(given, images)
    if not isinstance(text, str | None) or isinstance(image, Real):
        raise ConfigError(f"invalid term: {given!r} (expected {TERM_FORMAT})")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not abs(float(weight)) <= _LARGEST:
        raise ConfigError(f"invalid weight of a term: {weight!r} (expected a number up to {_LARGEST:,})")
    found, text = (() if image is None or (isinstance(image, str) and not image) else (image,)), (text or "").strip()
    if not (found or text):
        raise ConfigError(f"the term {given!r} is empty (expected {TERM_FORMAT})")
    return Term(found, text or None, float(weight))


def _read_parts(given: object, images: bool) -> tuple[Any, Any, Any]:
    """Return the image, the text and the weight of a term, not yet validated."""
    if isinstance(given, str):
        weight, content = 1.0, given.strip()
        if found := _WEIGHT.fullmatch(content):
            weight, content = float(found[1]), found[2]
        elif images and (found := _WEIGHT_BEHIND.fullmatch(content)):
            raise ConfigError(
                f"the term {given!r} ends like a weight, which comes first: {found[2]}:{found[1]}; for this text write "
                f"text:{given}"
            )
        elif content.startswith("-"):
            weight, content = -1.0, content[1:]
        return *(_read_content(content) if images else (None, content)), weight
    if isinstance(given, Mapping):
        if unknown := [name for name in given if name not in ("image", "text", "weight")]:
            raise ConfigError(f"unknown field of a term: {unknown[0]!r} (expected image, text, weight)")
        return given.get("image"), given.get("text"), given.get("weight", 1.0)
    if not isinstance(given, tuple | list):
        return given, None, 1.0
    if len(given) != 2:
        raise ConfigError(f"invalid term: {len(given)} values (expected {TERM_FORMAT})")
    held, weight = given if isinstance(given[1], Real) else (given, 1.0)
    if isinstance(held, str):
        return *_read_content(held), weight
    return (*held, weight) if isinstance(held, tuple | list) and len(held) == 2 else (held, None, weight)


def _read_content(content: str) -> tuple[str | None, str | None]:
    """Return the image and the text of `IMAGE`, `TEXT` or `IMAGE + TEXT`."""
    content = content.strip()
    if content.startswith("text:"):
        return None, content.removeprefix("text:")
    path = content.removeprefix("image:").strip()
    image, plus, text = path.partition(" + ")
    if not plus or os.path.lexists(find_path(str(expand_user(path)))):
        image, text = path, ""
    return (image.strip(), text) if content.startswith("image:") or _is_path(image) else (None, content)


def _is_path(text: str) -> bool:
    named = _REGION.sub("", text).lower().endswith(IMAGE_SUFFIXES)
    return named or _PATH.match(text) is not None or is_web_address(text)


def describe_term(term: Term) -> str:
    """Return a term as a title shows it, such as `2 * a.jpg + 'in red'`; several images are joined by `+` too."""
    shown = [str(image) for image in term.images if isinstance(image, str | Path)]
    content = " + ".join([*shown, *([repr(term.text)] if term.text else [])]) or "an embedding"
    return content if term.weight == 1 else f"{term.weight:g} * {content}"
