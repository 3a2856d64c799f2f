"""Where losses and metrics are written while training: CSV files, and beside them what another product reads.

Knows the products and where each keeps its files below a run's folder. Does not know what is logged.
"""

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from union_igrot.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LOGS = "logs"
"""Folder of all logs below a run's; a run that is begun anew removes it."""
_EXTRAS = ("tensorboard", "wandb")


def require_logger(name: str) -> None:
    """See that the packages of a logger are installed, without importing them.

    Args:
        name: The logger.

    Raises:
        ConfigError: Where one is missing. Says what to install.
    """
    if name in _EXTRAS and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f'logger={name} needs a package that is not installed; pip install "union-igrot[{name}]", '
            "or choose logger=csv"
        )


@contextmanager
def open_loggers(
    wanted: dict[str, Any], folder: Path, settings: dict[str, Any], *, leads: bool = True
) -> Iterator[list["Logger"]]:
    """Return the loggers of a training, and end them with it.

    CSV files are written whichever is chosen, but for `none`: the report draws its curves from them.

    Args:
        wanted: The configuration of the logger.
        folder: The run's folder. A resumed run goes on in the logs that are there.
        settings: What the run is noted with: nested plain values.
        leads: Whether this process writes; the others of a run keep but the CSV logger, which is silent in them.

    Raises:
        ConfigError: Where Weights & Biases cannot be reached, or does not know the user.
    """
    from lightning.pytorch.loggers import CSVLogger

    if wanted["name"] == "none":
        yield []
        return
    table = CSVLogger(folder, name=LOGS)
    if wanted["name"] == "tensorboard" and leads:
        yield [table, _tensorboard(folder, settings)]
    elif wanted["name"] == "wandb" and leads:
        with _wandb(wanted, folder, settings) as run:
            yield [table, run]
    else:
        yield [table]


def _tensorboard(folder: Path, settings: dict[str, Any]) -> "Logger":
    """Go on in the run's one folder of event files; what came after the checkpoint is hidden, and written again."""
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from omegaconf import OmegaConf

    last = folder / "checkpoints" / "last.ckpt"
    reached = None
    if last.is_file():
        reached = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    logger = TensorBoardLogger(
        folder / LOGS, name="tensorboard", version="", default_hp_metric=False, purge_step=reached
    )
    words = OmegaConf.to_yaml(settings).replace("\n", "\n    ")
    logger.experiment.add_text("configuration", f"    {words}", global_step=reached or 0)
    return logger


@contextmanager
def _wandb(wanted: dict[str, Any], folder: Path, settings: dict[str, Any]) -> Iterator["Logger"]:
    """Go on with the run's own number, so that a resumed training is one run there."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from rich.console import Console

    from union_igrot.storage.atomic import write_atomic

    offline = wanted["mode"] == "offline"
    if offline:
        # Its reports of its own errors would look up a host.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    place = folder / LOGS
    place.mkdir(parents=True, exist_ok=True)
    number = place / "wandb-id"
    if not number.is_file():
        write_atomic(number, uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=wanted["project"],
            name=folder.name,
            dir=place,
            id=number.read_text(),
            resume="allow",
            mode=wanted["mode"],
            config=settings,
            # The terminal is the progress bars'; offline, the summary at the end would be pages long.
            settings=wandb.Settings(console="off", silent=offline),
        )
    except wandb.errors.Error as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"logger.mode=online: Weights & Biases cannot be used ({said}); wandb login, or give logger.mode=offline"
        ) from None
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    code = 1
    try:
        yield WandbLogger(experiment=run)
        code = 0
    finally:
        kept = Path(run.dir).parent
        run.finish(exit_code=code)
    if offline:
        line = f"Weights & Biases: the run is kept in {kept}; to send it: wandb sync {kept}"
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
