"""`union-train`: train the heads, evaluate them, write the results.

Knows the order of the steps. Does not know how any of them is done.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from union_igrot.cli.command import run_command

if TYPE_CHECKING:
    from union_igrot.encode import Encoder
    from union_igrot.model import IGROTModel
    from union_igrot.runfolder import RunFolder


_PLACES = {"output_dir", "cache_dir", "progress"}
"""Settings that say where things lie, not what comes out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-train`."""
    run_command("train", train, argv)


def train(config: DictConfig, fresh: Path) -> None:
    """Train as configured; `fresh` is used where no folder is named and nothing is resumed."""
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from rich.console import Console

    from union_igrot.backbones.build import build_backbone
    from union_igrot.cli import assemble, data
    from union_igrot.cli.results import evaluate_and_report
    from union_igrot.model import IGROTModel
    from union_igrot.report.files import write_text
    from union_igrot.runfolder import identity_of, open_run

    settings = assemble.plain(config)
    deciding = {key: value for key, value in settings.items() if key not in _PLACES}
    chosen = None if config.output_dir is None else Path(config.output_dir).expanduser()
    with open_run(chosen, fresh, identity_of(deciding)) as run:
        where = f"{'going on in' if run.resumed else 'run folder'} {run.path}"
        Console(stderr=True).print(where, highlight=False, markup=False, soft_wrap=True)
        write_text(run.path / "config.yaml", OmegaConf.to_yaml(config))
        if run.stage == "trained":
            model = IGROTModel.load(run.path / "model", build_backbone(config.model.name, config.model.weights))
            encoder = assemble.encoder(config, model.backbone)
        else:
            model, encoder = _fit(config, run)
        whole = data.whole(config.data)
        evaluate_and_report(model, data.tested(config.data), encoder, run.path, config.seed, whole)
        run.reach("done")


def _fit(config: DictConfig, run: "RunFolder") -> "tuple[IGROTModel, Encoder]":
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    from union_igrot.cli import assemble, data
    from union_igrot.datamodule import IGROTDataModule
    from union_igrot.learner import Learner, Machine, Recipe, fit
    from union_igrot.losses import InfoNCE

    # Its notes on hardware and other products; the command says itself what it does.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    samples, validation = data.training(config.data)
    settings = {key: value for key, value in assemble.plain(config).items() if key not in _PLACES}
    card = {
        "data": samples.name,
        "classes": list(samples.classes),
        "samples": len(samples.triplets),
        "skipped": samples.skipped,
    }
    model = assemble.new_model(config, {**card, "config": settings})
    encoder = assemble.encoder(config, model.backbone)
    recipe = assemble.plain(config.recipe)
    batch_size = recipe.pop("batch_size")
    learner = Learner(model, InfoNCE(**assemble.plain(config.loss)), Recipe(**recipe), validation)
    batches = IGROTDataModule(
        samples,
        validation,
        encoder,
        query_tokens=model.fusion.needs_tokens,
        target_tokens=model.target.needs_tokens,
        batch_size=batch_size,
        seed=config.seed,
    )
    where = config.strategy
    machine = Machine(where.accelerator, where.devices, where.nodes, where.name, config.precision.trainer)
    logger = CSVLogger(run.path, name="logs") if config.logger.name == "csv" else False
    best = fit(learner, batches, run.path / "checkpoints", machine=machine, logger=logger, progress=config.progress)
    model.card["best"] = best
    model.save(run.path / "model")
    run.reach("trained")
    return model, encoder
