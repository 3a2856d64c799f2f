"""Validation for data that come without: some groups of a training set, kept out of it.

Knows triplets and their groups. Does not know files or models.
"""

import hashlib

from union_igrot.errors import DataError
from union_igrot.types import Benchmark, GalleryItem, ImageSource, Protocol, Query, TrainingSet, Triplet


def hold_out(training: TrainingSet, share: float = 0.1) -> tuple[TrainingSet, Benchmark]:
    """Split a training set by groups, so that the best epoch is never chosen on a test split.

    Groups are dealt by a hash of their names until `share` of the triplets is held out:
    whole classes of sketches, or all triplets that end at the same target.

    Args:
        training: The triplets, all of one task.
        share: Share of the triplets held out, above 0 and below 1.

    Returns:
        What is left to train on, and a benchmark: a query a held-out triplet, a gallery of all
        held-out targets (and, where there is a text, references, each left out of its own
        ranking); relevant is what has the query's group.

    Raises:
        DataError: Where there are fewer than two groups.
    """
    groups = sorted(
        {triplet.group for triplet in training.triplets}, key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    if len(groups) < 2:
        raise DataError(f"{training.name}: {len(groups)} group cannot be split into training and validation; add data")
    sizes: dict[str, int] = {}
    for triplet in training.triplets:
        sizes[triplet.group] = sizes.get(triplet.group, 0) + 1
    held: set[str] = set()
    count = 0
    for group in groups[:-1]:
        if held and count >= share * len(training.triplets):
            break
        held.add(group)
        count += sizes[group]
    kept = tuple(triplet for triplet in training.triplets if triplet.group not in held)
    out = [triplet for triplet in training.triplets if triplet.group in held]
    classes = tuple(name for name in training.classes if name not in held)
    return TrainingSet(training.name, kept, classes, training.skipped), _benchmark(training.name, out)


def _benchmark(name: str, triplets: list[Triplet]) -> Benchmark:
    cir = triplets[0].task == "cir"
    gallery: dict[ImageSource, GalleryItem] = {}
    for triplet in triplets:
        gallery.setdefault(triplet.target, GalleryItem(f"t{len(gallery)}", triplet.target, triplet.group))
    if cir:
        for triplet in triplets:
            gallery.setdefault(triplet.image, GalleryItem(f"t{len(gallery)}", triplet.image))
    by_group: dict[str, tuple[str, ...]] = {}
    for item in gallery.values():
        if item.label is not None:
            by_group[item.label] = (*by_group.get(item.label, ()), item.id)
    queries = [
        Query(
            id=f"q{number}",
            image=triplet.image,
            text=triplet.text,
            targets=by_group[triplet.group],
            exclude=(gallery[triplet.image].id,)
            if cir and gallery[triplet.image].id not in by_group[triplet.group]
            else (),
            label=None if cir else triplet.group,
        )
        for number, triplet in enumerate(triplets)
    ]
    protocol = Protocol(
        metrics=("R@1", "R@10", "R@50", "mAP"),
        primary="R@10" if cir else "mAP",
        exclude_reference=cir,
        note=f"{len(by_group)} groups held out of the training triplets",
    )
    return Benchmark(name, "held out", triplets[0].task, queries, list(gallery.values()), protocol)
