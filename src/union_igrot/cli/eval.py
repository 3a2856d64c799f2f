"""`union-eval`: a trained model, or a backbone alone, on benchmarks beside chance and untrained baselines.

Knows the order of the steps. Does not know how any of them is done.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.errors import ConfigError
from union_igrot.storage.paths import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.models.model import IGROTModel


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-eval`."""
    run_command("eval", evaluate_checkpoint, argv, resumes=True)


def evaluate_checkpoint(config: "DictConfig", fresh: Path) -> Path:
    """Evaluate as configured; `fresh` is used where no folder is named.

    Returns:
        The folder of the results.
    """
    # Heavy imports are delayed so that --help and usage errors are fast.
    from omegaconf import OmegaConf

    from union_igrot.cli import assemble
    from union_igrot.cli.results import evaluate_and_report, report_predictions
    from union_igrot.models.devices import resolve_device
    from union_igrot.storage.atomic import write_atomic
    from union_igrot.training.data import mean_name, read_evaluated

    folder = fresh if config.output_dir is None else expand_user(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error.strerror}); give another") from None
    if "model" in config:
        config.checkpoint = None  # the default, which is not asked
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(config))
    data = assemble.plain(config.data)
    if config.predictions is not None:
        report_predictions(expand_user(config.predictions), read_evaluated(data), folder, config.seed)
        return folder
    model, checkpoint = _model(config)
    model.to(resolve_device(config.device))
    test = read_evaluated(data)
    extractor = assemble.extractor(config, model.backbone)
    whole = mean_name(data)
    evaluate_and_report(model, test, extractor, folder, config.seed, whole, checkpoint=checkpoint)
    return folder


def _model(config: "DictConfig") -> "tuple[IGROTModel, str | None]":
    """Load what is evaluated: trained heads and where they are from, or a backbone without any."""
    from union_igrot.models.factory import build_backbone
    from union_igrot.models.model import baseline, load
    from union_igrot.models.registry import is_backbone

    if "model" in config:
        return baseline(build_backbone(config.model.name, config.model.weights), "sum"), None
    if config.checkpoint in (None, "tiny"):
        return load("tiny", weights=config.weights), "tiny"
    checkpoint = expand_user(config.checkpoint)
    if is_backbone(str(config.checkpoint)) and not checkpoint.is_dir():
        raise ConfigError(f"checkpoint={config.checkpoint} has no trained heads; model=... evaluates a backbone alone")
    return load(checkpoint, weights=config.weights), str(config.checkpoint)
