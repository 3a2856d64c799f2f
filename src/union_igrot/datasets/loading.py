"""Benchmarks and training sets by name, what is held out for validation, and whether anything can be told apart."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from union_igrot.datasets.annotations import DatasetFolder, group_by
from union_igrot.datasets.registry import BenchmarkDeclaration, benchmark_names, find_benchmark
from union_igrot.errors import ConfigError, DataError, check_choice
from union_igrot.types import Benchmark, GalleryItem, ImageSource, Protocol, Query, TrainingSet, Triplet

_REMEDY = {
    "sbir": "make every instance a class of its own, or assign at least two classes to each split in manifest.csv",
    "cir": "add rows with other targets, or list more images in gallery.txt",
}


def load_benchmark(
    name: str, root: str | Path | None = None, split: str | None = None, check_images: bool = True, **options: Any
) -> Benchmark:
    """Read a public benchmark, or a registered one, from its annotation files.

    No image is opened. Options are those that the benchmark declares, for all public ones `prompt` and
    `preset="official"|"union_reference"`; `fashioniq` needs `category`, `genecis` `task` and `dtin` `domain`.

    Args:
        name: One of `benchmark_names()`.
        root: The dataset's folder, by default `$UNION_DATA/<name>` (for `training_sketchy` also `sketchy`).
        split: Name of the split; by default the one that is usually reported and has published targets.
        check_images: Check that every image exists. Otherwise only annotation files are touched.
        **options: The benchmark's options.

    Returns:
        The benchmark, with its protocol.

    Raises:
        ConfigError: If a name, a split or an option is unknown; lists the known ones.
        DataError: If an annotation file is missing or not in its format; names the file and the row.
        ImageError: If images are missing; names the first and says how many.
    """
    declaration = find_benchmark(name)
    split = check_choice(f"split of {name}", declaration.splits[0] if split is None else split, declaration.splits)
    values = declaration.check_options(options)
    folder = DatasetFolder(_default_root(declaration) if root is None else root, check_images)
    benchmark = declaration.import_reader()(folder, split, **values)
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(f"the reader of {name} returned {type(benchmark).__name__} (expected a Benchmark)")
    folder.refuse_missing()
    return benchmark


def load_training(name: str, root: str | Path | None = None, check_images: bool = True, **options: Any) -> TrainingSet:
    """Read a benchmark's split `train` as triplets, one for each query and target.

    Arguments and errors are as for `load_benchmark`; `name` is one of `benchmark_names(trainable=True)`. `group` is the
    class of a sketch, else the target's id.

    Raises:
        ConfigError: Also if the benchmark has no training split, or if the prompt has several texts for a query.
    """
    check_choice("training data", name, benchmark_names(trainable=True))
    benchmark = load_benchmark(name, root, "train", check_images, **options)
    if any(len(query.wordings) > 1 for query in benchmark.queries):
        raise ConfigError(
            f"cannot train with prompt {benchmark.protocol.prompt!r}: it averages the embeddings of several texts; "
            "choose another prompt"
        )
    images = {item.id: item.image for item in benchmark.gallery}
    triplets = [
        Triplet(query.image, query.wordings[0], images[target], query.label or target, benchmark.task)
        for query in benchmark.queries
        for target in query.targets
    ]
    classes = sorted({query.label for query in benchmark.queries if query.label is not None})
    return TrainingSet(benchmark.name, triplets, tuple(classes))


def load_parts(
    name: str, root: str | Path | None = None, split: str | None = None, check_images: bool = True, **options: Any
) -> list[Benchmark]:
    """Read all parts of a benchmark, such as the categories of `fashioniq`; only one if an option selects it.

    Arguments and errors are as for `load_benchmark`.
    """
    parts = _parts(find_benchmark(name), options)
    return [load_benchmark(name, root, split, check_images, **options, **part) for part in parts]


def load_training_parts(
    name: str, root: str | Path | None = None, check_images: bool = True, **options: Any
) -> tuple[TrainingSet, list[Benchmark]]:
    """Read the triplets of all parts of a benchmark, and benchmarks for validation.

    Validation uses the benchmark's own split for it, or triplets that are held out. Arguments and errors are as for
    `load_training`; options that do not apply to training are used for validation only.
    """
    check_choice("training data", name, benchmark_names(trainable=True))
    declaration = find_benchmark(name)
    unused = {option.name for option in declaration.options if not option.for_training}
    kept = {key: value for key, value in options.items() if key not in unused}
    parts = [load_training(name, root, check_images, **kept, **part) for part in _parts(declaration, options)]
    triplets = tuple(triplet for part in parts for triplet in part.triplets)
    training = TrainingSet(name, triplets, tuple(label for part in parts for label in part.classes))
    if declaration.validation_split:
        return training, load_parts(name, root, declaration.validation_split, check_images, **options)
    training, validation = hold_out(training)
    return training, [validation]


def _parts(declaration: BenchmarkDeclaration, options: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{}] if options.keys() & declaration.parts[0].keys() else declaration.parts


def _default_root(declaration: BenchmarkDeclaration) -> Path:
    home = os.environ.get("UNION_DATA")
    if not home:
        raise ConfigError(f"missing root of {declaration.name}: pass the dataset's folder, or set UNION_DATA")
    own = Path(home) / declaration.name
    return own if declaration.folder is None or own.is_dir() else Path(home) / declaration.folder


def hold_out(training: TrainingSet, share: float = 0.1) -> tuple[TrainingSet, Benchmark]:
    """Split a training set by groups, so that the best epoch is never chosen on a test split.

    Groups are ordered by a hash of their names and held out until `share` of the triplets is: whole classes of sketches
    (at least two of four or more), or all triplets with the same target.

    Returns:
        The remaining training set, and a benchmark with a query for each held-out triplet. Its gallery holds all
        held-out targets and, for composed retrieval, the references, each excluded from its own ranking; the images of
        the query's group are relevant.

    Raises:
        DataError: If there are fewer than two groups.
    """
    sizes = Counter(triplet.group for triplet in training.triplets)
    groups = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(groups) < 2:
        raise DataError(f"{training.name}: {len(groups)} group cannot be split into training and validation; add data")
    # A gallery of one class tells nothing apart; that of composed retrieval holds the references as well.
    least = 2 if training.triplets[0].task == "sbir" and len(groups) > 3 else 1
    held: set[str] = set()
    count = 0
    for group in groups[:-1]:
        if len(held) >= least and count >= share * len(training.triplets):
            break
        held.add(group)
        count += sizes[group]
    kept = tuple(triplet for triplet in training.triplets if triplet.group not in held)
    out = [triplet for triplet in training.triplets if triplet.group in held]
    classes = tuple(name for name in training.classes if name not in held)
    return TrainingSet(training.name, kept, classes, training.skipped), _held_out_benchmark(training.name, out)


def _held_out_benchmark(name: str, triplets: list[Triplet]) -> Benchmark:
    composed = triplets[0].task == "cir"
    gallery: dict[ImageSource, GalleryItem] = {}
    for triplet in triplets:
        gallery.setdefault(triplet.target, GalleryItem(f"t{len(gallery)}", triplet.target, triplet.group))
    if composed:
        for triplet in triplets:
            gallery.setdefault(triplet.image, GalleryItem(f"t{len(gallery)}", triplet.image))
    groups = group_by((item for item in gallery.values() if item.label is not None), lambda item: item.label)
    targets = {group: tuple(item.id for item in items) for group, items in groups.items()}
    queries = []
    for number, triplet in enumerate(triplets):
        relevant = targets[triplet.group]
        reference = (gallery[triplet.image].id,) if composed else ()
        queries.append(
            Query(
                id=f"q{number}",
                image=triplet.image,
                text=triplet.text,
                targets=relevant,
                exclude=tuple(one for one in reference if one not in relevant),
                label=None if composed else triplet.group,
            )
        )
    protocol = Protocol(
        metrics=("R@1", "R@10", "R@50", "mAP"),
        primary="R@10" if composed else "mAP",
        exclude_reference=composed,
        note=f"{len(targets)} groups held out of the training triplets",
    )
    return Benchmark(name, "held out", triplets[0].task, queries, list(gallery.values()), protocol)


def benchmark_warning(benchmark: Benchmark) -> str:
    """Describe why the metrics of a benchmark have no meaning; return an empty text if they may have one."""
    queries = [query for query in benchmark.queries if query.targets]
    if not queries:
        return ""
    targets = {id(query.targets): frozenset(query.targets) for query in queries}
    where = f"{benchmark.name} {benchmark.split}"
    classes = {query.label for query in queries}
    single = f"there is a single class, {next(iter(classes))!r}; " if len(classes) == 1 and None not in classes else ""
    gallery = frozenset(item.id for item in benchmark.gallery)
    protocol = benchmark.protocol

    def relevant_alone(index: int) -> bool:
        query = queries[index]
        candidates = frozenset(query.subset or ()) if protocol.candidates == "subset" else gallery
        candidates -= frozenset(query.exclude if protocol.exclude_reference else ())
        return candidates <= targets[id(query.targets)]

    if all(map(relevant_alone, range(len(queries)))):
        return f"{where}: {single}every candidate is relevant, so every ranking is perfect and the metrics mean nothing"
    if len(queries) > 1 and len(set(targets.values())) == 1:
        return (
            f"{where}: {single}all {len(queries):,} queries have the same targets, so a ranking that ignores the query "
            "can be perfect and the metrics mean nothing"
        )
    return ""


def refuse_indistinct(training: TrainingSet, benchmarks: Sequence[Benchmark]) -> None:
    """Check before training that there is something to learn and to measure.

    Raises:
        DataError: If all triplets of a task have targets of one group, so that there are no negatives; or if the
            metrics of a benchmark have no meaning. Says what to do.
    """
    for task, remedy in _REMEDY.items():
        groups = {triplet.group for triplet in training.triplets if triplet.task == task}
        if len(groups) == 1:
            kind = "class" if task == "sbir" else "target"
            raise DataError(
                f"{training.name} train: all triplets have one {kind}, {next(iter(groups))!r}, so there is nothing to "
                f"tell apart; {remedy}"
            )
    for benchmark in benchmarks:
        if warning := benchmark_warning(benchmark):
            raise DataError(f"{warning}; {_REMEDY[benchmark.task]}")
