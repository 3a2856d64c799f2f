"""The last step of a command that found metrics: its `report.html`.

Knows how the command was started and where its configuration lies. Does not know what stands on the page.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from union_igrot.evaluation.evaluate import versions
from union_igrot.images.decode import open_image
from union_igrot.reporting.contact_sheets import Curve
from union_igrot.reporting.examples import SIDE
from union_igrot.reporting.page import Making, write_page
from union_igrot.reporting.page_tables import Asked

PAGE = "report.html"
"""Name of the page in a run's folder."""


def write_run_page(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    asked: Sequence[Asked],
    curves: Mapping[str, Curve],
    card: Mapping[str, Any],
    seed: int,
) -> Path:
    """Write the page of the running command.

    Args:
        folder: The run's folder, which holds its `config.yaml`.
        rows: Result rows of all benchmarks and methods.
        asked: The benchmarks and each method's answers.
        curves: Of the training.
        card: What the model says of its training.
        seed: Seed of chance and of the bootstrap.

    Returns:
        The page.
    """
    config = folder / "config.yaml"
    command = _command(config)
    names = dict.fromkeys(benchmark.name for benchmark, _ in asked)
    making = Making(
        title=f"union-{HydraConfig.get().job.config_name}: {', '.join(names)}",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=command,
        folder=_from_home(Path.cwd()),
        config=config.read_text(encoding="utf-8"),
        card=card,
        versions=versions(),
        seed=seed,
    )
    page = folder / PAGE
    # A photo is decoded at a fraction of its size: small images are all that is shown.
    write_page(page, rows, asked, curves, making, partial(open_image, at_least=SIDE))
    return page


def _from_home(folder: Path) -> str:
    """Return a folder without the name of who works there: the page is made to be sent."""
    with suppress(ValueError, RuntimeError):
        return str(Path("~") / folder.relative_to(Path.home()))
    return str(folder)


def _command(config: Path) -> str:
    """Return the running command as a shell takes it, with the place of public data where they were found by it."""
    hydra = HydraConfig.get()
    said = shlex.join([f"union-{hydra.job.config_name}", *hydra.overrides.task])
    root = OmegaConf.select(OmegaConf.load(config), "data.root", default="")
    place = os.environ.get("UNION_DATA")
    return f"UNION_DATA={shlex.quote(place)} {said}" if root is None and place else said
