"""The functions of the Python interface that put several packages together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from union_igrot.errors import ConfigError
from union_igrot.evaluation.evaluate import average_parts, evaluate_benchmark
from union_igrot.evaluation.results import EvaluationResult
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import chosen_limit, default_root
from union_igrot.storage.paths import expand_user
from union_igrot.training.data import data_settings, mean_name, read_evaluated
from union_igrot.types import Benchmark


def evaluate(
    model: IGROTModel,
    benchmark: str | Benchmark | Sequence[Benchmark],
    root: str | Path | None = None,
    *,
    seed: int = 0,
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
    if isinstance(benchmark, str):
        settings = data_settings(benchmark, root, **options)
        benchmarks, mean = read_evaluated(settings), mean_name(settings)
    else:
        if root is not None or options:
            given = ", ".join(["root"] * (root is not None) + sorted(options))
            raise ConfigError(f"invalid argument {given} for a benchmark that is already read (expected none)")
        benchmarks, mean = [benchmark] if isinstance(benchmark, Benchmark) else list(benchmark), ""
    cache = default_root() if cache_dir is None else expand_user(cache_dir)
    result, parts = EvaluationResult(), []
    with FeatureStore.for_backbone(model.backbone, cache, limit=chosen_limit(None)) as store:
        extractor = FeatureExtractor(model.backbone, store, batch_size=batch_size, workers=workers, progress=progress)
        for one in benchmarks:
            if not any(query.targets for query in one.queries):
                raise ConfigError(
                    f"the targets of {one.name} {one.split} are not published; choose another split, or write a "
                    "submission file with union-eval"
                )
            parts.append(evaluate_benchmark(model, one, extractor, seed))
            result += parts[-1]
    return result + average_parts(parts, mean, seed) if mean and len(parts) > 1 else result
