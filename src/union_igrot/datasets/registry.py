"""The benchmarks by name: one call that reads any of them.

Knows every reader's name, splits and parts. Does not know what any file holds.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from union_igrot.datasets import circo, cirr, dtin, fashioniq, genecis, lasco, sbir
from union_igrot.datasets.annotations import choose
from union_igrot.datasets.files import Files
from union_igrot.errors import ConfigError
from union_igrot.types import Benchmark, TrainingSet, Triplet

PRESETS = ("official", "union_reference")


@final
@dataclass(frozen=True)
class _Reader:
    """A reader, its splits (the first is the default) and the options whose values make up its parts."""

    read: Callable[..., Benchmark]
    splits: tuple[str, ...]
    parts: tuple[Mapping[str, str], ...] = field(default=({},))
    trains: bool = False
    folder: str | None = None  # where the data lie under $UNION_DATA, if not under the benchmark's own name


_READERS: Mapping[str, _Reader] = {
    "fashioniq": _Reader(
        fashioniq.fashioniq, fashioniq.SPLITS, tuple({"category": name} for name in fashioniq.CATEGORIES), trains=True
    ),
    "cirr": _Reader(cirr.cirr, cirr.SPLITS, trains=True),
    "circo": _Reader(circo.circo, circo.SPLITS),
    "genecis": _Reader(genecis.genecis, genecis.SPLITS, tuple({"task": name} for name in genecis.TASKS)),
    "lasco": _Reader(lasco.lasco, lasco.SPLITS, trains=True),
    "llavasco": _Reader(lasco.llavasco, lasco.SPLITS, trains=True),
    "dtin": _Reader(dtin.dtin, dtin.SPLITS, tuple({"domain": name} for name in dtin.DOMAINS)),
    "sketchy": _Reader(sbir.sketchy, sbir.SKETCHY_SPLITS, tuple({"split": name} for name in sbir.SKETCHY_SPLITS)),
    "tuberlin": _Reader(sbir.tuberlin, sbir.TEST),
    "quickdraw": _Reader(sbir.quickdraw, sbir.TEST),
    "training_sketchy": _Reader(sbir.training_sketchy, sbir.TRAIN, trains=True, folder="sketchy"),
}
BENCHMARKS = tuple(_READERS)
"""The names that `load_benchmark` knows."""


def load_benchmark(
    name: str, root: str | Path | None = None, split: str | None = None, check_images: bool = True, **options: Any
) -> Benchmark:
    """Read a public benchmark from its official annotation files.

    No image is opened. Options are those of the benchmark's own reader, among them for all `prompt` and
    `preset="official"|"union_reference"`; `fashioniq` needs `category`, `genecis` `task` and `dtin` `domain`.

    Args:
        name: One of `BENCHMARKS`.
        root: The dataset's folder, by default `$UNION_DATA/<name>` (`training_sketchy` lies in `sketchy`).
        split: Name of the split; by default the one that is usually reported and has published targets.
        check_images: Look that every image exists. Otherwise nothing but annotation files is touched.
        **options: The reader's options.

    Returns:
        The benchmark, with its protocol.

    Raises:
        ConfigError: Where a name, a split or an option is not known. Lists what is.
        DataError: Where an annotation file is missing or not in its format. Names the file and the row.
        ImageError: Where images are missing. Names the first and says how many.
    """
    reader = _READERS[choose("benchmark", name, BENCHMARKS)]
    split = choose(f"split of {name}", reader.splits[0] if split is None else split, reader.splits)
    allowed = inspect.signature(reader.read).parameters
    names = [key for key in allowed if key not in ("files", "split")]
    for key, value in options.items():
        if key not in names:
            raise ConfigError(f"{name} has no option {key!r}; it has {', '.join(names)}")
        if not _fits(value, allowed[key].annotation):
            raise ConfigError(f"{key} is {value!r}; {name} takes {_described(allowed[key].annotation)}")
    choose("preset", options.get("preset", PRESETS[0]), PRESETS)
    files = Files(_root(name, reader) if root is None else root, check_images)
    benchmark = reader.read(files, split, **options)
    files.close()
    return benchmark


def load_training(name: str, root: str | Path | None = None, check_images: bool = True, **options: Any) -> TrainingSet:
    """Read a benchmark's training split as triplets.

    Args:
        name: `llavasco`, `training_sketchy`, `fashioniq`, `cirr` or `lasco`.
        root: As for `load_benchmark`.
        check_images: As for `load_benchmark`.
        **options: The reader's options, such as `stride` and `limit` of `llavasco`, or `build` and `seed` of
            `training_sketchy`.

    Returns:
        One triplet a query and target. `group` is the class of a sketch, else the target's id.

    Raises:
        ConfigError: As for `load_benchmark`, where the benchmark has no training split, and where the prompt gives
            several wordings.
        DataError: As for `load_benchmark`.
        ImageError: As for `load_benchmark`.
    """
    choose("training data", name, tuple(known for known, reader in _READERS.items() if reader.trains))
    benchmark = load_benchmark(name, root, "train", check_images, **options)
    if any(len(query.wordings) > 1 for query in benchmark.queries):
        raise ConfigError(
            f"prompt {benchmark.protocol.prompt!r} averages the embeddings of several wordings, which training does "
            "not; choose another prompt to train with"
        )
    images = {item.id: item.image for item in benchmark.gallery}
    triplets = [
        Triplet(query.image, query.wordings[0], images[target], query.label or target, benchmark.task)
        for query in benchmark.queries
        for target in query.targets
    ]
    classes = sorted({query.label for query in benchmark.queries if query.label is not None})
    return TrainingSet(benchmark.name, triplets, tuple(classes))


def parts(name: str) -> list[dict[str, str]]:
    """Return the options that select each part of a benchmark, over which its headline is averaged or listed.

    Returns:
        Keyword arguments of `load_benchmark`, such as a category; a single empty set where a benchmark
        is not divided. Parts of `sketchy` are its two cuts, which are never averaged.

    Raises:
        ConfigError: Where there is no such benchmark.
    """
    return [dict(part) for part in _READERS[choose("benchmark", name, BENCHMARKS)].parts]


def splits(name: str) -> tuple[str, ...]:
    """Return the splits of a benchmark, the default first.

    Raises:
        ConfigError: Where there is no such benchmark.
    """
    return _READERS[choose("benchmark", name, BENCHMARKS)].splits


def _root(name: str, reader: _Reader) -> Path:
    home = os.environ.get("UNION_DATA")
    if not home:
        raise ConfigError(f"root of {name} is not given and UNION_DATA is not set; give the dataset's folder")
    own = Path(home) / name
    return own if reader.folder is None or own.is_dir() else Path(home) / reader.folder


def _fits(value: object, annotation: object) -> bool:
    kinds = getattr(annotation, "__args__", (annotation,))
    return any(type(value) is kind for kind in kinds)  # a bool is no int here


def _described(annotation: object) -> str:
    kinds = getattr(annotation, "__args__", (annotation,))
    return " or ".join("None" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
