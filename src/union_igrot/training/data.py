"""Benchmarks and training triplets by name: the generated world, an own folder, or a public dataset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from union_igrot.datasets.folder import folder_benchmark, folder_training
from union_igrot.datasets.loading import load_parts, load_training_parts, refuse_indistinct
from union_igrot.datasets.registry import benchmark_names, find_benchmark
from union_igrot.errors import ConfigError, check_choice
from union_igrot.settings import declared
from union_igrot.storage.files import expand_user
from union_igrot.synthetic.shapes import shapes_cir, shapes_sbir, shapes_training
from union_igrot.training.settings import FolderSettings, ShapesSettings
from union_igrot.types import Benchmark, TrainingSet

_SHAPES = {one.key: one for one in declared(ShapesSettings) if one.key != "name"}
_FOLDER = {one.key: one for one in declared(FolderSettings) if one.key not in ("name", "root")}


def data_settings(name: str, root: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Return the settings of a dataset as `read_benchmarks` and `read_training` take them.

    Args:
        name: `shapes`, a public benchmark, or the path of an own folder.
        root: The folder of a public benchmark, by default below `$UNION_DATA`.
        **options: Settings of the dataset, such as `split`.

    Raises:
        ConfigError: If there is no such dataset or setting.
    """
    if name == "shapes" or name not in benchmark_names():
        known = _SHAPES if name == "shapes" else _FOLDER
        if name != "shapes":
            root = name if name != "folder" else root
            if root is None or not expand_user(root).is_dir():
                if name == "folder":
                    raise ConfigError(f"invalid value for root of folder: {root} (expected the path of your folder)")
                known_names = ", ".join(["shapes", *benchmark_names()])
                raise ConfigError(f"unknown dataset {name!r} (expected one of {known_names}, or an existing folder)")
        for option, value in options.items():
            if not known[check_choice(f"option of {name}", option, known)].allows(value):
                raise ConfigError(f"invalid value for {option}: {value!r} (expected {known[option].expected})")
        defaults = {key: one.default for key, one in known.items()}
        return {**defaults, **options, "name": "shapes" if name == "shapes" else "folder", "root": root}
    return {"split": find_benchmark(name).splits[0], "check_images": True, **options, "name": name, "root": root}


def read_benchmarks(data: Mapping[str, Any], split: str | None = None, *, check_images: bool = True) -> list[Benchmark]:
    """Read the benchmarks of a dataset, one per part if it has parts.

    Args:
        data: The settings, see `data_settings`.
        split: Another split than that of the settings.
        check_images: Whether the images have to exist; rankings of other methods are scored without them.
    """
    split, name = split or data["split"], data["name"]
    if name == "shapes":
        count = data["queries"] if split == "test" else data["val_queries"]
        # Few queries get a small gallery: a trial run ends in seconds.
        composed = shapes_cir(split, count, data["seed"], distractors=min(500, 2 * count))
        return [composed, shapes_sbir(split, count, data["seed"], gallery=max(count, 20))]
    if name == "folder":
        root, options = expand_user(data["root"]), _folder_options(data)
        return [folder_benchmark(root, split, check_images=check_images, **options)]
    check_images &= data["check_images"]
    return load_parts(name, data["root"], split, check_images, **_reader_options(data))


def read_training(data: Mapping[str, Any]) -> tuple[TrainingSet, list[Benchmark]]:
    """Read or generate training triplets and the validation that selects the best epoch.

    Raises:
        ConfigError: If the dataset is for evaluation only.
    """
    name = data["name"]
    if name == "shapes":
        return shapes_training(data["triplets"], data["pairs"], data["seed"]), read_benchmarks(data, "val")
    if name == "folder":
        root, options = expand_user(data["root"]), _folder_options(data)
        triplets = folder_training(root, pairs=data["pairs"], seed=data["seed"], **options)
        validation = read_benchmarks(data, "val")
        tested = [] if data["split"] == "train" else [folder_benchmark(root, data["split"], check_images=False)]
        refuse_indistinct(triplets, [*validation, *tested])
        return triplets, validation
    trainable = benchmark_names(trainable=True)
    if name not in trainable:
        names = ", ".join(("shapes", "folder", *trainable))
        raise ConfigError(f"data={name} is for evaluation only; train on one of {names}")
    triplets, validation = load_training_parts(name, data["root"], data["check_images"], **_reader_options(data))
    refuse_indistinct(triplets, validation)
    return triplets, validation


def read_evaluated(data: Mapping[str, Any], *, check_images: bool = True) -> list[Benchmark]:
    """Return the benchmarks of the configured split; of `train` those that training holds out."""
    return read_training(data)[1] if data["split"] == "train" else read_benchmarks(data, check_images=check_images)


def mean_name(data: Mapping[str, Any]) -> str:
    """Return the name of the mean over a benchmark's parts; empty if the benchmarks are not parts of one."""
    return "" if data["name"] in ("shapes", "folder") else f"{data['name']}_mean"


def _folder_options(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": data["text"], "on_missing": data["on_missing"], "verify": data["on_missing"] == "skip"}


def _reader_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reader's own options that are set; `all` selects every part."""
    parts = {option.name for option in find_benchmark(data["name"]).options if option.is_part}
    common = ("name", "root", "split", "check_images")
    given = {key: value for key, value in data.items() if key not in common and value is not None}
    return {key: value for key, value in given.items() if not (key in parts and value == "all")}
