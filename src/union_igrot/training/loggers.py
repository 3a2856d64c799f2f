"""Loggers of losses and metrics: CSV files, and TensorBoard or Weights & Biases next to them."""

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from union_igrot.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LOGS = "logs"
"""Folder of all logs below a run's."""
_EXTRAS = ("tensorboard", "wandb")


def require_logger(name: str) -> None:
    """Check that the packages of a logger are installed, without importing them.

    Raises:
        ConfigError: If one is missing; says what to install.
    """
    if name in _EXTRAS and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f'logger={name} needs a package that is not installed; pip install "union-igrot[{name}]", '
            "or choose logger=csv"
        )


@contextmanager
def open_loggers(
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    main: bool = True,
    mode: Literal["offline", "online"] = "offline",
    project: str = "union-igrot",
) -> Iterator[list["Logger"]]:
    """Yield the loggers of a training, and close them at its end.

    CSV files are written with every logger but `none`: the report draws its curves from them.

    Args:
        name: `csv`, `none`, `tensorboard` or `wandb`.
        folder: The run's folder. A resumed run continues the logs in it.
        settings: The settings of the run, which are logged too: nested plain values.
        main: Whether this is rank 0; the other ranks only have the CSV logger, which is silent in them.
        mode: Of Weights & Biases: `offline` or `online`.
        project: Of Weights & Biases.

    Raises:
        ConfigError: If Weights & Biases cannot be reached, or does not know the user.
    """
    from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415 - slow

    if name == "none":
        yield []
        return
    table = CSVLogger(folder, name=LOGS)
    if name == "tensorboard" and main:
        yield [table, _tensorboard(folder, settings)]
    elif name == "wandb" and main:
        with _wandb(folder, settings, mode, project) as run:
            yield [table, run]
    else:
        yield [table]


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> "Logger":
    """Continue the event files of the run; what was logged after the checkpoint is purged and logged again."""
    import torch  # noqa: PLC0415 - slow
    import yaml  # noqa: PLC0415
    from lightning.pytorch.loggers import TensorBoardLogger  # noqa: PLC0415

    last = folder / "checkpoints" / "last.ckpt"
    reached = None
    if last.is_file():
        reached = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    logger = TensorBoardLogger(
        folder / LOGS, name="tensorboard", version="", default_hp_metric=False, purge_step=reached
    )
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).replace("\n", "\n    ")
    logger.experiment.add_text("configuration", f"    {text}", global_step=reached or 0)
    return logger


@contextmanager
def _wandb(
    folder: Path, settings: Mapping[str, Any], mode: Literal["offline", "online"], project: str
) -> Iterator["Logger"]:
    """Continue the run under its id, so that a resumed training is one run there."""
    import wandb  # noqa: PLC0415 - slow
    from lightning.pytorch.loggers import WandbLogger  # noqa: PLC0415

    from union_igrot.storage.files import write_atomic  # noqa: PLC0415
    from union_igrot.terminal import print_line  # noqa: PLC0415

    if mode == "offline":  # reports of its own errors would make outbound requests
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    logs = folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    id_file = logs / "wandb-id"
    if not id_file.is_file():
        write_atomic(id_file, uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=project,
            name=folder.name,
            dir=logs,
            id=id_file.read_text(),
            resume="allow",
            mode=mode,
            config=dict(settings),
            # The terminal belongs to the progress bars; offline, the summary at the end would take pages.
            settings=wandb.Settings(console="off", silent=mode == "offline"),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"logger.mode=online: cannot use Weights & Biases ({reason}); run wandb login, or set logger.mode=offline"
        ) from None
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    code = 1
    try:
        yield WandbLogger(experiment=run)
        code = 0
    finally:
        written = Path(run.dir).parent
        run.finish(exit_code=code)
    if mode == "offline":
        line = f"Weights & Biases: offline run in {written}; to upload it: wandb sync {written}"
        print_line(line, stderr=True)
