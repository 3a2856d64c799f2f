"""Sketch retrieval of unseen classes: Sketchy, TU-Berlin and QuickDraw, with their public splits.

Sources: the list files of ZSE-SBIR and SAKE. Queries are sketches, the gallery is photos, and equality of class is
relevance; all sketches of a class share one tuple of targets. The lists are used whole: a subsample is another
benchmark.
"""

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import TypeAlias

from union_igrot.datasets.annotations import (
    DatasetFolder,
    LabeledPath,
    check_path,
    group_by,
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


_Pair: TypeAlias = tuple[str, str, str, str]  # place, class, sketch and photo
_Lists: TypeAlias = tuple[dict[int, str], list[LabeledPath], list[LabeledPath]]
# Files of sketches and photos, with `zero` (unseen classes) or `train` to be filled in.
_LISTS = {
    "sketchy": ("sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt"),
    "tuberlin": ("png_ready_filelist_{}.txt", "ImageResized_ready_filelist_{}.txt"),
    "quickdraw": ("sketch_{}.txt", "all_photo_{}.txt"),
}


def _unseen_classes(
    declaration: BenchmarkDeclaration, folder: DatasetFolder, split: str, *, prompt: str | None, preset: str
) -> Benchmark:
    """Read sketches and photos of unseen classes.

    The preset `union_reference` measures average precision by trapezoids over the hits in the top k.
    """
    data = _read_lists(folder, declaration.name, split, "zero")
    remark = f"{len({row.label for row in data[2]})} unseen classes, whole lists"
    if split == "zeroshot0":
        remark += "; 17 of the 21 classes are among the training classes of zeroshot1"
    if preset == "union_reference":
        remark += "; average precision is lenient: it can exceed P@k"
    return _classes_benchmark(declaration, folder, split, "mAP", prompt, preset, remark, data)


def _classes_benchmark(
    declaration: BenchmarkDeclaration,
    folder: DatasetFolder,
    split: str,
    primary: str,
    prompt: str | None,
    preset: str,
    remark: str,
    data: _Lists,
) -> Benchmark:
    name, wording = declaration.name, declaration.find_prompt(prompt)
    classes, sketches, photos = data
    targets = _paths_by_class(photos)
    gallery = [GalleryItem(row.path, folder.image(row.place, row.path), classes[row.label]) for row in photos]
    texts = {label: wording.text({"class": title}) for label, title in classes.items()}
    queries = []
    for row in sketches:
        if row.label not in targets:
            raise DataError(f"{row.place}: class {classes[row.label]!r} has no photo in the list; download both again")
        image = folder.image(row.place, row.path)
        queries.append(Query(row.path, image, texts[row.label], targets[row.label], label=classes[row.label]))
    reference = preset == "union_reference"
    protocol = Protocol(
        name=preset,
        metrics=_METRICS,
        primary="mAP@200" if split == "zeroshot0" else primary,
        ap_norm="hits" if reference else "min",
        ap_rule="trapezoid" if reference else "step",
        ties="gallery order",
        prompt=wording.name,
        note=f"{name} {split}: {remark}",
    )
    return Benchmark(name, split, "sbir", queries, gallery, protocol)


read_sketchy, read_tuberlin, read_quickdraw = (
    partial(_unseen_classes, declaration) for declaration in (SKETCHY, TUBERLIN, QUICKDRAW)
)


def _generalized(
    declaration: BenchmarkDeclaration,
    base: str,
    primary: str,
    folder: DatasetFolder,
    split: str,
    *,
    protocol: str,
    seed: int,
    prompt: str | None,
) -> Benchmark:
    """Read a benchmark with seen classes in the gallery; the three protocols are not comparable."""
    classes, sketches, photos = _read_lists(folder, base, split, "zero")
    seen, drawn, taken = _read_lists(folder, base, split, "train")
    first = max(classes) + 1  # numbers of seen classes start at 0 again
    draw = random.Random(seed)
    if protocol == "seen_classes":  # a fifth of the classes, whole, which are queried too (OCEAN, Dr.CLIP)
        chosen = set(draw.sample(sorted(seen), round(0.2 * len(seen))))
        drawn, taken = ([row for row in rows if row.label in chosen] for rows in (drawn, taken))
        words = f"and {len(chosen)} whole seen classes, which are queried too"
    elif protocol == "seen_fifth":  # a fifth of the photos of each class (SEM-PCYC)
        groups = group_by(taken, lambda row: row.label).values()
        taken = [row for group in groups for row in draw.sample(group, round(0.2 * len(group)))]
        drawn, words = [], "and a fifth of the photos of each seen class"
    else:
        drawn, words = [], "and all training photos of seen classes"
    names = classes | {first + label: name for label, name in seen.items()}
    sketches += [row._replace(label=first + row.label) for row in drawn]
    photos += [row._replace(label=first + row.label) for row in taken]
    remark = f"protocol={protocol}, gallery: unseen classes {words}" + f", seed {seed}" * (protocol != "all_seen")
    data = names, sketches, photos
    found = _classes_benchmark(declaration, folder, split, primary, prompt, "official", remark, data)
    return replace(found, name=f"{declaration.name}_{protocol}")


read_sketchy_generalized = partial(_generalized, SKETCHY_GENERALIZED, "sketchy", "mAP")
read_tuberlin_generalized = partial(_generalized, TUBERLIN_GENERALIZED, "tuberlin", "mAP@200")


def read_sketchy_instances(folder: DatasetFolder, split: str, *, gallery: str, prompt: str | None) -> Benchmark:
    """Read the sketches of Sketchy with the very photo that each was drawn of as the only target."""
    wording = SKETCHY_INSTANCES.find_prompt(prompt)
    classes, sketches, listed = _read_lists(folder, "sketchy", split, "zero")
    photos = {row.path: row for row in listed if row.path.startswith("256x256/photo/")}
    own = _paths_by_class(photos.values())
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
    for number, (place, label, sketch, photo) in enumerate(pairs):
        if photo not in gallery:
            gallery[photo] = GalleryItem(photo, folder.image(place, photo), label)
        image = folder.image(place, sketch)
        queries.append(Query(str(number), image, wording.text({"class": label}), (photo,), label=label))
    origin = "the authors' file" if build is None else f"{build} pairs drawn with seed {seed}"
    protocol = Protocol(
        preset,
        ("R@1", "R@10"),
        "R@10",
        prompt=wording.name,
        note=f"Training-Sketchy of {lists}: {origin}; for training",
    )
    return Benchmark("training_sketchy", split, "sbir", queries, list(gallery.values()), protocol)


def _given_pairs(folder: DatasetFolder, lists: str) -> list[_Pair]:
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
        pairs.append((place, parts[0], sketch, photo))
    if not pairs:
        raise DataError(f"{file}: is empty; download the file again")
    return pairs


def _drawn_pairs(folder: DatasetFolder, lists: str, number: int, seed: int) -> list[_Pair]:
    classes, *rows = _read_lists(folder, "sketchy", lists, "train")
    sketches, photos = (group_by(side, lambda row: row.label) for side in rows)
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
        pairs.append((sketch.place, classes[label], sketch.path, photo.path))
    return pairs


def _read_lists(folder: DatasetFolder, name: str, split: str, kind: str) -> _Lists:
    """Return the names of the classes, the sketches and the photos."""
    top = split if name == "sketchy" else "zeroshot"
    names = "cname_cid_zero.txt" if kind == "zero" else "cname_cid.txt"
    classes = read_classes(folder.annotation(f"{top}/{names}"))
    sketches, photos = (read_labeled_paths(folder.annotation(f"{top}/{file.format(kind)}")) for file in _LISTS[name])
    for row in (*sketches, *photos):
        if row.label not in classes:
            raise DataError(f"{row.place}: class {row.label} is not in {names}; download the lists again")
    return classes, sketches, photos


def _paths_by_class(rows: Iterable[LabeledPath]) -> dict[int, tuple[str, ...]]:
    groups = group_by(rows, lambda row: row.label)
    return {label: tuple(row.path for row in group) for label, group in groups.items()}
