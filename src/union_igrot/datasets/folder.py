"""Folders of one's own images, as benchmarks and training sets.

Three layouts are known; if several exist, the first of this list is used:

1. `triplets.jsonl`, one object per line: `{"reference": path, "text": what to change or null, "targets": [path, ...]}`
   and optionally `"split"`; next to it optionally `gallery.txt`, one path per line.
2. `manifest.csv` with the columns `domain`, `path`, `class` and optionally `split`; a domain is `photo` or `sketch`.
3. Class folders `photos/<class>/...` and `sketches/<class>/...`.

Paths are relative to the folder, separated by slashes or backslashes. Hidden files and folders of storage systems are
ignored; in class folders, other files that are not images are counted in the note. Further fields and columns are
ignored. In triplets.jsonl, several texts are joined by "and", a blank text counts as null, a single target needs no
list, and a repeated row counts once.

A split is `train`, `val` or `test`, given in all rows or in none. If none is given, references (layout 1) or classes
(2, 3) are assigned 70/10/20 to train/val/test by a hash of their names; from six names on, val and test get at least
two. If only `val` is not given, a fifth of the train references or classes, chosen by the same hash, is held out as
`val`. Fewer than ten classes are not divided: instead, the sketches and the photos of each class are, if each class has
enough of both.

Triplets make composed retrieval: the gallery of a split is every image that its rows name and those of `gallery.txt`;
the reference of a query is excluded from its ranking. Photos and sketches with classes make sketch retrieval: the
queries are sketches, the gallery is the photos of the split, and photos of the same class are relevant.
"""

import hashlib
import os
import random
import reprlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NoReturn, TypeVar, final

from union_igrot.datasets.annotations import check_name, check_path, check_text, group_by
from union_igrot.errors import DataError, ImageError, check_choice, check_count
from union_igrot.images.decode import broken_images, check_image
from union_igrot.images.formats import IMAGE_SUFFIXES, describe_unused, is_ignored, is_image_name
from union_igrot.storage.files import expand_user, find_path
from union_igrot.storage.text import read_csv, read_json_lines, read_lines, refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, Task, TrainingSet, Triplet

FEW_CLASSES = 10
"""With fewer classes, images are assigned to splits within each class."""
SPLITS = ("train", "val", "test")
_HEADER = ("domain", "path", "class")
_KEYS = ("reference", "text", "targets")
_CIR = Protocol(metrics=("R@1", "R@5", "R@10", "R@50", "mAP@10", "mAP"), primary="mAP@10", exclude_reference=True)
_SBIR = Protocol(metrics=("mAP", "mAP@200", "P@100", "P@200", "R@1", "R@10"), primary="mAP")
_Item = TypeVar("_Item")


def folder_benchmark(
    root: str | Path,
    split: str = "val",
    *,
    text: str | None = None,
    on_missing: str = "error",
    verify: bool = False,
    check_images: bool = True,
) -> Benchmark:
    """Read one split of a folder as a benchmark named `folder`.

    Args:
        root: The folder, in one of the known layouts.
        split: `val` or `test`.
        text: Text of every sketch query. Triplets have their own.
        on_missing: `error`, or `skip`: missing images are left out, and so are the queries that lose their own
            image or all of their targets; `skipped` counts both together, and the note says how many of each.
        verify: Decode every image now, and treat what cannot be decoded as missing.
        check_images: Check that the images exist; otherwise only the lists are read.

    Returns:
        The benchmark. The note of its protocol says how the splits were made.

    Raises:
        ConfigError: If `split` or `on_missing` has another value.
        DataError: If the layout, a row or the split is invalid; names the file and the line.
        ImageError: If an image is missing under `error`; names the file and the line.
    """
    check_choice("split", split, ("val", "test"))
    data, used = _usable(root, split, on_missing, decode=verify, check=check_images)
    locate = partial(_locate, data.root)
    if data.is_composed:
        named, trained = (set(_places(rows)) for rows in (used.queries, data.splits["train"]))
        queries = [
            Query(
                id=row.id,
                image=locate(row.key),
                text=row.text,
                targets=tuple(path for path in row.targets if path in used.images),
                exclude=(row.key,),
            )
            for row in used.queries
        ]
    else:
        named, trained = ({row.key for row in rows} for rows in (used.queries, data.splits["train"]))
        targets = {label: tuple(photo.id for photo in group) for label, group in group_by(used.photos, _label).items()}
        queries = [Query(row.id, locate(row.id), text, targets[row.key], label=row.key) for row in used.queries]
    gallery = [GalleryItem(path, locate(path), label) for path, label in used.gallery.items()]
    what = "images" if data.is_composed else "classes"
    shared = f"{len(named & trained)} of the {len(named)} {what} of {split} are in train too"
    note = "; ".join(["own images", data.note, shared, *[used.left_out] * bool(used.skipped)])
    protocol = replace(_CIR if data.is_composed else _SBIR, note=note)
    task: Task = "cir" if data.is_composed else "sbir"
    return Benchmark("folder", split, task, queries, gallery, protocol, used.skipped)


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

    Triplets make one sample for each row and target, in the order of the file. Sketches make `pairs` samples: classes
    take turns, and within a class all sketches and all photos are used equally often, in an order drawn with `seed`.
    `group` is the class of a pair, or the path of a triplet's target.

    Other arguments and errors are those of `folder_benchmark`.
    """
    check_count("pairs", pairs)
    data, used = _usable(root, "train", on_missing, decode=verify)
    locate, draw = partial(_locate, data.root), random.Random(seed)
    if data.is_composed:
        triplets = [
            Triplet(locate(row.key), row.text, locate(target), target, "cir")
            for row in used.queries
            for target in row.targets
            if target in used.images
        ]
        return TrainingSet("folder", triplets, skipped=used.skipped)
    sketches, photos = group_by(used.queries, _label), group_by(used.photos, _label)
    turns = {label: (_turns(sketches[label], draw), _turns(photos[label], draw)) for label in sorted(sketches)}
    order = _turns(list(turns), draw)
    triplets = []
    for _ in range(pairs):
        label = next(order)
        sketch, photo = (next(turn) for turn in turns[label])
        triplets.append(Triplet(locate(sketch.id), text, locate(photo.id), label, "sbir"))
    return TrainingSet("folder", triplets, tuple(turns), used.skipped)


_label = attrgetter("key")


def _turns(items: list[_Item], draw: random.Random) -> Iterator[_Item]:
    while True:
        yield from draw.sample(items, len(items))


# --- what a folder names


@final
@dataclass(frozen=True, slots=True)
class FolderRow:
    """An image of a class, or a line of triplets.jsonl.

    `id` is the image's path, or that of the reference with the line's number; `key`, by which splits are assigned, is
    the class or the reference.
    """

    place: str
    id: str
    key: str
    split: str | None
    is_sketch: bool = False
    text: str | None = None
    targets: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class FolderRows:
    """Everything that a folder names, by split, and how the splits were made.

    `gallery` has the place of each path of gallery.txt; it is None if there are classes instead of triplets.
    """

    root: Path
    splits: Mapping[str, list[FolderRow]]
    note: str
    gallery: Mapping[str, str] | None = None

    @property
    def is_composed(self) -> bool:
        """Whether the folder has triplets."""
        return self.gallery is not None


def read_folder(folder: str | Path) -> FolderRows:
    """Read what a folder names, in the first layout that exists, and assign it to splits.

    The images are not checked, so a missing one changes no split.

    Raises:
        DataError: If there is no folder, no layout, or a row is invalid; names the file and the line.
    """
    root = expand_user(folder).absolute()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass the folder that holds the images")
    if (root / "triplets.jsonl").exists():
        triplets = _read_triplets(root / "triplets.jsonl")
        gallery = _read_gallery(root / "gallery.txt") if (root / "gallery.txt").exists() else {}
        return FolderRows(root, *_by_split(triplets, {row.key for row in triplets}, "references"), gallery)
    unused: list[str] = []
    if (root / "manifest.csv").exists():
        images = _read_manifest(root / "manifest.csv")
    elif (root / "photos").is_dir() and (root / "sketches").is_dir():
        images = [image for top in ("photos", "sketches") for image in _walk_class_folders(root, top, unused)]
    else:
        raise DataError(
            f"{root}: no known layout; add a triplets.jsonl, a manifest.csv ({','.join(_HEADER)},split), "
            "or the folders photos/<class>/ and sketches/<class>/"
        )
    left_out = describe_unused(unused)
    if not images:
        found = f" ({left_out})" if left_out else ""
        raise DataError(f"{root}: names no image{found}; known suffixes are {' '.join(IMAGE_SUFFIXES)}")
    splits, note = _by_split(images, {image.key for image in images if image.is_sketch}, "classes")
    return FolderRows(root, splits, f"{note}; not used: {left_out}" if left_out else note)


def _by_split(rows: list[FolderRow], query_keys: set[str], what: str) -> tuple[dict[str, list[FolderRow]], str]:
    """Assign the rows to splits; `query_keys` are the keys that have queries."""
    given = rows[0].split is not None
    for row in rows:
        if (row.split is not None) != given:
            raise DataError(f"{row.place}: split is {row.split!r}, unlike before; give it in all rows or in none")
    names = {row.split for row in rows}
    note, assigned = "splits as given", {row.id: row.split or "" for row in rows}
    if not given or ("train" in names and "val" not in names):
        pool = [row for row in rows if row.split in (None, "train")]
        shares = {"val": 5} if given else {"test": 5, "val": 10}
        keys, others = query_keys & {row.key for row in pool}, {row.key for row in pool} - query_keys
        within = _assign_within(pool, keys, shares) if what == "classes" and len(keys) < FEW_CLASSES else {}
        if within:
            assigned |= within
            subject = "a fifth of the train images of each class" if given else "images of each class"
            reason = f", since there are only {len(keys)} classes"
        else:
            chosen = _assign(keys, shares, least=2 if len(keys) >= 2 + 2 * len(shares) else 1)
            held_out = sum(split == "val" for split in chosen.values())
            # Classes without sketches have no queries; when val is held out, they stay in train.
            chosen |= dict.fromkeys(others, "train") if given else _assign(others, shares)
            assigned |= {row.id: chosen[row.key] for row in pool}
            subject, reason = f"{held_out} of {len(keys)} train {what}" if given else what, ""
        verb = "held out as val" if given else "dealt 70/10/20 into train/val/test"
        note = f"{subject} {verb} by a hash of their names{reason}"
    splits: dict[str, list[FolderRow]] = {name: [] for name in SPLITS}
    for row in rows:
        splits[assigned[row.id]].append(row)
    return splits, note


def _assign_within(rows: Sequence[FolderRow], query_keys: set[str], shares: Mapping[str, int]) -> dict[str, str]:
    """Assign the sketches and the photos of each class; nothing if a class with sketches has too few of either."""
    groups: defaultdict[tuple[str, bool], set[str]] = defaultdict(set)
    for row in rows:
        groups[row.key, row.is_sketch].add(row.id)
    if any(len(groups[key, is_sketch]) <= len(shares) for key in query_keys for is_sketch in (True, False)):
        return {}
    return {name: split for group in groups.values() for name, split in _assign(group, shares).items()}


def _assign(names: set[str], shares: Mapping[str, int], least: int = 1) -> dict[str, str]:
    """Assign names to splits in the order of their hashes: one in `shares[split]` of them, the rest to train.

    Each split gets at least `least` names, if there is one more name than splits before it.
    """
    counts = {
        split: max(least, round(len(names) / share)) if len(names) > number else 0
        for number, (split, share) in enumerate(shares.items(), 1)
    }
    order = [split for split, count in counts.items() for _ in range(count)]
    order += ["train"] * (len(names) - len(order))
    return dict(zip(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()), order, strict=True))


def _read_triplets(file: Path) -> list[FolderRow]:
    rows: list[FolderRow] = []
    seen: dict[tuple[str, str | None, frozenset[str]], FolderRow] = {}
    for place, value in read_json_lines(file):
        row = _triplet(value, place)
        first = seen.setdefault((row.key, row.text, frozenset(row.targets)), row)
        if first is row:
            rows.append(row)
        elif first.split != row.split:
            raise DataError(f"{place}: repeats {first.place} in another split, {row.split!r}; remove one of the two")
    if not rows:
        raise DataError(f"{file}: contains no row; write one object per line")
    return rows


def _triplet(value: object, place: str) -> FolderRow:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {reprlib.repr(value)} is not an object with the fields {', '.join(_KEYS)}")
    _refuse_misspelled(value, _KEYS, place)
    for key in _KEYS:
        if key not in value:
            raise DataError(f"{place}: field {key!r} is missing; expected {', '.join(_KEYS)} and optionally split")
    reference = _listed_path(value["reference"], "reference", place)
    given = [value["targets"]] if isinstance(value["targets"], str) else value["targets"]
    if not isinstance(given, list) or not given:
        raise DataError(f"{place}: targets is {reprlib.repr(given)}; expected a list of paths, not empty")
    targets = tuple(_listed_path(target, "a target", place) for target in given)
    if len({reference, *targets}) <= len(targets):
        raise DataError(f"{place}: a target is repeated or is the reference; name each other image once")
    texts = value["text"] if isinstance(value["text"], list) else [value["text"]]
    words = [check_text(text, "text", place).strip() for text in texts if text is not None]
    text = " and ".join(filter(None, words)) or None
    number = place.rpartition(" ")[2]
    split = _check_split(value.get("split"), place)
    return FolderRow(place, f"{reference}#{number}", reference, split, text=text, targets=targets)


def _refuse_misspelled(names: Collection[str], required: Sequence[str], place: str) -> None:
    """Refuse a name that is nearly a known one: a field that nobody reads would be lost without a word."""
    missing = {*required, "split"} - set(names)
    for name in sorted(set(names) - {*required, "split"}):
        if close := get_close_matches(name.lower(), missing, n=1, cutoff=0.8):
            raise DataError(f"{place}: unknown field {name!r}; did you mean {close[0]!r}?")


def _read_gallery(file: Path) -> dict[str, str]:
    paths: dict[str, str] = {}
    for place, line in read_lines(file):
        refuse_repeated(_listed_path(line, "path", place), place, paths)
    return paths


def _read_manifest(file: Path) -> list[FolderRow]:
    rows = read_csv(file)
    place, first = next(rows, (f"{file}, line 1", []))
    header = list(map(str.strip, first))
    _refuse_misspelled(header, _HEADER, place)
    if not set(_HEADER) <= set(header) or len(set(header)) < len(header):
        raise DataError(f"{place}: the header is {reprlib.repr(','.join(header))}; expected {','.join(_HEADER)},split")
    images: list[FolderRow] = []
    seen: dict[str, str] = {}
    for place, row in rows:
        if len(row) != len(header):
            raise DataError(f"{place}: {len(row)} fields, but the header has {len(header)}; quote fields with commas")
        cells = dict(zip(header, row, strict=True))
        domain = cells["domain"]
        if domain not in ("photo", "sketch"):
            raise DataError(f"{place}: domain is {reprlib.repr(domain)}; expected photo or sketch")
        path, label = _listed_path(cells["path"], "path", place), check_name(cells["class"], "class", place)
        refuse_repeated(path, place, seen)
        images.append(FolderRow(place, path, label, _check_split(cells.get("split"), place), domain == "sketch"))
    return images


def _walk_class_folders(root: Path, top: str, unused: list[str]) -> Iterator[FolderRow]:
    """Yield the images of a folder of classes; other files are added to `unused`."""

    def fail(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions") from None

    for folder, folders, files in os.walk(root / top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if any(os.path.realpath(parent) == real for parent in Path(folder).parents):
            raise DataError(f"{folder}: links back to a folder that contains it; remove the link")
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        parts = Path(folder).relative_to(root / top).parts
        for name in sorted(name for name in files if not is_ignored(name)):
            if not is_image_name(name):
                unused.append(name)
                continue
            path = check_path(Path(top, *parts, name).as_posix(), "path", folder)
            if not parts:
                raise DataError(f"{root / path}: is in no class folder; move it to {top}/<class>/")
            yield FolderRow(folder, path, parts[0], None, top == "sketches")


def _listed_path(value: object, name: str, place: str) -> str:
    """Return a path of a list, which may have been written on Windows."""
    path = check_path(check_path(value, name, place).replace("\\", "/"), name, place)
    if not is_image_name(path):
        raise DataError(f"{place}: {name} is {reprlib.repr(path)}; known suffixes are {' '.join(IMAGE_SUFFIXES)}")
    return path


def _check_split(value: object, place: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value not in SPLITS:
        raise DataError(f"{place}: split is {reprlib.repr(value)}; expected one of {', '.join(SPLITS)}, or none")
    return value


# --- missing images


@final
@dataclass(frozen=True)
class _Usable:
    """What can be used of a split: queries, photos of classes, and `gallery`, paths with their labels.

    `images` are all usable paths; `left_out` says what the number `skipped` counts, images and queries.
    """

    queries: list[FolderRow]
    photos: list[FolderRow]
    gallery: Mapping[str, str | None]
    images: Collection[str]
    skipped: int
    left_out: str


def _usable(
    root: str | Path, split: str, on_missing: str, *, decode: bool, check: bool = True
) -> tuple[FolderRows, _Usable]:
    """Read a folder and check the images of a split; at least one query has to remain."""
    check_choice("on_missing", on_missing, ("error", "skip"))
    data = read_folder(root)
    rows = data.splits[split]
    if not rows:
        counts = ", ".join(f"{name} {len(data.splits[name])}" for name in SPLITS)
        raise DataError(f"{data.root}: split {split!r} is empty ({counts}; {data.note}); add rows or classes to it")
    if data.is_composed:
        places = _places(rows)
        for path, place in (data.gallery or {}).items() if split != "train" else ():
            places.setdefault(path, place)
    else:
        _refuse_unanswered(data, split)
        places = {row.id: row.place for row in rows}
    reasons = unusable_images(data.root, places, decode=decode) if check else {}
    if reasons and on_missing == "error":
        first = next(path for path in places if path in reasons)
        more = f" ({len(reasons) - 1} more are missing or broken)" if len(reasons) > 1 else ""
        raise ImageError(f"{places[first]}: {reasons[first]}, or set on_missing=skip{more}")
    images = dict.fromkeys(path for path in places if path not in reasons)
    photos: list[FolderRow] = []
    gallery: Mapping[str, str | None] = images
    if data.is_composed:
        asked = rows
        kept = [row for row in rows if row.key in images and any(target in images for target in row.targets)]
    else:
        asked = [row for row in rows if row.is_sketch and row.id in images]
        photos = [row for row in rows if not row.is_sketch and row.id in images]
        gallery = {photo.id: photo.key for photo in photos}
        answered = {photo.key for photo in photos}
        kept = [sketch for sketch in asked if sketch.key in answered]
    lost = len(asked) - len(kept)
    left_out = f"{len(reasons)} missing images of {split} left out, {lost} queries with them"
    if not kept:
        raise DataError(f"{data.root}: {left_out}, which leaves no query; add the images")
    return data, _Usable(kept, photos, gallery, images, len(reasons) + lost, left_out)


def _refuse_unanswered(data: FolderRows, split: str) -> None:
    """Check that a split has sketches, and photos of each of their classes."""
    rows = data.splits[split]
    if not any(row.is_sketch for row in rows):
        raise DataError(f"{data.root}: split {split!r} has photos but no sketch ({data.note}); add sketches to it")
    answered = {row.key for row in rows if not row.is_sketch}
    for row in rows:
        if row.is_sketch and row.key not in answered:
            raise DataError(
                f"{row.place}: class {row.key!r} has sketches but no photo in split {split!r}; "
                "add photos of this class or remove its sketches"
            )


def _places(rows: Iterable[FolderRow]) -> dict[str, str]:
    """Return the place of each image that triplets name."""
    places: dict[str, str] = {}
    for row in rows:
        for path in (row.key, *row.targets):
            places.setdefault(path, row.place)
    return places


def unusable_images(root: Path, paths: Iterable[str], *, decode: bool) -> dict[str, str]:
    """Return why images of a folder are missing or, if they are decoded, broken, by their paths."""
    reasons, present = dict[str, str](), dict[Path, str]()
    for path in paths:
        file = _locate(root, path)
        try:
            check_image(file)
            present[file] = path
        except ImageError as error:
            reasons[path] = str(error)
    return reasons | {present[file]: reason for file, reason in (broken_images(present) if decode else ())}


def _locate(root: Path, path: str) -> Path:
    """Return an image's file; letters with accents may be composed in another way than in the list."""
    return root / path if path.isascii() else Path(find_path(str(root / path)))
