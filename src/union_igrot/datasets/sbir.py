"""Sketch retrieval of unseen classes: Sketchy, TU-Berlin and QuickDraw, with their public splits.

Sources: the list files of ZSE-SBIR and SAKE. Queries are sketches, the gallery is photos, and equality of class is
relevance; all sketches of a class share one tuple of targets. The lists are used whole: a subsample is another
benchmark.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import NamedTuple, TypeAlias

from union_igrot.datasets.annotations import (
    DatasetFolder,
    LabeledPath,
    check_path,
    read_classes,
    read_labeled_paths,
)
from union_igrot.datasets.builtin import (
    QUICKDRAW,
    SKETCHY,
    SKETCHY_GENERALIZED,
    SKETCHY_INSTANCES,
    TRAINING_SKETCHY,
    TUBERLIN,
    TUBERLIN_GENERALIZED,
)
from union_igrot.datasets.registry import BenchmarkDeclaration
from union_igrot.errors import DataError
from union_igrot.storage.text import read_lines
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

_METRICS = ("mAP", "mAP@200", "P@100", "P@200")


class _ListFiles(NamedTuple):
    """Names of a benchmark's list files, with `zero` (unseen classes) or `train` to be filled in."""

    folder: str
    sketches: str
    photos: str


_Lists: TypeAlias = tuple[dict[int, str], list[LabeledPath], list[LabeledPath]]
_SKETCHY_LISTS = "sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt"
_TUBERLIN_LISTS = _ListFiles("zeroshot", "png_ready_filelist_{}.txt", "ImageResized_ready_filelist_{}.txt")
_QUICKDRAW_LISTS = _ListFiles("zeroshot", "sketch_{}.txt", "all_photo_{}.txt")


def read_sketchy(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read Sketchy (extended).

    The preset `union_reference` measures average precision by trapezoids over the hits in the top k.
    """
    lists = _ListFiles(split, *_SKETCHY_LISTS)
    if split == "zeroshot1":
        return _unseen_classes(SKETCHY, folder, split, lists, "mAP", prompt, preset)
    remark = "; 17 of the 21 classes are among the training classes of zeroshot1"
    return _unseen_classes(SKETCHY, folder, split, lists, "mAP@200", prompt, preset, remark)


def read_tuberlin(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read TU-Berlin (extended), 30 unseen classes."""
    return _unseen_classes(TUBERLIN, folder, split, _TUBERLIN_LISTS, "mAP", prompt, preset)


def read_quickdraw(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read QuickDraw-Extended, 30 unseen classes."""
    return _unseen_classes(QUICKDRAW, folder, split, _QUICKDRAW_LISTS, "mAP", prompt, preset)


def _unseen_classes(
    declaration: BenchmarkDeclaration,
    folder: DatasetFolder,
    split: str,
    lists: _ListFiles,
    primary: str,
    prompt: str | None,
    preset: str,
    remark: str = "",
    data: _Lists | None = None,
) -> Benchmark:
    name, wording = declaration.name, declaration.find_prompt(prompt)
    classes, sketches, photos = data or _read_lists(folder, lists, "zero")
    targets = {label: tuple(row.path for row in rows) for label, rows in _rows_by_class(photos).items()}
    gallery = [GalleryItem(row.path, folder.image(row.place, row.path), classes[row.label]) for row in photos]
    texts = {label: wording.text({"class": title}) for label, title in classes.items()}
    queries = []
    for row in sketches:
        if row.label not in targets:
            raise DataError(f"{row.place}: class {classes[row.label]!r} has no photo in the list; download both again")
        image = folder.image(row.place, row.path)
        queries.append(Query(row.path, image, texts[row.label], targets[row.label], label=classes[row.label]))
    reference = preset == "union_reference"
    lenient = "; average precision is lenient: it can exceed P@k" if reference else ""
    protocol = Protocol(
        name=preset,
        metrics=_METRICS,
        primary=primary,
        ap_norm="hits" if reference else "min",
        ap_rule="trapezoid" if reference else "step",
        ties="gallery order",
        prompt=wording.name,
        note=f"{name} {split}: " + (remark if data else f"{len(targets)} unseen classes, whole lists{remark}{lenient}"),
    )
    return Benchmark(name, split, "sbir", queries, gallery, protocol)


def read_sketchy_generalized(
    folder: DatasetFolder, split: str, *, protocol: str, seed: int, prompt: str | None
) -> Benchmark:
    """Read Sketchy with seen classes in the gallery; the three protocols are not comparable."""
    primary = "mAP" if split == "zeroshot1" else "mAP@200"
    lists = _ListFiles(split, *_SKETCHY_LISTS)
    return _generalized(SKETCHY_GENERALIZED, folder, split, lists, primary, protocol, seed, prompt)


def read_tuberlin_generalized(
    folder: DatasetFolder, split: str, *, protocol: str, seed: int, prompt: str | None
) -> Benchmark:
    """Read TU-Berlin with seen classes in the gallery; the three protocols are not comparable."""
    return _generalized(TUBERLIN_GENERALIZED, folder, split, _TUBERLIN_LISTS, "mAP@200", protocol, seed, prompt)


def _generalized(
    declaration: BenchmarkDeclaration,
    folder: DatasetFolder,
    split: str,
    lists: _ListFiles,
    primary: str,
    protocol: str,
    seed: int,
    prompt: str | None,
) -> Benchmark:
    classes, sketches, photos = _read_lists(folder, lists, "zero")
    seen, drawn, taken = _read_lists(folder, lists, "train")
    first = max(classes) + 1  # numbers of seen classes start at 0 again
    draw = random.Random(seed)
    if protocol == "seen_classes":  # a fifth of the classes, whole, which are queried too (OCEAN, Dr.CLIP)
        chosen = set(draw.sample(sorted(seen), round(0.2 * len(seen))))
        drawn, taken = ([row for row in rows if row.label in chosen] for rows in (drawn, taken))
        words = f"and {len(chosen)} whole seen classes, which are queried too"
    elif protocol == "seen_fifth":  # a fifth of the photos of each class (SEM-PCYC)
        by_class = _rows_by_class(taken)
        taken = [row for label in by_class for row in draw.sample(by_class[label], round(0.2 * len(by_class[label])))]
        drawn, words = [], "and a fifth of the photos of each seen class"
    else:
        drawn, words = [], "and all training photos of seen classes"
    names = classes | {first + label: name for label, name in seen.items()}
    sketches += [row._replace(label=first + row.label) for row in drawn]
    photos += [row._replace(label=first + row.label) for row in taken]
    remark = f"protocol={protocol}, gallery: unseen classes {words}" + f", seed {seed}" * (protocol != "all_seen")
    found = _unseen_classes(
        declaration, folder, split, lists, primary, prompt, "official", remark, (names, sketches, photos)
    )
    return replace(found, name=f"{declaration.name}_{protocol}")


def read_sketchy_instances(folder: DatasetFolder, split: str, *, gallery: str, prompt: str | None) -> Benchmark:
    """Read the sketches of Sketchy with the very photo that each was drawn of as the only target."""
    wording = SKETCHY_INSTANCES.find_prompt(prompt)
    classes, sketches, listed = _read_lists(folder, _ListFiles(split, *_SKETCHY_LISTS), "zero")
    photos = {row.path: row for row in listed if row.path.startswith("256x256/photo/")}
    groups = _rows_by_class(list(photos.values()))
    own = {label: tuple(row.path for row in rows) for label, rows in groups.items()}
    queries = []
    for row in sketches:
        target = f"{row.path.replace('/sketch/', '/photo/', 1).rpartition('-')[0]}.jpg"
        if target not in photos or photos[target].label != row.label:
            raise DataError(
                f"{row.place}: its photo {target} is not in the list of the class; download both lists again"
            )
        text, image = wording.text({"class": classes[row.label]}), folder.image(row.place, row.path)
        subset = own[row.label] if gallery == "class" else None
        queries.append(Query(row.path, image, text, (target,), subset=subset, label=classes[row.label]))
    items = [GalleryItem(row.path, folder.image(row.place, row.path), classes[row.label]) for row in photos.values()]
    protocol = Protocol(
        metrics=("R@1", "R@5"),
        primary="R@1",
        candidates="subset" if gallery == "class" else "gallery",
        prompt=wording.name,
        note=f"Sketchy instances {split}, gallery={gallery}: the drawn photo among the "
        f"{'photos of its class' if gallery == 'class' else 'photos of all classes'}; R@k is Acc@k of the papers",
    )
    return Benchmark("sketchy_instances", split, "sbir", queries, items, protocol)


def read_training_sketchy(
    folder: DatasetFolder,
    split: str,
    *,
    lists: str,
    build: int | None,
    seed: int,
    prompt: str | None,
    preset: str,
) -> Benchmark:
    """Read the UNION authors' pairs of a sketch and a photo, `<lists>/training_sketchy.txt`, or draw such pairs.

    Drawn classes take turns; within one, all sketches and all photos are used equally often. The target of each sketch
    is the photo of its own line; query ids are the line's numbers.
    """
    wording = TRAINING_SKETCHY.find_prompt(prompt)
    pairs = _given_pairs(folder, lists) if build is None else _drawn_pairs(folder, lists, build, seed)
    gallery: dict[str, GalleryItem] = {}
    queries = []
    for number, pair in enumerate(pairs):
        if pair.photo not in gallery:
            gallery[pair.photo] = GalleryItem(pair.photo, folder.image(pair.place, pair.photo), pair.label)
        image = folder.image(pair.place, pair.sketch)
        queries.append(Query(str(number), image, wording.text({"class": pair.label}), (pair.photo,), label=pair.label))
    origin = "the authors' file" if build is None else f"{build} pairs drawn with seed {seed}"
    protocol = Protocol(
        preset,
        ("R@1", "R@10"),
        "R@10",
        prompt=wording.name,
        note=f"Training-Sketchy of {lists}: {origin}; for training",
    )
    return Benchmark("training_sketchy", split, "sbir", queries, list(gallery.values()), protocol)


class _SketchPhotoPair(NamedTuple):
    place: str
    label: str
    sketch: str
    photo: str


def _given_pairs(folder: DatasetFolder, lists: str) -> list[_SketchPhotoPair]:
    try:
        file = folder.annotation(f"{lists}/training_sketchy.txt", f"{lists}/sketchy_train.txt")
    except DataError as error:
        raise DataError(f"{error}; or draw pairs from the training lists with build=5000") from None
    pairs = []
    for place, line in read_lines(file):
        parts = line.split()
        if len(parts) != 3:
            raise DataError(f"{place}: {len(parts)} fields; expected '<class> <sketch> <photo>' without blanks")
        sketch, photo = check_path(parts[1], "sketch", place), check_path(parts[2], "photo", place)
        pairs.append(_SketchPhotoPair(place, parts[0], sketch, photo))
    if not pairs:
        raise DataError(f"{file}: is empty; download the file again")
    return pairs


def _drawn_pairs(folder: DatasetFolder, lists: str, number: int, seed: int) -> list[_SketchPhotoPair]:
    classes, *rows = _read_lists(folder, _ListFiles(lists, *_SKETCHY_LISTS), "train")
    sketches, photos = (_rows_by_class(side) for side in rows)
    draw = random.Random(seed)
    labels = sorted(sketches.keys() & photos.keys())
    if not labels:
        raise DataError(f"{folder.root / lists}: no class has both sketches and photos; download the lists again")
    turns = {
        label: [cycle(draw.sample(side, len(side))) for side in (sketches[label], photos[label])] for label in labels
    }
    pairs = []
    for label in islice(cycle(draw.sample(labels, len(labels))), number):
        sketch, photo = (next(turn) for turn in turns[label])
        pairs.append(_SketchPhotoPair(sketch.place, classes[label], sketch.path, photo.path))
    return pairs


def _read_lists(folder: DatasetFolder, lists: _ListFiles, kind: str) -> _Lists:
    """Return the names of the classes, the sketches and the photos."""
    names = "cname_cid_zero.txt" if kind == "zero" else "cname_cid.txt"
    classes = read_classes(folder.annotation(f"{lists.folder}/{names}"))
    sketches = read_labeled_paths(folder.annotation(f"{lists.folder}/{lists.sketches.format(kind)}"))
    photos = read_labeled_paths(folder.annotation(f"{lists.folder}/{lists.photos.format(kind)}"))
    for row in (*sketches, *photos):
        if row.label not in classes:
            raise DataError(f"{row.place}: class {row.label} is not in {names}; download the lists again")
    return classes, sketches, photos


def _rows_by_class(rows: Sequence[LabeledPath]) -> dict[int, list[LabeledPath]]:
    groups: defaultdict[int, list[LabeledPath]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    return groups
