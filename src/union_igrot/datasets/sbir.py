"""Sketch retrieval of unseen classes: Sketchy, TU-Berlin and QuickDraw, each as its public lists cut it.

Sources: the list files of ZSE-SBIR and SAKE. Sketches ask, photos answer, and equality of class is relevance; all
sketches of a class share one tuple of targets. The lists are used whole: a subsample is another benchmark. Does not
know which classes a model was trained on.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import final

from union_igrot.datasets.annotations import Labelled, as_path, read_classes, read_labelled, read_lines
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import default_prompt, template
from union_igrot.errors import ConfigError, DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SKETCHY_SPLITS = ("zeroshot1", "zeroshot0")
TEST = ("test",)
TRAIN = ("train",)
_METRICS = ("mAP", "mAP@200", "P@100", "P@200")


@final
@dataclass(frozen=True, slots=True)
class _Lists:
    """Names of a benchmark's list files, with `zero` (unseen classes) or `train` to be filled in."""

    folder: str
    sketches: str
    photos: str


_SKETCHY = "sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt"
_TUBERLIN = _Lists("zeroshot", "png_ready_filelist_{}.txt", "ImageResized_ready_filelist_{}.txt")
_QUICKDRAW = _Lists("zeroshot", "sketch_{}.txt", "all_photo_{}.txt")


def sketchy(
    files: Files, split: str = "zeroshot1", *, prompt: str | None = None, preset: str = "official"
) -> Benchmark:
    """Read Sketchy (extended).

    Args:
        files: The dataset's folder, with `zeroshot0/`, `zeroshot1/`, `256x256/` and `EXTEND_image_sketchy_ready/`.
        split: `zeroshot1`, 25 unseen classes (mAP and P@100 by custom); or `zeroshot0`, 21 (mAP@200 and P@200).
        prompt: See `prompts`.
        preset: `official`: strict average precision; or `union_reference`: by trapezoids over the hits in the top k.

    Returns:
        The benchmark. Ids are the lists' paths.
    """
    primary = "mAP" if split == "zeroshot1" else "mAP@200"
    seen = "" if split == "zeroshot1" else "; 17 of the 21 classes are among the training classes of zeroshot1"
    lists = _Lists(split, *_SKETCHY)
    return _unseen("sketchy", files, split, lists, primary, prompt, preset, seen)


def tuberlin(files: Files, split: str = "test", *, prompt: str | None = None, preset: str = "official") -> Benchmark:
    """Read TU-Berlin (extended), 30 unseen classes. Arguments are as for `sketchy`, but for `split`."""
    return _unseen("tuberlin", files, split, _TUBERLIN, "mAP", prompt, preset)


def quickdraw(files: Files, split: str = "test", *, prompt: str | None = None, preset: str = "official") -> Benchmark:
    """Read QuickDraw-Extended, 30 unseen classes. Arguments are as for `sketchy`, but for `split`."""
    return _unseen("quickdraw", files, split, _QUICKDRAW, "mAP", prompt, preset)


def _unseen(
    name: str,
    files: Files,
    split: str,
    lists: _Lists,
    primary: str,
    prompt: str | None,
    preset: str,
    remark: str = "",
) -> Benchmark:
    prompt = default_prompt(name) if prompt is None else prompt
    word = template(name, prompt)
    classes, sketches, photos = _read(files, lists, "zero")
    targets = {label: tuple(row.path for row in rows) for label, rows in _by_class(photos).items()}
    gallery = [GalleryItem(row.path, files.image(row.where, row.path), classes[row.label]) for row in photos]
    texts = {label: word({"class": title}) for label, title in classes.items()}
    queries = []
    for row in sketches:
        if row.label not in targets:
            raise DataError(f"{row.where}: class {classes[row.label]!r} has no photo in the list; fetch both again")
        image = files.image(row.where, row.path)
        queries.append(Query(row.path, image, texts[row.label], targets[row.label], label=classes[row.label]))
    reference = preset == "union_reference"
    protocol = Protocol(
        name=preset,
        metrics=_METRICS,
        primary=primary,
        ap_norm="hits" if reference else "min",
        ap_rule="trapezoid" if reference else "step",
        prompt=prompt,
        note=f"{name} {split}: {len(set(targets))} unseen classes, whole lists{remark}"
        + ("; average precision is lenient: it can exceed P@k" if reference else ""),
    )
    return Benchmark(name, split, "sbir", queries, gallery, protocol)


def training_sketchy(
    files: Files,
    split: str = "train",
    *,
    lists: str = "zeroshot1",
    build: int | None = None,
    seed: int = 0,
    prompt: str | None = None,
    preset: str = "official",
) -> Benchmark:
    """Read the UNION authors' training pairs of a sketch and a photo, or draw such pairs.

    Args:
        files: Sketchy's folder. The authors' file is `<lists>/training_sketchy.txt`.
        split: `train`, the only one.
        lists: Whose training classes: `zeroshot1` (100) or `zeroshot0` (104). For a clean metric on 21 unseen
            classes train on `zeroshot0`.
        build: Draw this many pairs from the training lists instead of reading the authors' file.
        seed: Seed of the draw. Classes take turns; within one, all sketches and all photos are used equally often.
        prompt: See `prompts`.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The pairs as a benchmark: each sketch asks for the photo of its own line. Query ids are the line's numbers.
    """
    if lists not in SKETCHY_SPLITS:
        raise ConfigError(f"lists is {lists!r}; choose one of {', '.join(SKETCHY_SPLITS)}")
    if build is not None and build < 1:
        raise ConfigError(f"build is {build}; give a number of pairs >= 1, or leave it out to read the authors' file")
    prompt = default_prompt("training_sketchy") if prompt is None else prompt
    word = template("training_sketchy", prompt)
    pairs = _given_pairs(files, lists) if build is None else _drawn_pairs(files, lists, build, seed)
    gallery: dict[str, GalleryItem] = {}
    queries = []
    for at, (where, title, sketch, photo) in enumerate(pairs):
        if photo not in gallery:
            gallery[photo] = GalleryItem(photo, files.image(where, photo), title)
        image = files.image(where, sketch)
        queries.append(Query(str(at), image, word({"class": title}), (photo,), label=title))
    how = "the authors' file" if build is None else f"{build} pairs drawn with seed {seed}"
    protocol = Protocol(
        preset, ("R@1", "R@10"), "R@10", prompt=prompt, note=f"Training-Sketchy of {lists}: {how}; for training"
    )
    return Benchmark("training_sketchy", split, "sbir", queries, list(gallery.values()), protocol)


_Pair = tuple[str, str, str, str]  # where it stands, class, sketch, photo


def _given_pairs(files: Files, lists: str) -> list[_Pair]:
    try:
        file = files.annotation(f"{lists}/training_sketchy.txt", f"{lists}/sketchy_train.txt")
    except DataError as error:
        raise DataError(f"{error}; or draw pairs from the training lists with build=5000") from None
    pairs = []
    for where, line in read_lines(file):
        parts = line.split()
        if len(parts) != 3:
            raise DataError(f"{where}: {len(parts)} fields; a line must be '<class> <sketch> <photo>' without blanks")
        title, sketch, photo = parts[0], as_path(parts[1], "sketch", where), as_path(parts[2], "photo", where)
        pairs.append((where, title, sketch, photo))
    return pairs


def _drawn_pairs(files: Files, lists: str, number: int, seed: int) -> list[_Pair]:
    classes, sketches, photos = _read(files, _Lists(lists, *_SKETCHY), "train")
    asking, answering = _by_class(sketches), _by_class(photos)
    draw = random.Random(seed)
    labels = sorted(asking.keys() & answering.keys())
    if not labels:
        raise DataError(f"{files.root / lists}: no class has both sketches and photos; fetch the lists again")
    turns = {
        label: [cycle(draw.sample(side, len(side))) for side in (asking[label], answering[label])] for label in labels
    }
    pairs = []
    for label in islice(cycle(draw.sample(labels, len(labels))), number):
        sketch, photo = (next(turn) for turn in turns[label])
        pairs.append((sketch.where, classes[label], sketch.path, photo.path))
    return pairs


def _read(files: Files, lists: _Lists, kind: str) -> tuple[dict[int, str], list[Labelled], list[Labelled]]:
    names = "cname_cid_zero.txt" if kind == "zero" else "cname_cid.txt"
    classes = read_classes(files.annotation(f"{lists.folder}/{names}"))
    sketches = read_labelled(files.annotation(f"{lists.folder}/{lists.sketches.format(kind)}"))
    photos = read_labelled(files.annotation(f"{lists.folder}/{lists.photos.format(kind)}"))
    for row in (*sketches, *photos):
        if row.label not in classes:
            raise DataError(f"{row.where}: class {row.label} is not in {names}; fetch the lists again")
    return classes, sketches, photos


def _by_class(rows: Sequence[Labelled]) -> dict[int, list[Labelled]]:
    groups: defaultdict[int, list[Labelled]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    return groups
