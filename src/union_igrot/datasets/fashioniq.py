"""FashionIQ: clothes and what should be different, in three categories.

Source: XiaoxiaoGuo/fashion-iq. Two galleries are in use and their metrics cannot be compared: `original` is the
category's split file; `val` (yanbeic/VAL) is every image that the queries name, with each caption a query of its
own and the reference excluded. Does not know how queries are embedded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from union_igrot.datasets.annotations import Record, as_name, as_text, choose, once, read_list, read_records
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import Template, Wording, default_prompt, template
from union_igrot.errors import ConfigError, DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = ("val", "train", "test")


@final
@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    candidate: str
    target: str | None
    captions: tuple[str, str]


def fashioniq(
    files: Files,
    split: str = "val",
    *,
    category: str | None = None,
    gallery: str = "original",
    captions: str | None = None,
    prompt: str | None = None,
    preset: str = "official",
) -> Benchmark:
    """Read one category of FashionIQ.

    Args:
        files: The dataset's folder, with `captions/` (or `json/`), `image_splits/` and `images/`.
        split: `val`, `train`, or `test` (whose targets are not published).
        category: `dress`, `shirt` or `toptee`. The published result is the mean over the three.
        gallery: `original` or `val`.
        captions: `joined`: a query a row, of both captions; `each`: a query a caption. By default `joined` for the
            original gallery and `each` for VAL's.
        prompt: See `prompts`.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The benchmark. Query ids are `category-split-row`, followed by `-0` and `-1` where each caption asks.
    """
    if category is None:
        raise ConfigError(f"category is not given; choose one of {', '.join(CATEGORIES)}, and average over them")
    choose("category", category, CATEGORIES)
    choose("gallery", gallery, ("original", "val"))
    own = gallery == "val"
    each = choose("captions", captions or ("each" if own else "joined"), ("joined", "each")) == "each"
    if each and prompt is not None:
        raise ConfigError("prompt joins two captions, but captions=each asks with one; leave prompt out")
    prompt = default_prompt("fashioniq") if prompt is None else prompt
    rows, names = _read(files, split, category)
    if own:
        if split == "test":
            raise ConfigError("gallery=val holds the targets, which split=test does not name; take gallery=original")
        names = {name: row.where for row in rows for name in (row.candidate, row.target) if name is not None}
        names = dict(sorted(names.items()))
    _check_named(rows, names)
    items = [GalleryItem(name, _picture(files, name, where)) for name, where in names.items()]
    queries = _queries(rows, files, f"{category}-{split}", template("fashioniq", prompt), each, own)
    if any(len(query.wordings) > 1 for query in queries):
        prompt = f"{prompt}, unit embeddings of both orders averaged"
    note = f"gallery={gallery}; {'each caption asks' if each else 'both captions joined'}; FashionIQ {category}"
    protocol = Protocol(
        name=preset,
        metrics=("R@10", "R@50"),
        primary="R@10",
        exclude_reference=own,
        means=(("R@10", "R@50"),),
        prompt="caption as it stands" if each else prompt,
        note=f"{note}; the dataset's metric is the mean over {', '.join(CATEGORIES)}",
    )
    return Benchmark(f"fashioniq_{category}", split, "cir", queries, items, protocol)


def _read(files: Files, split: str, category: str) -> tuple[list[_Row], dict[str, str]]:
    captions = f"cap.{category}.{split}.json"
    records = read_records(files.annotation(f"captions/{captions}", f"json/{captions}"))
    listing = files.annotation(f"image_splits/split.{category}.{split}.json")
    names: dict[str, str] = {}
    for row, value in enumerate(read_list(listing)):
        where = f"{listing}, row {row}"
        once(_asin(value, "entry", where), where, names)
    return [_row(record, split == "test") for record in records], names


def _row(record: Record, hidden: bool) -> _Row:
    given = record.get("captions")
    if not isinstance(given, list) or len(given) != 2:
        raise DataError(f"{record.where}: captions must be a list of two texts; fetch the file again")
    first, second = (as_text(caption, "captions", record.where) for caption in given)
    candidate = _asin(record.get("candidate"), "candidate", record.where)
    target = None if hidden else _asin(record.get("target"), "target", record.where)
    if candidate == target:
        raise DataError(f"{record.where}: the candidate is its own target, {target!r}; fetch the file again")
    return _Row(record.where, candidate, target, (first, second))


def _asin(value: object, what: str, where: str) -> str:
    name = as_name(value, what, where)
    if "/" in name or "\\" in name:
        raise DataError(f"{where}: {what} is {name!r}, a path; it must be a product's number")
    return name


def _check_named(rows: list[_Row], names: dict[str, str]) -> None:
    for row in rows:
        if row.target is not None and row.target not in names:
            raise DataError(f"{row.where}: the target {row.target!r} is not in the split file; fetch both files again")


def _picture(files: Files, name: str, where: str) -> Path:
    return files.image(where, f"images/{name}.png", f"images/{name}.jpg", f"images/{name}.jpeg")


def _queries(rows: list[_Row], files: Files, prefix: str, word: Template, each: bool, exclude: bool) -> list[Query]:
    queries = []
    for number, row in enumerate(rows):
        name = f"{prefix}-{number}"
        first, second = row.captions
        asked: dict[str, Wording] = {f"{name}-0": first, f"{name}-1": second}
        if not each:
            asked = {name: word({"c1": first, "c2": second})}
        image = _picture(files, row.candidate, row.where)
        targets = () if row.target is None else (row.target,)
        gone = (row.candidate,) if exclude else ()
        queries += [Query(key, image, text, targets, gone) for key, text in asked.items()]
    return queries
