"""`union-eval`: a trained model on benchmarks, beside chance and untrained baselines.

Knows the order of the steps. Does not know how any of them is done.
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from union_igrot.cli.command import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-eval`."""
    run_command("eval", evaluate_checkpoint, argv)


def evaluate_checkpoint(config: DictConfig, fresh: Path) -> None:
    """Evaluate as configured; `fresh` is used where no folder is named."""
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from union_igrot.cli import assemble, data
    from union_igrot.cli.results import evaluate_and_report, report_predictions
    from union_igrot.model import load_model
    from union_igrot.report.files import write_text

    folder = fresh if config.output_dir is None else Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    if config.predictions is not None:
        report_predictions(Path(config.predictions).expanduser(), data.tested(config.data), folder, config.seed)
        return
    checkpoint = Path(config.checkpoint).expanduser()
    inner = checkpoint / "model"
    where = config.checkpoint if config.checkpoint == "tiny" else inner if inner.is_dir() else checkpoint
    model = load_model(where, config.weights)
    test = data.tested(config.data)
    encoder = assemble.encoder(config, model.backbone)
    evaluate_and_report(model, test, encoder, folder, config.seed, data.whole(config.data))
