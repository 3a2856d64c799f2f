"""Writes the `report.html` of a command that evaluated something."""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from union_igrot.evaluation.evaluate import versions
from union_igrot.evaluation.results import EvaluationResult
from union_igrot.images.decode import open_image
from union_igrot.reporting.charts import Curve
from union_igrot.reporting.examples import SIDE
from union_igrot.reporting.page import Provenance, write_page

PAGE = "report.html"
"""Name of the page in a run's folder."""


def write_run_page(
    folder: Path, result: EvaluationResult, curves: Mapping[str, Curve], card: Mapping[str, Any], seed: int
) -> Path:
    """Write the page of the running command.

    Args:
        folder: The run's folder with its `config.yaml`.
        result: What was evaluated.
        curves: The training curves.
        card: What the model records of its training.
        seed: Seed of chance and of the bootstrap.

    Returns:
        The page.
    """
    config = folder / "config.yaml"
    names = dict.fromkeys(one.benchmark.name for one in result.scored)
    provenance = Provenance(
        title=f"union-{HydraConfig.get().job.config_name}: {', '.join(names)}",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=_command(config),
        folder=_relative_to_home(Path.cwd()),
        config=config.read_text(encoding="utf-8"),
        card=card,
        versions=versions(),
        seed=seed,
    )
    # Only thumbnails are shown, so photos are decoded at a fraction of their size.
    write_page(folder / PAGE, result, curves, provenance, partial(open_image, at_least=SIDE))
    return folder / PAGE


def _relative_to_home(folder: Path) -> str:
    """Return a folder without the user's name, since the page is meant to be shared."""
    with suppress(ValueError, RuntimeError):
        return str(Path("~") / folder.relative_to(Path.home()))
    return str(folder)


def _command(config: Path) -> str:
    """Return the running command for a shell, with `UNION_DATA` if it decided where the data are."""
    hydra = HydraConfig.get()
    command = shlex.join([f"union-{hydra.job.config_name}", *hydra.overrides.task])
    root = OmegaConf.select(OmegaConf.load(config), "data.root", default="")
    data = os.environ.get("UNION_DATA")
    return f"UNION_DATA={shlex.quote(data)} {command}" if root is None and data else command
