"""Queries of a gallery: weighted terms, and liked or disliked results; their embeddings; and files of queries.

Terms are images, texts, and images with a text, which are added or subtracted with a weight.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from union_igrot.errors import ConfigError, DataError, UnionError
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.filters import match_any
from union_igrot.gallery.ingest.embedding import read_vectors
from union_igrot.gallery.ingest.entries import path_as_text
from union_igrot.gallery.metadata import TASKS
from union_igrot.gallery.results import Hit
from union_igrot.images.decode import check_image, open_region, split_region
from union_igrot.images.formats import IMAGE_SUFFIXES
from union_igrot.images.transforms import ImageToTensor
from union_igrot.models.devices import full_precision
from union_igrot.models.model import IGROTModel
from union_igrot.storage.files import absolute_path, expand_user, find_path, is_web_address
from union_igrot.storage.text import read_csv, read_json_lines

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
    def task(self) -> Literal["cir", "sbir"] | None:
        """Its task, which decides how its scores are calibrated; None without an image, which is not calibrated."""
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


ALPHA: Final = 1.0  # weight of the query itself in a refined one
BETA: Final = 0.75  # weight of the mean of the liked results
GAMMA: Final = 0.15
"""Weight of the mean of the disliked results. The three are the values that Manning, Raghavan and Schütze,
Introduction to Information Retrieval (2008), section 9.1.1, call reasonable, for the method of Rocchio, Relevance
feedback in information retrieval (1971)."""
BATCH: Final = 256  # queries embedded at once, as in an evaluation

_FIELDS: Final = ("image", "text", "vector", "terms", "liked", "disliked", "exclude")
_CSV_FIELDS: Final = ("id", "image", "text")
_IDS_PER_FILTER: Final = 500
_CANCELED: Final = 1e-6  # length of a weighted sum of unit vectors below which its direction is rounding


@dataclass(frozen=True)
class GalleryQuery:
    """One query."""

    terms: tuple[Term, ...] = ()  # first its images with its text, if it has any
    liked: tuple[str, ...] = ()  # ids of results to move towards
    disliked: tuple[str, ...] = ()  # ids of results to move away from; they are not among the hits
    exclude: tuple[str, ...] = ()  # ids that are not among the hits

    @property
    def excluded(self) -> tuple[str, ...]:
        """All ids that are not among the hits."""
        return tuple(dict.fromkeys((*self.exclude, *self.disliked)))


def parse_query(given: Mapping[str, Any]) -> GalleryQuery:
    """Validate one query."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"invalid query: {given!r} (expected fields such as {{'text': 'a dog'}})")
    if unknown := [name for name in given if name not in _FIELDS]:
        raise ConfigError(f"unknown field of a query: {unknown[0]!r} (expected {', '.join(_FIELDS)})")
    text = given.get("text")
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"invalid value for text: {type(text).__name__} (expected str)")
    own = Term(as_items(given.get("image")), text if text and text.strip() else None)
    query = GalleryQuery(
        ((own,) if own.images or own.text else ())
        + _vector_terms(given.get("vector"))
        + tuple(parse_term(one) for one in as_items(given.get("terms"))),
        *(row_ids(given.get(name)) for name in ("liked", "disliked", "exclude")),
    )
    if not (query.terms or query.liked):
        raise ConfigError("the query is empty (expected an image, a text, both, a vector, terms, or liked results)")
    if query.terms and not any(term.weight > 0 for term in query.terms):
        found = "only negative terms" if all(term.weight for term in query.terms) else "no term of positive weight"
        raise ConfigError(f"the query has {found}; add one positive term: an image or a text")
    if both := set(query.liked) & set(query.disliked):
        raise ConfigError(f"{min(both)!r} is both liked and disliked")
    return query


def _vector_terms(given: object) -> tuple[Term, ...]:
    if given is None:
        return ()
    vectors = read_vectors(given)
    if len(vectors) > 1:
        raise ConfigError(f"invalid value for vector: {len(vectors)} rows (expected one; search_many takes several)")
    return (Term(vector=vectors[0]),)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Begin an error with the name of a query, if it has one."""
    try:
        yield
    except UnionError as error:
        raise (type(error)(f"{name}: {error}") if name else error) from error.__cause__


def as_items(given: object) -> tuple[Any, ...]:
    """Return one item or several as a tuple, None as an empty one; an array, a tensor and a string are one item."""
    if given is None:
        return ()
    kinds = (str, bytes, bytearray, memoryview, Path, Image.Image, np.ndarray, Tensor, Hit, Mapping)
    if isinstance(given, kinds) or not hasattr(given, "__iter__") or hasattr(given, "read"):
        return (given,)
    return tuple(given)


def row_ids(given: object) -> tuple[str, ...]:
    """Return the ids of rows that are given by id, path or hit, one or several; anything else is a ConfigError."""
    items = as_items(given)
    if wrong := [one for one in items if not isinstance(one, Hit | Path | str)]:
        raise ConfigError(f"invalid image of the gallery: {wrong[0]!r} (expected its id, its path or a hit)")
    return tuple(one.id if isinstance(one, Hit) else path_id(one) if isinstance(one, Path) else one for one in items)


def path_id(path: str | Path) -> str:
    """Return the id of a file's row: its absolute path."""
    return path_as_text(absolute_path(path))


def resolve_ids(index: VectorIndex, names: Sequence[str], *, missing_files: bool = False) -> tuple[str, ...]:
    """Replace relative paths by the ids of their rows; with `missing_files` also those of files that are gone."""
    candidates = {
        name: full
        for name in names
        if (full := path_id(name)) != name and (missing_files or os.path.exists(full))  # noqa: PTH110 - Path's raises for long names
    }
    existing = _existing_ids(index, [*candidates, *candidates.values()])
    return tuple(
        candidates[name] if name not in existing and candidates.get(name) in existing else name for name in names
    )


def _existing_ids(index: VectorIndex, names: Sequence[str]) -> set[str]:
    filters = [match_any("id", names[at : at + _IDS_PER_FILTER]) for at in range(0, len(names), _IDS_PER_FILTER)]
    return {str(name) for where in filters for batch in index.scan(["id"], where) for name in batch["id"]}


def resolve_queries(index: VectorIndex, queries: Sequence[GalleryQuery]) -> list[GalleryQuery]:
    """Replace relative paths in queries by the ids of their rows."""
    given = [name for one in queries for name in (*one.liked, *one.disliked, *one.exclude)]
    found = dict(zip(given, resolve_ids(index, given), strict=True))

    def ids(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(found[name] for name in names)

    return [replace(one, liked=ids(one.liked), disliked=ids(one.disliked), exclude=ids(one.exclude)) for one in queries]


def read_feedback(
    index: VectorIndex, queries: Sequence[GalleryQuery], names: Sequence[str], dim: int
) -> Mapping[str, Float[Tensor, " dim"]]:
    """Read the embeddings, of width `dim`, of liked and disliked results; one that does not exist is a DataError."""
    wanted = {row_id: name for one, name in zip(queries, names, strict=True) for row_id in (*one.liked, *one.disliked)}
    if not wanted:
        return {}
    existing = _existing_ids(index, list(wanted))
    if missing := [row_id for row_id in wanted if row_id not in existing]:
        with named_errors(wanted[missing[0]]):
            raise DataError(f"{missing[0]!r} is not in {index.uri} (expected an image of the gallery)")
    rows = index.fetch(list(wanted))
    return dict(zip(rows.ids, rows.vectors[:, :dim], strict=True))


@torch.inference_mode()
def embed_gallery_queries(
    model: IGROTModel,
    queries: Sequence[GalleryQuery],
    feedback: Mapping[str, Float[Tensor, " dim"]],
    names: Sequence[str],
) -> tuple[Float[Tensor, "queries dim"], Float[Tensor, "queries tasks"]]:
    """Embed queries: the normalized weighted sum of their terms, refined by liked and disliked results.

    An image without text is embedded with the null text, as in training; a text alone is its own embedding. Several
    images of a term give the normalized mean of their unit embeddings, each with the text.

    Returns:
        Unit embeddings, float32, on the CPU; and how much of each task's calibration belongs to a query: 1 for the
        task of a single term, for several terms the same weighted sum over their tasks as over their embeddings, so
        that their calibrated scores add up.

    Raises:
        ConfigError: If the terms of a query cancel each other out.
    """
    numbered = [(i, term) for i, one in enumerate(queries) for term in one.terms]
    embedded = _embed_terms(model, [term for _, term in numbered], [names[i] for i, _ in numbered])
    own = torch.tensor([[float(term.task == task) for task in TASKS] for _, term in numbered]).reshape(-1, len(TASKS))
    sums, tasks = torch.zeros(len(queries), model.backbone.dim), torch.zeros(len(queries), len(TASKS))
    at = 0
    for i, one in enumerate(queries):
        rows = slice(at, at := at + len(one.terms))
        if len(one.terms) == 1:
            sums[i], tasks[i] = embedded[rows][0], own[rows][0]
        elif one.terms:
            weights = torch.tensor([term.weight for term in one.terms])
            total = weights @ normalize(embedded[rows], dim=-1)
            if float(length := total.norm()) < _CANCELED * float(weights.abs().sum()):
                with named_errors(names[i]):
                    raise ConfigError("the terms of the query cancel each other out; change a weight or a term")
            sums[i], tasks[i] = total / length, weights @ own[rows] / length
        if one.liked or one.disliked:
            query = sums[i] if one.terms else None
            sums[i] = refine_query(query, [feedback[id_] for id_ in one.liked], [feedback[id_] for id_ in one.disliked])
    return sums, tasks


def _embed_terms(model: IGROTModel, terms: Sequence[Term], names: Sequence[str]) -> Float[Tensor, "terms dim"]:
    pairs = [(i, image) for i, one in enumerate(terms) for image in one.images]
    text_only = [i for i, one in enumerate(terms) if one.text and not one.images]
    mean = torch.zeros(len(terms), model.backbone.dim)
    for i, one in enumerate(terms):
        if one.vector is not None:
            if one.vector.shape != mean[i].shape:
                with named_errors(names[i]):
                    raise ConfigError(f"vector= has width {len(one.vector)} (expected {mean.shape[1]}, the model's)")
            mean[i] = one.vector
    with full_precision(model.device):
        for at in range(0, len(pairs), BATCH):
            some = pairs[at : at + BATCH]
            embedded = model.embed_queries(_load_images(some, model, names), [terms[i].text for i, _ in some])
            for (i, _), row in zip(some, embedded.float().cpu(), strict=True):
                # The embedding of a single image is unchanged, to the last bit as in an evaluation.
                mean[i] += row if len(terms[i].images) == 1 else normalize(row, dim=-1)
        for at in range(0, len(text_only), BATCH):
            chosen = text_only[at : at + BATCH]
            mean[chosen] = model.embed_queries(None, [terms[i].text for i in chosen]).float().cpu()
    for i, one in enumerate(terms):
        if one.text and not one.images and not mean[i].any():
            with named_errors(names[i]):
                raise ConfigError(f"{model.backbone.name} knows no word of {one.text!r}; use other words")
        if len(one.images) > 1:
            mean[i] = normalize(mean[i], dim=-1)
    return mean


def _load_images(
    numbered: Sequence[tuple[int, Any]], model: IGROTModel, names: Sequence[str]
) -> Float[Tensor, "images 3 size size"]:
    to_tensor, size = ImageToTensor(model.preprocess), model.preprocess.size

    def load(one: tuple[int, Any]) -> Tensor:
        i, image = one
        with named_errors(names[i]):
            return to_tensor(open_region(image, at_least=size))

    if len(numbered) == 1:
        return load(numbered[0])[None]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return torch.stack(list(pool.map(load, numbered)))


def refine_query(
    query: Float[Tensor, " dim"] | None,
    liked: Sequence[Float[Tensor, " dim"]],
    disliked: Sequence[Float[Tensor, " dim"]],
) -> Float[Tensor, " dim"]:
    """Move a query towards liked results and away from disliked ones.

    Rocchio's method on unit vectors: `ALPHA * query + BETA * mean(liked) - GAMMA * mean(disliked)`, normalized.
    Without a query, the liked results are the query.
    """
    parts = [] if query is None else [ALPHA * query]
    if liked:
        parts.append(BETA * torch.stack(list(liked)).mean(0))
    if disliked:
        parts.append(-GAMMA * torch.stack(list(disliked)).mean(0))
    return normalize(torch.stack(parts).sum(0), dim=-1)


@dataclass(frozen=True)
class QueryLine:
    """One query of a file."""

    name: str | int  # its `id`, or its number in the file, from 1
    query: dict[str, Any]  # its fields, as for `Gallery.search_many`; images are paths
    location: str = ""  # file and line; empty for a query from elsewhere


def read_queries(path: Path) -> list[QueryLine]:
    """Read a file of queries. Paths in it are relative to the file.

    Args:
        path: `.jsonl`, with objects of `image` (a path or a list of paths), `text`, `terms`, `id`, `liked`, `disliked`
            and `exclude` (lists of ids), all optional; or `.csv`, with a header of `image`, `text` and `id` in any
            order.
    """
    readers = {".jsonl": _read_json_queries, ".csv": _read_csv_queries}
    if path.suffix.lower() not in readers:
        raise DataError(f"invalid value for queries: {path} (expected a .jsonl or .csv file)")
    if not path.exists():
        raise DataError(f"queries={path}: no such file")
    lines: dict[str | int, QueryLine] = {}
    for location, fields in readers[path.suffix.lower()](path):
        line = make_query_line(fields, path.parent, location, len(lines) + 1)
        if line.name in lines:
            raise DataError(f"{location}: the id {line.name!r} is already used in {lines[line.name].location}")
        lines[line.name] = line
    if not lines:
        raise DataError(f"queries={path} holds no query; add lines with image, text or both")
    return list(lines.values())


def _read_json_queries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for location, fields in read_json_lines(path):
        if not isinstance(fields, dict):
            raise DataError(f'{location}: not an object (expected {{"image": "a.jpg", "text": "in red"}})')
        _check_fields(location, list(fields), ("id", *_FIELDS))
        yield location, {name: value for name, value in fields.items() if value is not None}


def _read_csv_queries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = read_csv(path)
    location, row = next(rows, ("", []))
    header = [cell.strip() for cell in row]
    _check_fields(location, header, _CSV_FIELDS)
    for location, row in rows:
        if len(row) != len(header):
            raise DataError(f"{location}: has {len(row)} cells, the header {len(header)}")
        yield location, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}


def _check_fields(location: str, names: list[str], allowed: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in allowed]:
        raise DataError(f"{location}: unknown field {unknown[0]!r} (expected {', '.join(allowed)})")
    if len(set(names)) != len(names):
        raise DataError(f"{location}: a name is repeated in the header")


def _located(term: Term, folder: Path) -> Term:
    if not all(isinstance(image, str) for image in term.images):
        raise DataError(f"invalid image of a term: {term.images[0]!r} (expected a path)")
    return replace(term, images=tuple(folder / expand_user(image) for image in term.images))


def make_query_line(
    fields: dict[str, Any], folder: Path = Path(), location: str = "", default_name: int = 1
) -> QueryLine:
    """Validate the fields of a query whose images are paths, relative to a folder; each image has to exist."""
    name = fields.pop("id", default_name)
    if not isinstance(name, str | int):
        raise DataError(f"{location}: invalid id {name!r} (expected text or a number)")
    for field in ("image", "liked", "disliked", "exclude"):
        if not all(isinstance(one, str) for one in as_items(fields.get(field))):
            raise DataError(f"{location}: invalid {field} {fields[field]!r} (expected text, or a list of texts)")
    try:
        with named_errors(location):
            fields["terms"] = [_located(parse_term(one), folder) for one in as_items(fields.get("terms"))]
            fields["image"] = [folder / expand_user(image) for image in as_items(fields.get("image"))]
            for image in (*fields["image"], *(image for term in parse_query(fields).terms for image in term.images)):
                check_image(Path(find_path(split_region(image)[0])))
    except ConfigError as error:
        raise DataError(str(error)) from None
    return QueryLine(name, fields, location)
