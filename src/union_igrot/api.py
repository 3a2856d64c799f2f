"""The functions of the Python interface that join several packages."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from union_igrot.errors import ConfigError, check_choice, check_count, wrong_type
from union_igrot.evaluation.evaluate import average_parts, evaluate_benchmark
from union_igrot.evaluation.results import EvaluationResult
from union_igrot.experiment import Launch, RunData, run_training
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.images.decode import image_key
from union_igrot.models.backbones.base import Backbone, PreprocessChoice
from union_igrot.models.devices import resolve_device
from union_igrot.models.model import IGROTModel
from union_igrot.models.registry import BACKBONE_FORMS, BACKBONE_PREFIXES, BACKBONES, QUERY_HEADS, TARGET_HEADS
from union_igrot.settings import declared
from union_igrot.storage.cache import chosen_limit, default_root
from union_igrot.storage.files import expand_user
from union_igrot.training.data import data_settings, mean_name, read_evaluated
from union_igrot.training.loggers import require_logger
from union_igrot.training.processes import detect_processes
from union_igrot.training.settings import BankSettings, Recipe
from union_igrot.types import Benchmark, TrainingSet

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Precisions of a training, with their names in Lightning."""
_HEADS = {"fusion": QUERY_HEADS, "target": TARGET_HEADS}


def evaluate(  # noqa: PLR0913 - a setting each, all but two with defaults
    model: IGROTModel,
    benchmark: str | Path | Benchmark | Sequence[Benchmark],
    root: str | Path | None = None,
    *,
    seed: int = 0,
    calibration: float = 0.0,
    query_expansion: int = 0,
    fusions: Sequence[str] = ("product",),
    corpora: Sequence[str | Path] = (),
    batch_size: int = 256,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> EvaluationResult:
    """Evaluate a model beside a random baseline and the training-free baselines of its backbone.

    Args:
        model: The model, on the device to evaluate on.
        benchmark: `shapes`, the name of a public benchmark, the path of an own folder, or benchmarks already read.
        root: Folder of a public benchmark; by default `$UNION_DATA/<name>`.
        seed: Seed of the random baseline and of the bootstrap.
        calibration: Weight of the calibration by training queries, such as 0.25; 0, as zero-shot protocols ask, for
            none. See `evaluation.calibration`.
        query_expansion: Number of first results, such as 5, that each query is moved towards before a second search; 0
            for none. See `evaluation.calibration`.
        fusions: Further baselines without training, any of `product`, `weicom`, `slerp` and `basic`.
        corpora: For `basic` a file of texts about subjects and one of texts about styles, one text a line.
        batch_size: Images encoded at once.
        workers: Processes that decode images; chosen by the device if None.
        cache_dir: Folder of the feature store; the default one if None.
        progress: Whether progress bars are shown.
        **options: Settings of the dataset, such as `split="val"` or, of `shapes`, `queries=200`.

    Returns:
        Metrics in percent with 95 % confidence intervals; `print` shows a table.

    Raises:
        ConfigError: If there is no such benchmark or option.
    """
    if not isinstance(model, IGROTModel):
        raise wrong_type("model", model, "a model, such as that of union_igrot.load")
    check_count("seed", seed, 0)
    check_count("batch_size", batch_size)
    check_count("workers", workers or 0, 0)
    if isinstance(benchmark, str | Path):
        settings = data_settings(str(benchmark), root, **options)
        benchmarks, mean = read_evaluated(settings), mean_name(settings)
    else:
        _check_no_options(root, options)
        benchmarks, mean = _benchmarks("benchmark", benchmark), ""
    if not benchmarks:
        raise ConfigError("the list of benchmarks is empty; pass a name or a Benchmark")
    fusions = [fusions] if isinstance(fusions, str) else fusions
    cache = default_root() if cache_dir is None else expand_user(cache_dir)
    chosen: dict[str, Any] = {"calibration": calibration, "query_expansion": query_expansion}
    chosen |= {"fusions": fusions, "corpora": corpora}
    result, parts = EvaluationResult(), []
    with FeatureStore.for_backbone(model.backbone, cache, limit=chosen_limit(None)) as store:
        extractor = FeatureExtractor(model.backbone, store, batch_size=batch_size, workers=workers, progress=progress)
        for one in benchmarks:
            if not any(query.targets for query in one.queries):
                raise ConfigError(
                    f"the targets of {one.name} {one.split} are not published; choose another split, or write a "
                    "submission file with union-eval"
                )
            parts.append(evaluate_benchmark(model, one, extractor, seed, **chosen))
            result += parts[-1]
    return result + average_parts(parts, mean, seed) if mean and len(parts) > 1 else result


def train(  # noqa: PLR0913 - a setting each, all but two with defaults
    data: str | Path | TrainingSet,
    backbone: str | Backbone = "tiny",
    *,
    fusion: str | Mapping[str, Any] = "transagg",
    target: str | Mapping[str, Any] = "residual",
    recipe: Recipe | None = None,
    loss: nn.Module | None = None,
    output_dir: str | Path | None = None,
    root: str | Path | None = None,
    validation: Benchmark | Sequence[Benchmark] = (),
    evaluate: bool = True,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    checkpoint: str | Path | None = None,
    finetune: Literal["none", "text", "image", "both"] = "none",
    projector: Literal["none", "mlp"] = "none",
    preprocess: PreprocessChoice | None = None,
    logger: Literal["csv", "none", "tensorboard", "wandb"] = "csv",
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> IGROTModel:
    """Train the heads on a frozen backbone and evaluate them, as `union-train` does.

    Writes the files of `union-train` into `output_dir`: the model, checkpoints, logs, results and `report.html`. The
    same call again resumes an interrupted run there. Sets the seed of Python, NumPy and torch.

    Args:
        data: `shapes`, `folder`, the name of a public dataset such as `llavasco`, the path of an own folder, or
            triplets already read.
        backbone: Name of a backbone, see `load`, or a backbone.
        fusion: Query head: its name, or its name as `kind` with options, such as `{"kind": "transagg", "layers": 1}`.
        target: Target head, in the same way.
        recipe: Optimizer, schedule and length; the defaults of `Recipe` if None.
        loss: The loss; `BankLoss()` if None.
        output_dir: The run's folder; `outputs/train/<date>/<time>` if None.
        root: Folder of the dataset; by default `$UNION_DATA/<name>`.
        validation: Benchmarks that select the best epoch, and on which the model is evaluated; only with a
            `TrainingSet`. Datasets by name have their own.
        evaluate: Whether to evaluate the model after training.
        seed: Seed of the weights, the order of samples, the random baseline and the bootstrap.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        precision: Numeric precision of the training.
        checkpoint: Trained heads to start from: the folder of a run or model, or a hub repository.
        finetune: Encoders of the backbone that are tuned too, at `recipe.backbone_rate`.
        projector: `mlp` adds a small residual network on image embeddings.
        preprocess: `model` or `pad`, for a backbone given by name, see `load`; None for its usual one.
        logger: Logger of losses and metrics.
        workers: Processes that decode images; chosen by the device if None.
        cache_dir: Folder of the feature store; the default one if None.
        progress: Whether progress bars and results are shown.
        **options: Settings of the dataset, such as `triplets=1000` of `shapes`.

    Returns:
        The model with the weights of the best epoch, in evaluation mode.

    Raises:
        ConfigError: If there is no such dataset, backbone, head or option.
        UnionError: If the data are invalid, or the folder is in use or contains a run of other settings.
    """
    given = {**locals()}
    options = given.pop("options")
    check_choice("precision", precision, PRECISIONS)
    check_choice("finetune", finetune, ("none", "text", "image", "both"))
    check_choice("logger", logger, ("csv", "none", "tensorboard", "wandb"))
    check_count("seed", seed, 0)
    check_count("workers", workers or 0, 0)
    require_logger(logger)
    recipe_settings = [one.key for one in declared(Recipe) if one.key in options]
    if recipe_settings:
        raise ConfigError(
            f"{recipe_settings[0]} is a setting of the recipe; pass recipe=Recipe({recipe_settings[0]}=...)"
        )
    read, dataset = _training_data(data, validation, root, options)
    if read is not None and not evaluate:
        read = replace(read, test=())
    settings = _training_settings(given, dataset, resolve_device(device))
    changed = {name: x for name, x in given.items() if x is not signature(train).parameters[name].default} | options
    call = f"union_igrot.train({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
    launch = Launch("union_igrot.train", call, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    model, _ = run_training(
        settings,
        launch,
        Path("outputs", "train", f"{datetime.now():%Y-%m-%d}", f"{datetime.now():%H-%M-%S-%f}").absolute(),
        resolve_device(device),
        processes=detect_processes(),
        data=read,
        backbone=None if isinstance(backbone, str) else backbone,
        loss=loss,
        evaluate=evaluate,
        shown=progress,
    )
    return model


def _benchmarks(name: str, given: object) -> list[Benchmark]:
    """Return one benchmark or several as a list."""
    several: list[Any] = [given] if isinstance(given, Benchmark) or not isinstance(given, Iterable) else list(given)
    if odd := [one for one in several if not isinstance(one, Benchmark)]:
        raise wrong_type(name, odd[0], "a Benchmark, or several")
    return several


def _training_data(
    data: object, validation: Benchmark | Sequence[Benchmark], root: str | Path | None, options: Mapping[str, Any]
) -> tuple[RunData | None, dict[str, Any]]:
    """Return the data if they are already read, and the settings of the dataset."""
    benchmarks = _benchmarks("validation", validation)
    if not isinstance(data, TrainingSet | str | Path):
        raise wrong_type("data", data, "the name of a dataset, the path of a folder, or a TrainingSet")
    if not isinstance(data, TrainingSet):
        if benchmarks:
            raise ConfigError(f"invalid argument validation: {data} has its own validation data (expected none)")
        return None, data_settings(str(data), root, **options)
    _check_no_options(root, options)
    if not benchmarks:
        raise ConfigError("validation is required with a TrainingSet (expected a benchmark to select the best epoch)")
    digest = hashlib.sha256()
    for one in data.triplets:
        digest.update("|".join(map(str, (image_key(one.image), one.text, image_key(one.target), one.group))).encode())
    hashes = [f"{one.name} {one.split} {one.queries_hash()}" for one in benchmarks]
    return RunData(data, benchmarks, benchmarks), {
        "name": data.name,
        "triplets": digest.hexdigest()[:16],
        "validation": hashes,
    }


def _training_settings(given: Mapping[str, Any], data: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the settings that `union-train` would have."""
    backbone, loss = given["backbone"], given["loss"]
    if not isinstance(loss, nn.Module | None):
        raise wrong_type("loss", loss, "a module, such as InfoNCE()")
    if not isinstance(backbone, str) and given["preprocess"] is not None:
        raise ConfigError("invalid argument preprocess for a backbone that is already built (expected none)")
    if not isinstance(backbone, str | Backbone):
        raise wrong_type("backbone", backbone, "a name or a Backbone; to go on from trained heads use checkpoint=")
    if isinstance(backbone, str) and backbone not in BACKBONES and not backbone.startswith(BACKBONE_PREFIXES):
        raise ConfigError(BACKBONES.unknown(backbone, BACKBONE_FORMS))
    recipe = Recipe() if given["recipe"] is None else given["recipe"]
    if not isinstance(recipe, Recipe):
        raise wrong_type("recipe", recipe, "a Recipe, such as Recipe(epochs=1)")
    for one in declared(Recipe):
        if not one.allows(value := getattr(recipe, one.key)):
            raise ConfigError(f"invalid value for {one.key} of the recipe: {value!r} (expected {one.expected})")
    known = {} if isinstance(backbone, str) else {"name": backbone.name, "fingerprint": backbone.fingerprint()}
    heads = {name: {"kind": given[name]} if isinstance(given[name], str) else dict(given[name]) for name in _HEADS}
    for name, registry in _HEADS.items():
        registry.get(str(heads[name].get("kind")))  # an error if there is none
    accelerator = "gpu" if device.type == "cuda" else device.type
    devices = 1 if device.index is None else [device.index]
    return {
        "model": {"name": backbone, "weights": None}
        | {name: given[name] for name in ("preprocess", "projector", "finetune")}
        | known,
        "data": {name: str(value) if isinstance(value, Path) else value for name, value in data.items()},
        **heads,
        "loss": asdict(BankSettings()) if loss is None else {"module": repr(loss)},
        "recipe": asdict(recipe),
        "precision": {"trainer": PRECISIONS[given["precision"]]},
        "strategy": {"accelerator": accelerator, "devices": devices, "nodes": 1, "name": "auto"},
        "logger": {"name": given["logger"]},
        "seed": given["seed"],
        **{
            name: None if given[name] is None else str(given[name])
            for name in ("output_dir", "cache_dir", "checkpoint")
        },
        "cache_limit": None,
        "progress": given["progress"],
        "features": {"batch_size": 256, "workers": given["workers"], "dtype": "float32", "precision": "float32"},
    }


def _check_no_options(root: object, options: Mapping[str, Any]) -> None:
    if root is not None or options:
        given = ", ".join(["root"] * (root is not None) + sorted(options))
        raise ConfigError(f"invalid argument {given} for data that is already read (expected none)")
