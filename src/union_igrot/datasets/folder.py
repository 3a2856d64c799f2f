"""The user's own images: a folder becomes benchmarks and a training set.

Triplets give composed retrieval: the gallery of a split is every image its rows name, enlarged by `gallery.txt`, and
a query's own reference is excluded from its ranking. Photos and sketches with classes give sketch retrieval: sketches
ask, the photos of the split answer, and those of the same class are relevant. How a folder is laid out and how splits
come about stands in `layouts`. Does not know how images become tensors, nor how metrics are computed.
"""

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, final

from union_igrot.datasets.layouts import SPLITS, Entry, Row, Rows, Sample, Samples, read_folder
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.images.decode import broken_images, check_image
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, TrainingSet, Triplet

_CIR = Protocol(metrics=("R@1", "R@5", "R@10", "R@50", "mAP@10", "mAP"), primary="mAP@10", exclude_reference=True)
_SBIR = Protocol(metrics=("mAP", "mAP@200", "P@100", "P@200", "R@1", "R@10"), primary="mAP")
_Item = TypeVar("_Item")


def folder_benchmark(
    root: str | Path, split: str = "val", *, text: str | None = None, on_missing: str = "error", verify: bool = False
) -> Benchmark:
    """Read one split of a folder as a benchmark named `folder`.

    Args:
        root: The folder, in one of the known layouts.
        split: `val` or `test`.
        text: Prompt of every sketch query. Triplets carry their own text.
        on_missing: `error`, or `skip`: missing images are left out, and so are the queries that lose their own
            image or all of their answers; `skipped` counts both together, and the note says how many of each.
        verify: Decode every image now, and treat what cannot be decoded as missing.

    Returns:
        The benchmark. The note of its protocol says how the splits came about.

    Raises:
        ConfigError: Where `split` or `on_missing` is another word.
        DataError: Where the layout, a row or the split is wrong. Names the file and the line.
        ImageError: Where an image is missing under `error`. Names the file and the line.
    """
    _choose("split", split, ("val", "test"))
    _choose("on_missing", on_missing, ("error", "skip"))
    data = read_folder(root)
    pick = _Pick(data.root, on_missing, verify)
    if isinstance(data, Rows):
        return _cir_benchmark(data, split, pick)
    return _sbir_benchmark(data, split, text, pick)


def folder_training(
    root: str | Path,
    *,
    pairs: int = 2500,
    seed: int = 0,
    text: str | None = None,
    on_missing: str = "error",
    verify: bool = False,
) -> TrainingSet:
    """Read the train split of a folder as a training set named `folder`.

    Triplets give one sample a row and target, in the order of the file. Sketches give `pairs` samples: classes take
    turns, and within a class all sketches and all photos are used equally often, in an order drawn with `seed`.

    Args:
        root: The folder, in one of the known layouts.
        pairs: How many pairs of a sketch and a photo of its class are drawn, at least 1.
        seed: Seed of the draw.
        text: Prompt of every sketch. Triplets carry their own text.
        on_missing: As for `folder_benchmark`.
        verify: As for `folder_benchmark`.

    Returns:
        The training set. `group` is the class of a pair, or the path of a triplet's target.

    Raises:
        ConfigError: Where `pairs` is below 1 or `on_missing` is another word.
        DataError: Where the layout, a row or the split is wrong. Names the file and the line.
        ImageError: Where an image is missing under `error`. Names the file and the line.
    """
    if pairs < 1:
        raise ConfigError(f"pairs is {pairs}; give a number >= 1")
    _choose("on_missing", on_missing, ("error", "skip"))
    data = read_folder(root)
    pick = _Pick(data.root, on_missing, verify)
    if isinstance(data, Rows):
        return _cir_training(data, pick)
    return _sbir_training(data, pairs, random.Random(seed), text, pick)


@final
class _Pick:
    """Tells which images are there, and counts what is left out."""

    def __init__(self, root: Path, on_missing: str, verify: bool) -> None:
        self.root, self.skip, self.verify = root, on_missing == "skip", verify
        self.images = self.queries = 0

    @property
    def skipped(self) -> int:
        return self.images + self.queries

    def absent(self, named: Mapping[str, str]) -> set[str]:
        """Of paths, and the places that name them, give the paths that cannot be used."""
        faults: dict[str, str] = {}
        for path in named:
            try:
                check_image(self.root / path)
            except ImageError as error:
                faults[path] = str(error)
        if self.verify:
            present = {self.root / path: path for path in named if path not in faults}
            faults |= {present[file]: why for file, why in broken_images(present)}
        if faults and not self.skip:
            first = next(path for path in named if path in faults)
            more = f" ({len(faults) - 1} more are missing or broken)" if len(faults) > 1 else ""
            raise ImageError(f"{named[first]}: {faults[first]}, or set on_missing=skip{more}")
        self.images = len(faults)
        return set(faults)

    def keep(self, entries: Sequence[Entry], kept: list[Entry], split: str) -> list[Entry]:
        """Count the queries that went with their images; at least one has to stay."""
        self.queries = len(entries) - len(kept)
        if not kept:
            raise DataError(f"{self.root}: {self.note(split)}, which leaves no query; add the images")
        return kept

    def note(self, split: str) -> str:
        """Say what was left out, for people."""
        return f"{self.images} missing images of {split} left out, {self.queries} queries with them"


# --- composed retrieval


def _cir_entries(data: Rows, split: str, pick: _Pick) -> tuple[list[Row], dict[str, str], set[str]]:
    rows = _of_split(data, data.splits, split)
    named = _pictures(rows)
    if split != "train":
        named |= {path: where for path, where in data.extra.items() if path not in named}
    absent = pick.absent(named)
    kept = [row for row in rows if row.key not in absent and not absent.issuperset(row.targets)]
    return pick.keep(rows, kept, split), named, absent


def _cir_benchmark(data: Rows, split: str, pick: _Pick) -> Benchmark:
    rows, named, absent = _cir_entries(data, split, pick)
    queries = [
        Query(
            id=row.id,
            image=data.root / row.key,
            text=row.text,
            targets=tuple(path for path in row.targets if path not in absent),
            exclude=(row.key,),
        )
        for row in rows
    ]
    gallery = [GalleryItem(path, data.root / path) for path in named if path not in absent]
    trained = _pictures(data.splits["train"]).keys()
    protocol = _noted(_CIR, data.note, trained, _pictures(rows).keys(), "images", split, pick)
    return Benchmark("folder", split, "cir", queries, gallery, protocol, pick.skipped)


def _cir_training(data: Rows, pick: _Pick) -> TrainingSet:
    rows, _, absent = _cir_entries(data, "train", pick)
    triplets = [
        Triplet(data.root / row.key, row.text, data.root / target, target, "cir")
        for row in rows
        for target in row.targets
        if target not in absent
    ]
    return TrainingSet("folder", triplets, skipped=pick.skipped)


def _pictures(rows: Iterable[Row]) -> dict[str, str]:
    named: dict[str, str] = {}
    for row in rows:
        for path in (row.key, *row.targets):
            named.setdefault(path, row.where)
    return named


# --- sketch retrieval


def _sbir_entries(data: Samples, split: str, pick: _Pick) -> tuple[list[Sample], list[Sample]]:
    samples = _of_split(data, data.splits, split)
    if not any(sample.sketch for sample in samples):
        raise DataError(f"{data.root}: split {split!r} has photos but no sketch ({data.note}); add sketches to it")
    answered = {sample.key for sample in samples if not sample.sketch}
    for sample in samples:
        if sample.sketch and sample.key not in answered:
            raise DataError(
                f"{sample.where}: class {sample.key!r} has sketches but no photo in split {split!r}; "
                "add photos of this class or remove its sketches"
            )
    absent = pick.absent({sample.path: sample.where for sample in samples})
    present = [sample for sample in samples if sample.path not in absent]
    photos = [sample for sample in present if not sample.sketch]
    answered = {photo.key for photo in photos}
    sketches = [sample for sample in present if sample.sketch]
    return pick.keep(sketches, [sketch for sketch in sketches if sketch.key in answered], split), photos


def _sbir_benchmark(data: Samples, split: str, text: str | None, pick: _Pick) -> Benchmark:
    sketches, photos = _sbir_entries(data, split, pick)
    answers = {label: tuple(photo.path for photo in group) for label, group in _by_class(photos).items()}
    queries = [
        Query(sketch.path, data.root / sketch.path, text, answers[sketch.key], label=sketch.key) for sketch in sketches
    ]
    gallery = [GalleryItem(photo.path, data.root / photo.path, photo.key) for photo in photos]
    trained = {sample.key for sample in data.splits["train"]}
    protocol = _noted(_SBIR, data.note, trained, {sketch.key for sketch in sketches}, "classes", split, pick)
    return Benchmark("folder", split, "sbir", queries, gallery, protocol, pick.skipped)


def _sbir_training(data: Samples, pairs: int, draw: random.Random, text: str | None, pick: _Pick) -> TrainingSet:
    sketches, photos = _sbir_entries(data, "train", pick)
    asking, answering = _by_class(sketches), _by_class(photos)
    turns = {label: (_turns(asking[label], draw), _turns(answering[label], draw)) for label in sorted(asking)}
    order = _turns(list(turns), draw)
    triplets = []
    for _ in range(pairs):
        label = next(order)
        sketch, photo = (next(turn) for turn in turns[label])
        triplets.append(Triplet(data.root / sketch.path, text, data.root / photo.path, label, "sbir"))
    return TrainingSet("folder", triplets, tuple(turns), pick.skipped)


def _by_class(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.key].append(sample)
    return groups


def _turns(items: list[_Item], draw: random.Random) -> Iterator[_Item]:
    while True:
        yield from draw.sample(items, len(items))


def _of_split(data: Rows | Samples, splits: Mapping[str, list[Entry]], split: str) -> list[Entry]:
    if not splits[split]:
        counts = ", ".join(f"{name} {len(splits[name])}" for name in SPLITS)
        raise DataError(f"{data.root}: split {split!r} is empty ({counts}; {data.note}); add rows or classes to it")
    return splits[split]


def _noted(
    protocol: Protocol, note: str, trained: Collection[str], here: Collection[str], what: str, split: str, pick: _Pick
) -> Protocol:
    parts = [
        "own images",
        note,
        f"{len(set(trained).intersection(here))} of the {len(here)} {what} of {split} are in train too",
    ]
    return replace(protocol, note="; ".join([*parts, pick.note(split)] if pick.skipped else parts))


def _choose(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
