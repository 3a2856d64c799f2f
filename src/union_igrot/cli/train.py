"""`union-train`: train the heads, evaluate them, write the results.

Knows the order of the steps. Does not know how any of them is done.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import EXIT_USAGE, run_command
from union_igrot.storage.paths import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.training.processes import Processes


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-train`."""
    run_command("train", train, argv, resumes=True)


def train(config: "DictConfig", fresh: Path) -> Path | None:
    """Train as configured; `fresh` is used where no folder is named and nothing is resumed.

    Returns:
        The run's folder, where this process knows it.
    """
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from union_igrot.cli.loggers import require_logger
    from union_igrot.training.processes import count_processes, detect_processes, launch_processes

    require_logger(config.logger.name)
    processes, where = detect_processes(), config.strategy
    if processes.world == 1:
        count = count_processes(where.accelerator, where.devices, where.nodes)
        if count > 1:
            from hydra.core.hydra_config import HydraConfig

            place = str(fresh).replace("\\", "\\\\").replace("'", "\\'")
            said = [*HydraConfig.get().overrides.task, f"hydra.run.dir='{place}'"]
            launch_processes("union_igrot.cli.train", said, count)
            return None
    if processes.is_main:
        return _lead(config, fresh, processes)
    _follow(config, fresh, processes)
    return None


def _lead(config: "DictConfig", fresh: Path, processes: "Processes") -> Path:
    """Train, evaluate and write: what one process does, or the first of several."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from union_igrot.cli import assemble
    from union_igrot.cli.fit import PLACES, fit_heads
    from union_igrot.cli.results import evaluate_and_report
    from union_igrot.errors import UnionError
    from union_igrot.models.devices import resolve_device
    from union_igrot.models.model import IGROTModel
    from union_igrot.reporting.model_card import write_model_card
    from union_igrot.storage.atomic import write_atomic
    from union_igrot.training.data import mean_name, read_evaluated
    from union_igrot.training.run_folder import identity_of, open_run

    deciding = {key: value for key, value in assemble.plain(config).items() if key not in PLACES}
    chosen = None if config.output_dir is None else expand_user(config.output_dir)
    try:
        run = open_run(chosen, fresh, identity_of(deciding))
    except UnionError:
        processes.broadcast("run", json.dumps(None))
        raise
    with run:
        processes.broadcast("run", json.dumps([str(run.path), run.stage]))
        where = f"{'going on in' if run.resumed else 'run folder'} {run.path}"
        Console(stderr=True).print(where, highlight=False, markup=False, soft_wrap=True)
        write_atomic(run.path / "config.yaml", OmegaConf.to_yaml(config))
        if run.stage == "trained":
            model = IGROTModel.load(run.path / "model", weights=config.model.weights)
        else:
            model = fit_heads(config, run.path, processes)
            model.save(run.path / "model")
            run.reach("trained")
        # Where the training was: what comes from disk, or was in pieces, lies on the CPU.
        model.to(resolve_device("cpu" if config.strategy.accelerator == "cpu" else "auto"))
        # Of its own: the weights of a tuned backbone are others now.
        extractor = assemble.extractor(config, model.backbone)
        data, saved = assemble.plain(config.data), str(run.path / "model")
        evaluate_and_report(
            model, read_evaluated(data), extractor, run.path, config.seed, mean_name(data), checkpoint=saved
        )
        write_model_card(run.path / "model", run.path / "results.json")
        run.reach("done")
        return run.path


def _follow(config: "DictConfig", fresh: Path, processes: "Processes") -> None:
    """Train with the first process, in its folder, and say nothing."""
    from union_igrot.cli.fit import fit_heads
    from union_igrot.errors import UnionError

    told = json.loads(processes.broadcast("run"))
    if told is None:
        raise SystemExit(EXIT_USAGE)
    folder, stage = Path(told[0]), told[1]
    if fresh != folder and fresh.is_dir() and not any(fresh.iterdir()):
        fresh.rmdir()
    if stage == "trained":
        return
    try:
        fit_heads(config, folder, processes)
    except UnionError:
        # The first process meets the same mistake and says so; then this one is ended before it repeats it.
        time.sleep(5)
        raise


if __name__ == "__main__":
    main()
