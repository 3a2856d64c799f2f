"""FashionIQ: clothes and two captions of what should be different, in three categories.

Source: XiaoxiaoGuo/fashion-iq. Two galleries are in use and their metrics cannot be compared: `original` is the
category's split file; `val` (yanbeic/VAL) is every image that the queries name, with each caption a query of its
own and the reference excluded.
"""

from pathlib import Path
from typing import NamedTuple

from union_igrot.datasets.annotations import DatasetFolder, Record, check_name, check_text, read_list, read_records
from union_igrot.datasets.builtin import CATEGORIES, FASHIONIQ
from union_igrot.datasets.registry import Template, Text
from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.text import refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query


class _CaptionPair(NamedTuple):
    place: str
    candidate: str
    target: str | None
    captions: tuple[str, str]


def read_fashioniq(
    folder: DatasetFolder,
    split: str,
    *,
    category: str,
    gallery: str,
    captions: str | None,
    prompt: str | None,
    preset: str,
) -> Benchmark:
    """Read one category of FashionIQ.

    Args:
        folder: The dataset's folder, with `captions/` (or `json/`), `image_splits/` and `images/`.
        split: `val`, `train`, or `test` (whose targets are not published).
        category: `dress`, `shirt` or `toptee`. The published result is the mean over the three.
        gallery: `original` or `val`.
        captions: `joined`: one query of both captions for each row; `each`: one query for each caption. By default
            `joined` for the original gallery and `each` for VAL's.
        prompt: Name or template.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The benchmark. Query ids are `category-split-row`, followed by `-0` and `-1` if each caption is a query.
    """
    val = gallery == "val"
    each = (captions or ("each" if val else "joined")) == "each"
    if each and prompt is not None:
        raise ConfigError("prompt joins two captions and cannot be used with captions=each; leave it out")
    if val and split == "test":
        raise ConfigError("gallery=val needs the targets, which are not published for split=test; use gallery=original")
    wording = FASHIONIQ.find_prompt(prompt)
    rows, places = _read(folder, split, category)
    if val:
        places = {name: row.place for row in rows for name in (row.candidate, row.target) if name is not None}
        places = dict(sorted(places.items()))
    for row in rows:
        if row.target is not None and row.target not in places:
            raise DataError(f"{row.place}: target {row.target!r} is not in the split file; download both files again")
    items = [GalleryItem(name, _image(folder, name, place)) for name, place in places.items()]
    queries = [
        Query(name, _image(folder, row.candidate, row.place), text, targets, (row.candidate,) if val else ())
        for number, row in enumerate(rows)
        for targets in [() if row.target is None else (row.target,)]
        for name, text in _texts(f"{category}-{split}-{number}", row.captions, None if each else wording.text)
    ]
    note = f"gallery={gallery}; {'each caption asks' if each else 'both captions joined'}; FashionIQ {category}"
    averaged = any(len(query.wordings) > 1 for query in queries)
    name = f"{wording.name}, unit embeddings of both orders averaged" if averaged else wording.name
    protocol = Protocol(
        name=preset,
        metrics=("R@10", "R@50"),
        primary="R@10",
        exclude_reference=val,
        means=(("R@10", "R@50"),),
        prompt="caption as it stands" if each else name,
        note=f"{note}; the dataset's metric is the mean over {', '.join(CATEGORIES)}",
    )
    return Benchmark(f"fashioniq_{category}", split, "cir", queries, items, protocol)


def _read(folder: DatasetFolder, split: str, category: str) -> tuple[list[_CaptionPair], dict[str, str]]:
    """Return the rows, and the place of each image of the split file."""
    captions = f"cap.{category}.{split}.json"
    records = read_records(folder.annotation(f"captions/{captions}", f"json/{captions}"))
    file = folder.annotation(f"image_splits/split.{category}.{split}.json")
    places: dict[str, str] = {}
    for row, value in enumerate(read_list(file)):
        place = f"{file}, row {row}"
        refuse_repeated(_product(value, "entry", place), place, places)
    return [_caption_pair(record, split == "test") for record in records], places


def _caption_pair(record: Record, hidden: bool) -> _CaptionPair:
    captions = record.get("captions")
    if not isinstance(captions, list) or len(captions) != 2:
        raise DataError(f"{record.place}: captions must be a list of two texts; download the file again")
    first, second = (check_text(caption, "captions", record.place) for caption in captions)
    candidate = _product(record.get("candidate"), "candidate", record.place)
    target = None if hidden else _product(record.get("target"), "target", record.place)
    if candidate == target:
        raise DataError(f"{record.place}: the candidate is its own target, {target!r}; download the file again")
    return _CaptionPair(record.place, candidate, target, (first, second))


def _product(value: object, name: str, place: str) -> str:
    number = check_name(value, name, place)
    if "/" in number or "\\" in number:
        raise DataError(f"{place}: {name} is {number!r}, a path; expected the number of a product")
    return number


def _image(folder: DatasetFolder, name: str, place: str) -> Path:
    return folder.image(place, f"images/{name}.png", f"images/{name}.jpg", f"images/{name}.jpeg")


def _texts(name: str, captions: tuple[str, str], joined: Template | None) -> list[tuple[str, Text]]:
    """Return the ids and texts of a row's queries: one, or one for each caption if they are not joined."""
    first, second = captions
    if joined is None:
        return [(f"{name}-0", first), (f"{name}-1", second)]
    return [(name, joined({"c1": first, "c2": second}))]
