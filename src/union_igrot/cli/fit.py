"""From a checked configuration to a model with trained heads.

Knows which settings go to which part. Does not know where a run's folder is, or what
becomes of the model.
"""

from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig

from union_igrot.cli import assemble
from union_igrot.cli.loggers import open_loggers
from union_igrot.images.identity import image_identities
from union_igrot.models.model import IGROTModel
from union_igrot.training.data import read_training
from union_igrot.training.datamodule import IGROTDataModule
from union_igrot.training.learner import Learner, Recipe, fit, load_best
from union_igrot.training.losses import InfoNCE
from union_igrot.training.processes import Processes, leave_process_group

PLACES = {"output_dir", "cache_dir", "cache_limit", "progress"}
"""Settings that say where things lie, not what comes out."""
_SIDES: dict[str, tuple[Any, ...]] = {"none": (), "text": ("text",), "image": ("image",), "both": ("image", "text")}


def fit_heads(config: DictConfig, folder: Path, processes: Processes) -> IGROTModel:
    """Train as configured, alone or with the other processes of the run.

    Args:
        config: The checked settings.
        folder: The run's folder; checkpoints and logs go there.
        processes: This process among those of the run.

    Returns:
        The model with the best epoch's weights, in evaluation mode; whole in the first process.
    """
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    samples, validation = read_training(assemble.plain(config.data))
    settings = {key: value for key, value in assemble.plain(config).items() if key not in PLACES}
    card = {
        "data": samples.name,
        "classes": list(samples.classes),
        "samples": len(samples.triplets),
        "skipped": samples.skipped,
    }
    model = assemble.new_model(config, {**card, "config": settings})
    extractor = assemble.extractor(config, model.backbone, shown=processes.is_main)
    recipe = assemble.plain(config.recipe)
    batch_size, checkpointing = recipe.pop("batch_size"), recipe.pop("checkpointing")
    model.tune(_SIDES[config.model.finetune])
    if checkpointing:
        model.backbone.checkpoint_activations()
    learner = Learner(model, InfoNCE(**assemble.plain(config.loss)), Recipe(**recipe), validation)
    batches = IGROTDataModule(
        samples,
        validation,
        extractor,
        query_tokens=model.fusion.needs_tokens,
        target_tokens=model.target.needs_tokens,
        batch_size=batch_size,
        seed=config.seed,
        live=_SIDES[config.model.finetune],
    )
    machine = assemble.machine(config, processes)
    with open_loggers(assemble.plain(config.logger), folder, settings, leads=processes.is_main) as logger:
        best = fit(learner, batches, folder / "checkpoints", machine=machine, logger=logger, progress=config.progress)
    leave_process_group()
    if config.strategy.name.startswith("fsdp") and processes.is_main:
        model = assemble.new_model(config, model.metadata)
        load_best(model, folder / "checkpoints")
        model.tuned = config.model.finetune != "none"
    model.metadata["best"] = best
    model.training_images = image_identities(side for one in samples.triplets for side in (one.image, one.target))
    return model
