"""`union-eval`: a trained model, or a backbone alone, on benchmarks next to a random and untrained baselines."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import launch_of, run_command
from union_igrot.cli.config import plain
from union_igrot.errors import ConfigError
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.models.model import IGROTModel


def evaluate_checkpoint(config: "DictConfig", fresh: Path) -> Path:
    """Evaluate as configured; `fresh` is used if no folder is named.

    Returns:
        The folder of the results.
    """
    from union_igrot.experiment import check_writable, evaluate_and_report, open_extractor, report_predictions
    from union_igrot.models.devices import resolve_device
    from union_igrot.storage.files import write_atomic
    from union_igrot.training.data import mean_name, read_evaluated

    if "model" in config:
        config.checkpoint = None  # the default, which does not apply
    settings, launch = plain(config), launch_of(config)
    model, checkpoint = (None, None) if config.predictions is not None else _model(config)
    folder = fresh if config.output_dir is None else expand_user(config.output_dir)
    check_writable(folder)
    # Rankings of other methods are scored without images.
    benchmarks = read_evaluated(settings["data"], check_images=config.predictions is None)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", launch.config)
    if model is None:
        report_predictions(expand_user(config.predictions), benchmarks, folder, launch, config.seed)
        return folder
    model.to(resolve_device(config.device))
    extractor, mean = open_extractor(settings, model.backbone), mean_name(settings["data"])
    evaluate_and_report(
        model,
        benchmarks,
        extractor,
        folder,
        launch,
        config.seed,
        mean,
        checkpoint=checkpoint,
        calibration=config.calibration,
        query_expansion=config.query_expansion,
        fusions=settings["fusions"],
        corpora=[expand_user(path) for path in settings["corpora"]],
    )
    return folder


def _model(config: "DictConfig") -> "tuple[IGROTModel, str | None]":
    """Load trained heads and return where they are from, or a backbone without any."""
    from union_igrot.models.factory import build_backbone
    from union_igrot.models.model import BUNDLED, baseline, load
    from union_igrot.models.registry import names_backbone

    if "model" in config:
        return baseline(build_backbone(config.model.name, config.model.weights, config.model.preprocess), "sum"), None
    if config.checkpoint is None or config.checkpoint in BUNDLED:
        name = config.checkpoint or "tiny"
        return load(name, weights=config.weights), name
    checkpoint = expand_user(config.checkpoint)
    if names_backbone(str(config.checkpoint)):
        raise ConfigError(f"checkpoint={config.checkpoint} has no trained heads; model=... evaluates a backbone alone")
    return load(checkpoint, weights=config.weights), str(config.checkpoint)


main = partial(run_command, "eval", evaluate_checkpoint, resumes=True)
if __name__ == "__main__":
    main()
