"""From a checked data configuration to benchmarks and triplets."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from union_igrot.datasets.folder import folder_benchmark, folder_training
from union_igrot.datasets.loading import load_parts, load_training_parts
from union_igrot.datasets.registry import benchmark_names, find_benchmark
from union_igrot.errors import ConfigError
from union_igrot.storage.paths import expand_user
from union_igrot.synthetic.shapes import shapes_cir, shapes_sbir, shapes_training
from union_igrot.types import Benchmark, TrainingSet


def benchmarks(data: DictConfig, split: str | None = None) -> list[Benchmark]:
    """Read the benchmarks of a data configuration, one a part where a benchmark has parts.

    Args:
        data: The checked settings.
        split: Another split than the configured one.
    """
    split = split or data.split
    if data.name == "shapes":
        count = data.queries if split == "test" else data.val_queries
        # Few queries get a small gallery: a trial run ends in seconds.
        composed = shapes_cir(split, count, data.seed, distractors=min(500, 2 * count))
        return [composed, shapes_sbir(split, count, data.seed, gallery=max(count, 20))]
    if data.name == "folder":
        return [folder_benchmark(expand_user(data.root), split, **_folder_options(data))]
    return load_parts(data.name, data.root, split, data.check_images, **_public_options(data))


def training(data: DictConfig) -> tuple[TrainingSet, list[Benchmark]]:
    """Read or draw training triplets and the validation by which the best epoch is chosen.

    Raises:
        ConfigError: Where there is nothing to train on.
    """
    if data.name == "shapes":
        return shapes_training(data.triplets, data.pairs, data.seed), benchmarks(data, "val")
    if data.name == "folder":
        root, options = expand_user(data.root), _folder_options(data)
        return folder_training(root, pairs=data.pairs, seed=data.seed, **options), benchmarks(data, "val")
    trainable = benchmark_names(trainable=True)
    if data.name not in trainable:
        names = ", ".join(("shapes", "folder", *trainable))
        raise ConfigError(f"data={data.name} is for evaluation only; train on one of {names}")
    return load_training_parts(data.name, data.root, data.check_images, **_public_options(data))


def tested(data: DictConfig) -> list[Benchmark]:
    """Return what is evaluated: the configured split, or what training holds out where there is none."""
    return training(data)[1] if data.split == "train" else benchmarks(data)


def whole(data: DictConfig) -> str:
    """Name the mean over a benchmark's parts; empty where the benchmarks are not parts of one."""
    return "" if data.name in ("shapes", "folder") else f"{data.name}_mean"


def _folder_options(data: DictConfig) -> dict[str, Any]:
    return {"text": data.text, "on_missing": data.on_missing, "verify": data.on_missing == "skip"}


def _public_options(data: DictConfig) -> dict[str, Any]:
    """Return the reader's own options that are set; `all` selects every part."""
    parts = {option.name for option in find_benchmark(data.name).options if option.is_part}
    settings: dict[str, Any] = OmegaConf.to_container(data)  # type: ignore[assignment]
    for name in ("name", "root", "split", "check_images"):
        del settings[name]
    return {
        name: value for name, value in settings.items() if value is not None and not (name in parts and value == "all")
    }
